"""What is made to be evaluated on, and how it is taken out of a stream."""

import math
import random
from functools import cache

import numpy as np
import pytest
import seq2seq_models
import torch
import toy_models

import atman_triton as atman
from atman_triton.demo import load_demo_model, make_document, prompt
from atman_triton.demo.documents import reworded
from atman_triton.demo.evaluate import fresh_case
from atman_triton.demo.shapes import KINDS, load_shapes_model, make_picture
from atman_triton.demo.shapes.evaluate import name_chances
from atman_triton.evaluate import Example
from atman_triton.evaluate.data import DATASETS, load
from atman_triton.evaluate.data.asking import Asking, within
from atman_triton.evaluate.data.contracts import WRONG
from atman_triton.evaluate.data.gather import Skipped, gather, shuffled
from atman_triton.evaluate.data.shapes import LEAST_CHANCE, UNLIKELY
from atman_triton.evaluate.labels import label, rated
from atman_triton.evaluate.statistics import Statistics, statistics
from atman_triton.stacks import UnsupportedModelError

reader = cache(load_demo_model)
seer = cache(load_shapes_model)


def test_what_is_asked_for_is_checked_by_name():
    for arguments, error, message in (
        ({"name": "squat"}, ValueError, "name must be one of squad, openimages, contracts, shapes"),
        ({"limit": 0}, ValueError, "limit must be an int of at least 1 or None, got 0"),
        ({"limit": True}, ValueError, "limit must be an int .* got True"),
        ({"limit": None}, ValueError, "limit must be an int, as contracts have no end"),
        ({"seed": "1"}, TypeError, "seed must be an int, got '1'"),
        ({"path": "x"}, ValueError, "path is for data that is read, but contracts are made"),
        ({"images": "x"}, ValueError, "images is for openimages, but name is 'contracts'"),
        ({"model": torch.nn.Linear(1, 1)}, TypeError, "Linear"),
        ({"model": seq2seq_models.t5()}, UnsupportedModelError, "for decoders alone, got T5For"),
    ):
        with pytest.raises(error, match=message):
            load(**{"name": "contracts", "limit": 1} | arguments)
    assert set(DATASETS) == {"squad", "openimages", "contracts", "shapes"}


# --- the stream ---------------------------------------------------------------------------------


def test_enough_are_taken_and_the_others_counted():
    stream = [1, Skipped("odd"), 2, Skipped("odd"), Skipped("new"), 3, Skipped("late")]
    found = gather("numbers", iter(stream), 3)
    assert found.kept == [1, 2, 3]
    assert found.notes == [
        "numbers: 3 examples of 6 that were looked at",
        "numbers: left out 2: odd",
        "numbers: left out 1: new",
    ]
    assert gather("numbers", stream, None).notes[0].endswith("of 7 that were looked at")
    few = gather("numbers", stream, 4)
    assert few.kept == [1, 2, 3]
    assert few.notes[-1] == "numbers: fewer than the 4 asked for, as there are no more"


def test_too_many_in_a_row_that_are_left_out_end_the_stream():
    stream = [1, *[Skipped("odd")] * 2, 2, *[Skipped("odd")] * 3, 3]
    found = gather("numbers", stream, 3, patience=3)
    assert found.kept == [1, 2]
    assert found.notes[-1] == "numbers: fewer than the 3 asked for, as 3 in a row were left out"
    apart = [Skipped("odd"), Skipped("odd"), 1, Skipped("odd"), Skipped("odd"), 2]
    assert gather("numbers", apart, 2, patience=3).kept == [1, 2]
    with pytest.raises(ValueError, match="numbers gave no example: 3 looked at, left out 3: odd"):
        gather("numbers", [Skipped("odd")] * 9, 1, patience=3)
    with pytest.raises(ValueError, match="numbers gave no example: 0 looked at, left out none"):
        gather("numbers", [], 1)


def test_an_order_by_names_keeps_when_some_are_missing():
    names = [str(number) for number in range(50)]
    whole = shuffled(names, str, 0)
    assert whole != names and sorted(whole) == sorted(names)
    assert shuffled(names[::3][::-1], str, 0) == [name for name in whole if name in names[::3]]
    assert shuffled(names, str, 1) != whole


# --- contracts ----------------------------------------------------------------------------------


@cache
def some_contracts():
    return load("contracts", limit=60)


def test_a_contract_is_labelled_with_the_value_that_is_asked_for():
    forms = set()
    for number, example in enumerate(some_contracts().examples):
        document, question = fresh_case(number, "evaluate-0")
        assert example.id == f"contracts-0-{number}" and example.group == document.kind
        assert example.prompt == prompt(document, question) and example.target == question.answer
        assert example.region == (0, len(document.text))
        [(start, stop)] = example.labels
        first, last = example.facts["evidence"]
        assert example.prompt[first:last] == document.sentences[question.evidence]
        assert first <= start < stop <= last
        value = example.prompt[start:stop]
        assert value in [
            fact.value for fact in document.facts if fact.sentence == question.evidence
        ]
        assert example.prompt[first:last].count(value) == 1
        forms.add(question.form)
        if question.form == "plain":
            assert f" {value}" == example.target
        assert (example.facts["sentences"], example.facts["form"]) == (
            (len(document.sentences), question.form)
        )
        assert "context_tokens" not in example.facts
    assert forms == {"plain", "digits", "country"}
    assert some_contracts().notes[-1].startswith("contracts: no model was given")


