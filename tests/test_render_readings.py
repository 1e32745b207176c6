"""Terminal, figure and table of documents, neighbours, parts, contrasts and processed scores."""

import dataclasses
import re
from typing import Any

import numpy
import pandas
import pytest
from matplotlib.text import Text
from pictures import printed
from rich.cells import cell_len

# The same explanations as on the page.
from test_page_readings import halves, one, two
from toy_explanations import HOSTILE, coarser, explain, explain_several, sourced

from atman_triton.pieces import Document, Neighbour
from atman_triton.render import layout, wording

change = dataclasses.replace


def drawn(figure):
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


# The terminal.


def test_every_document_starts_a_line_under_its_id():
    text = printed(one())
    head = text[: text.index("rank")]
    assert (
        "\n── pay ──\nThe ⟦pay⟧ is ⟦34⟧ dollars an hour. \n── overtime ──\nOvertime is "
        "51 dollars.\n──\nQ: Which pay? A: ⟦34⟧ dollars now\n"
    ) in head
    assert "──" not in printed(explain())


def test_documents_that_follow_at_once_have_no_line_between_them():
    explanation = sourced(explain())
    documents = [Document("one", 0, 31), Document("two", 31, 71)]
    units = [change(unit, document=None) for unit in explanation.units]
    shown = printed(change(explanation, documents=documents, units=units))
    assert "hour. \n── two ──\nOvertime" in shown
    # The answer is no part of the second one.
    assert "\nQ: Which pay? A: \n──\n⟦34⟧ dollars\n" in shown
    assert shown.count("\n──\n") == 1


def test_a_document_in_the_middle_of_a_line_breaks_it():
    assert layout.lines("aaa bb cc", 80, [4]) == [(0, 4), (4, 9)]
    assert layout.lines("aaa bb cc", 3, [4]) == [(0, 4), (4, 7), (7, 9)]
    assert layout.lines("aaa", 80, [0, 3]) == [(0, 3)]


def test_what_is_shown_behind_a_gap_names_its_document():
    filler = "nothing to see here at all\n" * 100
    prompt = filler + "the key is 34\n" + filler
    made = explain(prompt, scores={"34": 1.0})
    stop = len(prompt)
    documents = [Document("first", 0, 100), Document("second", 100, stop)]
    shown = printed(change(made, documents=documents)).splitlines()
    at = shown.index("the key is ⟦34⟧")
    assert shown[at - 3 : at - 1] == ["⋯", "── second ──"]
    assert shown.count("── first ──") == shown.count("── second ──") == 1


def test_the_list_names_documents_and_neighbours():
    text = printed(one())
    assert re.search(r"\n +2 .*\+3\.00  \[pay\] The pay is 34 dollars", text)
    assert re.search(r"\n +with: pay ×0\.28, 51 ×0\.28, 34 ×0\.28\n", text)
    assert text.count("with:") == 3
    assert "with:" not in printed(explain())
    assert "[pay]" not in printed(explain())


def test_neighbours_are_the_most_manipulated_first_and_few():
    explanation = explain(scores={"34": 2.0})
    others = [unit for unit in explanation.units if unit.text.strip() not in ("34", "")][:8]
    factors = [0.9, 0.2, 0.5, 1.9, 0.8, 0.7, 0.6, 0.95]
    near = [
        Neighbour(u.tokens[0], factor, 0.9, u.start, u.stop, u.branch)
        for u, factor in zip(others, factors, strict=True)
    ]
    near.append(Neighbour(900, 0.99, 0.6))
    alike = [Neighbour(1, 0.5, 0.6), Neighbour(2, 0.5, 0.9), Neighbour(3, 0.5, 0.9)]
    assert [each.token for each in wording.by_weight(alike)] == [2, 3, 1]
    units = [
        change(u, neighbours=tuple(near)) if u.text == " 34" and u.branch is None else u
        for u in explanation.units
    ]
    shown = printed(change(explanation, units=units), width=200)
    names = [u.text.strip() for u in others]
    order = [3, 1, 2, 6, 5]
    listed = ", ".join(f"{names[i]} ×{factors[i]:.2g}" for i in order)
    assert f"with: {listed} and 4 more\n" in shown
    assert wording.neighbour_text(explanation, near[-1]) == "token 900"


def test_parts_are_listed_and_one_can_be_shown(capsys):
    explanation = one()
    text = printed(explanation)
    rows = text[text.index("part   p") :].splitlines()[1:3]
    assert rows[0].split() == ["0", "0.779", "34", "←", "34", "[pay]"]
    assert rows[1].split() == ["1", "0.287", "dollars", "now", "←", "34", "[pay]"]
    explanation.show(part=1, width=80)
    shown = capsys.readouterr().out
    assert "Part 1: dollars now   p = 0.287" in shown
    assert "+3.50" in shown  # the mean of its two tokens' scores
    assert "part   p" not in shown
    two().show(part=3, width=80)
    alone = capsys.readouterr().out
    two().branch(1).show(part=1, width=80)
    assert alone == capsys.readouterr().out
    assert "part   p" not in printed(explain())


def test_a_contrast_asks_why_this_rather_than_that():
    text = printed(two(contrast=True))
    assert text.startswith(
        "Why: 34 dollars now   p = 0.223\nRather than: 51 dollars then   p = 0.223\n"
    )
    assert "⟦for “34 dollars now”⟧ ⟪for “51 dollars then”⟫" in text
    assert "is ⟦34⟧ dollars an hour" in text
    assert "is ⟪51⟫ dollars." in text
    assert "branch   p" not in text
    assert re.search(r"\n +\d+ .*−2\.00  \[overtime\]", text)


