"""What every picture of an explanation needs, and what the terminal shows."""

import dataclasses
import itertools
import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import Page, printed
from rich.cells import cell_len
from toy_explanations import (
    CONTRACT,
    HOSTILE,
    explain,
    explain_several,
    hierarchical,
    merge,
    with_effects,
)

from atman_triton.explanation import Explanation, Target, Unit
from atman_triton.render import layout, palette, wording

NAN, INF = float("nan"), float("inf")


# Cutting and breaking text.


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 12),
    st.lists(st.lists(st.none() | st.tuples(st.integers(-1, 13), st.integers(-1, 13)), max_size=4)),
)
def test_pieces_cover_the_text_once_and_know_their_spans(length, span_lists):
    pieces = layout.cut(length, *span_lists)
    assert "".join("x" * (piece.stop - piece.start) for piece in pieces) == "x" * length
    for before, after in itertools.pairwise(pieces):
        assert before.stop == after.start
    for piece in pieces:
        for cover, spans in zip(piece.covers, span_lists, strict=True):
            for character in range(piece.start, piece.stop):
                inside = [i for i, s in enumerate(spans) if s and s[0] <= character < s[1]]
                assert list(cover) == inside


@settings(deadline=None, max_examples=60)
@given(st.text(alphabet="ab \n漢🙂\u0301", max_size=60), st.integers(3, 12))
def test_lines_hold_the_whole_text_and_fit(text, width):
    spans = layout.lines(text, width)
    assert "".join(text[start:stop] for start, stop in spans) == text
    for start, stop in spans:
        assert "\n" not in text[start : stop - 1]
        row = text[start:stop].rstrip(" \n")
        assert sum(map(layout.get_character_cell_size, row)) <= width


def test_lines_break_after_spaces():
    text = "aaa bb cccccccc d"
    assert [text[a:b] for a, b in layout.lines(text, 7)] == ["aaa bb ", "ccccccc", "c d"]


def test_control_characters_are_made_visible():
    text = "a\x00\x1b[1m\tb\n\r\x7f\x85\u202e\ud800"
    assert layout.printable(text) == "a␀␛[1m⇥b\n␍␡\ufffd\ufffd\ufffd"
    assert len(layout.printable(HOSTILE)) == len(HOSTILE)


@pytest.mark.parametrize(
    ("text", "shown"),
    [(" word", "word"), ("  word", "␣␣word"), ("a ", "a␣"), ("\n", "↵"), ("  ", "␣␣"), ("", "∅")],
)
def test_a_unit_is_shown_on_one_line(text, shown):
    assert layout.visible(text) == shown


def test_strengths_are_scaled_by_the_largest_magnitude():
    assert layout.strengths([1.0, -4.0, 0.0, INF, -INF]) == [0.25, -1.0, 0.0, 1.0, -1.0]
    assert layout.strengths([0.0, 0.0]) == [0.0, 0.0]
    assert math.isnan(layout.strengths([NAN, 1.0])[0])
    assert layout.strongest([0.2, -0.5, NAN], (0, 1, 2)) == -0.5
    assert layout.strongest([NAN], (0,)) == 0.0


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ([12.3456, -0.001, NAN], ["+12.3", "0.0", "–"]),
        ([0.01234, -0.00567, INF], ["+0.0123", "−0.0057", "+∞"]),
        ([0.0, -INF], ["0.00", "−∞"]),
    ],
)
def test_numbers_have_the_digits_of_the_largest(values, shown):
    digits = wording.decimals(values)
    assert [wording.signed(value, digits) for value in values] == shown


def test_context_is_cut_at_words():
    explanation = explain()
    unit = [u.text for u in explanation.units].index(" Overtime")
    assert layout.context(explanation, unit, 12) == ("…an hour. ", "Overtime", " is 51…")
    assert layout.context(explanation, 0, 9) == ("", "The", " pay is…")


