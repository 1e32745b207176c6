"""The studies' arithmetic by hand, and tiny runs of each."""

import csv
import math
import random

import pytest
import torch

pytest.importorskip("matplotlib")

from atman_triton import Explainer
from atman_triton.demo import load_demo_model, make_document
from bench.removal import leave_one_out
from bench.studies import agreement, common, length, settings, signs, size
from bench.studies.truth import CORRELATION, GAP, MEASURES, Truth

NAN = math.nan


@pytest.fixture(scope="module")
def demo():
    return load_demo_model()


@pytest.fixture(scope="module")
def case(demo):
    return common.documents(*demo, 1)[0]


@pytest.fixture(scope="module")
def truth(demo, case):
    return Truth(*demo, case, common.explain(*demo, case), 0)


def read(path):
    with path.open() as file:
        return list(csv.DictReader(file))


# --- truth ----------------------------------------------------------------------------------


def test_removal_agrees_with_itself_and_with_a_forward_pass(demo, case, truth):
    model, tokenizer = demo
    ids = tokenizer(case.prompt)["input_ids"]
    assert truth.ids == ids and len(truth.rises) == len(ids)
    assert truth.overlap(truth.rises) == 1.0
    assert truth.overlap([-rise for rise in truth.rises]) < 1.0
    first = truth.order(truth.rises)[0]
    assert truth.rises[first] == max(truth.rises)
    answer = tokenizer(case.answer)["input_ids"]

    def loss(prompt):
        with torch.inference_mode():
            logits = model(torch.tensor([[*prompt, *answer[:-1]]])).logits[0, len(prompt) - 1 :]
        return torch.nn.functional.cross_entropy(logits, torch.tensor(answer)).item()

    rise = loss([*ids[:first], *ids[first + 1 :]]) - loss(ids)
    assert truth.rises[first] == pytest.approx(rise, rel=1e-4)


def test_a_judgement_has_every_measure(demo, case, truth):
    found = truth.judge({"direct": common.explain(*demo, case)})["direct"]
    assert tuple(found) == MEASURES
    assert found["precision"] > 0.99 and found[GAP] > 1


# --- agreement ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([3.0, 2.0, 1.0], 1.0),  # the pairs (first, third) and (second, third) count
        ([1.0, 0.0, 2.0], 0.0),
        ([2.0, 1.0, 2.0], 0.25),  # one equal, one wrong
    ],
)
def test_pairs_in_order(scores, expected):
    assert agreement.pairs_in_order(scores, [1.05, 1.0, 0.0], 0.1) == expected


def test_coefficients_by_hand():
    assert math.isnan(agreement.pairs_in_order([1.0, 2.0], [0.0, 0.05], 0.1))
    rises = [4.0, 3.0, 2.0, 0.0, 0.0]
    assert agreement.among([4.0, 2.0, 3.0, 9.0, 9.0], rises, 0.01) == pytest.approx(0.5)
    assert math.isnan(agreement.among([1.0, 2.0], [1.0, 2.0], 0.01))
    assert agreement.linear([1.0, 2.0, 3.0], [2.0, 4.0, 6.0]) == pytest.approx(1.0)
    assert math.isnan(agreement.linear([1.0, 1.0], [0.0, 2.0]))
    assert agreement.overlap([5.0, 4.0, 0.0, 0.0], [5.0, 0.0, 4.0, 0.0], 2) == 0.5


def test_the_last_token_is_left_out_where_it_is_said():
    scores, rises = [3.0, 2.0, 1.0, 0.0, 0.0], [3.0, 2.0, 1.0, 0.0, 99.0]
    found = agreement.agreement(scores, rises)
    assert found[agreement.CORRELATION_1] == found[agreement.LINEAR] == pytest.approx(1.0)
    assert found[CORRELATION] < 0.5


def test_known_rankings():
    order = list(range(30))
    assert agreement.scored([2, 0, 1]) == [2.0, 1.0, 3.0]
    swapped = agreement.second_first(order)
    assert swapped[:7] == [3, 4, 5, 0, 1, 2, 6] and swapped[6:] == order[6:]
    shuffled = agreement.top_only(order, random.Random(0))
    assert shuffled[:3] == [0, 1, 2] and sorted(shuffled) == order != shuffled


def test_kept_positions_change_nothing_behind_the_last_token(demo, truth):
    model, _ = demo
    rises = agreement.kept_positions(model, truth.ids, truth.answer)
    # nothing stands behind a token that is deleted in front of all others but for the shift, and a
    # rotary model knows distances alone: deleting the first token is the same either way
    assert rises[0] == pytest.approx(truth.rises[0], abs=1e-4)
    assert max(rises) > 1


def test_double_precision_is_double(demo, truth):
    model, _ = demo
    double = agreement._Double(model)
    found = leave_one_out(double, truth.ids, truth.answer, truth.positions[:4])
    assert found == pytest.approx(truth.rises[:4], abs=1e-5)
    assert double(torch.tensor([[5, 6]])).logits.float().dtype == torch.float64
    assert model.dtype == torch.float32


