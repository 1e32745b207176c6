"""Manipulated attention in plain PyTorch operators, for machines and cases without our kernels.

Where the algebra allows, the manipulation is folded into ``scaled_dot_product_attention``:

- ``multiplicative``: m·(q·k) = q·(m k), so the keys are scaled;
- ``log_additive``: log m is a bias per key;
- ``min_shift`` and ``min_shift_full``: c + m (s − c) = q·(m k) + (1 − m) c, one more head
  dimension that holds the row minimum c in the query and 1 − m in the key.

On a CPU without gradients only ``multiplicative`` is folded, in float32 only where no mask is to
be materialised; blocks of scores that stay in the cache (``portable_blocks``) are faster otherwise.
CPU time in ms on one thread of a Xeon, causal, 6 query and 2 key heads, D 64, float32 (bfloat16),
batch × tokens:

| | 32×64 | 8×256 | 2×1024 | 1×4096 |
|---|---|---|---|---|
| plain, SDPA | 2.2 (1.5) | 5.9 (2.7) | 18 (6.6) | 107 (37) |
| ``multiplicative``, folded | 2.4 (1.5) | 6.1 (2.7) | 18 (6.3) | 107 (36) |
| ``multiplicative``, blocks | 3.9 (4.1) | 7.1 (7.4) | 20 (19) | 128 (124) |
| ``min_shift``, folded | 6.9 (7.6) | 14 (16) | 38 (49) | 241 (371) |
| ``min_shift``, blocks | 4.4 (4.5) | 7.2 (8.2) | 21 (23) | 140 (136) |
| ``log_additive``, folded | 3.4 (8.1) | 8.5 (17) | 38 (55) | 274 (443) |
| ``log_additive``, blocks | 3.6 (4.4) | 6.6 (7.7) | 20 (21) | 128 (120) |

512 rows at the end of 512, 1024, 2048, 8192 keys, plain: SDPA with a mask 3.4, 7.0, 16, 62
(bfloat16 1.3, 2.7, 5.7, 25), blocks 2.8, 6.5, 14, 64 (2.5, 6.2, 14, 57). SDPA in bfloat16 has
matrix instructions (AMX) there.

With gradients, compiled, and on other devices the rest (soft cap, sinks, log-sum-exp, dropout,
anything that half precision would round before the softmax, a gradient to a position bias or to a
``log_additive`` factor) is computed eagerly by blocks of query rows, so that memory stays
proportional to ``Tk``. For the backward pass a block is computed once more, unless it is so narrow
that keeping its scores costs no more than keeping its queries.

Legend: B batch, Hq/Hk query/key heads, Tq/Tk query/key tokens, Tp prefix tokens, D head dim, Dv
value dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from .portable_blocks import attention_blocks
from .portable_eager import (
    CAUSAL_BLOCK,
    SCORES_PER_BLOCK,
    as_it_is_now,
    attention_eager,
    grouped_scores,
)
from .portable_paths import QUERY_BLOCKS, SCORE_BLOCKS, portable_path, visibility_of
from .recompute import recomputed
from .visibility import Visibility


def attention_portable(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_factor: Tensor | None,
    *,
    mode: str,
    causal: bool,
    query_offset: int | Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    position_bias: Tensor | None,
    mask: Tensor | None,
    dropout: float,
    dropout_seed: Tensor | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """Attention with manipulated scores; arguments as in ``atman_triton.attention``, validated.

    Returns: output ``[B, Hq, Tq, Dv]`` and, if asked for, log-sum-exp ``[B, Hq, Tq]`` float32
        (float64 for float64 inputs).
    """
    batch, query_heads, query_tokens, _ = query.shape
    key_tokens = key.shape[2]
    if query_tokens == 0:
        lse_dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
        empty = query.new_empty(batch, query_heads, 0, value.shape[-1])
        return empty, query.new_empty(batch, query_heads, 0, dtype=lse_dtype)
    visibility = visibility_of(causal, query_offset, window, mask, key_tokens)
    path = portable_path(
        query,
        key,
        value,
        key_factor,
        mode=mode,
        scale=scale,
        softcap=softcap,
        sinks=sinks,
        position_bias=position_bias,
        visibility=visibility,
        dropout=dropout,
        return_lse=return_lse,
    )
    if path.kernel == SCORE_BLOCKS:
        empty_key, empty_value = key[:1, :, :0], value[:1, :, :0]
        shares_all = batch > 1 and key.shape[0] == value.shape[0] == 1
        return attention_blocks(
            query,
            empty_key if shares_all else key,
            empty_value if shares_all else value,
            key_factor,
            key if shares_all else empty_key,
            value if shares_all else empty_value,
            mode=mode,
            scale=scale,
            softcap=softcap,
            sinks=sinks,
            position_bias=position_bias,
            visibility=visibility,
            return_lse=return_lse,
        )
    key = key.expand(batch, -1, -1, -1)
    value = value.expand(batch, -1, -1, -1)
    if key_factor is not None and key_factor.dim() == 3 and key.shape[1] != query_heads:
        group = query_heads // key.shape[1]
        key = key.repeat_interleave(group, dim=1)
        value = value.repeat_interleave(group, dim=1)
    factor = None
    if key_factor is not None:
        factor = key_factor[:, None, :] if key_factor.dim() == 2 else key_factor  # [B, 1|Hq, Tk]

    if path.kernel == QUERY_BLOCKS:
        return attention_eager(
            query,
            key,
            value,
            factor,
            mode=mode,
            scale=scale,
            softcap=softcap,
            sinks=sinks,
            position_bias=position_bias,
            visibility=visibility,
            dropout=dropout,
            dropout_seed=dropout_seed,
            return_lse=return_lse,
        )
    if position_bias is not None:
        position_bias = position_bias.expand(-1, -1, query_tokens, key_tokens)
    bias = None
    if factor is not None and mode == "log_additive":
        bias = factor.to(query.dtype).log()[:, :, None, :]  # [B, 1|Hq, 1, Tk]
    elif factor is not None:
        factor = factor.to(query.dtype)[..., None]  # [B, 1|Hq, Tk, 1]
        if mode != "multiplicative":
            counted = visibility if mode == "min_shift" else visibility.all_keys()
            minimum = _row_minimum(query, key, scale, counted)  # [B, Hq, Tq, 1]
            query = torch.cat([query * scale, minimum], dim=-1)
            rest = (1 - factor).expand(-1, key.shape[1], -1, -1)
            key = torch.cat([key * factor, rest], dim=-1)
            scale = 1.0
        else:
            key = key * factor
    output = _attention_sdpa(
        query, key, value, bias, position_bias, scale, visibility, masked=path.masked
    )
    return output, None


def _row_minimum(query: Tensor, key: Tensor, scale: float, visibility: Visibility) -> Tensor:
    """The smallest visible score of each row, 0 where none is visible: ``[B, Hq, Tq, 1]``.

    Found without autograd, then computed from its one key, so that no scores are kept for it.
    """
    batch, query_heads, query_tokens, head_dim = query.shape
    if key.shape[2] == 0:
        return query.new_zeros(batch, query_heads, query_tokens, 1)
    places, seen = [], []
    with torch.no_grad():
        for start in range(0, query_tokens, CAUSAL_BLOCK):
            stop = min(start + CAUSAL_BLOCK, query_tokens)
            low, high = visibility.key_range(start, stop)
            if low == high:
                place = torch.zeros_like(query[:, :, start:stop, 0], dtype=torch.int64)
                places.append(place)
                seen.append(torch.zeros_like(place, dtype=torch.bool))
                continue
            scores = grouped_scores(query[:, :, start:stop] * scale, key[:, :, low:high])
            visible = visibility.block(start, stop, low, high, query.device)
            if visible is not None:
                scores = scores.masked_fill(~visible, float("inf"))
            minimum, place = scores.min(-1)
            places.append(place + low)
            seen.append(minimum != float("inf"))
    place = torch.cat(places, dim=2).view(batch, key.shape[1], -1, 1)  # [B, Hk, g * Tq, 1]
    lowest = key.gather(2, place.expand(-1, -1, -1, head_dim)).view_as(query)
    minimum = (query * lowest).sum(-1, keepdim=True) * scale
    return torch.where(torch.cat(seen, dim=2)[..., None], minimum, torch.zeros_like(minimum))


def _attention_sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    position_bias: Tensor | None,
    scale: float,
    visibility: Visibility,
    *,
    masked: bool,
) -> Tensor:
    """Attention whose manipulation is already folded into keys or ``bias``.

    Args:
        masked: whether SDPA needs a mask, see ``portable_paths``.
    """
    query_tokens, key_tokens = query.shape[2], key.shape[2]
    value_dim = value.shape[-1]
    # the CPU's flash kernel wants one head dim for all three; other kernels pad for themselves
    if query.device.type == "cpu" and value_dim < query.shape[-1]:
        value = F.pad(value, (0, query.shape[-1] - value_dim))
    # a branch, since torch.compile would make the comparison itself symbolic
    grouping = {"enable_gqa": True} if query.shape[1] != key.shape[1] else {}

    def sdpa(rows: Tensor, keys: Tensor, values: Tensor, *, mask: Tensor | None, causal: bool):
        return F.scaled_dot_product_attention(
            rows, keys, values, attn_mask=mask, is_causal=causal, scale=scale, **grouping
        )

    if not masked and key_tokens > 0:
        causal = visibility.causal
        return sdpa(query, key, value, mask=None, causal=causal)[..., :value_dim]

    rows_per_block = max(16, SCORES_PER_BLOCK // max(1, query.shape[0] * key_tokens))
    visibility = as_it_is_now(visibility)
    numbers = _mask_numbers(bias, position_bias, visibility)
    outputs = []
    for start in range(0, query_tokens, rows_per_block):
        stop = min(start + rows_per_block, query_tokens)
        low, high = visibility.key_range(start, stop)
        if low == high:
            outputs.append(query.new_zeros(*query.shape[:2], stop - start, value_dim))
            continue
        block = partial(_sdpa_block, sdpa, visibility, (start, stop, low, high))
        arguments = (
            query[:, :, start:stop],
            key[:, :, low:high],
            value[:, :, low:high],
            None if bias is None else bias[..., low:high],
            None if position_bias is None else position_bias[:, :, start:stop, low:high],
            visibility.mask,
        )
        # else autograd would keep a mask that is larger than the queries
        again = numbers * (high - low) > math.prod(query.shape[:2]) * query.shape[-1]
        [output] = recomputed(block, *arguments) if again else block(*arguments)
        outputs.append(output[..., :value_dim])
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)


def _sdpa_block(
    sdpa: Callable[..., Tensor],
    visibility: Visibility,
    place: tuple[int, int, int, int],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    position_bias: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor]:
    """Rows and keys at ``place``, of which the tensors are slices; ``mask`` is whole."""
    start, stop, low, high = place
    visible = replace(visibility, mask=mask).block(start, stop, low, high, query.device)
    added = bias
    if position_bias is not None:
        position_bias = position_bias.to(query.dtype)
        added = position_bias if added is None else added + position_bias
    mask = visible
    if added is not None:
        mask = added if visible is None else added.masked_fill(~visible, float("-inf"))
        mask = mask.to(query.dtype).expand(-1, -1, stop - start, -1)
    output = sdpa(query, key, value, mask=mask, causal=False)
    certain = bias is None and position_bias is None and visibility.always_some_key()
    if mask is not None and not certain:  # a row that sees nothing gives 0
        seen = mask if mask.dtype == torch.bool else mask != float("-inf")
        output = torch.where(seen.any(-1, keepdim=True), output, torch.zeros_like(output))
    return (output,)


def _mask_numbers(bias: Tensor | None, position_bias: Tensor | None, visibility: Visibility) -> int:
    """Numbers in SDPA's mask per query row and key; 0 if all rows share it."""
    mask = visibility.mask
    whole = mask if mask is not None and mask.dim() == 4 else None
    banded = visibility.causal or visibility.window is not None
    if not banded and bias is None and position_bias is None and whole is None:
        return 0
    shapes = [part.shape[:2] for part in (bias, position_bias, whole) if part is not None]
    shapes.append(torch.Size((1 if mask is None else mask.shape[0], 1)))
    return math.prod(torch.broadcast_shapes(*shapes))
