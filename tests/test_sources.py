"""Ranked sources of an answer and of each of its sentences."""

import json
import math
from dataclasses import replace

import pytest
import torch
from toy_explanations import explain
from toy_models import MODELS
from toy_tokenizers import byte_level, sentencepiece, unigram

from atman_triton import Explainer, load
from atman_triton.pieces import Document

DOCUMENTS = [
    {"id": "contract", "text": "The pay is 23 euros. It is good."},
    {"id": "atlas", "text": "Paris is the capital of France."},
]


def by_hand(**changes):
    """Two documents of words; the answer has two sentences, which rest on one word each."""
    e = explain(
        prompt="Read: pay 34 euros. Paris France. Q:",
        answer=" It is 34. In Paris.",
        scores={"Read:": 9.0, "pay": 1.0},
    )
    contract, atlas = (6, 19), (20, 33)

    def document(unit):
        spans = [index for index, (a, b) in enumerate((contract, atlas)) if a < unit.stop <= b]
        return spans[0] if spans and unit.part == "prompt" else None

    units = [replace(unit, document=document(unit)) for unit in e.units]
    suppressed = e.suppressed_logprobs.clone()
    for word, rows, score in (("34", range(0, 3), 6.0), ("Paris", range(3, 5), 4.0)):
        column = [unit.text.strip() for unit in units].index(word)
        for row in rows:
            suppressed[row, column] = e.base_logprobs[row] - score
    documents = [Document("contract", *contract), Document("atlas", *atlas)]
    fields = {"units": units, "documents": documents, "suppressed_logprobs": suppressed}
    return replace(e, **(fields | changes))


def test_sources_of_an_answer_and_its_sentences():
    e = by_hand()
    (answer,) = e.sources(top_k=3)["answers"]
    assert answer["text"] == " It is 34. In Paris."
    assert (
        answer["sources"]
        == [
            {
                "document": "contract",
                "start": 4,
                "stop": 6,
                "text": "34",
                "score": pytest.approx(3.6),
            },
            {
                "document": "atlas",
                "start": 0,
                "stop": 5,
                "text": "Paris",
                "score": pytest.approx(1.6),
            },
            {
                "document": "contract",
                "start": 0,
                "stop": 3,
                "text": "pay",
                "score": pytest.approx(1.0),
            },
        ]
        or answer["sources"][0]["text"].strip() == "34"
    )
    first, second = answer["sentences"]
    assert (first["text"].strip(), second["text"].strip()) == ("It is 34.", "In Paris.")
    assert answer["text"][first["start"] : first["stop"]] == first["text"]
    assert first["documents"] == [
        {"document": "contract", "score": pytest.approx(6.0)},
        {"document": "atlas", "score": pytest.approx(0.0)},
    ]
    assert [each["document"] for each in second["documents"]] == ["atlas", "contract"]
    assert second["sources"][0]["score"] == pytest.approx(4.0)
    texts = [each["text"] for each in e.sources()["answers"][0]["sources"]]
    assert "Read:" not in texts  # the strongest unit, but of no document


def test_spans_are_those_of_the_document():
    e = by_hand()
    given = ["pay 34 euros.", "Paris France."]
    ids = ["contract", "atlas"]
    (answer,) = e.sources()["answers"]
    assert len(answer["sources"]) == 5
    for source in answer["sources"]:
        text = given[ids.index(source["document"])]
        assert text[source["start"] : source["stop"]] == source["text"]
    scores = [source["score"] for source in answer["sources"]]
    assert scores == sorted(scores, reverse=True)