def test_a_small_run_of_agreement(tmp_path, monkeypatch):
    kept = {name: agreement.METHODS[name] for name in ("direct, min_shift",)}
    monkeypatch.setattr(agreement, "METHODS", kept)
    agreement.main(["--documents", "2", "--out", str(tmp_path)])
    rows = read(tmp_path / "studies-agreement.csv")
    assert {row["part"] for row in rows} == {"methods", "witness"}
    value = {(row["what"], row["measure"]): float(row["value"]) for row in rows}
    assert value["float64", "pairs"] == 1.0
    assert value["second tenth first", CORRELATION] > 0.9 > value["top tenth only", CORRELATION]
    assert value["leave-one-out", "negligible"] > 0.9
    assert (tmp_path / "studies-agreement.png").stat().st_size > 20_000


# --- settings -------------------------------------------------------------------------------


def test_every_setting_is_one_that_the_explainer_takes(demo, case):
    for method in ("direct", "exact"):
        several = settings.settings_of(method)
        assert len(set(several)) == len(several) and settings.default_of(method) in several
        for setting in several:
            Explainer(*demo, progress=False, **setting.arguments)
    paper = next(s for s in settings.settings_of("direct") if s.rule == "paper")
    assert "factor" not in paper.arguments
    found = settings.examine(*demo, case, 0, [settings.default_of("direct"), paper])
    default, other = found.values()
    assert default[settings.NEIGHBOURS] == 0.0 < other[settings.NEIGHBOURS]
    assert default["precision"] > other["precision"]


def test_what_is_chosen_on_one_half_is_reported_on_the_other():
    default = settings.default_of("direct")
    other = default._replace(factor=0.5, what="factor 0.5")

    def found(gap, rival):
        measures = dict.fromkeys(settings._SHOWN, 0.0)
        return {default: {**measures, GAP: gap}, other: {**measures, GAP: rival}}

    rows = settings.choice([found(1.0, 2.0)], [found(5.0, 3.0), found(5.0, 4.0)], "direct")
    (difference,) = [
        row
        for row in rows
        if row.what == "chosen: factor 0.5" and row.measure == settings.DIFFERENCE
    ]
    assert difference.value == -1.5 and difference.count == 2


# --- length ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("depth", "place"), [(0.0, 0), (0.5, 6), (1.0, 11)])
def test_evidence_is_planted(depth, place):
    others = [f"Other {number}." for number in range(11)]
    text, spans, found = length.planted("Here it is.", others, depth)
    assert found == place and text.count("\n\n") == 1
    assert [text[a:b] for a, b in spans][place] == "Here it is."
    assert len(spans) == 12 and all(text[a:b].endswith(".") for a, b in spans)


def test_texts_are_as_long_as_they_may_be(demo):
    _, tokenizer = demo
    for tokens in (64, 200):
        case = length.text_of(tokenizer, "seed", tokens, 0.5)
        count = len(tokenizer(case.prompt + case.answer)["input_ids"])
        assert tokens - 40 < count <= tokens
        assert case.text.count(case.answer.strip()) <= 1
    with pytest.raises(ValueError, match="must hold the evidence and another sentence, got 8"):
        length.text_of(tokenizer, "seed", 8, 0.5)


def test_distractors_do_not_state_what_is_asked():
    document = make_document(3)
    asked = document.questions[0]
    several = length.distractors(random.Random(0), document.kind, asked)
    for _ in range(50):
        assert asked.answer.strip() not in next(several)


def test_a_small_run_of_length_keeps_other_lengths(tmp_path, monkeypatch):
    monkeypatch.setattr(length, "DEPTHS", (0.0, 1.0))
    start = ["--documents", "2", "--costly", "1", "--out", str(tmp_path), "--lengths"]
    length.main([*start, "64"])
    length.main([*start, "4096"])
    rows = read(tmp_path / "studies-length.csv")
    assert {row["part"] for row in rows} == {"64 tokens", "4096 tokens"}
    (beyond,) = [row for row in rows if row["part"] == "4096 tokens"]
    assert beyond["what"].startswith("beyond the window of 2048") and beyond["count"] == "0"
    value = {(row["what"], row["method"], row["measure"]): float(row["value"]) for row in rows[:-1]}
    assert value["all depths", "", "right"] == value["all depths", "direct", "first"] == 1.0
    assert (tmp_path / "studies-length.png").stat().st_size > 10_000


# --- size -----------------------------------------------------------------------------------


def test_sizes_must_be_trained(tmp_path):
    with pytest.raises(ValueError, match=r"must hold a trained size .* got none; train them"):
        size.readers(tmp_path)