def test_a_part_of_a_word_is_shown_in_it():
    explanation = explain("the normal pay")
    parts = [("n", 4, 5), ("orm", 5, 8), ("al", 8, 10), (" pay", 10, 14)]
    explanation.units[1:3] = [Unit(text, (1,), a, b, "prompt") for text, a, b in parts]
    shown = [layout.in_word(explanation, unit) for unit in range(5)]
    assert shown == ["the", "[n]ormal", "n[orm]al", "norm[al]", "pay"]


def test_long_texts_are_elided_around_marks():
    marked = [index == 20 for index in range(40)]
    assert layout.elide(marked, 40) == list(range(40))
    assert layout.elide(marked, 39) == [0, 1, None, 19, 20, 21, None, 36, 37, 38, 39]


def test_of_too_many_marks_the_largest_are_kept():
    marked = [0.5] * 40
    marked[10], marked[30] = 0.75, 1.0
    shown = [0, 1, None, 9, 10, 11, None, 29, 30, 31, None, 36, 37, 38, 39]
    assert layout.elide(marked, 12) == shown
    assert layout.elide(marked, 11) == [*shown[:3], *shown[7:]]
    rows = [[layout.Run("a", 0, 0.25), layout.Run("b", 1, -0.5)], [layout.Run("c", 2, 0.25)], []]
    assert layout.notable(rows, 0.35) == [0.5, 0.0, 0.0]


def test_a_text_that_matters_everywhere_stays_short():
    words = [f"w{index}" for index in range(2000)]
    explanation = explain(" ".join(words), scores=dict.fromkeys(words, 1.0))
    assert len(printed(explanation).splitlines()) < 90
    assert explanation.plot().get_size_inches()[1] < 20


def test_units_without_a_place_stand_behind_the_text():
    explanation = Explanation(
        text="ab",
        prompt_stop=2,
        units=[
            Unit("a", (0,), 0, 1, "prompt"),
            Unit("\ufffd", (1,), None, None, "prompt"),
            Unit("", (2,), 1, 1, "prompt"),
        ],
        targets=[Target("x", 3, 1, None, None)],
        base_logprobs=torch.zeros(1),
        suppressed_logprobs=-torch.ones(1, 3),
    )
    placed = layout.place(explanation)
    assert placed.text == "ab\nNot in the text: \ufffd ∅"
    assert [placed.text[start:stop] for start, stop in placed.units] == ["a", "\ufffd", "∅"]
    rows = layout.heat_lines(explanation, [1.0, -1.0, 0.5], 80)
    assert [(run.text, run.strength) for run in rows[1] if run.strength] == [
        ("\ufffd", -1.0),
        ("∅", 0.5),
    ]
    page = Page(explanation.to_html())
    assert page.text == placed.text
    assert explanation.answer in printed(explanation)


def test_settings_name_the_folder_and_not_the_path():
    assert wording.settings(explain(model="/home/me/models/reader", layers=[0, 2])) == (
        "models/reader · preset default · mode min_shift · factor 0.1 · layers 0,2 · "
        "17 units · 2 target tokens (mean) · 18 runs · 0.5 s"
    )
    assert wording.settings(explain(model="org/name")).startswith("org/name · ")


# Colours.


@pytest.mark.parametrize("theme", [palette.LIGHT, palette.DARK], ids=["light", "dark"])
def test_text_keeps_its_contrast_on_every_colour(theme):
    for colour in (theme.support, theme.oppose, *theme.overlays):
        for opacity in range(21):
            back = palette.mix(theme.paper, colour, opacity / 20)
            assert palette.contrast(theme.ink, back) >= 4.5
    for back in (theme.paper, theme.panel):
        assert palette.contrast(theme.ink, back) >= 7
        assert palette.contrast(theme.faint, back) >= 4.5
        assert palette.contrast(theme.accent, back) >= 4.5


def test_contrast_is_that_of_wcag():
    assert palette.contrast((0, 0, 0), (255, 255, 255)) == pytest.approx(21)
    assert palette.contrast((119, 119, 119), (255, 255, 255)) == pytest.approx(4.48, abs=0.005)


# The terminal.


