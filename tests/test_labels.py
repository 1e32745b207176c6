"""Which units bear a label, by hand."""

import math

import numpy as np
import pytest
import torch

from atman_triton.evaluate import Example
from atman_triton.evaluate.labels import RASTER, grid, label, labelled, rated
from atman_triton.explanation import Explanation
from atman_triton.images.pointing import coverage
from atman_triton.pictures import Picture
from atman_triton.pieces import Target, Unit

TEXT = "He is 23. Q: How old? A:"
REGION = (0, 9)


def explained(units, text=TEXT, **more):
    target = Target(" x", len(units), 0, len(text), len(text) + 2)
    return Explanation(
        text=text + " x",
        prompt_stop=len(text),
        units=units,
        targets=[target],
        base_logprobs=torch.zeros(1),
        suppressed_logprobs=torch.zeros(1, len(units)),
        **more,
    )


def words(*pieces, text=TEXT):
    units, start = [], 0
    for place, piece in enumerate(pieces):
        units.append(Unit(piece, (place,), start, start + len(piece), "prompt"))
        start += len(piece)
    assert "".join(pieces) == text
    return explained(units, text)


def asked(*labels):
    return Example("one", TEXT, "23", REGION, labels)


def patches(boxes, size, image=0):
    units = [
        Unit("patch", (i,), None, None, "prompt", level="patch", image=image, boxes=(box,))
        for i, box in enumerate(boxes)
    ]
    from PIL import Image

    pictures = [Picture.of(Image.new("RGB", size), 0)] * (image + 1)
    return explained(units, pictures=pictures)


def seen(mask):
    return Example("picture", None, "dog", mask=np.array(mask, bool))


def squares(columns, rows, side=2.0):
    return [(side * c, side * r, side, side) for r in range(rows) for c in range(columns)]


def test_tokens_words_and_sentences_that_touch_the_label_bear_it():
    tokens = words("He", " is", " 2", "3", ".", " Q: How old?", " A:")
    assert rated(tokens, asked((6, 8))) == [0, 1, 2, 3, 4]
    assert label(tokens, asked((6, 8))).tolist() == [0, 0, 1, 1, 0]
    assert label(tokens, asked((0, 2), (6, 8))).tolist() == [1, 0, 1, 1, 0]
    # The space in front of the label is none of it, nor is one at the end of a unit.
    assert label(tokens, asked((5, 8))).tolist() == [0, 0, 1, 1, 0]
    spaced = words("He ", "is ", "23. ", "Q: How old? A:")
    assert label(spaced, asked((6, 8))).tolist() == [0, 0, 1]
    assert label(spaced, asked((5, 8))).tolist() == [0, 0, 1]
    sentences = words("He is 23. ", "Q: How old? ", "A:")
    assert label(sentences, asked((6, 8))).tolist() == [1]


def test_a_unit_that_reaches_out_of_the_region_counts_and_one_behind_does_not():
    across = words("He", " is", " 23. Q:", " How old? A:")
    assert rated(across, asked((6, 8))) == [0, 1, 2]
    only_space = words("He is 23.", " Q: How old? A:")
    assert rated(only_space, asked((6, 8))) == [0]


def test_units_of_the_target_and_without_a_place_are_not_rated():
    units = [
        Unit("<s>", (0,), None, None, "prompt"),
        Unit("He is 23.", (1,), 0, 9, "prompt"),
        Unit(" x", (2,), len(TEXT), len(TEXT) + 1, "target", branch=0),
    ]
    assert rated(explained(units), asked((6, 8))) == [1]


def test_what_cannot_be_labelled_is_said():
    tokens = words("He is", " 23. Q: How old? A:")
    found = labelled(tokens, asked((5, 6)))
    assert found.values.tolist() == [0, 0]
    assert found.notes == ["no label: no rated unit overlaps the label"]
    assert labelled(tokens, asked((6, 8))).notes == []
    behind = explained([Unit("A:", (0,), 22, 24, "prompt")])
    with pytest.raises(ValueError, match=r"'one' with units there, but no unit stands in .* 0:9"):
        rated(behind, asked((6, 8)))
    with pytest.raises(ValueError, match="'bare' has neither"):
        rated(tokens, Example("bare", TEXT, "23"))
    with pytest.raises(ValueError, match="no unit has a place on the picture"):
        rated(tokens, seen(np.ones((2, 2))))