def test_what_was_not_measured_is_no_source_and_infinities_are_strings():
    e = by_hand()
    suppressed = e.suppressed_logprobs.clone()
    columns = {unit.text.strip(): index for index, unit in enumerate(e.units)}
    suppressed[:, columns["34"]] = math.nan
    suppressed[:, columns["pay"]] = -math.inf
    (answer,) = by_hand(suppressed_logprobs=suppressed).sources()["answers"]
    assert answer["sources"][0]["score"] == "inf"
    assert answer["documents"][0] == {"document": "contract", "score": "inf"}
    assert "34" not in [source["text"].strip() for source in answer["sources"]]
    json.dumps(answer, allow_nan=False)


def test_sources_follow_how_scores_are_read():
    assert by_hand(normalize=True).sources()["answers"][0]["documents"][0]["score"] <= 1
    squared = by_hand(postprocessing="square").sources()["answers"][0]
    assert squared["sentences"][0]["documents"][0]["score"] == pytest.approx(36.0)
    summed = by_hand(reduction="sum").sources()["answers"][0]
    assert summed["sentences"][0]["documents"][0]["score"] == pytest.approx(18.0)


@pytest.mark.parametrize("tokenizer", [sentencepiece(), byte_level()], ids=["pieces", "bytes"])
@pytest.mark.parametrize("granularity", ["word", "sentence", "document", "auto"])
def test_sources_of_a_model_s_answers(tokenizer, granularity, tmp_path):
    explainer = Explainer(MODELS["llama"](), tokenizer)
    answers = ["23. It is.", "Paris"]
    e = explainer.explain(
        "{documents}\n\nQ: A:", None, granularity, targets=answers, documents=DOCUMENTS
    )
    found = e.sources()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert [answer["text"].strip() for answer in found["answers"]] == answers
    assert [len(answer["sentences"]) for answer in found["answers"]] == [2, 1]
    given = {document["id"]: document["text"] for document in DOCUMENTS}
    for branch, answer in enumerate(found["answers"]):
        for source in answer["sources"]:
            text = given[source["document"]]
            assert text[source["start"] : source["stop"]] == source["text"]
        scores = [source["score"] for source in answer["sources"]]
        expected = e.relevances[branch][e.ranking(branch=branch)]
        torch.testing.assert_close(torch.tensor(scores), expected, rtol=0, atol=1e-6)
        # the whole of the second answer is its only sentence
        if branch == 1:
            assert answer["sentences"][0]["sources"] == answer["sources"]
        assert answer["documents"][0]["score"] == answer["sources"][0]["score"]
    e.save(tmp_path / "e.json")
    assert load(tmp_path / "e.json").sources() == found


def test_a_token_that_reaches_beyond_its_document_is_cut_to_it():
    explainer = Explainer(MODELS["llama"](), unigram())  # unknown characters are one token
    e = explainer.explain("The pay is <{documents}> euros", "23", documents=["日本"])
    assert [unit.text for unit in e.units] == ["<日本>"]
    (source,) = e.sources()["answers"][0]["sources"]
    assert (source["start"], source["stop"], source["text"]) == (0, 2, "日本")


def test_hierarchical_keeps_documents_apart():
    explainer = Explainer(MODELS["llama"](), byte_level(), method="hierarchical", budget=14)
    prompt = "Read: {documents} Q: A:"
    e = explainer.explain(prompt, "23", documents=["The pay is 23 euros.", "Hello world. Yes."])
    assert {unit.document for unit in e.units} == {0, 1}
    assert {unit.document for unit in e.coarse.units} == {0, 1}
    given = ["The pay is 23 euros.", "Hello world. Yes."]
    for unit in (*e.units, *e.coarse.units):
        assert unit.text.strip() in given[unit.document]
    assert len(e.sources()["answers"][0]["sources"]) == len(e.units)


def test_sources_of_nothing_are_refused():
    with pytest.raises(ValueError, match="sources needs documents; explain with documents="):
        explain().sources()
    with pytest.raises(ValueError, match="top_k must be at least 1, got 0"):
        by_hand().sources(top_k=0)
    with pytest.raises(TypeError, match="top_k must be an int or None, got '3'"):
        by_hand().sources(top_k="3")
