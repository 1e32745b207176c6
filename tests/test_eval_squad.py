"""SQuAD as its site and as the hub give it, and files that are neither."""

import json
import os
import re
from pathlib import Path

import pytest
import toy_models
import toy_tokenizers

from atman_triton import Explainer
from atman_triton.evaluate.data import load
from atman_triton.evaluate.data.squad import ELSEWHERE, EMPTY, NO_ANSWER, TWICE
from atman_triton.evaluate.statistics import statistics

CONTEXT = "Anna is 23. Her brother Ben is 30 years old."
SUBSET = os.environ.get("ATMAN_SQUAD")


def asked(name, question, *answers):
    return {
        "id": name,
        "question": question,
        "answers": [{"text": text, "answer_start": start} for text, start in answers],
    }


def document(*paragraphs, title="Two people"):
    return {
        "version": "1.1",
        "data": [
            {
                "title": title,
                "paragraphs": [
                    {"context": text, "qas": questions} for text, questions in paragraphs
                ],
            }
        ],
    }


GOOD = [
    asked("a", "How old is Anna?", ("23", 8), ("Anna is 23", 0)),
    asked("b", " Who is 30? ", ("Ben", 24)),
]
OTHER = ("It rains.", [asked("c", "What does it do?", ("rains", 3))])


def saved(folder, data):
    path = folder / "dev.json"
    path.write_text(json.dumps(data), encoding="utf-8")
    return path


def by_id(loaded):
    return {example.id: example for example in loaded.examples}


def test_prompt_target_and_label_are_those_of_the_paper(tmp_path):
    loaded = load("squad", limit=None, path=saved(tmp_path, document((CONTEXT, GOOD), OTHER)))
    found = by_id(loaded)
    assert set(found) == {"a", "b", "c"}
    first = found["a"]
    assert first.prompt == f"{CONTEXT} Q: How old is Anna? A:"
    assert first.target == "23" and first.labels == ((8, 10),)
    assert first.region == (0, len(CONTEXT))
    assert first.reworded == f"{CONTEXT} Question: How old is Anna? Answer:"
    assert first.facts["answers"] == ["23", "Anna is 23"]
    assert first.facts["questions"] == 2 and first.facts["context_words"] == 10
    assert first.group == "Two people #0" and found["c"].group == "Two people #1"
    assert found["b"].prompt.endswith(" Q: Who is 30? A:")
    assert loaded.notes == ["squad: 3 examples of 3 that were looked at"]


def test_what_cannot_be_rated_is_counted_with_its_reason(tmp_path):
    questions = [
        *GOOD,
        asked("none", "Where?"),
        asked("empty", "What?", (" ", 4)),
        asked("moved", "Who?", ("Ben", 23)),
        asked("behind", "Who?", ("old.", len(CONTEXT) - 3)),
        asked("negative", "Who?", ("old", -4)),
        asked("a", "Again?", ("Ben", 24)),
    ]
    loaded = load("squad", limit=None, path=saved(tmp_path, document((CONTEXT, questions))))
    assert set(by_id(loaded)) == {"a", "b"}
    assert by_id(loaded)["a"].target == "23"  # the first of that id
    assert loaded.notes[0] == "squad: 2 examples of 7 that were looked at"
    assert set(loaded.notes[1:]) == {
        f"squad: left out 3: {ELSEWHERE}",
        f"squad: left out 1: {NO_ANSWER}",
        f"squad: left out 1: {EMPTY}",
        f"squad: left out 1: {TWICE}",
    }


def test_spaces_around_an_answer_are_none_of_it(tmp_path):
    path = saved(tmp_path, document((CONTEXT, [asked("a", "How old?", (" 23. ", 7))])))
    [example] = load("squad", limit=None, path=path).examples
    assert example.target == "23." and example.labels == ((8, 11),)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "must have 'data' of type list, got None"),
        ({"data": [3]}, r"data\[0\] must have 'paragraphs' of type list"),
        (document((None, GOOD)), r"data\[0\].paragraphs\[0\] must have 'context' of type str"),
        (document(OTHER, (CONTEXT, [{"id": "x", "question": "?"}])),
         r"paragraphs\[1\].qas\[0\] must have 'answers' of type list"),
        (document((CONTEXT, [asked("a", "?", ("23", "8"))])),
         r"qas\[0\] must have 'answer_start' of type int, got '8'"),
        (document((CONTEXT, [asked(7, "?", ("23", 8))])), "must have 'id' of type str, got 7"),
        (document((CONTEXT, [asked("a", "?")])), f"no example: 1 looked at.*1: {NO_ANSWER}"),
    ],
)  # fmt: skip
def test_files_in_another_form_are_refused_by_name(tmp_path, data, message):
    with pytest.raises(ValueError, match=message):
        load("squad", limit=None, path=saved(tmp_path, data))


def test_files_that_are_no_json_are_refused_by_name(tmp_path):
    path = tmp_path / "dev.json"
    path.write_text('{"data": [')
    with pytest.raises(ValueError, match=f"{path} is no JSON: .*expected SQuAD's own form"):
        load("squad", limit=1, path=path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="is no JSON"):
        load("squad", limit=1, path=path)
    with pytest.raises(FileNotFoundError, match=r"there is no .*absent.json; dev-v1.1.json is at"):
        load("squad", limit=1, path=tmp_path / "absent.json")