def test_without_colour_strong_units_stand_in_brackets():
    text = printed(explain(CONTRACT, scores={"34": 2.0, "pay": 1.0, "51": -1.0}))
    assert "The ⟦pay⟧ is ⟦34⟧ dollars an hour. Overtime is ⟪51⟫ dollars." in text
    assert "\x1b" not in text
    assert "Answer: 34 dollars   p = 0.472" in text
    assert re.search(r"\n +1  █{14} +\+2\.00  The pay is 34 dollars an…", text)
    assert re.search(r"\n +17  █{7} +−1\.00 .* 51 dollars", text)
    assert "Left out: <s> (special token)" in text
    assert "were not measured" not in text
    assert text.rstrip().endswith("(mean) · 18 runs · 0.5 s")


def test_with_colour_the_strongest_unit_is_coloured():
    text = printed(explain(scores={"34": 2.0, "51": -2.0, "pay": 0.3}), colour="truecolor")
    assert "\x1b[38;2;0;0;0;48;2;255;142;20m34\x1b[0m" in text
    assert "\x1b[38;2;0;0;0;48;2;92;164;255m51\x1b[0m" in text
    assert re.search(r"\x1b\[4;38;2;184;98;0mpay\x1b\[0m", text)
    assert "⟦" not in text


def test_colours_of_the_terminal_are_readable():
    for colour in (palette.SUPPORT, palette.OPPOSE):
        for opacity in range(21):
            back = palette.mix(palette.GREY, colour, opacity / 20)
            assert palette.contrast((0, 0, 0), back) >= 4.5
    for ink in (palette.SUPPORT_INK, palette.OPPOSE_INK):
        for back in ((0, 0, 0), (255, 255, 255)):
            assert palette.contrast(ink, back) >= 4


@pytest.mark.parametrize("colour", [None, "truecolor"])
def test_hostile_text_is_only_text_in_the_terminal(colour):
    text = printed(explain(HOSTILE, HOSTILE), colour=colour, width=1000)
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    assert "\x1b" not in plain
    assert "[bold]markup[/bold] :smile:" in plain
    assert "␛[31mred \ufffd␀⇥" in plain


@pytest.mark.parametrize("width", [20, 33, 80])
def test_lines_stay_within_the_width(width):
    prompt = "漢字かな交じり文を 折り返す words 🙂 " * 6
    text = printed(explain(prompt, scores={"words": 1.0}), width=width)
    assert max(cell_len(line.rstrip()) for line in text.splitlines()) <= width


def test_the_list_follows_target_and_top_k():
    explanation = explain()
    text = printed(explanation, target=1, top_k=2)
    assert "Target token 1: dollars   p = 0.607" in text
    assert len(re.findall(r"^ +\d+  █", text, re.MULTILINE)) == 2
    assert "score, nats" in text


def listed(explanation, **options):
    return len(re.findall(r"^ +\d+  █", printed(explanation, **options), re.MULTILINE))


def test_the_list_leaves_out_what_tells_nothing():
    scores = {"34": 2.0, "pay": 0.03, "is": 0.019, "an": 0.001, "The": 0.001, "A:": 0.001}
    assert listed(explain(scores=scores)) == 3
    assert listed(explain(scores=scores), top_k=5) == 5
    assert listed(explain(scores={"34": 2.0, "an": 0.001, "The": 0.001})) == 3


