"""The mask object against transformers' dense masks, and masks that models hand over themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES, VOCAB, WINDOW, eager_reference
from torch import Tensor
from transformers import masking_utils as hf

import atman_triton.integration as atman
from atman_triton.kernels.reference import visible_keys
from atman_triton.masks import AttentionMask, dense_visibility, make_mask

KINDS = {
    "causal": hf.causal_mask_function,
    "two-sided": hf.bidirectional_mask_function,
    "window": hf.sliding_window_causal_mask_function(3),
    "two-sided window": hf.sliding_window_bidirectional_mask_function(3),
    "chunks": hf.chunked_causal_mask_function(4, torch.tensor([0, 1])),
    "packed": hf.and_masks(
        hf.packed_sequence_mask_function((torch.arange(12) // 5).expand(2, -1)),
        hf.causal_mask_function,
    ),
    "block": hf.or_masks(
        hf.causal_mask_function, hf.blockwise_overlay((torch.arange(12) // 4 - 1).expand(2, -1))
    ),
    "causal and window the other way round": hf.and_masks(
        hf.causal_mask_function, hf.sliding_window_overlay(3)
    ),
}
RECOGNISED = {"causal", "two-sided", "window", "two-sided window"}
PLACES = {  # q_length, kv_length, q_offset, kv_offset
    "prompt": (8, 8, 0, 0),
    "decode": (1, 9, 8, 0),
    "chunk": (3, 9, 6, 0),
    "sliding cache": (2, 4, 7, 5),
    "static cache": (3, 12, 4, 0),
}


def _padding(kind: str, tokens: int) -> Tensor | None:
    mask = torch.ones(2, tokens, dtype=torch.bool)
    if kind == "none":
        return None
    mask[0, slice(0, 3) if kind == "left" else slice(6, 8)] = False
    return mask


def _visible(mask: AttentionMask, queries: int) -> Tensor:
    """What the op makes of the mask."""
    return visible_keys(
        queries,
        mask.key_tokens,
        causal=mask.causal,
        query_offset=mask.query_offset,
        window=mask.window,
        mask=mask.padding if mask.dense is None else mask.dense,
    ).expand(2, 1, -1, -1)


@pytest.mark.parametrize("as_tensor", [False, True], ids=["int", "tensor"])
@pytest.mark.parametrize("padding", ["none", "left", "middle"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", KINDS)
def test_says_what_transformers_dense_mask_says(
    kind: str, place: str, padding: str, as_tensor: bool
) -> None:
    queries, keys, q_offset, kv_offset = PLACES[place]
    arguments: dict[str, Any] = {
        "batch_size": 2,
        "q_length": queries,
        "kv_length": keys,
        "q_offset": torch.tensor(q_offset) if as_tensor else q_offset,
        "kv_offset": kv_offset,
        "mask_function": KINDS[kind],
        "attention_mask": _padding(padding, q_offset + queries),
    }
    mask = make_mask(**arguments)
    assert (mask.dense is None) == (kind in RECOGNISED)
    assert mask.key_offset == kv_offset
    expected = hf.sdpa_mask(**arguments, allow_is_causal_skip=False)
    assert torch.equal(_visible(mask, queries), expected)


def test_keeps_the_position_of_a_counter_that_moves_on() -> None:
    """A static cache counts in place between the making of the mask and its use."""
    counter = torch.tensor(4)
    mask = make_mask(batch_size=1, q_length=1, kv_length=8, q_offset=counter)
    counter.add_(1)
    assert int(mask.query_offset) == 4


def test_drops_a_padding_mask_that_hides_nothing() -> None:
    ones = torch.ones(2, 5, dtype=torch.bool)
    assert make_mask(batch_size=2, q_length=5, kv_length=5, attention_mask=ones).padding is None


def test_refuses_a_three_dimensional_mask() -> None:
    with pytest.raises(ValueError, match=r"2 or 4 dimensions, got shape \[2, 5, 5\]"):
        make_mask(batch_size=2, q_length=5, kv_length=5, attention_mask=torch.ones(2, 5, 5))


def test_splits_a_float_mask_into_visibility_and_bias() -> None:
    low = torch.finfo(torch.float32).min
    mask = torch.tensor([[[[0.0, low], [-1.5, -torch.inf]]]])
    visible, bias = dense_visibility(mask)
    assert visible.tolist() == [[[[True, False], [True, False]]]]
    assert bias is not None
    assert bias.tolist() == [[[[0.0, 0.0], [-1.5, 0.0]]]]
    with pytest.raises(TypeError, match=r"bool or floating, got torch\.int64"):
        dense_visibility(torch.ones(1, 1, 2, 2, dtype=torch.long))


# --- through a model ----------------------------------------------------------------------------

TOKENS = 9


def _ids() -> Tensor:
    return torch.randint(3, VOCAB, (2, TOKENS), generator=torch.Generator().manual_seed(3))


def _factor() -> Tensor:
    factor = torch.ones(2, TOKENS)
    factor[:, 2], factor[:, 5] = 0.1, 3.0
    return factor


@torch.no_grad()
def _compare(name: str, **inputs: Any) -> float:
    """Largest error of the manipulated logits against the eager reference, as a share of effect."""
    family = FAMILIES[name]
    model = family.build()
    with eager_reference(family, model, _factor(), "min_shift"):
        expected = model(_ids(), **inputs).logits
    with eager_reference(family, model, None):
        plain = model(_ids(), **inputs).logits
    with atman.manipulate(model, _factor(), "min_shift"):
        actual = model(_ids(), **inputs).logits
    return ((actual - expected).abs().max() / (plain - expected).abs().max()).item()


@pytest.mark.parametrize("dtype", ["bool", "float"])
def test_a_users_four_dimensional_mask(dtype: str) -> None:
    visible = torch.ones(TOKENS, TOKENS).tril().bool()
    visible[5:, 1] = False
    visible = visible.expand(2, 1, -1, -1)
    low = torch.finfo(torch.float64).min
    dense = torch.zeros(visible.shape, dtype=torch.float64).masked_fill(~visible, low)
    family = FAMILIES["llama"]
    model = family.build()
    with torch.no_grad():
        with eager_reference(family, model, _factor(), "min_shift"):
            expected = model(_ids(), attention_mask=dense, use_cache=False).logits
        with atman.manipulate(model, _factor(), "min_shift"):
            given = visible if dtype == "bool" else dense
            actual = model(_ids(), attention_mask=given, use_cache=False).logits
    assert (actual - expected).abs().max() < 1e-9


def test_a_float_mask_may_carry_a_bias() -> None:
    query, key, value = torch.randn(3, 1, 2, 4, 16, dtype=torch.float64)
    mask = torch.randn(1, 2, 4, 4, dtype=torch.float64)
    mask[..., 3, 1] = -torch.inf
    actual, _ = atman.AttentionInterface()["atman"](torch.nn.Module(), query, key, value, mask)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    assert torch.allclose(actual, sdpa(query, key, value, mask).transpose(1, 2))


@pytest.mark.parametrize("name", ["llama", "mistral", "gptj", "gpt_neo"])
def test_packed_sequences_stay_apart(name: str) -> None:
    positions = torch.cat([torch.arange(4), torch.arange(TOKENS - 4)]).expand(2, -1)
    assert _compare(name, position_ids=positions, use_cache=False) < 1e-4


def test_a_dense_mask_with_a_sliding_cache_is_refused() -> None:
    model = FAMILIES["mistral"].build()
    with torch.no_grad(), atman.manipulate(model, _factor()):
        past = model(_ids()).past_key_values
        mask = torch.ones(2, 1, 1, WINDOW, dtype=torch.bool)
        with pytest.raises(ValueError, match="does not say where its keys stand"):
            model(_ids()[:, :1], attention_mask=mask, past_key_values=past)


def test_a_missing_mask_is_read_only_where_it_is_clear() -> None:
    """Some layers pass no mask: causal if they say so, as many queries as keys, and no window."""
    interface = atman.AttentionInterface()["atman"]
    module = torch.nn.Module()
    query = torch.randn(1, 2, 4, 16, dtype=torch.float64)
    causal, _ = interface(module, query, query, query, None)
    full, _ = interface(module, query, query, query, None, is_causal=False)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    for actual, flag in ((causal, True), (full, False)):
        expected = sdpa(query, query, query, is_causal=flag).transpose(1, 2)
        assert torch.allclose(actual, expected)
    with pytest.raises(ValueError, match="passes no mask for 3 queries and 4 keys"):
        interface(module, query[:, :, :3], query, query, None)
    with pytest.raises(ValueError, match="passes no mask for 4 queries and 4 keys"):
        interface(module, query, query, query, None, sliding_window=2)
