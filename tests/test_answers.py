"""Passages of an answer, parts of it, and documents, through the whole explainer."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from toy_models import MODELS, llama, plain_loop
from toy_tokenizers import byte_level, sentencepiece

from atman_triton import Delimiter, Explainer
from atman_triton.explanation import load

TOKENIZER = sentencepiece()
PROMPT = "Q: What is the pay per hour? A:"
ANSWER = "The pay per hour is 23 euros. It is good. Yes."


def explainer(tokenizer: Any = TOKENIZER, **changes) -> Explainer:
    return Explainer(MODELS["llama"](), tokenizer, **changes)


# --- target_span --------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["exact", "direct"])
@pytest.mark.parametrize("name", MODELS)
def test_a_passage_of_an_answer_is_scored_as_by_one_forward_per_unit(name, method):
    model = MODELS[name]()
    e = Explainer(model, TOKENIZER, method=method).explain(PROMPT, ANSWER, target_span="23 euros")
    words = TOKENIZER(PROMPT).input_ids
    ids = words + TOKENIZER(ANSWER, add_special_tokens=False).input_ids
    scored = [target.token_id for target in e.targets]
    first = e.targets[0].token
    assert scored == ids[first : first + len(scored)]
    assert "".join(target.text for target in e.targets).strip().startswith("23 euros")
    read = ids[: first + len(scored) - 1]
    units = [unit.tokens for unit in e.units]
    assert units == [(token,) for token in range(1, len(read))]  # all but BOS
    loop = plain_loop(
        model,
        read,
        scored,
        units,
        0.1,
        "min_shift",
        first_row=first - 1 if method == "direct" else 0,
    )
    torch.testing.assert_close(e.base_logprobs, loop[0], rtol=0, atol=1e-4)
    reaches = torch.tensor([[unit.tokens[0] < t.token for unit in e.units] for t in e.targets])
    assert torch.equal(e.scores.isnan(), ~reaches)
    torch.testing.assert_close(
        e.suppressed_logprobs[reaches], loop[1:].T[reaches], rtol=0, atol=1e-4
    )


def test_what_stands_around_the_passage():
    e = explainer().explain(PROMPT, ANSWER, target_span="23 euros", granularity="word")
    assert e.answer == " The pay per hour is 23 euros."  # the full stop is in the same token
    context = [unit for unit in e.units if unit.part == "target"]
    assert [unit.text.strip() for unit in context][:5] == ["The", "pay", "per", "hour", "is"]
    assert {unit.branch for unit in context} == {0}
    for unit in e.units:
        assert e.text[unit.start : unit.stop] == unit.text
    last = e.left_out[-1]
    assert (last.text, last.tokens) == (" It is good. Yes.", ())
    assert last.reason == "behind target_span, not run"
    assert e.provenance["target_span"] == [20, 28]
    assert [part.text.strip() for part in e.parts] == ["23 euros."]


def test_a_passage_by_characters_is_the_same():
    one = explainer().explain(PROMPT, ANSWER, target_span="23 euros")
    other = explainer().explain(PROMPT, ANSWER, target_span=(20, 28))
    assert torch.equal(one.scores.nan_to_num(), other.scores.nan_to_num())
    assert one.targets == other.targets


def test_a_passage_of_what_the_model_writes():
    whole = explainer().explain(PROMPT, max_new_tokens=6)
    start, stop = whole.targets[2].start, whole.targets[3].stop
    assert start is not None and stop is not None
    span = (start - whole.prompt_stop, stop - whole.prompt_stop)
    e = explainer(method="exact").explain(PROMPT, max_new_tokens=6, target_span=span)
    places = [(t.token, t.start or 0, t.stop or 0) for t in whole.targets]
    inside = [token for token, first, last in places if first < stop and start < last]
    assert [target.token for target in e.targets] == inside
    assert e.provenance["target"] == "generated"
    row = e.targets[0].token - whole.targets[0].token
    exact = explainer(method="exact").explain(PROMPT, max_new_tokens=6)
    columns = [exact.units.index(unit) for unit in e.units]
    count = len(e.targets)
    torch.testing.assert_close(
        e.scores, exact.scores[row : row + count][:, columns], rtol=0, atol=1e-4, equal_nan=True
    )


@pytest.mark.parametrize("similarity", [None, 0.3])
@pytest.mark.parametrize("method", ["hierarchical", "hybrid", "path"])
def test_every_method_takes_a_passage(method, similarity):
    if method == "path" and similarity is not None:
        pytest.skip("gradients suppress no neighbours")
    budget = None if method == "path" else 12
    explained = explainer(method=method, similarity=similarity, budget=budget)
    e = explained.explain(PROMPT, ANSWER, target_span="23 eu")
    assert {unit.branch for unit in e.units if unit.part == "target"} == {0}
    for unit in e.units:
        for near in unit.neighbours:
            assert (near.branch is None) == (near.token < len(TOKENIZER(PROMPT).input_ids))


def test_what_stands_before_a_passage_is_divided_like_the_prompt():
    explained = explainer(method="hierarchical", budget=4)
    e = explained.explain(PROMPT, "The pay is good. " * 5 + "23", target_span="23")
    assert e.coarse is not None
    coarse = [unit for unit in e.coarse.units if unit.part == "target"]
    assert [unit.text.strip() for unit in coarse] == ["The pay is good. " * 4 + "The pay is good."]
    assert {unit.branch for unit in coarse} == {0}


def test_a_long_answer_is_read_only_up_to_the_passage():
    words = [5] * 60
    e = explainer(None).explain(words, [6] * 4)
    assert len(e.targets) == 4
    long = "Hello " * 60
    e = explainer().explain("Hello", long, target_span=(0, 5))
    assert e.answer.strip() == "Hello"


def test_a_passage_needs_text():
    with pytest.raises(ValueError, match="target_span needs text, but without a tokenizer"):
        explainer(None).explain([5, 6], [7, 8], target_span=(0, 1))
    with pytest.raises(ValueError, match="target_span ' ' holds no token: only whitespace"):
        explainer().explain(PROMPT, "23 euros", target_span=" ")
    with pytest.raises(ValueError, match=r"'23' occurs 2 times in the completion; .* \(0, 2\)"):
        explainer().explain(PROMPT, "23 23", target_span="23")


# --- parts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer", [TOKENIZER, byte_level()], ids=["pieces", "bytes"])
@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ("complete", [ANSWER, "No, it is not. It is 5."]),
        (
            "sentence",
            [
                "The pay per hour is 23 euros.",
                "It is good.",
                "Yes.",
                "No, it is not.",
                "It is 5.",
            ],
        ),
        ("word", [*ANSWER.split(), "No,", "it", "is", "not.", "It", "is", "5."]),
        ("token", None),
    ],
)
def test_parts_of_answers(tokenizer, size, expected):
    answers = [ANSWER, "No, it is not. It is 5."]
    e = explainer(tokenizer).explain(PROMPT, targets=answers, target_granularity=size)
    if expected is not None:
        assert [part.text.strip() for part in e.parts] == expected
    rows = [row for part in e.parts for row in part.rows]
    assert rows == list(range(len(e.targets)))
    for part in e.parts:
        assert e.text[part.start : part.stop] == part.text
        assert {e.targets[row].branch for row in part.rows} == {part.branch}
    spans = [(part.start or 0, part.stop or 0) for part in e.parts]
    assert all(a[1] <= b[0] for a, b in pairwise(spans))


def test_parts_change_no_score(tmp_path):
    plain = explainer().explain(PROMPT, ANSWER)
    e = explainer().explain(PROMPT, ANSWER, target_granularity="sentence")
    assert torch.equal(e.scores.nan_to_num(), plain.scores.nan_to_num())
    e.save(tmp_path / "e.json")
    assert load(tmp_path / "e.json") == e


def test_parts_of_ids_without_a_text():
    e = explainer(None).explain([5, 6], [7, 8], target_granularity="token")
    assert [part.rows for part in e.parts] == [(0,), (1,)]


# --- chunks -------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["paragraph", Delimiter("\n\n")], ids=str)
def test_a_document_of_50_chunks_costs_50_runs(granularity):
    """The paper's document question answering: each paragraph suppressed as one."""
    chunks = [f"The pay in {number} is 23 euros. Is it?" for number in range(50)]
    prompt = "\n\n".join([*chunks]) + "\n\n"
    model = llama(max_position_embeddings=2048)
    explainer = Explainer(model, byte_level(), method="exact")
    e = explainer.explain(
        prompt + "Q: pay? A:", "23", granularity, explain_only=prompt, target_granularity="complete"
    )
    assert [unit.text.strip() for unit in e.units] == chunks
    assert e.provenance["exact_runs"] == 50
    assert e.provenance["runs"] == 51  # and the base run
    assert all(len(unit.tokens) > 5 for unit in e.units)