def test_a_patch_bears_the_label_from_half_of_it_on():
    picture = patches(squares(2, 1), (4, 2))
    half = [[1, 0, 0, 0], [1, 0, 0, 0]]
    assert labelled(picture, seen(half)).values.tolist() == [1, 0]
    assert labelled(picture, seen(half)).notes == []
    less = [[1, 0, 1, 1], [0, 0, 1, 1]]
    assert labelled(picture, seen(less)).values.tolist() == [0, 1]


def test_without_a_half_covered_patch_the_most_covered_one_bears_it_and_ties_share():
    picture = patches(squares(3, 1), (6, 2))
    mask = np.zeros((2, 6))
    mask[0, 2] = 1
    found = labelled(picture, seen(mask))
    assert found.values.tolist() == [0, 1, 0]
    assert found.notes == ["no unit is covered by half: the most covered is the label"]
    mask[0, 5] = 1
    found = labelled(picture, seen(mask))
    assert found.values.tolist() == [0, 1, 1]
    assert found.notes == [
        "no unit is covered by half: the 2 that are covered equally are the label"
    ]
    nothing = labelled(picture, seen(np.zeros((2, 6))))
    assert nothing.values.sum() == 0 and nothing.notes == ["no label: the mask covers no unit"]


def test_patches_become_rows_and_columns():
    picture = patches(squares(3, 2), (6, 4))
    values = torch.arange(6.0)
    assert grid(picture, seen(np.ones((4, 6))), values).tolist() == [[0, 1, 2], [3, 4, 5]]
    turned = patches(squares(3, 2)[::-1], (6, 4))  # order of units does not matter
    assert grid(turned, seen(np.ones((4, 6))), values).tolist() == [[5, 4, 3], [2, 1, 0]]
    values[1] = math.nan
    assert math.isnan(grid(picture, seen(np.ones((4, 6))), values)[0, 1])
    with pytest.raises(ValueError, match=r"values must have shape \[6\].*got \[2\]"):
        grid(picture, seen(np.ones((4, 6))), torch.ones(2))
    with pytest.raises(ValueError, match="'one' has no mask"):
        grid(words(TEXT), asked((6, 8)), torch.ones(1))


def test_what_forms_no_grid_is_averaged_by_area():
    # An overview of the whole and, above it, two crops: every place is seen twice.
    boxes = [(0.0, 0.0, 24.0, 24.0), (0.0, 0.0, 12.0, 24.0), (12.0, 0.0, 12.0, 24.0)]
    picture = patches(boxes, (24, 24))
    example = seen(np.ones((24, 24)))
    found = grid(picture, example, torch.tensor([1.0, 3.0, 5.0]))
    assert found.shape == (RASTER, RASTER)
    assert (found[:, :6] == 2).all() and (found[:, 6:] == 3).all()
    both = patches([boxes[0], boxes[2]], (24, 24))  # begin where cells of a grid would
    found = grid(both, example, torch.tensor([1.0, 5.0]))
    assert (found[:, :6] == 1).all() and (found[:, 6:] == 3).all()
    absent = grid(picture, example, torch.tensor([math.nan, 3.0, math.nan]))
    assert (absent[:, :6] == 3).all() and absent[:, 6:].isnan().all()
    # A gap and a smaller unit: a third of the second column of cells is covered by neither.
    uneven = patches(
        [(0.0, 0.0, 3.0, 24.0), (4.0, 0.0, 20.0, 24.0), (0.0, 0.0, 1.0, 1.0)], (24, 24)
    )
    found = grid(uneven, example, torch.tensor([1.0, 2.0, 5.0]))
    assert found[1, 0] == 1 and found[1, 1] == 1 and found[1, 2] == 2
    assert found[0, 0] == pytest.approx((4 * 1 + 1 * 5) / 5)


def test_many_units_are_covered_as_each_alone():
    mask = torch.from_numpy(np.random.default_rng(0).random((9, 7)) < 0.4)
    boxes = [((0.0, 0.0, 3.5, 4.2), (5.0, 1.0, 2.0, 8.0)), ((1.25, 2.5, 3.0, 3.0),)]
    units = [
        Unit("p", (0,), None, None, "prompt", level="patch", image=0, boxes=own) for own in boxes
    ]
    fine = mask.double().repeat_interleave(20, 0).repeat_interleave(20, 1)  # edges are at 1/20
    for own, found in zip(boxes, coverage(units, mask), strict=True):
        parts = [
            fine[round(top * 20) : round((top + h) * 20), round(left * 20) : round((left + w) * 20)]
            for left, top, w, h in own
        ]
        wanted = sum(part.sum() for part in parts) / sum(part.numel() for part in parts)
        assert float(found) == pytest.approx(float(wanted))
