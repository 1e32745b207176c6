"""manipulate() on encoders and encoder-decoders: the logits are those of the modifier matrix."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from site_models import BLIP, ENCODERS, MLLAMA, SEQ2SEQ, VOCAB
from site_oracle import logits_of, oracle, oracle_logits
from torch import Tensor

from atman_triton.integration import UnsupportedModelError, manipulate, run_as_atman
from atman_triton.sites import sources

CROSSING = SEQ2SEQ | BLIP
ALL = ENCODERS | CROSSING | {"mllama": MLLAMA}
MODES = ["multiplicative", "min_shift", "log_additive", "min_shift_full"]


@torch.no_grad()
def logits_under(
    model: Any, inputs: dict[str, Any], factors: Any, *args: Any, **how: Any
) -> Tensor:
    with manipulate(model, factors, *args, **how):
        return logits_of(model, inputs)


def far(actual: Tensor, expected: Tensor) -> float:
    return (actual - expected).abs().max().item()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ALL)
def test_every_source_alone_and_all_together(name: str, mode: str) -> None:
    case = ALL[name]
    model, inputs, factors = case.build(), case.inputs(), case.factors()
    assert sources(model) == tuple(factors)
    plain = oracle_logits(model, inputs, {})
    for given in ({source: factor} for source, factor in factors.items()):
        expected = oracle_logits(model, inputs, given, mode)
        assert far(logits_under(model, inputs, given, mode), expected) < case.rounding
        assert far(expected, plain) > 1000 * case.rounding
    expected = oracle_logits(model, inputs, factors, mode)
    assert far(logits_under(model, inputs, factors, mode), expected) < case.rounding


@pytest.mark.parametrize("attention", ["encoder", "cross", "both"])
@pytest.mark.parametrize("name", [name for name in CROSSING if name != "blip-pair"])
def test_where_the_encoders_tokens_are_manipulated(name: str, attention: Any) -> None:
    case = CROSSING[name]
    model, inputs = case.build(), case.inputs()
    read = {source: factor for source, factor in case.factors().items() if source != "decoder"}
    for source, factor in read.items():
        results = {
            where: oracle_logits(model, inputs, {source: factor}, attention=where)
            for where in ("encoder", "cross", "both")
        }
        if name == "blip-retrieval" and source == "text":  # no decoder reads it
            attention, results = "encoder", {"encoder": results["encoder"]}
        actual = logits_under(model, inputs, {source: factor}, "min_shift", attention=attention)
        assert far(actual, results[attention]) < case.rounding
        others = [logits for where, logits in results.items() if where != attention]
        assert all(far(actual, other) > 1000 * case.rounding for other in others)


@pytest.mark.parametrize("name", ALL)
def test_factors_of_one_change_nothing(name: str) -> None:
    case = ALL[name]
    model, inputs = case.build(), case.inputs()
    ones = {source: torch.ones(1, tokens) for source, tokens in case.sources.items()}
    plain = oracle_logits(model, inputs, {})
    assert far(logits_under(model, inputs, ones, "min_shift"), plain) < case.rounding


@pytest.mark.parametrize("name", ["vit", "siglip", "bart", "t5", "whisper", "blip-vqa", "mllama"])
def test_some_layers_and_some_heads(name: str) -> None:
    case = ALL[name]
    model, inputs, factors = case.build(), case.inputs(), case.factors()
    for layers in ([0, 3], [1, 2]) if name == "mllama" else ([1], [0]):
        expected = oracle_logits(model, inputs, factors, layers=layers)
        actual = logits_under(model, inputs, factors, "min_shift", layers=layers)
        assert far(actual, expected) < case.rounding
    heads = 4 if name == "mllama" else 2  # two to each of its key heads
    per_head = {source: torch.ones(2, heads, given.shape[1]) for source, given in factors.items()}
    for source, given in factors.items():
        per_head[source][:, 1] = given
    expected = oracle_logits(model, inputs, per_head)
    assert (
        far(logits_under(model, inputs, factors, "min_shift", heads=[1]), expected) < case.rounding
    )
    assert far(logits_under(model, inputs, per_head, "min_shift"), expected) < case.rounding


@pytest.mark.parametrize("name", SEQ2SEQ)
def test_a_layer_that_only_the_deeper_stack_has(name: str) -> None:
    case = SEQ2SEQ[name]
    model, inputs, factors = case.build(), case.inputs(), case.factors()
    source = next(iter(factors))
    expected = oracle_logits(model, inputs, {source: factors[source]}, layers=[2])
    actual = logits_under(model, inputs, factors[source], "min_shift", layers=[2])
    assert far(actual, expected) < case.rounding
    assert far(actual, oracle_logits(model, inputs, {})) > 1000 * case.rounding


@torch.no_grad()
def _greedy_by_hand(
    model: Any, inputs: dict[str, Tensor], factors: dict[str, Tensor], steps: int, **how: Any
) -> tuple[Tensor, Tensor]:
    """Greedy tokens ``[B, steps]`` and their logits from full passes of the oracle."""
    ids = torch.full((2, 1), model.config.decoder_start_token_id)
    with oracle(model, factors, **how):
        for _ in range(steps):
            logits = model(**inputs | {"decoder_input_ids": ids}, use_cache=False).logits
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
    return ids[:, 1:], logits


@pytest.mark.parametrize("attention", ["encoder", "cross", "both"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["bart", "t5", "whisper"])
def test_generate_manipulates_every_step(name: str, cache: str, attention: Any) -> None:
    """The keys of cross-attention come from the cache after the first step."""
    case = SEQ2SEQ[name]
    model, inputs, factors = case.build(), case.inputs(), case.factors()
    del inputs["decoder_input_ids"]
    factors["decoder"] = torch.tensor([[0.3, 1.0, 0.1], [1.0, 0.2, 3.0]])
    model.generation_config.forced_eos_token_id = None
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": VOCAB + 1}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    options |= {"cache_implementation": "static"} if cache == "static" else {}
    options |= {"decoder_input_ids": torch.ones(2, 1).long()} if name == "whisper" else {}
    tokens, logits = _greedy_by_hand(model, inputs, factors, 6, attention=attention)
    with manipulate(model, factors, "min_shift", attention=attention):
        actual = model.generate(**inputs, **options)
    assert torch.equal(actual.sequences[:, -6:], tokens)
    rounding = torch.finfo(torch.float32).eps * logits.abs().max().item()  # generate casts them
    assert far(torch.stack(actual.logits, 1), logits) < rounding
    assert far(logits, _greedy_by_hand(model, inputs, {}, 6)[1]) > 1000 * case.rounding


# --- Mllama: the decoder attends to the picture ---------------------------------------------------


@torch.no_grad()
def test_generate_manipulates_the_pictures_cached_keys() -> None:
    case = MLLAMA
    model, inputs, factors = case.build(), case.inputs(), case.factors()
    inputs["attention_mask"] = torch.ones(2, 7, dtype=torch.long)
    given = dict(inputs)
    with oracle(model, factors):
        for _ in range(3):
            logits = model(**given, use_cache=False).logits
            given["input_ids"] = torch.cat([given["input_ids"], logits[:, -1:].argmax(-1)], 1)
            for name in ("attention_mask", "cross_attention_mask"):
                given[name] = torch.cat([given[name], given[name][:, -1:]], 1)
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": VOCAB + 1}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    with manipulate(model, factors, "min_shift"):
        actual = model.generate(**inputs, **options)
    assert torch.equal(actual.sequences, given["input_ids"])
    assert far(torch.stack(actual.logits, 1), logits[:, -3:]) < case.rounding


def test_a_tensor_is_for_the_picture_and_a_text_without_one_reads_none() -> None:
    case = MLLAMA
    model, inputs, factors = case.build(), case.inputs(), case.factors()
    expected = oracle_logits(model, inputs, {"image": factors["image"]})
    assert far(logits_under(model, inputs, factors["image"], "min_shift"), expected) < case.rounding
    alone = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    expected = oracle_logits(model, alone, {"decoder": factors["decoder"]})
    actual = logits_under(model, alone, {"decoder": factors["decoder"]}, "min_shift")
    assert far(actual, expected) < case.rounding
    with run_as_atman(model, None, "min_shift"):
        logits_of(model, alone)
    message = r"Mllama\w+: .* did not reach cross-attention layers \[1, 3\] of"
    with pytest.raises(UnsupportedModelError, match=message):
        logits_under(model, alone, factors)
    with pytest.raises(ValueError, match="attention is for models with an encoder"):
        logits_under(model, inputs, factors, attention="cross")