def test_show_prints_to_standard_output(capsys):
    explain().show(width=70, top_k=1)
    captured = capsys.readouterr()
    assert "Answer: 34 dollars" in captured.out
    assert captured.err == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 0}, "top_k must be at least 1, got 0."),
        ({"width": 19}, "width must be at least 20, got 19."),
        ({"target": 2}, "target must lie in [0, 1], got 2."),
    ],
)
def test_show_refuses_bad_arguments(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        explain().show(**options)


def test_a_long_text_is_cut_down_to_what_matters():
    prompt = "nothing to see here at all\n" * 300 + "the key is 34\n" + "more of nothing\n" * 300
    lines = printed(explain(prompt, scores={"34": 1.0})).splitlines()
    assert len(lines) < 40
    assert "the key is ⟦34⟧" in lines
    assert lines.count("⋯") == 2


def test_nothing_measured_and_nothing_supporting_can_be_shown():
    explanation = explain(scores={})
    assert "no unit supports the answer" in printed(explanation)
    explanation.suppressed_logprobs.fill_(NAN)
    text = printed(explanation)
    assert "were not measured" in text
    assert Page(explanation.to_html()).text == explanation.text


# Several targets, direct effects, larger units.

DIRECT = "direct effect: only the answer's own rows are manipulated"


def test_the_overview_of_several_targets_shows_the_prompt():
    text = printed(explain_several())
    assert text.startswith("Targets: 3   the numbers are their mean; branch=k shows one\n")
    assert "⟦Overtime⟧ is ⟦51⟧ dollars.\nQ: Which pay? A:\n\nrank" in text
    assert "supports⟧ ⟪opposes⟫ the answer · only the prompt is shown" in text
    listed = re.findall(r"^ +(\d+)   ([\d.]+) +(.*)$", text, re.MULTILINE)
    assert listed == [
        ("2", "0.779", "no"),
        ("0", "0.472", "34 dollars"),
        ("1", "0.472", "51 dollars"),
    ]
    assert "18 units · 3 targets · 5 target tokens (mean)" in " ".join(text.split())


def test_units_of_a_target_take_no_part_in_the_overview():
    explanation = explain_several()
    assert explanation.relevance.max() == 2.0  # of a target's own unit
    seen = layout.in_sight(explanation)
    assert [math.isnan(value) for value in seen] == [u.part == "target" for u in explanation.units]
    strong = {
        run.text.strip()
        for row in layout.heat_lines(explanation, seen, 80)
        for run in row
        if run.strength == 1.0
    }
    assert strong == {"34", "51"}
    assert layout.in_sight(explanation, 1)[3] == 2.0
    assert layout.in_sight(explain()) == pytest.approx(explain().relevance.tolist(), nan_ok=True)


def test_of_many_targets_the_likeliest_are_listed():
    explanation = explain_several(30)
    explanation.base_logprobs[17] = -0.125
    lines = printed(explanation).splitlines()
    start = lines.index("branch   p         target, the likeliest first")
    assert lines[start + 1].split() == ["17", "0.882", "17"]
    assert lines[start + 11].strip() == "and 20 more"


def test_one_of_several_targets_is_shown_as_alone(capsys):
    explanation = explain_several()

    def shown(explanation, **options):
        explanation.show(width=80, **options)
        return capsys.readouterr().out

    assert shown(explanation, branch=1) == shown(explanation.branch(1))
    assert shown(explanation, target=3) == shown(explanation.branch(1), target=1)
    assert "Answer: 51 dollars" in shown(explanation, branch=1)
    assert "Target token 1: dollars" in shown(explanation, target=3)
    single = explain()
    assert shown(single, branch=0) == shown(single)
    with pytest.raises(ValueError, match=r"^branch must lie in \[0, 2\], got 3\.$"):
        explanation.show(branch=3)
    with pytest.raises(ValueError, match=r"^give one of target \(a target token\), branch"):
        explanation.show(branch=1, target=2)


@pytest.mark.parametrize("which", [layout.context, layout.in_word])
def test_a_unit_stands_behind_the_prompt_and_not_behind_another_target(which):
    explanation = merge([explain(answer=text) for text in ("yes now", "no never")])
    unit = next(i for i, u in enumerate(explanation.units) if u.branch == 1)
    alone = explanation.branch(1)
    assert which(explanation, unit, 12) == which(alone, len(alone.units) - 1, 12)
    last = next(i for i, u in enumerate(explanation.units) if u.branch == 0) - 1
    assert "yes" not in "".join(which(explanation, last, 12))


def test_units_without_a_place_stand_behind_the_prompt_of_several_targets():
    explanation = explain_several()
    units = [dataclasses.replace(u, start=None, stop=None) for u in explanation.units]
    units = [units[0], *explanation.units[1:-1], units[-1]]
    explanation = dataclasses.replace(explanation, units=units)
    placed = layout.place(explanation, overview=True)
    assert placed.text == CONTRACT + "\nNot in the text: The"
    assert placed.text[slice(*placed.units[0])] == "The"
    assert placed.units[-1] == (0, 0)
    assert set(placed.targets) == {None}


def mixed():
    scores = {"34": 2.0, "pay": 1.5, "dollars": 0.25, "51": -1.0}
    return with_effects(explain(scores=scores), {"pay", "51", "dollars"})


def test_direct_effects_among_total_ones_are_marked_without_colour():
    text = printed(mixed())
    assert "The ⟦pay⟧° is ⟦34⟧ dollars an hour. Overtime is ⟪51⟫° dollars." in text
    assert re.search(r" \+2\.00   The pay is 34", text)
    assert re.search(r" \+1\.50°  The pay is", text)
    notes = " ".join(text.split())
    assert f"Scores: total effect, but where marked ° a {DIRECT}." in notes
    assert wording.DIFFERENCE in notes
    assert "· method hybrid ·" in notes


def test_direct_effects_among_total_ones_are_in_italics():
    text = printed(mixed(), colour="truecolor", width=200)
    assert re.search(r"\x1b\[3;38;2;0;0;0;48;2;[\d;]+mpay\x1b", text)
    assert re.search(r"\x1b\[3;4;38;2;[\d;]+m dollars\x1b", text)
    assert re.search(r"\x1b\[38;2;0;0;0;48;2;[\d;]+m34\x1b", text)
    assert "where in italics or with ° a direct effect" in text


def test_what_the_numbers_are_is_said():
    direct = explain()
    units = [dataclasses.replace(unit, effect="direct") for unit in direct.units]
    direct = dataclasses.replace(direct, units=units, method="direct")
    text = " ".join(printed(direct).split())
    assert f"Scores: {DIRECT}. Left out" in text
    assert "°" not in text
    assert "\nScores: total effect.\n" in printed(explain())


def test_larger_units_that_were_refined_are_listed_the_largest_first():
    lines = [line.strip() for line in printed(hierarchical()).splitlines()]
    first = lines.index("First by paragraphs (2, total effect):")
    assert lines[first + 1 : first + 7] == [
        "+2.75  The pay is 34 dollars an hour. Overtime is 51 dollars.↵",
        "0.00  Q: Which pay? A:",
        "",
        "Then by sentences (3, total effect):",
        "+3.25  The pay is 34 dollars an hour.",
        "0.00  Q: Which pay? A:",
    ]
    assert "First by" not in printed(explain())


@pytest.mark.parametrize("width", [20, 33])
def test_lists_of_targets_and_of_larger_units_stay_within_the_width(width):
    for explanation in (explain_several(30), hierarchical()):
        text = printed(explanation, width=width)
        assert max(cell_len(line.rstrip()) for line in text.splitlines()) <= width


def test_levels_are_named_from_small_to_large():
    assert wording.levels(explain()) == "tokens"
    sentences, fine = hierarchical().coarse, explain()
    assert sentences
    own = dataclasses.replace(fine.units[-1], level="token")  # of the target, it does not count
    suppressed = torch.cat([sentences.suppressed_logprobs, fine.suppressed_logprobs[:, -1:]], 1)
    with_target = dataclasses.replace(
        sentences, units=[*sentences.units, own], suppressed_logprobs=suppressed, coarse=None
    )
    assert wording.levels(with_target) == "sentences"
    shown = printed(dataclasses.replace(fine, method="hierarchical", coarse=with_target))
    assert "First by sentences (3, total effect):" in shown
    assert len(shown.split("total effect):")[1].split("\n\n")[0].strip().splitlines()) == 3
    assert "  34\n" not in shown
    assert wording.levels(hierarchical()) == "words and sentences"
    fine = hierarchical()
    fine.units[0] = dataclasses.replace(fine.units[0], level="token")
    assert wording.levels(fine) == "tokens, words and sentences"
    assert [wording.levels(each) for each in layout.by_size(hierarchical())[1:]] == [
        "sentences",
        "paragraphs",
    ]
