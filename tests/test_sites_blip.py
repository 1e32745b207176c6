"""manipulate() on BLIP, whose attention never asks transformers' interface."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from manipulated import checkpoint_layers
from site_models import BLIP, VOCAB
from site_oracle import logits_of, oracle
from torch import Tensor

from atman_triton.integration import UnsupportedModelError, manipulate

ROUNDING = 1e-9  # float64
STEPS = 5


@torch.no_grad()
def _greedy_by_hand(
    model: Any, inputs: dict[str, Any], name: str, factors: dict[str, Tensor], **how: Any
) -> tuple[Tensor, Tensor]:
    """Greedy tokens ``[B, STEPS]`` behind the text and their logits, from full oracle passes."""
    ids = inputs[name]
    with oracle(model, factors, **how):
        for _ in range(STEPS):
            logits = logits_of(model, inputs | {name: ids})
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
    return ids[:, -STEPS:], logits[:, -STEPS:]


def _asked(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the model's forward takes, and what generate takes for the same."""
    inputs = BLIP[name].inputs()
    if name == "blip-vqa":
        first = {"decoder_input_ids": torch.full((2, 1), 1)}
        return inputs | first, {k: v for k, v in inputs.items() if k != "decoder_input_ids"}
    ids = inputs["input_ids"]
    ids[:, 0] = 1  # generate begins so, and leaves the last token out
    pixels = {"pixel_values": inputs["pixel_values"]}
    return pixels | {"input_ids": ids[:, :-1]}, pixels | {"input_ids": ids}


@torch.no_grad()
@pytest.mark.parametrize("attention", ["encoder", "cross", "both"])
@pytest.mark.parametrize("name", ["blip-captions", "blip-vqa"])
def test_generate_manipulates_every_step(name: str, attention: Any) -> None:
    """It runs the stacks one by one; keys of cross-attention come from the cache."""
    model, factors = BLIP[name].build(), BLIP[name].factors()
    factors["decoder"] = torch.tensor([[0.3, 1.0, 0.1, 1.0, 0.5], [1.0, 0.2, 3.0, 0.1, 1.0]])
    inputs, given = _asked(name)
    text = "decoder_input_ids" if name == "blip-vqa" else "input_ids"
    tokens, logits = _greedy_by_hand(model, inputs, text, factors, attention=attention)
    plain = _greedy_by_hand(model, inputs, text, {})[1]
    options = {"max_new_tokens": STEPS, "do_sample": False, "return_dict_in_generate": True}
    model.config.text_config.sep_token_id = VOCAB + 1  # never ends
    with manipulate(model, factors, "min_shift", attention=attention):
        actual = model.generate(**given, **options, output_logits=True)
    rounding = torch.finfo(torch.float32).eps * logits.abs().max().item()  # generate casts them
    assert torch.equal(actual.sequences[:, -STEPS:], tokens)
    assert (torch.stack(actual.logits, 1) - logits).abs().max() < rounding
    assert (logits - plain).abs().max() > 1000 * ROUNDING


def test_a_source_that_is_not_read_is_named() -> None:
    """Without its matching head, the retrieval model compares two encoders."""
    case = BLIP["blip-retrieval"]
    model, inputs, factors = case.build(), case.inputs(), case.factors()
    message = r"BlipForImageTextRetrieval: .* did not reach cross-attention layers \[0, 1, 2\]"
    with pytest.raises(UnsupportedModelError, match=message), manipulate(model, factors):
        model(**inputs, use_itm_head=False)
    with manipulate(model, factors, attention="encoder"):
        model(**inputs, use_itm_head=False)


def test_activation_checkpointing_is_refused_in_its_text_stacks() -> None:
    case = BLIP["blip-captions"]
    model, inputs, factors = case.build().train(), case.inputs(), case.factors()
    checkpoint_layers(model)
    with (
        pytest.raises(ValueError, match="TextSelfAttention takes no factors as arguments"),
        manipulate(model, {"decoder": factors["decoder"]}),
    ):
        model(**inputs)


def test_other_threads_run_blips_own_code() -> None:
    """It gives its weights, which ours never holds, while this thread manipulates."""
    case = BLIP["blip-captions"]
    model, inputs = case.build(), case.inputs()
    plain = model.text_decoder(inputs["input_ids"], output_attentions=True, use_cache=False)
    seen = model.vision_model(inputs["pixel_values"], output_attentions=True)
    results: list[Any] = []

    def work() -> None:
        results.append(
            model.text_decoder(inputs["input_ids"], output_attentions=True, use_cache=False)
        )
        results.append(model.vision_model(inputs["pixel_values"], output_attentions=True))

    with manipulate(model, case.factors()):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        logits_of(model, inputs)
    for actual, expected in zip(results, (plain, seen), strict=True):
        pairs = zip(actual.attentions, expected.attentions, strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_attention_weights_are_refused() -> None:
    case = BLIP["blip-captions"]
    model = case.build()
    weights = model(**case.inputs(), output_attentions=True).attentions
    assert len(weights) == 2
    with (
        pytest.raises(ValueError, match="output_attentions=True"),
        manipulate(model, case.factors()),
    ):
        model(**case.inputs(), output_attentions=True)
