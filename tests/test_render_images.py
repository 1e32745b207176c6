"""Heat over pictures and sounds: pixel by pixel, and in the terminal."""

import dataclasses
import io
import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import printed
from rich.cells import cell_len
from rich.console import Console
from toy_pictures import classified, corner, explained, grid, heard, patch, seen

from atman_triton.explanation import load
from atman_triton.pictures import Sound
from atman_triton.render import blocks, heat, layout, wording
from atman_triton.render.live import LiveView
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


# The terminal.


def frames(text):
    """The rows within frames that stand side by side, without their edges."""
    rows = [line for line in text.splitlines() if line.startswith("│")]
    return [[part for part in re.split(r"│ *│?", row)[1:] if part] for row in rows]


def cells(text):
    """``[rows, columns, 2, 3]``: the colours of half blocks."""
    block = r"\x1b\[38;2;(\d+);(\d+);(\d+);48;2;(\d+);(\d+);(\d+)m▀\x1b\[0m"
    rows = [re.findall(block, line) for line in text.splitlines() if "▀" in line]
    return np.array(rows, dtype=int).reshape(len(rows), -1, 2, 3)


def test_without_colour_a_picture_is_characters():
    text = printed(corner(), width=42)
    rows = text.splitlines()[2:14]
    assert rows[0] == "┌" + "─" * 40 + "┐"
    assert rows[1:6] == ["│" + "@" * 10 + " " * 30 + "│"] * 5
    assert rows[6:11] == ["│" + " " * 30 + "o" * 10 + "│"] * 5
    assert rows[11] == "└" + "─" * 40 + "┘"
    assert "pictures: ' .:-=+*#%@' from 0 to the strongest, o opposes" in " ".join(text.split())


def test_characters_rise_with_the_strength():
    values = [k / 9 for k in range(10)]
    text = printed(explained(grid((20, 2), 10, 1), [values], sizes=((20, 2),)), width=22)
    assert "│  ..::--==++**##%%@@│" in text.splitlines()


def test_in_colour_two_pixels_stand_in_a_cell():
    shown = cells(printed(corner(), width=40, colour="truecolor"))
    assert shown.shape == (10, 40, 2, 3)  # twice as wide as tall, in square pixels
    warm = shown[..., 0] - shown[..., 2]
    assert (warm[:5, :10] > 100).all()
    assert (warm[5:, 30:] < -30).all()
    assert not warm[5:, :30].any()
    assert not warm[:5, 10:].any()
    units = [patch(0, (0, 0, 4, 1)), patch(0, (0, 1, 4, 1))]
    halves = cells(
        printed(explained(units, [[1.0, -1.0]], sizes=((4, 2),)), width=20, colour="truecolor")
    )
    warm = halves[..., 0] - halves[..., 2]
    assert halves.shape == (5, 20, 2, 3)
    assert (warm[:2] > 100).all()
    assert (warm[2, :, 0] > 100).all()
    assert (warm[2, :, 1] < -30).all()


@pytest.mark.parametrize(
    ("size", "expected"), [((40, 20), (12, 48)), ((20, 40), (24, 24)), ((500, 3), (1, 48))]
)
def test_a_block_picture_is_small_and_keeps_its_shape(size, expected):
    shown = cells(printed(corner(size, 2, 1), width=120, colour="truecolor"))
    assert shown.shape[:2] == expected


def test_several_targets_stand_side_by_side_where_there_is_room():
    wide, narrow = printed(seen(), width=64), printed(seen(), width=30)
    assert re.search(r"\n\ncat   60\.7% +dog   36\.8%\n┌─+┐  ┌─+┐\n", wide)
    assert {len(row) for row in frames(wide)} == {2}
    assert {len(row) for row in frames(narrow)} == {1}
    assert re.search(r"\ncat   60\.7%\n┌─+┐\n(.|\n)*\ndog   36\.8%\n┌", narrow)
    left, right = frames(wide)[0]
    assert left.startswith("@")
    assert right.rstrip().endswith("@")
    assert "branch   p         target, the likeliest first" in wide


def test_one_of_several_targets_has_one_picture(capsys):
    seen().show(branch=1, width=64)
    assert {len(row) for row in frames(capsys.readouterr().out)} == {1}


def test_several_pictures_are_named_and_so_are_their_patches():
    units = [patch(0, (0, 0, 20, 20)), patch(1, (0, 10, 10, 20))]
    text = printed(explained(units, [[1.0, 0.5]], sizes=((40, 20), (10, 30))), width=80)
    assert re.search(r"\nimage 1 +image 2\n┌", text)
    assert "[image 2] patch at 0,10" in text
    assert "Not in the text" not in text


@pytest.mark.parametrize("width", [20, 33, 80])
@pytest.mark.parametrize("colour", [None, "truecolor"])
@pytest.mark.parametrize("what", [seen, heard, corner, classified])
def test_the_width_is_kept(what, colour, width):
    plain = re.sub(r"\x1b\[[0-9;]*m", "", printed(what(), width=width, colour=colour))
    assert max(cell_len(line.rstrip()) for line in plain.splitlines()) <= width


