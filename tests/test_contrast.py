"""``explain(contrast_target=, postprocessing=, normalize=)``: what the explanation then is."""

import re
from typing import Any

import pytest
import torch
from test_explain import PROMPT, TOKENIZER, explainer

from atman_triton import load

A, B = "23 euros.", "The pay"


def ids(text):
    return TOKENIZER(text, add_special_tokens=False).input_ids


@pytest.mark.parametrize("method", ["direct", "exact", "hybrid", "hierarchical", "path"])
def test_a_contrast_is_two_targets_in_one_pass(method):
    e = explainer(method=method).explain(PROMPT, A, contrast_target=B)
    both = explainer(method=method).explain(PROMPT, targets=[A, B])
    assert e.contrast and not both.contrast
    assert e.answers == both.answers == [" 23 euros.", " The pay"]
    torch.testing.assert_close(e.scores, both.scores, equal_nan=True)
    first, second = both.relevances
    torch.testing.assert_close(e.relevance, first - second, equal_nan=True)
    assert e.relevance.isnan().tolist() == [unit.part == "target" for unit in e.units]
    assert not (e.relevance.nan_to_num() == 0).all()


def test_the_other_way_round_it_is_the_opposite():
    one = explainer().explain(PROMPT, A, contrast_target=B)
    other = explainer().explain(PROMPT, B, contrast_target=A)
    known = ~one.relevance.isnan()
    torch.testing.assert_close(
        one.relevance[known], -other.relevance[: int(known.sum())], rtol=1e-4, atol=1e-5
    )


def test_targets_may_be_token_ids_and_the_first_one_generated(tmp_path):
    by_text = explainer().explain(PROMPT, A, contrast_target=B)
    by_ids = explainer().explain(PROMPT, ids(A), contrast_target=ids(B))
    torch.testing.assert_close(by_ids.scores, by_text.scores, equal_nan=True)
    e = explainer().explain(PROMPT, contrast_target=B, max_new_tokens=3)
    alone = explainer().explain(PROMPT, max_new_tokens=3)
    assert e.contrast
    assert e.answers == [alone.answer, " The pay"]
    known = e.provenance
    assert (known["target"], known["separator"]) == ("generated", [" "])
    torch.testing.assert_close(
        e.branch(0).scores, alone.scores, equal_nan=True, rtol=1e-4, atol=1e-5
    )
    e.save(tmp_path / "a.json")
    assert load(tmp_path / "a.json") == e


def test_the_end_of_a_generated_answer_belongs_to_it_alone():
    e = explainer().explain(PROMPT, contrast_target=B, max_new_tokens=3)
    ends = [piece for piece in e.left_out if "end of text" in piece.reason]
    assert [piece.branch for piece in ends] == [0]
    assert [p for p in e.branch(1).left_out if "end of text" in p.reason] == []


def test_how_scores_are_read_is_asked_for():
    plain = explainer().explain(PROMPT, A)
    e = explainer().explain(PROMPT, A, postprocessing="square", normalize=True)
    assert (plain.postprocessing, plain.normalize) == ("none", False)
    assert (e.postprocessing, e.normalize) == ("square", True)
    torch.testing.assert_close(e.scores, plain.scores, equal_nan=True)
    known = e.relevance[~e.relevance.isnan()]
    assert (known.min(), known.max()) == (0, 1)
    sums = plain.scores.square().nansum(0) / (~plain.scores.isnan()).sum(0)
    squares = explainer().explain(PROMPT, A, postprocessing="square")
    torch.testing.assert_close(squares.relevance, sums)


def test_larger_units_are_read_alike():
    text = "The pay is 23 euros. " * 8 + PROMPT
    hierarchical = explainer(method="hierarchical", budget=1.0)
    e = hierarchical.explain(text, A, postprocessing="absolute", normalize=True)
    assert e.coarse is not None
    assert (e.coarse.postprocessing, e.coarse.normalize) == ("absolute", True)
    assert e.coarse.relevance.max() == 1


def test_the_postprocessing_is_the_presets(monkeypatch):
    import dataclasses

    from atman_triton import explain

    preset = dataclasses.replace(explain.PRESETS["default"], postprocessing="absolute")
    monkeypatch.setitem(explain.PRESETS, "default", preset)
    assert explainer().explain(PROMPT, A).postprocessing == "absolute"
    assert explainer().explain(PROMPT, A, postprocessing="none").postprocessing == "none"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"targets": [A], "contrast_target": B},
            TypeError,
            "contrast_target is compared with one target; give target, not targets.",
        ),
        (
            {"target": A, "contrast_target": 5},
            TypeError,
            "contrast_target must be a str or a sequence of token ids, got 5.",
        ),
        (
            {"target": A, "contrast_target": A},
            ValueError,
            "contrast_target must differ from the target, but both are ' 23 euros.'.",
        ),
        ({"target": A, "contrast_target": ""}, ValueError, "target must not be empty."),
        (
            {"target": A, "postprocessing": "cube"},
            ValueError,
            "postprocessing must be one of none, absolute, square, got 'cube'.",
        ),
        (
            {"target": A, "normalize": 1},
            TypeError,
            "normalize must be True or False, got 1.",
        ),
    ],
)
def test_what_makes_no_contrast_is_refused(arguments: dict[str, Any], error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        explainer().explain(PROMPT, **arguments)
