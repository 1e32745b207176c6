"""The command for the bottom rows of Fig. 19 in small, and its sums by hand."""

import csv
import dataclasses
import math

import pytest

pytest.importorskip("matplotlib")

from atman_triton.demo import load_demo_model
from atman_triton.demo.documents import make_document
from bench import figure19


@pytest.fixture(scope="module")
def demo():
    return load_demo_model()


def test_spread_by_hand():
    even = figure19.spread([2.0, -1.0, 2.0], math.log(0.25))
    assert even.effective == pytest.approx(2) and even.top == 0.5
    assert even.largest == 2 and even.likely == pytest.approx(0.25)
    assert figure19.spread([0.0, 3.0], 0.0).effective == 1
    assert figure19.spread([-1.0, -2.0, 0.0], 0.0).effective == pytest.approx(3)
    assert figure19.auroc([3.0, 2.0], [1.0, 2.0]) == (1 + 1 + 1 + 0.5) / 4


def test_questions_that_documents_do_not_answer():
    for number in range(20):
        document = make_document(f"absent-{number}")
        case = figure19.asked(f"test-{number}")
        assert case["removed"].question == case["answered"].question != case["absent"].question
        assert case["absent"].sentences == case["answered"].sentences
        assert len(case["removed"].sentences) == len(case["answered"].sentences) - 1
        asked = figure19.absent_question(figure19.random.Random(number), document)
        assert asked.endswith("?") and not set("[]{}|") & set(asked)
        assert asked not in {question.text for question in document.questions}


def test_relevance_of_sentences_is_that_of_their_units(demo):
    model, tokenizer = demo
    case = figure19.asked("test-0")["answered"]
    explainer = figure19.atman.Explainer(model, tokenizer, progress=False)
    by_token = explainer.explain(case.prompt)
    totals = figure19.relevances(by_token, case.sentences)
    inside = [
        u for u in by_token.units if u.stop <= sum(map(len, case.sentences)) + len(case.sentences)
    ]
    share = sum(float(by_token.relevance[by_token.units.index(unit)]) for unit in inside)
    assert sum(totals) == pytest.approx(share, abs=1e-5)
    by_sentence = explainer.explain(case.prompt, granularity="sentence")
    own = figure19.relevances(by_sentence, case.sentences)
    place = max(range(len(own)), key=own.__getitem__)
    (unit,) = [u for u in by_sentence.units if u.text.strip() == case.sentences[place]]
    assert own[place] == pytest.approx(float(by_sentence.relevance[by_sentence.units.index(unit)]))


def test_figure_19_in_small(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(figure19, "METHODS", ("direct",))
    figure19.main(["--documents", "2", "--out", str(tmp_path)])
    rows = _read(tmp_path / "figure19.csv")
    assert list(rows[0]) == [field.name for field in dataclasses.fields(figure19.Row)]
    assert {row["question"] for row in rows} == set(figure19.KINDS)
    for row in rows:
        assert 1 <= float(row["effective"]) <= 12 and 0 < float(row["top"]) <= 1
        if row["question"] == "answered":
            assert float(row["likely"]) > 0.9 and row["auroc"] == "0.5"
    assert (tmp_path / "figure19.png").stat().st_size > 20_000
    assert "effective sentences" in capsys.readouterr().out


def _read(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_one_document_has_no_standard_error(capsys):
    with pytest.raises(SystemExit, match="2"):
        figure19.main(["--documents", "1"])
    assert "at least 2 documents" in capsys.readouterr().err
