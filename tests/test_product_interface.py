"""Every parameter of the authors' product interface, beside ours: what each means, one test each.

Names in section titles are those of its client: an explanation request, a completion request, and
the items and controls that prompts of either are made of.
"""

import math

import pytest
import torch
from toy_models import llama, plain_loop
from toy_tokenizers import byte_level

import atman_triton as atman
from atman_triton.demo import load_demo_model

TEXT = "The pay per hour is 23 euros. The notice period is four weeks."
TARGET = " hello there"
PARTS = "The pay is 23.\n\nQ: What is it? A: 23###The notice is long. Q: What is it? A: long"


@pytest.fixture(scope="module")
def demo():
    return load_demo_model()


def ids(text):
    return byte_level()(text)["input_ids"]


def explain(prompt=TEXT, target=TARGET, *more, explainer=None, **arguments):
    settings = {"method": "exact", "progress": False} | (explainer or {})
    return atman.Explainer(llama(), byte_level(), **settings).explain(
        prompt, target, *more, **arguments
    )


def by_hand(units, factor, mode, prompt=TEXT, target=TARGET):
    """Relevance of units, each the positions of its tokens: one eager forward per unit."""
    target_ids = ids(target)
    rows = plain_loop(llama(), ids(prompt) + target_ids[:-1], target_ids, units, factor, mode)
    return (rows[0] - rows[1:]).mean(-1)


def in_prompt(explanation):
    """The units of the prompt with their relevance."""
    pairs = zip(explanation.units, explanation.relevance.tolist(), strict=True)
    return [(unit, value) for unit, value in pairs if unit.part == "prompt"]


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


# --- explanation: prompt, target ----------------------------------------------------------------


def test_prompt_items_are_text_or_token_ids():
    text, tokens = explain(), explain(ids(TEXT), ids(TARGET))
    close(text.relevance, tokens.relevance)
    assert [unit.tokens for unit in text.units] == [unit.tokens for unit in tokens.units]
    start = TEXT.index(" pay")
    assert any((u.text, u.start, u.stop) == (" pay", start, start + 4) for u in text.units)


def test_a_prompt_item_that_is_an_image_is_refused_by_a_text_model():
    with pytest.raises(TypeError, match="prompt must hold integer token ids"):
        explain([TEXT, torch.zeros(3, 4, 4)])


def test_the_target_is_explained_too_by_what_comes_before():
    explanation = explain()
    assert explanation.targets[-1].text == " there"
    assert explanation.text == TEXT + TARGET
    late = [unit for unit in explanation.units if unit.part == "target"]
    assert late and math.isnan(explanation.scores[0, explanation.units.index(late[-1])])


# --- explanation: control_factor, control_log_additive ------------------------------------------


@pytest.mark.parametrize("factor", [0.0, 0.1, 0.9])
@pytest.mark.parametrize("mode", ["log_additive", "min_shift"])
def test_control_factor_is_the_factor_of_the_suppressed_unit(factor, mode):
    if mode == "log_additive" and factor == 0.0:
        factor = 0.01  # the first token alone would leave a row without keys
    explanation = explain(explainer={"factor": factor, "mode": mode})
    units = [unit.tokens for unit in explanation.units if unit.part == "prompt"]
    values = torch.tensor([value for _, value in in_prompt(explanation)])
    close(values, by_hand(units, factor, mode))


def test_control_factor_defaults_to_a_tenth():
    assert explain().provenance["factor"] == 0.1


def test_control_log_additive_adds_the_logarithm_or_multiplies_shifted_scores():
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, 5, 16, generator=generator) for _ in range(3))
    factor = torch.tensor([[1.0, 0.1, 1.0, 3.0, 0.5]])
    scores = query @ key.transpose(2, 3) / 4
    added = scores + factor.log()  # True, its default
    shifted = (scores - scores.amin(-1, keepdim=True)) * factor  # False
    for mode, expected in (("log_additive", added), ("min_shift", shifted)):
        out = atman.attention(query, key, value, factor, mode=mode)
        close(out, expected.softmax(-1) @ value)


# --- explanation: contextual_control_threshold --------------------------------------------------


def test_contextual_control_threshold_takes_similar_tokens_along():
    repeated = "hello world, hello there"
    alone = explain(repeated, explainer={"mode": "min_shift"})
    along = explain(repeated, explainer={"mode": "min_shift", "similarity": 1.0})
    tokens = ids(repeated)
    for one, other, (unit, value) in zip(
        in_prompt(alone), in_prompt(along), in_prompt(along), strict=True
    ):
        same = tuple(place for place, token in enumerate(tokens) if token == tokens[unit.tokens[0]])
        target = [
            place
            for place, token in enumerate(ids(TARGET)[:-1])
            if token in (tokens[unit.tokens[0]],)
        ]
        both = (*same, *(len(tokens) + place for place in target))
        (expected,) = by_hand([both], 0.1, "min_shift", repeated).tolist()
        assert value == pytest.approx(expected, abs=1e-5)
        assert (one == other) == (len(both) == 1)


# --- explanation: postprocessing, normalize, target_granularity -----------------------------------


def test_postprocessing_of_every_score():
    plain = explain(postprocessing="none")
    scores = plain.scores.double()
    for how, expected in (("absolute", scores.abs()), ("square", scores.square())):
        close(explain(postprocessing=how).relevance.double(), expected.nanmean(0))
    close(plain.relevance.double(), scores.nanmean(0))


def test_normalize_after_postprocessing():
    squared = explain(postprocessing="square").relevance
    found = explain(postprocessing="square", normalize=True).relevance
    close(found, (squared - squared.min()) / (squared.max() - squared.min()))
    assert (float(found.min()), float(found.max())) == (0, 1)
