"""Heat over pictures and sounds: pixel by pixel, and in the terminal."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_pictures import corner, explained, grid, heard, patch

from atman_triton.render import heat, layout, wording
from atman_triton.render.palette import LIGHT

NAN = float("nan")
COLOURS = (LIGHT.oppose, LIGHT.support)


def hot(units, values, size, shown=None, image=0, **options):
    """``[H, W]`` of units on a picture of this size, shown in another."""
    scores = [[0.0] * len(units)]
    sizes = [size] * (1 + max(unit.image or 0 for unit in units))
    return heat.heat(explained(units, scores, sizes=sizes), values, image, shown or size, **options)


def test_every_pixel_of_a_box_has_its_value():
    units = [patch(0, (0, 0, 2, 1)), patch(0, (2, 0, 2, 1)), patch(0, (0, 1, 4, 2))]
    expected = [[1, 1, -2, -2], [3, 3, 3, 3], [3, 3, 3, 3]]
    assert hot(units, [1.0, -2.0, 3.0], (4, 3)) == pytest.approx(np.array(expected))
    twice = np.repeat(np.repeat(expected, 2, 0), 2, 1)
    assert hot(units, [1.0, -2.0, 3.0], (4, 3), (8, 6)) == pytest.approx(twice)


def test_a_pixel_covered_in_part_has_a_part_of_the_value():
    found = hot([patch(0, (1.5, 0.25, 2, 1))], [4.0], (4, 2))
    assert found == pytest.approx(np.array([[0, 1.5, 3, 1.5], [0, 0.5, 1, 0.5]]))


def test_where_boxes_lie_over_each_other_their_values_are_added():
    whole = patch(0, (0, 0, 2, 1), "image")
    units = [whole, patch(0, (0, 0, 1, 1)), patch(0, (1, 0, 1, 1))]
    assert hot(units, [1.0, 2.0, -1.0], (2, 1)) == pytest.approx(np.array([[3, 0]]))


def test_what_was_not_measured_or_stands_elsewhere_is_absent():
    units = [patch(0, (0, 0, 1, 1)), patch(1, (0, 0, 1, 1)), patch(0, (1, 0, 1, 1))]
    assert hot(units, [1.0, 5.0, NAN], (2, 1)) == pytest.approx(np.array([[1, 0]]))
    assert hot(units, [1.0, 5.0, NAN], (2, 1), image=1) == pytest.approx(np.array([[5, 0]]))
    assert not hot(units, [NAN, 5.0, NAN], (2, 1)).any()
    text = explained([units[0]], [[0.0] * 3], "two words")
    found = heat.heat(text, [1.0, 7.0, 7.0], 0, (40, 20))
    assert found.sum() == pytest.approx(1.0)


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 6),
    st.integers(1, 6),
    st.tuples(st.integers(3, 40), st.integers(3, 40)),
    st.tuples(st.integers(1, 30), st.integers(1, 30)),
    st.randoms(use_true_random=False),
)
def test_softening_keeps_sum_and_sign(columns, rows, size, shown, random):
    units = grid(size, columns, rows)
    values = [random.uniform(-1, 1) for _ in units]
    area = size[0] * size[1] / (shown[0] * shown[1])
    for smooth in (False, True):
        found = hot(units, values, size, shown, smooth=smooth) * area
        exact = sum(v * u.boxes[0][2] * u.boxes[0][3] for u, v in zip(units, values, strict=True))
        assert found.sum() == pytest.approx(exact, abs=1e-9 * size[0] * size[1])
    assert (hot(units, [abs(v) for v in values], size, shown, smooth=True) >= 0).all()


def test_softened_alike_values_stay_as_they_are():
    units = grid((30, 20), 3, 2)
    units[5] = patch(0, (20, 10, 10, 3))  # cut off at the border of a picture
    units.append(patch(0, (20, 13, 10, 7)))
    found = hot(units, [2.0] * 7, (30, 20), (60, 40), smooth=True)
    assert found == pytest.approx(np.full((40, 60), 2.0))


def test_softened_the_middle_of_a_box_keeps_its_value():
    found = hot(grid((90, 30), 3, 1), [0.0, 1.0, 0.0], (90, 30), smooth=True)
    row = found[15]
    assert row[45] == pytest.approx(1.0, abs=2e-3)
    assert row[[29, 30]].mean() == pytest.approx(0.5)
    assert (np.diff(row[15:45]) >= 0).all()
    assert not row[:15].any()
    assert (found == found[0]).all()
    assert row == pytest.approx(row[::-1])


def test_softening_is_of_the_size_of_most_boxes():
    units = [patch(0, (0, 0, 80, 80), "image"), *grid((80, 80), 8, 8)]
    found = hot(units, [0.0, 1.0, *[0.0] * 63], (80, 80), (160, 160), smooth=True)
    assert found[10, 10] == pytest.approx(1.0, abs=5e-3)
    assert not found[:, 30:].any()


def test_a_sound_is_heat_over_time():
    assert heat.timeline(heard(), [-1.0, 0.0, 2.0, NAN], 8).tolist() == [-1, -1, 0, 0, 2, 2, 0, 0]
    assert heat.timeline(heard(), [1.0, 0.0, 0.0, 0.0], 2).tolist() == [0.5, 0.0]
    assert not heat.timeline(heard(), [NAN] * 4, 8).any()


@pytest.mark.parametrize(
    ("size", "room", "expected"),
    [
        ((40, 20), (8, 8), (8, 4)),
        ((20, 40), (8, 8), (4, 8)),
        ((900, 1), (10, 10), (10, 1)),
        ((3, 3), (48, 24), (24, 24)),
    ],
)
def test_a_picture_keeps_its_shape(size, room, expected):
    assert (
        heat.fitted(explained([patch(0, (0, 0, 1, 1))], [[0.0]], sizes=[size]).pictures[0], *room)
        == expected
    )


def test_colours_lie_over_a_picture_without_its_own():
    from PIL import Image

    image = Image.new("RGB", (2, 2), (255, 0, 0))
    image.putpixel((0, 0), (255, 255, 255))
    plain = heat.overlay(image, (2, 2), np.zeros((2, 2)), COLOURS).astype(int)
    assert (plain[..., 0] == plain[..., 2]).all()
    assert plain[0, 0, 0] > plain[1, 1, 0]  # what was lighter still is
    beyond = np.array([[9.0, 1.0], [-1.0, 0.0]])
    assert (
        heat.overlay(image, (2, 2), beyond, COLOURS)
        == heat.overlay(image, (2, 2), np.clip(beyond, -1, 1), COLOURS)
    ).all()
    level = np.array([[1.0, 1.0], [-1.0, 0.5]])
    found = heat.overlay(image, (2, 2), level, COLOURS).astype(int)
    assert found[0, 0].tolist() == pytest.approx(LIGHT.support, abs=25)
    assert found[1, 0, 2] - found[1, 0, 0] > 100
    assert found[0, 1, 0] - found[0, 1, 2] > found[1, 1, 0] - found[1, 1, 2] > 50


def test_the_colours_of_text_and_pictures_are_scaled_together():
    strength = layout.strengths([4.0, -2.0, 1.0])  # two patches and a word
    units = [patch(0, (0, 0, 1, 1)), patch(0, (1, 0, 1, 1))]
    e = explained(units, [[4.0, -2.0, 1.0]], "word", sizes=((2, 1),))
    assert heat.heat(e, strength, 0, (2, 1)).tolist() == [[1.0, -0.5]]


def test_units_are_named_by_their_place():
    units = [patch(0, (7.5, 3.2, 4, 4)), patch(0, (0, 0, 20, 20), "tile"), patch(1, (0, 0, 9, 9))]
    units.append(patch(1, (0, 0, 10, 30), "image", "image 2"))
    e = explained(units, [[0.0] * 4], sizes=((40, 20), (10, 30)))
    names = ["patch at 8,3", "tile at 0,0", "patch at 0,0", "image 2"]
    assert [layout.name(unit) for unit in e.units] == names
    assert [layout.context(e, k) for k in range(4)] == [("", name, "") for name in names]
    assert [layout.in_word(e, k) for k in range(4)] == names
    sources = ["[image 1]", "[image 1]", "[image 2]", ""]
    assert [wording.source(e, k) for k in range(4)] == sources
    assert wording.source(corner(), 0) == ""


def test_drawn_units_have_no_place_in_the_text():
    newline = patch(0, (0, 0, 1, 1))
    newline = type(newline)("newline token", (1,), None, None, "prompt", level="patch", image=0)
    e = explained([patch(0, (0, 0, 1, 1)), newline], [[1.0, 2.0, 3.0]], "word")
    placed = layout.place(e)
    assert placed.text == "word cat\nNot in the text: newline token"
    assert placed.units[0] == (0, 0)
    assert placed.text[slice(*placed.units[1])] == "newline token"
    assert layout.place(heard()).text == " cat"


def test_infinite_values_are_as_strong_as_can_be():
    strength = layout.strengths([math.inf, 1.0])
    units = [patch(0, (0, 0, 1, 1)), patch(0, (1, 0, 1, 1))]
    assert hot(units, strength, (2, 1)).tolist() == [[1.0, 1.0]]
