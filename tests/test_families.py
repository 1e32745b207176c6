"""Every family against its own eager attention, and against eager with the modifier matrix.

The reference is always one forward pass over the whole text without a cache. A run with a cache
must give the same rows, so factors that slip from their tokens show.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from families import FAMILIES, LAYERS, VOCAB, eager_reference
from torch import Tensor
from transformers import DynamicCache, StaticCache

import atman_triton.integration as atman
from atman_triton.testing import assert_close_to_oracle, count_launches

BATCH, PROMPT, TOKENS = 2, 8, 12
CHUNKS = ((0, 8), (8, 10), (10, 11), (11, 12))
MODES = ("multiplicative", "min_shift", "log_additive")
PADDINGS = ("none", "left", "right")

OWN_ROUNDING = 1e-4  # float32 throughout, a few layers deep


def _ids() -> Tensor:
    return torch.randint(3, VOCAB, (BATCH, TOKENS), generator=torch.Generator().manual_seed(1))


def _padding(kind: str) -> Tensor | None:
    """Padding of the prompt: on its left, or on its right, before the tokens that follow."""
    if kind == "none":
        return None
    mask = torch.ones(BATCH, TOKENS, dtype=torch.long)
    mask[0, slice(0, 3) if kind == "left" else slice(PROMPT - 3, PROMPT)] = 0
    return mask


def _factor() -> Tensor:
    """Some columns suppressed, amplified or removed; others left alone."""
    generator = torch.Generator().manual_seed(2)
    factor = torch.rand(BATCH, TOKENS, generator=generator) * 2
    keep = torch.rand(BATCH, TOKENS, generator=generator) < 0.4
    factor = torch.where(keep, 1.0, factor)
    factor[:, 4] = 0.0
    factor[:, 10] = 0.1  # a token that comes after the prompt
    return factor


@torch.no_grad()
def _run(model: Any, padding: Tensor | None, cache_kind: str) -> Tensor:
    """Logits ``[B, T, V]`` of the whole text."""
    ids = _ids()
    if cache_kind == "none":
        return model(ids, attention_mask=padding, use_cache=False).logits
    past = (
        DynamicCache(config=model.config)
        if cache_kind == "dynamic"
        else StaticCache(config=model.config, max_cache_len=TOKENS + 3)
    )
    rows = []
    for start, stop in CHUNKS:
        seen = None if padding is None else padding[:, :stop]
        output = model(
            ids[:, start:stop], attention_mask=seen, past_key_values=past, use_cache=True
        )
        rows.append(output.logits)
    return torch.cat(rows, 1)


@cache
def _model(name: str) -> Any:
    return FAMILIES[name].build()


@cache
def _reference(name: str, padding: str, mode: str | None) -> Tensor:
    family, model = FAMILIES[name], _model(name)
    with eager_reference(family, model, None if mode is None else _factor(), mode or MODES[0]):
        return _run(model, _padding(padding), "none")


def _error(actual: Tensor, expected: Tensor, padding: str) -> float:
    """Largest difference in the rows of real tokens."""
    mask = _padding(padding)
    real = torch.ones(BATCH, TOKENS, dtype=torch.bool) if mask is None else mask.bool()
    return (actual[real] - expected[real]).abs().max().item()


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("name", FAMILIES)
def test_the_reference_is_the_models_own_attention(name: str, padding: str) -> None:
    model = FAMILIES[name].build().float()  # in float64 their masks overflow in a float32 softmax
    own = _run(model, _padding(padding), "none")
    assert _error(own, _reference(name, padding, None), padding) < OWN_ROUNDING


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", FAMILIES)
def test_the_manipulation_is_large_enough_to_prove_something(name: str, mode: str) -> None:
    for padding in PADDINGS:
        effect = _error(_reference(name, padding, mode), _reference(name, padding, None), padding)
        assert effect > 100 * OWN_ROUNDING


@pytest.mark.parametrize("cache_kind", ["none", "dynamic", "static"])
@pytest.mark.parametrize("name", FAMILIES)
def test_equals_eager_with_the_modifier_matrix(name: str, cache_kind: str) -> None:
    family, model = FAMILIES[name], _model(name)
    errors = {}
    for padding in PADDINGS:
        for mode in (None, *MODES):
            factor = torch.ones(1, 1) if mode is None else _factor()
            with atman.manipulate(model, factor, mode or MODES[0]):
                actual = _run(model, _padding(padding), cache_kind)
            errors[padding, mode] = _error(actual, _reference(name, padding, mode), padding)
    print({key: f"{error:.1e}" for key, error in errors.items()})
    assert max(errors.values()) < family.rounding
    assert model.config._attn_implementation == family.own


@pytest.mark.parametrize("name", FAMILIES)
def test_works_when_built_with_the_implementation(name: str) -> None:
    family = FAMILIES[name]
    model = family.build("atman")
    for cache_kind, padding in (("none", "none"), ("dynamic", "left"), ("static", "right")):
        # BLOOM's own layers cannot add ALiBi for a short mask to a static cache.
        if (name, cache_kind) != ("bloom", "static"):
            plain = _run(model, _padding(padding), cache_kind)
            assert _error(plain, _reference(name, padding, None), padding) < family.rounding
        with atman.manipulate(model, _factor(), "min_shift"):
            actual = _run(model, _padding(padding), cache_kind)
        assert _error(actual, _reference(name, padding, "min_shift"), padding) < family.rounding


@pytest.mark.parametrize("name", FAMILIES)
def test_runs_on_the_kernel_with_every_launch_counted(name: str) -> None:
    """One prompt and one chunk of decoding; without a GPU under Triton's interpreter."""
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ids, factor, padding = _ids().to(device), _factor(), _padding("left")
    assert padding is not None
    padding = padding.to(device)

    @torch.no_grad()
    def run(model: Any, backend: str) -> Tensor:
        past, rows = DynamicCache(config=model.config), []
        with atman.manipulate(model, factor, "min_shift", backend=backend):
            for start, stop in ((0, 10), (10, 12)):
                seen = padding[:, :stop]
                output = model(ids[:, start:stop], attention_mask=seen, past_key_values=past)
                rows.append(output.logits)
        return torch.cat(rows, 1)[padding.bool()]

    model = FAMILIES[name].build().to(device)
    oracle = run(model.double(), "torch")
    model = model.float()
    portable = run(model, "torch")
    with count_launches() as launches:
        fused = run(model, "triton")
    assert launches.attention == 2 * LAYERS
    assert_close_to_oracle(fused, portable, oracle, name=name)