def test_a_reworded_question_asks_for_the_same():
    for number, example in enumerate(some_contracts().examples):
        document, question = fresh_case(number, "evaluate-0")
        other = reworded(random.Random(number), document, question)
        assert other.text != question.text
        assert other._replace(text=question.text) == question
        assert (question.form == "digits") == other.text.endswith(", in digits?")
        assert ("country" in question.text) == ("country" in other.text)
        assert "{" not in other.text and "[" not in other.text
        assert example.reworded != example.prompt
        assert example.reworded.startswith(f"{document.text} Q: ")


def test_a_fact_with_one_way_to_ask_has_no_other(monkeypatch):
    from atman_triton.demo import facts

    document, question = make_document(3), make_document(3).questions[0]
    own = facts.FACTS[document.kind]
    one = {
        value_type: tuple(fact._replace(questions=("[How|What]?",)) for fact in of_type)
        for value_type, of_type in own.items()
    }
    monkeypatch.setitem(facts.FACTS, document.kind, one)
    plain = question._replace(text="How?", form="plain")
    assert reworded(random.Random(0), document, plain).text == "What?"
    one = {
        value_type: tuple(fact._replace(questions=("How?",)) for fact in of_type)
        for value_type, of_type in own.items()
    }
    monkeypatch.setitem(facts.FACTS, document.kind, one)
    assert reworded(random.Random(0), document, plain) is None


def test_fresh_documents_do_not_depend_on_the_limit_but_on_the_seed():
    ids = [example.prompt for example in some_contracts().examples]
    assert [example.prompt for example in load("contracts", limit=7).examples] == ids[:7]
    others = [example.prompt for example in load("contracts", limit=7, seed=1).examples]
    assert not set(others) & set(ids)


def test_only_documents_that_the_model_answers_are_kept(monkeypatch):
    model, tokenizer = reader()
    loaded = load("contracts", limit=4, model=model, processor=tokenizer)
    plain = {example.id: example for example in some_contracts().examples}
    for example in loaded.examples:
        assert example.prompt == plain[example.id].prompt
        assert example.facts["context_tokens"] >= example.facts["context_words"]
        explainer = atman.Explainer(model, tokenizer, progress=False)
        found = explainer.explain(example.prompt, example.target, explain_only=example.region)
        assert len(rated(found, example)) == example.facts["context_tokens"] == len(found.units)
        assert label(found, example).sum() == example.facts["label_tokens"]
    monkeypatch.setattr("atman_triton.evaluate.data.contracts._PATIENCE", 3)
    untrained = toy_models.llama(vocab_size=4000, max_position_embeddings=512)
    with pytest.raises(ValueError, match=f"contracts gave no example: 3 .* left out 3: {WRONG}"):
        load("contracts", limit=1, model=untrained, processor=tokenizer)
    with pytest.raises(ValueError, match="left out 3: longer than the model's context window"):
        load("contracts", limit=1, model=toy_models.llama(vocab_size=4000), processor=tokenizer)


def test_an_answer_is_right_if_the_model_writes_it_and_stops():
    model, tokenizer = reader()
    asking = Asking(model, tokenizer)
    [example] = load("contracts", limit=1, model=model, processor=tokenizer).examples
    found = asking.said(example.prompt, example.target)
    assert found.right
    logprobs = atman.Explainer(model, tokenizer, progress=False).explain(
        example.prompt, example.target
    )
    assert found.chance == pytest.approx(math.exp(float(logprobs.base_logprobs.sum())), abs=1e-5)
    assert not asking.said(example.prompt, " Bavaria").right
    # The first token alone is right too, but the model goes on with the rest of the word.
    ids = tokenizer(example.target)["input_ids"]
    rest = [str(tokenizer.decode(ids[:count])) for count in range(1, len(ids))]
    assert not any(asking.said(example.prompt, part).right for part in rest if part.strip())


@pytest.mark.parametrize(
    ("answer", "behind", "right"),
    [
        (" 23", " EUR", True),
        (" 23", ". Next", True),
        (" 23", "\n4", True),
        (" 23", "", True),
        (" 23", "4", False),
        (" 23", ".50", False),
        (" 23", "-year", False),
        (" Ann", "a", False),
        (" Ann", "'s", False),
    ],
)
def test_what_follows_an_answer_may_not_be_the_rest_of_it(answer, behind, right, monkeypatch):
    """A model that writes one text, a character a token."""
    asking = Asking(*reader())
    end = ord("Z")  # a letter, were it not the end
    written = [*(ord(character) for character in answer + behind), end]

    def logprobs(inputs, before, count):
        found = torch.zeros(count, 256)
        for row in range(count):
            place = min(len(before) - count + 1 + row, len(written) - 1)
            found[row, written[place]] = 1.0
        return found

    class Characters:
        def decode(self, ids):
            return "".join(map(chr, ids))

    monkeypatch.setattr(asking, "_logprobs", logprobs)
    monkeypatch.setattr(asking, "_ends", {end})
    monkeypatch.setattr(asking.task, "tokenizer", Characters())
    ids = [ord(character) for character in answer]
    assert asking._ends_there({}, ids, written[len(ids)]) == right


