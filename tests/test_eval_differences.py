"""Paired differences of methods, from results made by hand."""

import csv

import pytest
from eval_cases import result
from test_eval_tables import FACTS

from atman_triton.evaluate.differences import (
    differences,
    differences_markdown,
    write_differences,
)
from atman_triton.evaluate.settings import parse_methods
from atman_triton.evaluate.tables import summarise


def measured(method, precisions, *, best="squared sum", groups=None, lds=None):
    """One example to choose by, and others to report."""
    found = [result("c", method, split="choose", precision=0.9, best=best)]
    for index, precision in enumerate(precisions):
        own = result(
            f"r{index}", method, precision=precision, group=groups[index] if groups else ""
        )
        if lds is not None:
            own.faithfulness["lds"] = lds[index]
        found.append(own)
    return found


def compared(results, names, **changes):
    rows = summarise(results, parse_methods(names), {}, **changes)
    return differences(results, rows, **changes)


# Hard and easy examples: each method's own interval is wide, what lies between them is sure.
HARD = [0.05 * place for place in range(20)]


def test_what_makes_an_example_hard_for_both_cancels():
    better = [value + 0.02 for value in HARD]
    results = measured("direct", HARD) + measured("chefer", better)
    [found] = compared(results, "direct, chefer")
    assert (found.method, found.against) == ("chefer", "direct")
    mean, low, high, count, _ = found.values["mAP"]
    assert [mean, low, high] == pytest.approx([0.02] * 3) and count == 20
    own = summarise(results, parse_methods("direct, chefer"), {})[0].values["mAP"]
    assert own.high - own.low > 0.2


def test_examples_are_matched_by_name_and_readings_are_the_chosen_ones():
    ours = measured("direct", [0.1, 0.9], best="squared sum")
    theirs = measured("chefer", [0.2, 0.3], best="signed mean")
    shuffled = [theirs[0], theirs[2], theirs[1]]
    [found] = compared(ours + shuffled, "direct, chefer")
    readings = {
        row.method: row.reading
        for row in summarise(ours + shuffled, parse_methods("direct, chefer"), {})
        if row.chosen
    }
    assert readings == {"direct": "squared sum", "chefer": "signed mean"}
    pairs = {
        name: [one.alignment[readings[method]]["precision"] for one in results[1:]]
        for name, method, results in (("a", "chefer", theirs), ("b", "direct", ours))
    }
    expected = sum(a - b for a, b in zip(pairs["a"], pairs["b"], strict=True)) / 2
    assert found.values["mAP"].value == pytest.approx(expected)


def test_a_pair_with_no_value_is_left_out_and_a_column_without_any_is_absent():
    ours = measured("direct", [0.1, 0.2, 0.3], lds=[0.1, float("nan"), 0.5])
    theirs = measured("chefer", [0.1, 0.2, 0.3], lds=[0.2, 0.3, 0.4])
    [found] = compared(ours + theirs, "direct, chefer")
    assert found.values["lds"].value == pytest.approx(0.0) and found.values["lds"].count == 2
    nothing = measured("direct", [0.1, 0.2, 0.3], lds=3 * [float("nan")])
    [found] = compared(nothing + theirs, "direct, chefer")
    assert "lds" not in found.values and "mAP" in found.values


def test_groups_are_drawn_together():
    groups = ["a"] * 10 + ["b"] * 10
    better = [
        value + (0.1 if group == "a" else 0.0) for value, group in zip(HARD, groups, strict=True)
    ]
    results = measured("direct", HARD, groups=groups) + measured("chefer", better, groups=groups)
    [alone] = compared(results, "direct, chefer")
    [together] = compared(results, "direct, chefer", grouped=True)
    assert alone.values["mAP"].value == pytest.approx(together.values["mAP"].value)
    assert together.values["mAP"][1:3] == pytest.approx((0.0, 0.1))  # all of one group, or none
    assert alone.values["mAP"].low > 0.01


def test_files(tmp_path):
    better = [value + 0.02 for value in HARD]
    mixed = [value + (0.02 if place % 2 else -0.02) for place, value in enumerate(HARD)]
    results = measured("direct", HARD) + measured("chefer", better) + measured("rollout", mixed)
    found = compared(results, "direct, chefer, rollout")
    write_differences(found, tmp_path / "differences.csv", FACTS)
    lines = list(csv.DictReader((tmp_path / "differences.csv").read_text().splitlines()))
    own = [line for line in lines if line["column"] == "mAP"]
    assert [(line["method"], line["less"]) for line in own] == [
        ("chefer", "direct"),
        ("rollout", "direct"),
    ]
    assert float(own[0]["low"]) == pytest.approx(0.02) and own[0]["examples"] == "20"
    text = differences_markdown(found)
    assert "## Less direct" in text
    assert "| chefer | **+2.0** [+2.0, +2.0] |" in text
    assert "| rollout | 0.0 [−" in text
    assert differences_markdown([]) == ""
    alone = compared(measured("direct", HARD), "direct")
    assert alone == [] and differences_markdown(alone) == ""
