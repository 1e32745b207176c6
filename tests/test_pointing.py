"""How much relevance stands inside of a mask, by hand."""

import math

import pytest
import torch

from atman_triton.images.pointing import covered, share_inside
from atman_triton.pieces import Unit

LEFT = torch.tensor([[True, False, False, False], [True, False, False, False]])


def unit(*boxes, image=0):
    return Unit("patch", (0,), None, None, "prompt", level="patch", image=image, boxes=boxes)


def test_a_box_counts_by_the_pixels_that_it_covers():
    assert covered(unit((0.0, 0.0, 1.0, 2.0)), LEFT) == 1
    assert covered(unit((0.0, 0.0, 2.0, 1.0)), LEFT) == 0.5
    assert covered(unit((0.5, 0.0, 2.0, 2.0)), LEFT) == 0.25
    assert covered(unit((0.0, 0.0, 1.0, 1.0), (2.0, 0.0, 1.0, 2.0)), LEFT) == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="mask must have the size of the picture, but patch ends"):
        covered(unit((3.0, 0.0, 2.0, 2.0)), LEFT)


def test_only_positive_relevance_on_the_picture_is_shared_out():
    units = [
        unit((0.0, 0.0, 2.0, 2.0)),  # half inside
        unit((2.0, 0.0, 2.0, 2.0)),
        unit((0.0, 0.0, 1.0, 1.0)),  # opposes
        unit(),  # has no place
        unit((0.0, 0.0, 1.0, 1.0), image=1),
        Unit("word", (9,), 0, 4, "prompt"),
    ]
    values = torch.tensor([2.0, 3.0, -5.0, 7.0, 7.0, 7.0])
    assert share_inside(units, values, LEFT) == pytest.approx(1 / 5)
    assert share_inside(units, values, LEFT, image=1) == 1
    assert math.isnan(share_inside(units, -values.abs(), LEFT))
    absent = torch.tensor([math.nan, 3.0, -5.0, 7.0, 7.0, 7.0])
    assert share_inside(units, absent, LEFT) == 0
