"""The benchmark of methods and modes in small: its sums by hand, and a run in parts."""

import csv
import dataclasses
import itertools
import json
import math

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("pandas")

from atman_triton.demo import load_demo_model
from atman_triton.methods import METHODS
from bench import budget, removal
from bench.budget_results import (
    LEAVE_ONE_OUT,
    RANDOM,
    Document,
    Found,
    Row,
    Setting,
    draw,
    paired,
    summarise,
    supported,
    table,
)

EXACT, DIRECT = Setting("exact", None, "min_shift"), Setting("direct", None, "min_shift")
RUN = {
    "weights": "w",
    "code": "c",
    "torch": "t",
    "transformers": "x",
    "device": "d",
    "commit": "a",
    "date": "2026-01-02",
}


def document(**gaps):
    settings = {"exact": EXACT, "direct": DIRECT, "leave_one_out": LEAVE_ONE_OUT}
    forwards = {"exact": 60.0, "direct": 3.0, "leave_one_out": 90.0}
    found = {
        settings[name].name: Found(gap, forwards[name], gap / 10) for name, gap in gaps.items()
    }
    return Document(80, found)


def test_settings_are_the_whole_grid():
    settings = budget.settings_of(budget.LEVELS)
    assert len(set(settings)) == len(settings) == 3 * (1 + 1 + 3 + 4 + 1) + 2
    names = [setting.name for setting in settings]
    assert {"hybrid 0.2, log_additive", "path 8, min_shift", "random"} < set(names)


def test_sums_by_hand():
    documents = [document(exact=4.0, direct=3.0), document(exact=8.0, direct=5.0)]
    runs = [RUN, RUN | {"commit": "b", "date": "2026-01-03"}]
    exact, direct = summarise(documents, [EXACT, DIRECT], runs)
    assert (direct.gap, direct.gap_se) == (4.0, 1.0)
    assert (direct.difference, direct.difference_se) == (-2.0, 1.0)
    assert (exact.difference, exact.difference_se) == (0, 0)
    assert (direct.rank_correlation, direct.rank_correlation_se) == (0.4, 0.1)
    assert (direct.forwards, direct.prompt_tokens, direct.documents) == (3.0, 80, 2)
    assert (direct.commit, direct.device, direct.date) == ("a + b", "d", "2026-01-03")
    assert direct.setting == DIRECT
    assert paired(documents, DIRECT, EXACT) == (-2.0, 1.0)
    (alone,) = summarise(documents, [DIRECT], runs)
    assert alone.difference is None


@pytest.mark.parametrize(
    ("direct", "cheapest"), [((3.0, 5.0, 4.9), "direct"), ((3.0, 3.0, 4.1), "exact")]
)
def test_conclusion_takes_the_cheapest_that_is_not_clearly_worse(direct, cheapest):
    exact = (4.0, 4.5, 5.0)
    documents = [
        document(exact=ours, direct=theirs, leave_one_out=9.0)
        for ours, theirs in zip(exact, direct, strict=True)
    ]
    rows = summarise(documents, [EXACT, DIRECT, LEAVE_ONE_OUT], [RUN])
    said = supported(rows, documents)
    assert said.startswith("largest gap: exact, min_shift (4.500")
    assert f"not clearly below: {cheapest}, min_shift" in said and " and " not in said


def test_conclusion_names_all_that_cost_the_same():
    other = Setting("direct", None, "multiplicative")
    documents = [
        Document(80, document(exact=gap + 0.1, direct=gap).found | {other.name: Found(gap, 3.0, 0)})
        for gap in (4.0, 5.0)
    ]
    documents[0].found[DIRECT.name] = Found(4.2, 3.0, 0)
    rows = summarise(documents, [EXACT, DIRECT, other], [RUN])
    # 0.1 less in every document is clear, however little it is; sometimes more is not.
    assert "below: direct, min_shift (+0.000 ± 0.100), 3.0" in supported(rows, documents)
    documents[1].found[other.name] = Found(5.3, 3.0, 0)
    rows = summarise(documents, [EXACT, DIRECT, other], [RUN])
    said = supported(rows, documents)
    assert "direct, min_shift (" in said and " and direct, multiplicative (" in said