def test_a_small_run_of_size(demo, tmp_path, monkeypatch, capsys):
    model, tokenizer = demo
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "96x3" / "model")
    monkeypatch.setattr(size, "_FRESH", 4)
    monkeypatch.setattr(
        size, "METHODS", {"direct": {"method": "direct"}, "exact": {"method": "direct"}}
    )
    size.main(["--documents", "2", "--folder", str(tmp_path), "--out", str(tmp_path)])
    rows = read(tmp_path / "studies-size.csv")
    assert {row["part"] for row in rows} == {"readers", "own", "shared"}
    (same,) = {row["value"] for row in rows if row["measure"] == size.PARAMETERS}
    assert float(same) == model.num_parameters()
    assert "6B 65.5, 13B 64.8, 30B 63.6" in capsys.readouterr().out


def test_training_goes_by_the_recipe(tmp_path, monkeypatch):
    taken = []
    monkeypatch.setattr(size, "launch", lambda *arguments: taken.append(arguments))
    size.main(["--train", "64x2", "--folder", str(tmp_path)])
    ((work, workers, out, recipe, steps),) = taken
    assert work is size._train and workers == 1 and out == tmp_path / "64x2"
    assert (recipe.width, recipe.layers, recipe.tokens, steps) == (64, 2, 3072, 4000)


# --- signs ----------------------------------------------------------------------------------


def test_signs_by_hand():
    assert signs.additivity(3.0, 3.0) == 0.0
    assert signs.additivity(4.0, 1.0) == 0.75
    assert signs.additivity(0.0, 0.0) == 0.0
    assert signs.negative([3.0, -1.0, 0.0, 0.0]) == (0.25, 0.25)
    assert signs.negative([0.0]) == (0.0, 0.0)


def test_auroc_by_hand():
    value, low, high = signs.auroc([2.0, 3.0], [1.0, 2.0])
    assert value == 3.5 / 4 and low <= value <= high <= 1.0
    assert signs.auroc([2.0, 3.0], [0.0, 1.0]) == (1.0, 1.0, 1.0)
    assert math.isnan(signs.auroc([], [1.0])[0])


def test_what_is_bad():
    several = [
        signs.Found(precision=p, share=s, gap=g, signs={})
        for p, s, g in ((0.9, 0.9, 5.0), (0.4, 0.9, 1.0), (0.9, 0.1, 4.0))
    ]
    for reading, place in (("precision", 1), ("share", 2), (GAP, 1)):
        bad, good = signs.split(several, reading)
        assert bad == [several[place]] and len(good) == 2


@pytest.mark.parametrize(
    ("improbable", "spread", "faint", "doubted"),
    [
        (0.0, 1.0, -2.0, False),
        (0.06, 1.0, -2.0, True),
        (0.0, 1.6, -2.0, True),
        (0.0, 1.0, 0.0, True),
    ],
)
def test_one_sign_is_enough_for_doubt(improbable, spread, faint, doubted):
    own = {"improbable": improbable, "spread": spread, "faint": faint}
    found = signs.Found(precision=0.0, share=1.0, gap=0.0, signs=own)
    assert signs.doubtful(found) == doubted
    documents = {kind: [{"direct": found, "exact": found}] for kind in signs.KINDS}
    value = {(row.what, row.measure): row for row in signs.rule_rows(documents)}
    assert value["all; bad: precision below 0.5", "caught"].value == doubted
    assert value["all; bad: share below 0.5", "false alarms"].value == doubted
    assert value["all; bad: share below 0.5", "caught"].count == 0


def test_kinds_of_documents(demo):
    _, tokenizer = demo
    twice = signs.case_of("redundant", 0, tokenizer)
    assert len(twice.evidence) == 2
    for kind in ("absent", "removed"):
        assert signs.case_of(kind, 0, tokenizer).evidence == ()
    assert len(tokenizer(signs.case_of("long", 0, tokenizer).prompt)["input_ids"]) > 400


def test_a_redundant_document_is_faint(demo, case):
    (twice,) = signs.cases_of(*demo, "redundant", 1)
    faint = signs.examine(*demo, twice, 0)["direct"]
    plain = signs.examine(*demo, case, 0)["direct"]
    assert faint.share < 0.01 and faint.signs["faint"] > -0.01
    assert plain.share > 0.5 and plain.signs["faint"] < -1
    assert set(plain.signs) == set(signs.SIGNS)


def test_a_small_run_of_signs(tmp_path, monkeypatch):
    monkeypatch.setattr(signs, "KINDS", {"ordinary": 1.0, "redundant": 1.0, "absent": 1.0})
    every = dict.fromkeys(signs.POPULATIONS, tuple(signs.KINDS))
    monkeypatch.setattr(signs, "POPULATIONS", every)
    signs.main(["--documents", "2", "--out", str(tmp_path)])
    rows = read(tmp_path / "studies-signs.csv")
    assert {row["what"] for row in rows if row["part"] == "kinds"} == set(signs.KINDS)
    value = {
        (row["part"], row["method"], row["measure"]): row["value"]
        for row in rows
        if row["part"].startswith("AUROC")
    }
    assert float(value["AUROC, share below 0.5", "direct", "faint"]) > 0.5