@pytest.mark.parametrize("make", [one, lambda **ways: two(contrast=True, **ways)])
@pytest.mark.parametrize(
    ("ways", "head", "absent"),
    [
        ({"postprocessing": "absolute"}, "relevance, nats  ", "⟪"),
        ({"postprocessing": "square"}, "relevance, nats²", "⟪"),
        ({"normalize": True}, "relevance, 0 to 1", "⟪"),
        ({"normalize": True, "postprocessing": "square"}, "relevance, 0 to 1", "nats"),
    ],
)
def test_processed_numbers_have_no_sign_and_no_other_side(make, ways, head, absent):
    text = printed(make(**ways))
    assert head in text
    assert absent not in text
    listing = text[text.index("rank ") : text.index("part   p")]
    assert re.search(r"█ \d", listing)
    assert not re.search(r"[+−]\d", listing)
    assert ("scaled: 0 is the smallest" in " ".join(text.split())) == ("normalize" in ways)
    assert ("matters" in text) == ("postprocessing" in ways)
    coloured = printed(make(**ways), colour="truecolor")
    assert "48;2;92;164;255" not in coloured  # the strongest blue
    assert wording.settings(make(**ways)).count("normalized") == ("normalize" in ways)


@pytest.mark.parametrize("width", [20, 40])
def test_ids_and_neighbours_stay_within_the_width(width):
    explanation = sourced(explain(answer=" 34 dollars now"))
    documents = [change(d, id=f"漢字 {d.id} " * 9) for d in explanation.documents]
    explanation = halves(change(explanation, documents=documents))
    lines = printed(explanation, width=width).splitlines()
    assert max(cell_len(line.rstrip()) for line in lines) <= width
    wide = printed(explanation, width=80)  # an id leaves room for the unit
    assert re.search(r"\n +1 .* \[漢字 pay 漢 … The pay is 34 dollars", wide)


def test_hostile_ids_are_only_text_in_the_terminal():
    documents = [Document(HOSTILE, 0, 20)]
    text = printed(change(explain(), documents=documents), width=1000)
    assert "\x1b" not in text
    assert layout.visible(HOSTILE) in text


def test_larger_units_are_read_alike():
    coarse = coarser(sourced(explain()), documents=sourced(explain()).documents)
    explanation = change(sourced(explain()), coarse=coarse, postprocessing="absolute")
    text = printed(explanation)
    first = text[text.index("First by sentences") :].splitlines()[1:3]
    assert [line.split()[0] for line in first] == ["3.00", "0.50"]


def test_levels_have_names():
    explanation = explain()
    units = [
        change(u, level=level)
        for u, level in zip(
            explanation.units, ["delimited", "span", "turn", "document"], strict=False
        )
    ]
    some = change(
        explanation, units=units, suppressed_logprobs=explanation.suppressed_logprobs[:, :4]
    )
    assert wording.levels(some) == "delimited pieces, spans, turns and documents"
    text = printed(some)
    assert "hour. Overtime is 51 dollars." in text  # what is no unit is shown plainly


# The figure.


def test_a_figure_names_documents_and_reads_scores():
    shown = drawn(one(postprocessing="square").plot())
    assert {"──", "pay", "overtime"} <= set(shown)
    assert "[pay] 34" in shown
    assert "strongest units, nats²" in shown
    assert "What matters for the answer" in shown
    assert not [text for text in shown if re.match(r"[+−]\d", text)]


def test_a_figure_of_a_contrast_and_of_a_part():
    figure = two(contrast=True).plot()
    shown = drawn(figure)
    title = {"What speaks for it rather than “51 dollars then”", "34 dollars now   (p = 0.223)"}
    assert title <= set(shown)
    assert "+1.50" in shown
    assert figure.axes[2].images[0].get_array().shape == (2, 20)
    shown = drawn(one().plot(part=1))
    title = {"What supports part 1 of the answer", "dollars now   (p = 0.287)"}
    assert title | {"+3.50"} <= set(shown)
    scaled = drawn(one(normalize=True).plot())
    assert any(line.startswith("Values are scaled: 0 is") for line in scaled)


def test_the_matrix_is_of_what_is_read():
    def least(explanation):
        matrix: Any = explanation.plot().axes[2].images[0].get_array()
        return numpy.nanmin(matrix.filled(numpy.nan))

    assert least(one(postprocessing="absolute")) == 0
    assert least(one()) == -1.0


# The table.


def test_the_table_has_documents_neighbours_and_parts():
    explanation = one(postprocessing="square")
    frame: Any = explanation.to_dataframe()
    assert list(frame.columns[8:]) == [
        *("document", "neighbours", "0:  34", "1:  dollars", "2:  now"),
        *("part 0:  34", "part 1:  dollars now"),
    ]
    assert frame["document"].iloc[0] == "pay"
    assert frame["document"].iloc[-1] is pandas.NA
    assert frame["neighbours"].sum() == sum(len(u.neighbours) for u in explanation.units)
    assert frame["part 1:  dollars now"].iloc[3] == explanation.part_relevances[1, 3].item()
    assert frame["1:  dollars"].iloc[3] == explanation.values(target=1)[3].item()
    assert frame["relevance"].iloc[3] == explanation.relevance[3].item()


def test_the_table_of_several_targets_has_the_parts_of_all():
    frame: Any = two(contrast=True).to_dataframe(top_k=1)
    assert list(frame.columns[8:]) == [
        *("document", "neighbours", "branch", "0:  34 dollars now", "1:  51 dollars then"),
        *("part 0:  34", "part 1:  dollars now", "part 2:  51", "part 3:  dollars then"),
    ]
    assert frame["relevance"].iloc[0] == two(contrast=True).relevance[3].item()
    assert not [name for name in explain_several().to_dataframe() if "part " in name]
