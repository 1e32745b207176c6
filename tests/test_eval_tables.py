"""Rows of a table from results made by hand."""

import csv
import io
import math

import pytest
from eval_cases import result
from rich.console import Console

from atman_triton.evaluate.paper import SQUAD
from atman_triton.evaluate.settings import parse_methods
from atman_triton.evaluate.tables import choose_reading, chosen, marks, summarise
from atman_triton.evaluate.written import terminal_table, write_csv, write_markdown

FACTS = {
    "data": "contracts",
    "model": "reader",
    "dtype": "float32",
    "device": "chip, 1 thread",
    "atman_triton": "1.0",
    "commit": "abc",
    "torch": "2",
    "transformers": "5",
    "date": "2026-01-02",
}


def several(method, *precisions, best="squared sum", **changes):
    """One example to choose by, and others to report."""
    found = [result("c", method, split="choose", precision=0.9, best=best)]
    reports = enumerate(precisions)
    return found + [
        result(f"r{index}", method, precision=value, **changes) for index, value in reports
    ]


def table(*methods, **changes):
    settings = parse_methods(",".join(methods))
    precisions = {"direct": (0.2, 0.4), "exact multiplicative": (0.6, 0.8), "chefer": (0.5, 0.5)}
    results = [one for name in methods for one in several(name, *precisions[name])]
    return summarise(results, settings, SQUAD, **changes)


def test_readings_are_chosen_on_one_split_and_reported_on_the_other():
    rows = summarise(several("direct", 0.2, 0.4, 0.6), parse_methods("direct"), {})
    assert len(rows) == 6 and [row.reading for row in rows if row.chosen] == ["squared sum"]
    (row,) = chosen(rows)
    # The example to choose by, whose precision is 0.9, is not in it.
    assert row.count == 3 and row.values["mAP"][:1] == (pytest.approx(0.4),)
    assert row.values["mAP"].low == pytest.approx(0.2) and row.values["mAP"].high <= 0.6
    assert row.values["mAR"].value == pytest.approx(0.2)
    assert row.values["removal_gap"][:3] == (2.0, 2.0, 2.0)
    assert row.values["forwards"].value == 3.0 and row.values["seconds"].value == 0.5
    assert "stability" not in row.values and "variation" not in row.values
    assert row.paper == {} and row.kind == "atman"


def test_the_first_of_equal_readings_is_chosen_and_nan_never_is():
    assert choose_reading([result("a", precision=0.5)]) == "signed mean"
    # A reading that finds nothing in one example, and all in the other, is not the best.
    some, other = result("a", precision=math.nan), result("b", precision=0.9)
    some.alignment["absolute sum"]["precision"] = 0.1
    assert choose_reading([some, other]) == "absolute sum"
    with pytest.raises(ValueError, match="no examples to choose a reading by"):
        choose_reading([])
    with pytest.raises(ValueError, match="no examples of direct to report, only to choose"):
        summarise([result("a", split="choose")], parse_methods("direct"), {})


def test_a_metric_of_some_examples_counts_those():
    first, second, third = several("direct", 0.2, 0.4)
    second.faithfulness["stability"] = 0.7
    rows = summarise([first, second, third], parse_methods("direct"), {})
    assert rows[0].values["stability"].value == 0.7 and rows[0].values["stability"].count == 1
    # But who finds nothing missed it.
    second.alignment["signed mean"]["precision"] = math.nan
    rows = summarise([first, second, third], parse_methods("direct"), {})
    assert rows[0].values["mAP"].value == pytest.approx(0.2) and rows[0].values["mAP"].count == 2


def test_questions_about_one_paragraph_are_drawn_together():
    first = result("c", split="choose", best="squared sum")
    halves = [("a", 0.2)] * 8 + [("b", 0.8)] * 8
    results = [first] + [
        result(f"r{i}", precision=p, group=group) for i, (group, p) in enumerate(halves)
    ]
    settings = parse_methods("direct")
    (apart,) = chosen(summarise(results, settings, {}))
    (together,) = chosen(summarise(results, settings, {}, grouped=True))
    assert apart.values["mAP"].value == together.values["mAP"].value == pytest.approx(0.5)
    assert together.values["mAP"].low == pytest.approx(0.2)  # both draws from one paragraph
    assert 0.2 < apart.values["mAP"].low < 0.4