def read(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_a_run_in_parts_is_a_run_in_one(tmp_path, capsys):
    def run(parts, *more, methods=("direct",)):
        arguments = ["--documents", "4", "--methods", *methods, "--parts", str(tmp_path / parts)]
        status = budget.main([*arguments, "--out", str(tmp_path / f"{parts}-out"), *more])
        return status, capsys.readouterr()

    status, said = run("parts", "--share", "0/2")
    assert status == 0
    assert "2 of 2 documents" in said.err and "2 of 4 documents are done" in said.err
    assert not (tmp_path / "parts-out").exists()

    # Cut short in the middle of its last line: that document alone is measured again.
    half = tmp_path / "parts" / "share-0-of-2.jsonl"
    half.write_bytes(half.read_bytes()[:-20])
    _, said = run("parts", "--share", "0/2")
    assert "1 of 1 documents" in said.err and "1 of 2" not in said.err
    numbers = [json.loads(line).get("document") for line in half.read_text().splitlines()]
    assert numbers == [None, 0, None, 2]

    status, said = run("parts", "--share", "1/2")
    assert status == 0 and "direct" in said.out and "largest gap" in said.out
    rows = read(tmp_path / "parts-out" / "budget.csv")
    names = [*3 * ["direct"], "leave-one-out", "random"]
    assert [row["method"] for row in rows] == names
    assert list(rows[0]) == [field.name for field in dataclasses.fields(Row)]
    assert rows[3]["rank_correlation"] == "1.0" and rows[4]["forwards"] == "0.0"
    assert (tmp_path / "parts-out" / "budget.png").stat().st_size > 20_000

    # All at once, nothing but the means' rounding may differ.
    run("whole")
    assert read(tmp_path / "whole-out" / "budget.csv") == rows

    # Another method later: the first ones are not run again, and differences appear.
    _, said = run("whole", "--documents", "2", methods=("exact", "direct"))
    assert "2 of 2 documents" in said.err
    (path,) = (tmp_path / "whole").iterdir()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    later = [line for line in lines if "document" in line][4:]
    modes = budget.MODES
    assert [set(line["found"]) for line in later] == 2 * [{f"exact, {mode}" for mode in modes}]
    rows = read(tmp_path / "whole-out" / "budget.csv")
    assert [row["documents"] for row in rows] == 8 * ["2"]
    assert float(rows[0]["difference"]) == 0 and math.isfinite(float(rows[3]["difference"]))


@pytest.mark.parametrize("other", ["weights", "code", "case"])
def test_parts_of_another_run_are_refused(tmp_path, capsys, other):
    model, tokenizer = load_demo_model()
    cases = removal.answered_cases(model, tokenizer, 2)
    run = budget.described(model)
    if other in run:
        run[other] = "others"
    case = dataclasses.replace(cases[1], answer="?") if other == "case" else cases[1]
    budget.Journal(tmp_path, "a.jsonl", run).add(1, case, document(direct=1.0))
    arguments = ["--documents", "2", "--methods", "direct", "--parts", str(tmp_path)]
    assert budget.main(arguments) == 1
    said = capsys.readouterr().err
    assert f"was measured with {other}" in said and "--parts" in said


def test_levels_reach_the_explainer():
    model, tokenizer = load_demo_model()
    (case,) = removal.answered_cases(model, tokenizer, 1)
    found = budget.explain(model, tokenizer, case, Setting("hybrid", 0.3, "log_additive"))
    assert (found.provenance["budget"], found.provenance["mode"]) == (0.3, "log_additive")
    assert found.provenance["exact_runs"] == math.floor(0.3 * len(found.units))
    found = budget.explain(model, tokenizer, case, Setting("path", 3, "multiplicative"))
    assert (found.provenance["steps"], found.provenance["mode"]) == (3, "multiplicative")


def test_every_method_is_measured():
    assert set(budget.LEVELS) == set(METHODS) - {"hierarchical"}  # whose units are pieces
    model, tokenizer = load_demo_model()
    (case,) = removal.answered_cases(model, tokenizer, 1)
    settings = [
        Setting(method, levels[0], mode)
        for (method, levels), mode in zip(
            budget.LEVELS.items(), itertools.cycle(budget.MODES), strict=False
        )
    ]
    found = budget.examine(model, tokenizer, case, [*settings, RANDOM], 0).found
    assert list(found) == [setting.name for setting in [*settings, RANDOM]]
    random = found.pop("random")
    assert random.forwards == 0 and math.isfinite(random.gap)
    left_out: list[float] = []
    for setting in settings:
        explained = budget.explain(model, tokenizer, case, setting)
        each = found[setting.name]
        assert each.forwards == explained.provenance["forwards"] > 1
        tried = removal.Removal(model, tokenizer, case, explained, 0)
        scores = explained.relevance.tolist()
        (gap,) = tried.gaps({"alone": scores}).values()
        assert each.gap == pytest.approx(gap, abs=1e-4)
        left_out = left_out or tried.of_prompt(tried.leave_one_out())  # the same for all
        assert each.rank_correlation == pytest.approx(
            removal.rank_correlation(tried.of_prompt(scores), left_out)
        )


@pytest.mark.parametrize("share", ["2/2", "1", "a/b", "-1/2"])
def test_shares_that_are_none(share, capsys):
    with pytest.raises(SystemExit, match="2"):
        budget.main(["--share", share])
    assert "must be like 0/2" in capsys.readouterr().err or share.startswith("-")


def test_picture_and_table_show_every_setting(tmp_path):
    settings = budget.settings_of(budget.LEVELS)
    documents = [
        Document(80, {s.name: Found(n + i, n + 1.0, 0.1 * i) for n, s in enumerate(settings)})
        for i in range(2)
    ]
    rows = summarise(documents, settings, [RUN])
    draw(rows, tmp_path / "budget.png")
    assert (tmp_path / "budget.png").stat().st_size > 20_000
    assert table(rows).row_count == len(settings) == len({row.setting for row in rows})
    assert rows[-1].setting == RANDOM