def test_a_sound_is_a_strip_over_time():
    rows = printed(heard(), width=40).splitlines()
    assert rows[2] == "".join(10 * block for block in "▁█▅▁")
    assert rows[3] == "o" * 10 + " " * 10 + "@" * 10
    assert rows[4] == "0         0.5       1         1.5 s"
    text = printed(heard(), width=40, colour="truecolor")
    strip = text.splitlines()[2]
    assert strip.count("48;2;255;142;20m") == 10
    assert strip.index("48;2;109;160;224m") < strip.index("48;2;255;142;20m")
    peak = Sound.of([0.0] * 150 + [1.0] + [0.0] * 249, 200)  # shorter than a column
    assert printed(heard(sound=peak), width=40).splitlines()[2].index("█") == 15
    assert "sound: ' .:-=+*#%@'" in printed(heard())
    assert "1.00–1.50 s" in text


@pytest.mark.parametrize(
    ("seconds", "columns", "expected"),
    [
        (2.0, 40, "0         0.5       1         1.5 s"),
        (30.0, 72, "0           5           10          15          20          25 s"),
        (0.02, 20, "0         0.01 s"),
        (3600.0, 20, "0          2000 s"),
    ],
)
def test_marks_of_time_stand_where_it_is(seconds, columns, expected):
    assert blocks._times(seconds, columns) == expected


def test_saved_pictures_are_printed_alike(tmp_path):
    for explanation in (seen(), heard()):
        explanation.save(tmp_path / "e.json")
        for colour in (None, "truecolor"):
            again = printed(load(tmp_path / "e.json"), colour=colour)
            assert again == printed(explanation, colour=colour)


def test_classes_and_outputs_are_told_apart_in_the_terminal():
    text = printed(classified())
    assert text.startswith("Classes: 2 ")
    assert "branch   p         class, the likeliest first" in text
    assert "POSITIVE\n" not in text.split("branch")[0]
    assert text.rstrip().endswith("toy · 4 units · 2 classes")
    text = printed(classified("logit"))
    assert "branch   logit     class, the highest first\n     0   -0.5      POSITIVE" in text
    assert "relevance, logits" in text
    text = printed(classified("output", ("stars",)))
    assert text.startswith("Output: stars   output = -0.5\n\na ⟦great⟧ film, ⟪slow⟫\n")
    assert "⟦raises⟧ ⟪lowers⟫ the output" in text
    text = printed(classified(answers=("POSITIVE",)))
    assert text.startswith("Class: POSITIVE   p = 0.607\n")
    for other in ("logit", "output"):
        assert not re.search(r"nats|p =|probab", printed(classified(other, ("x",))))


def test_image_controls_are_named_by_their_place():
    control = {"kind": "ImageControl", "left": 0.1, "top": 0.25, "width": 0.3, "height": 0.5}
    control |= {"factor": 0.5, "image": 1}
    units = [patch(0, (0, 0, 1, 1)), patch(1, (0, 0, 1, 1))]
    facts = {"controls": [control]}
    two = explained(units, [[0.0, 0.0]], sizes=((4, 4), (4, 4)), provenance=facts)
    assert wording.settings(two).endswith("controls 10–40% × 25–75% of image 2 ×0.5")
    one = corner(provenance={"controls": [control | {"image": 0}]})
    assert wording.settings(one).endswith("controls 10–40% × 25–75% of the image ×0.5")


def test_sums_of_scores_have_the_unit_of_what_was_scored():
    def said(quantity):
        e = classified(quantity, ("A",))
        units = [dataclasses.replace(unit, effect="path") for unit in e.units]
        together = e.base_logprobs - 1
        whole = dataclasses.replace(
            e, units=units, method="path", together_logprobs=together, postprocessing="square"
        )
        return wording.completeness(whole)

    assert "sum to 1 nats; with all units suppressed the loss rises by 1 (" in said("logprob")
    assert "sum to 1 logits; with all units suppressed the logit falls by 1 (" in said("logit")
    assert "sum to 1; with all units suppressed the output falls by 1 (" in said("output")


@pytest.mark.parametrize("height", [12, 24, 40])
def test_pictures_are_seen_while_an_answer_is_written(height):
    console = Console(file=io.StringIO(), width=60, height=height, color_system=None)
    view = LiveView(console)
    with console.capture() as capture:
        console.print(view.picture(seen(answers=(" cat",))))
    lines = capture.get().splitlines()
    framed = [line for line in lines if line.startswith("│@")]
    assert 1 <= len(framed) <= height // 4
    assert len(lines) < height
    assert "A ⟦" not in capture.get()
    assert any(line.startswith("A picture of a") for line in lines)


# The table.


def test_the_table_says_where_and_when():
    newline = patch(0, (0, 0, 1, 1))
    newline = type(newline)("newline token", (1,), None, None, "prompt", level="patch", image=0)
    both = patch(0, (10, 0, 10, 10))
    both = type(both)(
        "two", (2,), None, None, "prompt", image=0, boxes=((10, 0, 10, 5), (30, 5, 5, 9))
    )
    e = explained([newline, both], [[1.0, 2.0, 0.5]], "word")
    frame = e.to_dataframe()
    assert frame.columns.tolist()[8:] == ["image", "left", "top", "width", "height"]
    assert frame["image"].tolist()[:2] == [0, 0]
    assert frame.loc[1, ["left", "top", "width", "height"]].tolist() == [10, 0, 25, 14]
    assert frame.loc[[0, 2], "left"].isna().all()
    assert frame["image"].isna().tolist() == [False, False, True]
    heard_frame = heard().to_dataframe()
    assert heard_frame.columns.tolist()[8:] == ["start_seconds", "stop_seconds"]
    assert heard_frame.loc[3, ["start_seconds", "stop_seconds"]].tolist() == [1.5, 2.0]
    assert "image" not in classified().to_dataframe()