def test_notes_are_counted_by_example():
    notes = [["lds: 3 NaN left out", "no label"], ["lds: 12 NaN left out", "lds: 4 NaN left out"]]
    first, *others = several("direct", 0.2, 0.4)
    for one, own in zip(others, notes, strict=True):
        one.notes.extend(own)
    rows = summarise([first, *others], parse_methods("direct"), {})
    assert rows[0].notes == ("2 examples: lds: N NaN left out", "1 example: no label")


def test_best_and_second_are_marked_by_what_is_good():
    rows = chosen(table("direct", "exact multiplicative", "chefer"))
    assert [row.method for row in rows] == ["exact multiplicative", "chefer", "direct"]
    assert marks(rows, "mAP") == {"exact multiplicative": "best", "chefer": "second"}
    # Equal values share a place, and low deletion is good.
    assert set(marks(rows, "deletion").values()) == {"best"}
    rows[0].values["deletion"] = rows[0].values["deletion"]._replace(value=0.1)
    assert marks(rows, "deletion") == {
        "exact multiplicative": "best",
        "chefer": "second",
        "direct": "second",
    }


def test_files(tmp_path):
    rows = table("direct", "exact multiplicative", "chefer")
    write_csv(rows, tmp_path / "table.csv", FACTS)
    with (tmp_path / "table.csv").open() as file:
        read = list(csv.DictReader(file))
    assert len(read) == 18 and [row["chosen"] for row in read].count("true") == 3
    found = {(row["method"], row["reading"]): row for row in read}
    row = found["exact multiplicative", "squared sum"]
    assert float(row["mAP"]) == pytest.approx(0.7) and row["mAP_count"] == row["examples"] == "2"
    assert float(row["mAP_low"]) == pytest.approx(0.6) and row["stability"] == ""
    assert row["paper_mAP"] == "0.737" and found["direct", "signed sum"]["paper_mAP"] == ""
    assert row["commit"] == "abc" and row["data"] == "contracts"

    write_markdown(rows, tmp_path / "table.md", FACTS, "contracts, reader")
    text = (tmp_path / "table.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert {len(line) for line in cells} == {len(cells[0])} and len(cells) == 5
    assert cells[2][:3] == ["exact multiplicative", "squared sum", "**70.0** ± 10.0"]
    assert cells[3][2] == "<u>50.0</u> ± 0.0" and cells[4][2] == "30.0 ± 10.0"
    assert cells[0][-1] == "the paper's, on its 6B model: mAP / mAP IQ / mAR / mAR IQ"
    assert cells[2][-1] == "73.7 / 81.8 / 93.4 / 100.0" and cells[4][-1] == ""
    assert "2 examples" in text and "at abc" in text and "2026-01-02" in text


def test_examples_that_have_no_value_are_shown(tmp_path):
    first, second, third = several("direct", 0.2, 0.4)
    second.faithfulness["removal_gap"] = math.nan
    rows = summarise([first, second, third], parse_methods("direct"), {})
    write_markdown(rows, tmp_path / "table.md", FACTS, "t")
    assert "**2.000** (of 1)" in (tmp_path / "table.md").read_text()


def test_terminals_show_what_they_have_room_for():
    rows = table("direct", "exact multiplicative")
    for width, cell in ((200, "70.0 ± 10.0"), (80, " 70.0 ")):
        console = Console(width=width, record=True, file=io.StringIO())
        console.print(terminal_table(rows, "contracts, reader", width))
        text = console.export_text()
        assert "contracts, reader" in text and cell in text and "73.7" in text
        assert "exact multiplicative" in text and "…" not in text
        assert ("read as" in text) == ("squared sum" in text) == (width == 200)
        assert ("mAP IQ" in text) == ("70.0 ±" in text) == (width == 200)
