"""The benchmark of facts that stand twice in small: its judgement by hand, and a run."""

import csv
import dataclasses

import pytest

pytest.importorskip("matplotlib")

from atman_triton import Explainer
from atman_triton.demo import load_demo_model, prompt
from bench import redundancy, removal
from bench.redundancy import Found, Setting, judged, units_of
from bench.restated import spans

TOKENS = [(0, 1), (2,), (3, 4, 5)]
TWO = (0, 2)


@pytest.fixture(scope="module")
def demo():
    return load_demo_model()


@pytest.fixture(scope="module")
def case(demo):
    return redundancy.redundant_cases(*demo, "same", 1)[0][0]


def test_what_is_suppressed():
    def units(unit, evidence=TWO):
        return list(units_of(Setting("single", unit, "exact"), TOKENS, evidence))

    assert units("token") == [(True, [(0,), (1,)]), (False, [(2,)]), (True, [(3,), (4,), (5,)])]
    assert units("sentence") == [(True, [(0, 1)]), (False, [(2,)]), (True, [(3, 4, 5)])]
    assert units("pairs") == [
        (False, [(0, 1, 2)]),
        (True, [(0, 1, 3, 4, 5)]),
        (False, [(2, 3, 4, 5)]),
    ]
    assert [holds for holds, _ in units("pairs", (0,))] == [True, True, False]
    assert units("known") == [(True, [(0, 1, 3, 4, 5)]), (False, [(2,)])]


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        # the best token of each sentence: 3, 1, 2, of which the first and last hold the fact
        ([3.0, 0.0, 1.0, -9.0, 2.0, 0.0], Found(True, 0.5, 0.25)),
        ([3.0, 0.0, 2.0, -9.0, 2.0, 0.0], Found(False, 0.5, 0.5)),  # as good is not above
        ([3.0, 0.0, 1.0, -9.0, 1.9, 0.0], Found(True, 0.475, 0.25)),
    ],
)
def test_a_fact_is_found_where_both_mentions_stand_out(scores, expected):
    groups = list(units_of(Setting("single", "token", "exact"), TOKENS, TWO))
    found = judged(groups, scores, rise=4.0)
    assert found == expected


@pytest.mark.parametrize(("first", "share"), [(True, 0.5), (True, 0.49), (False, 0.9)])
def test_it_must_rank_first_and_reach_half(first, share):
    assert Found(first, share, 0.1).found == (first and share == 0.5)


def test_cases_need_the_fact_and_have_it_twice(demo, case):
    model, tokenizer = demo

    def answer(*without):
        text = prompt(" ".join(case.without(*without)), case.question)
        return redundancy.generate_answers(model, tokenizer, [text])[0]

    assert answer() == answer(case.first) == answer(case.twin) == case.question.answer
    assert answer(case.first, case.twin) != case.question.answer


@pytest.mark.parametrize("similarity", [None, 0.3])
def test_scores_are_those_of_the_explainer(demo, case, similarity):
    model, tokenizer = demo
    what, rule = ("single", None) if similarity is None else ("correlated", "released")
    setting = Setting(what, "token", "direct", rule, similarity)
    evidence = sorted((case.first, case.twin))
    (found,) = redundancy.examine(
        model, tokenizer, case.sentences, evidence, case.question, [setting]
    ).values()
    explainer = Explainer(model, tokenizer, similarity=similarity, progress=False)
    text = prompt(" ".join(case.sentences), case.question)
    explanation = explainer.explain(text, case.question.answer, separator="")
    best = []
    for start, stop in spans(case.sentences):
        own = [
            value
            for unit, value in zip(explanation.units, explanation.relevance.tolist(), strict=True)
            if unit.part == "prompt" and unit.start < stop and unit.stop > start
        ]
        best.append(max(own))
    least = min(best[place] for place in evidence)
    others = max(value for place, value in enumerate(best) if place not in evidence)
    ids = [
        tokenizer(each)["input_ids"]
        for each in (text, prompt(" ".join(case.without(*evidence)), case.question))
    ]
    answer = tokenizer(case.question.answer)["input_ids"]
    whole, deleted = (float(removal.losses(model, [each], answer)) for each in ids)
    rise = deleted - whole
    assert found.first == (least > others)
    assert found.share * rise == pytest.approx(least, rel=1e-3, abs=1e-4)
    assert found.others * rise == pytest.approx(others, rel=1e-3, abs=1e-4)
    assert found.found == (similarity is not None)


def test_a_small_run(tmp_path, monkeypatch, capsys):
    chosen = [
        Setting("single", "sentence", "direct"),
        Setting("correlated", "sentence", "direct", "released", 0.6),
        Setting("grouped", "known", "direct"),
    ]
    monkeypatch.setattr(redundancy, "settings", lambda stands: chosen)
    monkeypatch.setattr(redundancy, "EFFECTS", {"direct": "direct"})
    redundancy.main(["--documents", "2", "--processes", "0", "--out", str(tmp_path)])
    with (tmp_path / "redundancy.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [field.name for field in dataclasses.fields(redundancy.Row)]
    found = {(row["stands"], row["what"]): float(row["found"]) for row in rows}
    assert set(found) == {(s, c.what) for s in redundancy.STANDS for c in chosen}
    assert found["twice", "single"] == 0
    assert found["twice", "grouped"] == found["once", "single"] == 1
    assert (tmp_path / "redundancy.png").stat().st_size > 20_000
    said = capsys.readouterr().out
    assert "twice, direct: single, sentence finds 0%" in said


def test_every_setting_is_measured_once():
    for stands in redundancy.STANDS:
        chosen = redundancy.settings(stands)
        assert len(set(chosen)) == len(chosen)
        kinds = {(s.what, s.unit, s.method) for s in chosen}
        assert len(kinds) == 12  # three ways, two kinds of units each, exact and direct
    names = {setting.name for setting in redundancy.settings("twice")}
    assert {"single, token", "correlated 0.2 (paper), sentence", "grouped, pairs"} < names


def test_one_document_has_no_standard_error(capsys):
    with pytest.raises(SystemExit, match="2"):
        redundancy.main(["--documents", "1"])
    assert "at least 2 documents" in capsys.readouterr().err