def test_a_shorter_limit_of_answered_documents_is_the_beginning_of_a_longer_one():
    model, tokenizer = reader()
    first = load("contracts", limit=2, model=model, processor=tokenizer, seed=3)
    more = load("contracts", limit=4, model=model, processor=tokenizer, seed=3)
    assert [e.id for e in more.examples][:2] == [e.id for e in first.examples]


# --- shapes -------------------------------------------------------------------------------------


def test_a_picture_is_labelled_with_the_object_that_is_named():
    firsts = 0
    for number, example in enumerate(load("shapes", limit=12).examples):
        picture = make_picture(f"evaluate-shapes-0-{number}", 2, balanced=True)
        [named] = [shape for shape in picture.objects if f" {shape.name}" == example.target]
        [other] = [shape for shape in picture.objects if shape is not named]
        firsts += named is picture.objects[0]
        assert np.array_equal(example.mask, named.mask) and example.group == named.kind
        assert example.group in KINDS and example.facts["other"] == other.name
        image, text = example.prompt
        assert text == "This is a picture of a" and image.tobytes() == picture.image.tobytes()
        assert example.reworded[0] is image and example.reworded[1] != text
        assert example.facts["mask_share"] == named.mask.mean()
        assert example.is_picture and example.region is None
    assert 2 <= firsts <= 10


def test_only_names_that_the_model_finds_likely_are_kept():
    model, processor = seer()
    loaded = load("shapes", limit=2, model=model, processor=processor)
    for example in loaded.examples:
        number = int(example.id.split("-")[-1])
        picture = make_picture(f"evaluate-shapes-0-{number}", 2, balanced=True)
        names = [f" {shape.name}" for shape in picture.objects]
        chance = name_chances(model, processor, picture)[names.index(example.target)]
        assert example.facts["chance"] == pytest.approx(chance, abs=1e-4)
        assert example.facts["chance"] >= LEAST_CHANCE


def test_unlikely_names_are_counted(monkeypatch):
    model, processor = seer()
    chances = iter([0.05, 0.2, 0.3, 0.5, 0.09])
    said = Asking.said
    monkeypatch.setattr(Asking, "said", lambda *args: said(*args)._replace(chance=next(chances)))
    loaded = load("shapes", limit=2, model=model, processor=processor)
    assert [example.id for example in loaded.examples] == ["shapes-0-1", "shapes-0-2"]
    assert loaded.examples[0].reworded is not None and loaded.examples[1].reworded is None
    assert f"shapes: left out 1: {UNLIKELY}" in loaded.notes
    assert loaded.notes[-1] == "shapes: 1 without another prompt that keeps the name's chance"


# --- numbers of a data set ----------------------------------------------------------------------


def test_tokens_within_a_passage_are_those_with_more_than_its_whitespace():
    words = Asking(*reader()).tokens("Anna is 23. Q: Who? A:")
    assert within(words, (0, len(words.text))) == len(words)
    assert within(words, (4, 5)) == 0
    assert within(words, (8, 10)) == within(words, (7, 10)) >= 1


def test_statistics_of_a_case_worked_by_hand():
    def example(group, **facts):
        return Example(group, "x", "y", (0, 1), ((0, 1),), group=group, facts=facts)

    found = statistics(
        [
            example("p", paragraph="p", questions=2, context_words=1),
            example("p", paragraph="p", questions=2, context_words=2),
            example("q", paragraph="q", questions=5, context_words=3),
            example("q", paragraph="q", questions=5, context_words=10),
        ]
    )
    assert found.examples == 4
    words, questions = found.rows()
    assert words == {
        "quantity": "words in a context",
        "count": 4,
        "mean": 4.0,
        "least": 1.0,
        "lower_quartile": 1.75,
        "median": 2.5,
        "upper_quartile": 4.75,
        "most": 10.0,
    }
    assert found.values["questions on a paragraph"] == [2.0, 5.0] and questions["count"] == 2
    assert Statistics(**found.to_json()) == found
    with pytest.raises(ValueError, match="examples must hold one at least, got none"):
        statistics([])
    with pytest.raises(ValueError, match="examples of 'p' differ in 'questions'"):
        statistics(
            [example("p", paragraph="p", questions=2), example("p", paragraph="p", questions=3)]
        )


def test_statistics_of_pictures_count_classes():
    found = statistics(load("shapes", limit=9).examples)
    assert sum(found.values["images of a class"]) == 9
    assert len(found.values["share of a picture that its mask covers"]) == 9