def test_the_order_does_not_depend_on_the_limit_or_on_the_file(tmp_path):
    questions = [asked(f"q{n}", f"Who is {n}?", ("Ben", 24)) for n in range(40)]
    path = saved(tmp_path, document((CONTEXT, questions)))
    whole = [example.id for example in load("squad", limit=None, path=path).examples]
    assert whole != sorted(whole) and len(set(whole)) == 40
    for limit in (1, 7, 39, 99):
        some = load("squad", limit=limit, path=path)
        assert [example.id for example in some.examples] == whole[:limit]
    assert some.notes[-1] == "squad: fewer than the 99 asked for, as there are no more"
    path = saved(tmp_path, document((CONTEXT, questions[::-2])))
    kept = {question["id"] for question in questions[::-2]}
    half = [example.id for example in load("squad", limit=None, path=path).examples]
    assert half == [name for name in whole if name in kept]
    again = [example.id for example in load("squad", limit=None, path=path, seed=1).examples]
    assert again != half and sorted(again) == sorted(half)


def test_contexts_longer_than_the_window_are_left_out_exactly(tmp_path):
    tokenizer, model = toy_tokenizers.byte_level(), toy_models.llama()
    size = [len(tokenizer(text)["input_ids"]) for text in ("xxxxx Q: ? A:", "xxxxxx Q: ? A:", " x")]
    assert size[1] == size[0] + 1  # every x is a token
    room = toy_models.WINDOW - (size[0] - 5) - (size[2] - 1)  # the answer's last one is not read
    long = ("x" * (room + 1), [asked("long", "?", ("x", 0))])
    fits = ("x" * room, [asked("fits", "?", ("x", 0))])
    path = saved(tmp_path, document(long, fits))
    loaded = load("squad", limit=None, path=path, model=model, processor=tokenizer)
    [example] = loaded.examples
    assert example.id == "fits" and example.reworded is None  # longer words, no room for them
    assert "squad: left out 1: longer than the model's context window" in loaded.notes
    assert example.facts["context_tokens"] == room and example.facts["label_tokens"] == 1
    explainer = Explainer(model, tokenizer, progress=False)
    explainer.explain(example.prompt, example.target, explain_only=example.region)
    with pytest.raises(ValueError, match="must fit into the context window"):
        explainer.explain(f"{long[0]} Q: ? A:", "x")


ROWS = [
    {"id": "a", "title": "T", "context": CONTEXT, "question": "How old is Anna?",
     "answers": {"text": ["23", "23."], "answer_start": [8, 8]}},
    {"id": "c", "title": "T", "context": "It rains.", "question": "What does it do?",
     "answers": {"text": ["rains"], "answer_start": [3]}},
    {"id": "b", "title": "T", "context": CONTEXT, "question": "Who is 30?",
     "answers": {"text": ["Ben"], "answer_start": [24]}},
]  # fmt: skip


def test_rows_of_the_hub_give_the_same_examples(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list(ROWS)
    calls = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: calls.append((a, k)) or rows)
    flat = by_id(load("squad", limit=None))
    assert calls == [(("rajpurkar/squad",), {"split": "validation"})]
    nested = by_id(
        load("squad", limit=None, path=saved(tmp_path, document((CONTEXT, GOOD), OTHER, title="T")))
    )
    assert list(flat) == list(nested)
    for name, example in nested.items():
        other = flat[name]
        assert (example.prompt, example.target, example.labels, example.group) == (
            (other.prompt, other.target, other.labels, other.group)
        )
        assert example.facts["questions"] == other.facts["questions"]
    rows.save_to_disk(tmp_path / "split")
    assert list(by_id(load("squad", limit=None, path=tmp_path / "split"))) == list(flat)
    datasets.DatasetDict({"validation": rows}).save_to_disk(tmp_path / "whole")
    assert list(by_id(load("squad", limit=None, path=tmp_path / "whole"))) == list(flat)
    datasets.DatasetDict({"train": rows}).save_to_disk(tmp_path / "train")
    with pytest.raises(
        ValueError, match="must hold a split 'validation' or be one split, got train"
    ):
        load("squad", limit=None, path=tmp_path / "train")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(FileNotFoundError, match="nothing holds no dataset that datasets saved"):
        load("squad", limit=None, path=tmp_path / "nothing")


def test_a_hub_that_cannot_be_reached_names_the_way_out(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def refused(*args, **kwargs):
        raise ConnectionError("Couldn't reach 'rajpurkar/squad' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", refused)
    with pytest.raises(
        ConnectionError,
        match=r"rajpurkar/squad could not be read from the .* Give the path of a local",
    ):
        load("squad", limit=5)


def test_malformed_rows_are_named(monkeypatch):
    datasets = pytest.importorskip("datasets")
    uneven = ROWS[0] | {"answers": {"text": ["23"], "answer_start": []}}
    for rows, message in (
        ([ROWS[1], uneven], "row 1 of the data has 1 answers and 0 offsets"),
        ([{"id": "a"}], "row 0 of the data must have 'title' of type str"),
        ([ROWS[0] | {"answers": [3]}], "row 0 of the data must have 'answers' of type Mapping"),
    ):
        monkeypatch.setattr(datasets, "load_dataset", lambda *a, rows=rows, **k: rows)
        with pytest.raises(ValueError, match=re.escape(message)):
            load("squad", limit=None)


def test_statistics_count_paragraphs_once(tmp_path):
    path = saved(tmp_path, document((CONTEXT, GOOD), OTHER))
    found = statistics(load("squad", limit=None, path=path).examples)
    assert sorted(found.values["questions on a paragraph"]) == [1, 2]
    assert sorted(found.values["words in a context"]) == [2, 10, 10]
    assert found.values["words in a label"] == [1, 1, 1]


@pytest.mark.skipif(SUBSET is None, reason="ATMAN_SQUAD names no file of SQuAD v1.1")
def test_a_real_file_is_read_whole():
    loaded = load("squad", limit=None, path=Path(SUBSET))
    assert len(loaded.examples) >= 100
    for example in loaded.examples:
        [label] = example.labels
        assert example.prompt[slice(*label)] == example.target
        assert label[1] <= example.region[1]
