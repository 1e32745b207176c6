"""The figure of an explanation."""

import pytest
from matplotlib.text import Text
from toy_explanations import HOSTILE, explain

from atman_triton.render import palette

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_a_figure_is_returned_and_written(tmp_path, ending):
    path = tmp_path / f"figure.{ending}"
    figure = explain().plot(path)
    start = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[ending]
    assert path.read_bytes().startswith(start)
    words = " ".join(text.get_text() for text in figure.findobj(Text))
    assert "34 dollars   (p = 0.472)" in words
    assert "target token × unit" in words


def test_hostile_text_and_missing_glyphs_do_not_warn(tmp_path):
    explain(HOSTILE + "\U00013000\ue000\u0e01", HOSTILE).plot(tmp_path / "figure.png")


def test_dollar_signs_are_no_formulas(tmp_path):
    formula = "$\\nonsense{$"
    explain(f"{formula} a", f"{formula} b", model=formula).plot(tmp_path / "figure.png")


def test_a_figure_of_one_target_and_a_long_text():
    prompt = (
        "\n".join(f"line {index} says nothing new" for index in range(125)) + "\nthe pay is 3400"
    )
    figure = explain(prompt, " 3400", scores={"3400": 1.0}).plot(target=0)
    axes = figure.axes
    assert len(axes) == 2  # no matrix
    assert len(axes[1].patches) == 3  # the others tell nothing
    shown = [text.get_text() for text in axes[0].texts]
    assert "⋯" in shown
    assert shown.count("3400") == 2
    assert figure.get_size_inches()[1] < 20


def test_the_boxes_of_the_figure_follow_the_strengths():
    figure = explain(scores={"34": 2.0, "51": -1.0}).plot()
    colours = [patch.get_facecolor()[:3] for patch in figure.axes[0].patches]
    expected = [
        tuple(channel / 255 for channel in colour)
        for colour in (
            palette.LIGHT.support,
            palette.mix((255, 255, 255), palette.LIGHT.oppose, 0.5),
            palette.LIGHT.support,
        )
    ]
    assert colours == [pytest.approx(colour) for colour in expected]


def test_a_figure_of_a_missing_target_is_refused():
    with pytest.raises(ValueError, match=r"^target must lie in \[0, 1\], got 5\.$"):
        explain().plot(target=5)
