"""The figure of an explanation."""

import pytest
from matplotlib.text import Text
from toy_explanations import HOSTILE, explain, explain_several, hierarchical, with_effects

from atman_triton.render import palette, wording

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


def words(figure):
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def test_a_figure_of_several_targets_shows_the_prompt_and_every_target():
    figure = explain_several().plot()
    shown = words(figure)
    assert {"What supports the targets, on average", "3 targets"} <= set(shown)
    assert {"34 dollars 47%", "51 dollars 47%", "no 78%"} <= set(shown)
    assert "target × unit (grey: not measured)" in shown
    assert [text.get_text() for text in figure.axes[0].texts].count("34") == 1  # the prompt's
    assert figure.axes[2].images[0].get_array().shape == (3, 18)


def test_a_figure_of_many_targets_lists_the_likeliest():
    explanation = explain_several(350)
    explanation.base_logprobs[321] = -0.125
    figure = explanation.plot()
    shown = words(figure)
    assert len(figure.axes) == 2  # no matrix
    assert "0.882    321" in shown
    assert "         and 338 more" in shown
    assert figure.get_size_inches()[1] < 20


def test_a_figure_of_one_of_several_targets_is_that_of_it_alone():
    explanation = explain_several()
    assert words(explanation.plot(branch=1)) == words(explanation.branch(1).plot())
    assert words(explanation.plot(target=3)) == words(explanation.branch(1).plot(target=1))
    assert "What supports target token 1" in words(explanation.plot(target=3))
    with pytest.raises(ValueError, match=r"^branch must lie in \[0, 2\], got 3\.$"):
        explanation.plot(branch=3)


def test_a_figure_marks_direct_effects_and_says_what_the_numbers_are():
    scores = {"34": 2.0, "pay": 1.0}
    figure = with_effects(explain(scores=scores), {"pay"}).plot()
    shown = words(figure)
    assert any(
        line.startswith("Scores: total effect, but where a line is dashed") for line in shown
    )
    assert wording.DIFFERENCE in shown
    assert len(figure.axes[0].lines) == 1  # below the box of "pay"
    dashed = [isinstance(bar.get_linestyle(), tuple) for bar in figure.axes[1].patches]
    assert dashed == [False, False, True]  # 34, 34, pay
    plain = explain(scores=scores).plot()
    assert "Scores: total effect." in words(plain)
    assert wording.DIFFERENCE not in words(plain)
    assert not plain.axes[0].lines


def test_a_figure_of_refined_units_is_drawn(tmp_path):
    shown = words(hierarchical().plot(tmp_path / "figure.png"))
    assert any("method hierarchical" in line for line in shown)
