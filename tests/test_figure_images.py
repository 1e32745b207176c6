"""Figures of pictures, sounds and classes."""

import math

import numpy as np
import pytest
from matplotlib.text import Text
from toy_pictures import classified, corner, explained, grid, heard, patch, seen

from atman_triton.explanation import load


def words(figure):
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def pictures(figure):
    """The axes of pictures: their images have a side that is not a bar's."""
    shown = [axes for axes in figure.axes if axes.images and axes.images[0].get_array().ndim == 3]
    return [axes for axes in shown if axes.images[0].get_array().shape[0] > 1]


def pixels(axes):
    return np.asarray(axes.images[0].get_array()).astype(int)


def warmth(axes):
    """``[H, W]``: how much more red than blue every pixel is."""
    shown = pixels(axes)
    return shown[..., 0] - shown[..., 2]


def drawn(figure):
    """``[H, W, 3]``: the figure as it is written."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].astype(int)


@pytest.mark.parametrize("size", [(40, 20), (20, 40), (300, 100), (7, 5)])
@pytest.mark.parametrize("smooth", [False, True])
def test_a_picture_keeps_its_shape_and_its_corners(size, smooth):
    figure = corner(size).plot(smooth=smooth)
    plain, coloured = pictures(figure)
    for axes in (plain, coloured):
        box = axes.get_window_extent()
        assert box.width / box.height == pytest.approx(size[0] / size[1])
        assert axes.get_xlim() == (0, size[0])
        assert axes.get_ylim() == (size[1], 0)
    assert not warmth(plain).any()
    warm = warmth(coloured)
    rows, columns = warm.shape
    assert warm[rows // 8, columns // 16] > 100
    assert warm[-1 - rows // 8, -1 - columns // 16] < -30
    assert warm[-1 - rows // 8, columns // 16] == warm[rows // 8, -1 - columns // 16] == 0


def test_the_written_figure_has_its_colours_at_the_top_left():
    figure = corner().plot(smooth=False)
    page, box = drawn(figure), pictures(figure)[1].get_window_extent()
    top, left = len(page) - box.y1, box.x0

    def at(across, down):
        red, _, blue = page[round(top + down * box.height), round(left + across * box.width)]
        return red - blue

    assert at(0.1, 0.2) > 100  # the patch at 0,0
    assert at(0.9, 0.8) < -30
    assert at(0.1, 0.8) == at(0.9, 0.2) == 0


def test_patches_keep_their_edges_unless_smooth():
    for smooth in (False, True):
        level = warmth(pictures(corner().plot(smooth=smooth))[1])[5]
        assert (len(set(level.tolist())) == 2) == (not smooth)


def test_the_colour_bar_has_the_numbers_of_the_strongest_unit():
    figure = corner().plot()
    assert {"−2.00", "0", "+2.00 nats"} <= set(words(figure))
    assert "patch at 30,10" in words(figure)


def test_several_targets_stand_side_by_side_each_on_its_own_scale():
    figure = seen().plot()
    plain, cat, dog = pictures(figure)
    assert [axes.get_title("left") for axes in (plain, cat, dog)] == [
        "image",
        "cat   60.7%",
        "dog   36.8%",
    ]
    boxes = [axes.get_position() for axes in (plain, cat, dog)]
    assert boxes[0].x1 < boxes[1].x0 < boxes[1].x1 < boxes[2].x0 < boxes[2].x1 <= 1
    assert len({round(box.y0, 6) for box in boxes}) == 1
    assert {"+1.00 nats", "+0.500 nats"} <= set(words(figure))
    assert (warmth(cat)[5] == warmth(dog)[5, ::-1]).all()
    assert any("its own colour scale, that of its target" in line for line in words(figure))
    assert "p        target" not in words(figure)  # all of them are above


def test_one_of_several_targets_is_drawn_as_if_alone():
    whole = seen()
    for branch in range(2):
        one = pictures(whole.plot(branch=branch))[1]
        assert (pixels(one) == pixels(pictures(whole.branch(branch).plot())[1])).all()
    assert "What supports the answer" in words(whole.plot(branch=1))


def test_of_many_targets_the_likeliest_are_drawn_and_the_others_listed():
    names = [f" {k}" for k in range(10)]
    figure = explained(grid((40, 20), 2, 1), [[1.0, 0.0]] * 10, answers=names).plot()
    titles = [axes.get_title("left") for axes in pictures(figure)]
    assert [title.split()[0] for title in titles] == ["image", *map(str, range(7))]
    assert {"p        target", "0.00674  9"} <= set(words(figure))
    assert figure.get_size_inches()[1] < 14


def test_several_pictures_share_one_scale():
    units = [patch(0, (0, 0, 20, 20)), patch(1, (0, 0, 10, 10)), patch(1, (0, 10, 10, 20))]
    figure = explained(units, [[1.0, 0.5, -2.0]], sizes=((40, 20), (10, 30))).plot(smooth=False)
    shown = pictures(figure)
    assert [axes.get_title("left") for axes in shown] == ["image 1", "image 2", "cat", ""]
    half, quarter = (warmth(axes)[2, 2] for axes in shown[2:])
    assert half == pytest.approx(2 * quarter, abs=2)
    assert {word for word in words(figure) if word.endswith(" nats")} == {
        "+2.00 nats",
        "strongest units, nats",
    }
    assert "[image 2] patch at 0,10" in words(figure)


def test_the_text_below_a_picture_does_not_list_its_patches():
    figure = seen(answers=(" cat",)).plot()
    shown = words(figure)
    assert "picture" in shown
    assert not [word for word in shown if "Not in the text" in word]
    alone = corner(answers=("",), provenance={"classes": [""]}).plot()
    assert len(alone.axes) == 4  # two pictures, a colour bar, bars


def test_a_token_without_a_place_on_the_picture_is_listed():
    unit = patch(0, (0, 0, 10, 10))
    newline = type(unit)("newline token", (1,), None, None, "prompt", level="patch", image=0)
    figure = explained([unit, newline], [[1.0, 2.0]]).plot()
    assert {"Not", "newline"} <= set(words(figure))


def test_unmeasured_patches_are_left_alone():
    e = corner()
    e.suppressed_logprobs[0, 0] = math.nan
    coloured = pictures(e.plot(smooth=False))[1]
    assert (warmth(coloured) <= 0).all()


def test_a_contrast_is_one_picture():
    e = seen()
    e.contrast = True
    figure = e.plot()
    assert [axes.get_title("left") for axes in pictures(figure)] == ["image", "cat rather than dog"]


def test_a_sound_is_drawn_over_time():
    figure = heard().plot()
    axes = figure.axes[0]
    assert axes.get_xlim() == (0, 2)
    colours = np.asarray(axes.images[0].get_array())[0]
    warm = colours[:, 0] - colours[:, 2]
    assert (warm[200:300] > 0.5).all()
    assert (warm[:100] < -0.2).all()
    assert not warm[100:200].any()
    assert not warm[300:].any()
    assert {"seconds", "+2.00 nats", "1.00–1.50 s"} <= set(words(figure))
    assert not [word for word in words(figure) if word.startswith("Not")]


def test_a_saved_explanation_is_drawn_alike(tmp_path):
    for explanation in (seen(), heard()):
        explanation.save(tmp_path / "e.json")
        assert (drawn(load(tmp_path / "e.json").plot()) == drawn(explanation.plot())).all()


def test_classes_and_outputs_have_words_of_their_own():
    shown = words(classified().plot())
    assert {"What supports the classes, on average", "2 classes", "POSITIVE 61%"} <= set(shown)
    assert "class × unit (grey: not measured)" in shown
    shown = words(classified("logit", ("POSITIVE",)).plot())
    assert {"What supports the class", "POSITIVE   (logit = -0.5)"} <= set(shown)
    assert "strongest units, logits" in shown
    assert not [word for word in shown if "[slow]" in word]  # the class is no part of the word
    shown = words(classified("output", ("stars",)).plot())
    assert {"What raises the output", "stars   (output = -0.5)"} <= set(shown)
    assert "strongest units, change of the output" in shown
    assert not [word for word in shown if "nats" in word or "p =" in word]


def test_numbers_of_negative_bars_do_not_run_into_names():
    figure = explained(grid((40, 20), 2, 1), [[-0.000871, 0.0005]]).plot()
    drawn(figure)
    (bars,) = [axes for axes in figure.axes if "strongest" in axes.get_title("left")]
    names = [label.get_window_extent() for label in bars.get_yticklabels()]
    numbers = [text.get_window_extent() for text in bars.texts]
    assert max(box.x1 for box in names) < min(box.x0 for box in numbers)
