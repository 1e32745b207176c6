"""Manipulated attention in plain PyTorch operators, for machines and cases without our kernels.

Where the algebra allows, the manipulation is folded into ``scaled_dot_product_attention``:

- ``multiplicative``: m·(q·k) = q·(m k), so the keys are scaled;
- ``log_additive``: log m is a bias per key;
- ``min_shift``: c + m (s − c) = q·(m k) + (1 − m) c, one more head dimension that holds the row
  minimum c in the query and 1 − m in the key.

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

With gradients, compiled, and on other devices the rest (soft cap, sinks, log-sum-exp, anything that
half precision would round before the softmax, a gradient to a ``log_additive`` factor) is computed
eagerly by blocks of query rows, so that memory stays proportional to ``Tk``.

Legend: B batch, Hq/Hk query/key heads, Tq/Tk query/key tokens, Tp prefix tokens, D head dim, Dv
value dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .portable_blocks import attention_blocks, serves_blocks
from .visibility import Visibility

_SCORES_PER_BLOCK = 1 << 23
_CAUSAL_BLOCK = 64  # rows: small enough that a causal block skips most of the keys it cannot see


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
    visibility = Visibility(causal, query_offset, window, mask, key_tokens)
    half = query.dtype in (torch.float16, torch.bfloat16)
    if serves_blocks(query, key, value, key_factor, sinks, position_bias) and not _sdpa_is_faster(
        key_factor is not None,
        mode,
        scale,
        half,
        any(given is not None for given in (softcap, sinks, position_bias)) or return_lse,
        query_tokens,
        visibility,
    ):
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

    eager = (
        softcap is not None
        or sinks is not None
        or return_lse
        or (half and position_bias is not None)
        or (half and factor is not None and mode != "multiplicative")
        or (factor is not None and mode == "log_additive" and factor.requires_grad)
    )
    if eager:
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
            return_lse=return_lse,
        )
    if position_bias is not None:
        position_bias = position_bias.expand(-1, -1, query_tokens, key_tokens)
    bias = None
    if factor is not None and mode == "log_additive":
        bias = factor.to(query.dtype).log()[:, :, None, :]  # [B, 1|Hq, 1, Tk]
    elif factor is not None:
        factor = factor.to(query.dtype)[..., None]  # [B, 1|Hq, Tk, 1]
        if mode == "min_shift":
            minimum = _row_minimum(query, key, scale, visibility)  # [B, Hq, Tq, 1]
            query = torch.cat([query * scale, minimum], dim=-1)
            rest = (1 - factor).expand(-1, key.shape[1], -1, -1)
            key = torch.cat([key * factor, rest], dim=-1)
            scale = 1.0
        else:
            key = key * factor
    output = _attention_sdpa(query, key, value, bias, position_bias, scale, visibility)
    return output, None


def _sdpa_is_faster(
    has_factor: bool,
    mode: str,
    scale: float,
    half: bool,
    needs_scores: bool,
    query_tokens: int,
    visibility: Visibility,
) -> bool:
    """Whether one call of SDPA beats blocks on a CPU: see the table above."""
    if needs_scores or (has_factor and mode != "multiplicative"):
        return False
    if half:
        return True
    if visibility.mask is not None or visibility.window is not None:
        return False
    if not visibility.causal:
        return True
    offset = visibility.query_offset
    square = isinstance(offset, int) and offset == 0 and query_tokens == visibility.key_tokens
    return square and scale > 0


def _row_minimum(query: Tensor, key: Tensor, scale: float, visibility: Visibility) -> Tensor:
    """The smallest visible score of each row, 0 where none is visible: ``[B, Hq, Tq, 1]``."""
    query_tokens = query.shape[2]
    minima = []
    for start in range(0, query_tokens, _CAUSAL_BLOCK):
        stop = min(start + _CAUSAL_BLOCK, query_tokens)
        low, high = visibility.key_range(start, stop)
        if low == high:
            minima.append(query.new_zeros(*query.shape[:2], stop - start, 1))
            continue
        scores = _grouped_scores(query[:, :, start:stop] * scale, key[:, :, low:high])
        visible = visibility.block(start, stop, low, high, query.device)
        if visible is not None:
            scores = scores.masked_fill(~visible, float("inf"))
        minimum = scores.amin(-1, keepdim=True)
        if visible is not None:
            minimum = minimum.masked_fill(minimum == float("inf"), 0.0)
        minima.append(minimum)
    return torch.cat(minima, dim=2)


def _grouped_scores(query: Tensor, key: Tensor, prefix_key: Tensor | None = None) -> Tensor:
    """q·kᵀ with grouped heads and no copy of the keys: ``[B, Hq, rows, Tp + keys]``."""
    batch, query_heads, rows, head_dim = query.shape
    key_heads = key.shape[1]
    grouped = query.reshape(batch, key_heads, query_heads // key_heads * rows, head_dim)
    scores = (grouped @ key.transpose(-1, -2)).view(batch, query_heads, rows, key.shape[2])
    if prefix_key is None:
        return scores
    together = grouped.transpose(0, 1).flatten(1, 2)  # [Hk, B * g * rows, D]
    shared = together @ prefix_key[0].transpose(-1, -2)
    shared = shared.unflatten(1, (batch, -1)).transpose(0, 1)  # [B, Hk, g * rows, Tp]
    return torch.cat([shared.reshape(batch, query_heads, rows, -1), scores], dim=-1)


def _grouped_values(
    probabilities: Tensor, value: Tensor, prefix_value: Tensor | None = None
) -> Tensor:
    """p·v with grouped heads and no copy of the values: ``[B, Hq, rows, Dv]``."""
    batch, query_heads, rows, keys = probabilities.shape
    key_heads = value.shape[1]
    grouped = probabilities.reshape(batch, key_heads, query_heads // key_heads * rows, keys)
    if prefix_value is None:
        return (grouped @ value).view(batch, query_heads, rows, value.shape[-1])
    together, grouped = grouped.tensor_split([prefix_value.shape[2]], dim=-1)
    shared = together.transpose(0, 1).flatten(1, 2) @ prefix_value[0]  # [Hk, B * g * rows, Dv]
    output = shared.unflatten(1, (batch, -1)).transpose(0, 1) + grouped @ value
    return output.reshape(batch, query_heads, rows, value.shape[-1])


def _attention_sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    position_bias: Tensor | None,
    scale: float,
    visibility: Visibility,
) -> Tensor:
    """Attention whose manipulation is already folded into keys or ``bias``."""
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

    plain = bias is None and position_bias is None and visibility.mask is None
    square = query_tokens == key_tokens and isinstance(visibility.query_offset, int)
    # is_causal with scale <= 0 gives NaN in torch 2.13 on CPU; the masked path does not
    if plain and visibility.causal and square and visibility.query_offset == 0 and scale > 0:
        if visibility.window is None or visibility.window >= key_tokens:
            return sdpa(query, key, value, mask=None, causal=True)[..., :value_dim]

    rows_per_block = max(16, _SCORES_PER_BLOCK // max(1, query.shape[0] * key_tokens))
    outputs = []
    for start in range(0, query_tokens, rows_per_block):
        stop = min(start + rows_per_block, query_tokens)
        low, high = visibility.key_range(start, stop)
        if low == high:
            outputs.append(query.new_zeros(*query.shape[:2], stop - start, value_dim))
            continue
        visible = visibility.block(start, stop, low, high, query.device)
        added = None if bias is None else bias[..., low:high]
        if position_bias is not None:
            block = position_bias[:, :, start:stop, low:high].to(query.dtype)
            added = block if added is None else added + block
        mask = visible
        if added is not None:
            mask = added if visible is None else added.masked_fill(~visible, float("-inf"))
            mask = mask.to(query.dtype).expand(-1, -1, stop - start, -1)
        output = sdpa(
            query[:, :, start:stop],
            key[:, :, low:high],
            value[:, :, low:high],
            mask=mask,
            causal=False,
        )[..., :value_dim]
        certain = bias is None and position_bias is None and visibility.always_some_key()
        if mask is not None and not certain:  # a row that sees nothing gives 0
            seen = mask if mask.dtype == torch.bool else mask != float("-inf")
            output = torch.where(seen.any(-1, keepdim=True), output, torch.zeros_like(output))
        outputs.append(output)
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)


def attention_eager(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    factor: Tensor | None,
    *,
    mode: str,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    position_bias: Tensor | None,
    visibility: Visibility,
    return_lse: bool,
    prefix: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Attention by blocks of query rows, scores held for one block only.

    Args:
        key: ``[B, Hk, Tk, D]``; also ``value`` has every batch row.
        factor: ``[B, 1|Hq, Tp + Tk]``.
        prefix: keys ``[1, Hk, Tp, D]`` and values in front of ``key``; ``visibility`` spans both.
    """
    batch, query_heads, query_tokens, _ = query.shape
    key_tokens = visibility.key_tokens
    prefix_tokens = key_tokens - key.shape[2]
    if position_bias is not None:
        position_bias = position_bias.expand(-1, -1, query_tokens, key_tokens)
    score_dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    if factor is not None:
        factor = factor.to(score_dtype)[:, :, None, :]  # [B, 1|Hq, 1, Tk]
    sink = None if sinks is None else sinks.to(score_dtype)[None, :, None, None]
    rows_per_block = max(16, _SCORES_PER_BLOCK // max(1, batch * query_heads * key_tokens))
    if visibility.causal:
        rows_per_block = min(rows_per_block, _CAUSAL_BLOCK)
    outputs, log_sum_exps = [], []
    for start in range(0, query_tokens, rows_per_block):
        stop = min(start + rows_per_block, query_tokens)
        low, high = visibility.key_range(start, stop)
        own = slice(max(low - prefix_tokens, 0), max(high - prefix_tokens, 0))
        shared_key, shared_value = None, None
        if prefix is not None:
            shared_key, shared_value = (part[:, :, low:high] for part in prefix)
        scores = _grouped_scores(query[:, :, start:stop], key[:, :, own], shared_key)
        scores = scores.to(score_dtype) * scale  # [B, Hq, rows, keys]
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        visible = visibility.block(start, stop, low, high, query.device)
        weight = None
        if factor is not None:
            columns = factor[..., low:high]
            if mode == "multiplicative":
                scores = scores * columns
            elif mode == "log_additive":
                weight = columns  # m·exp(s): finite gradient at m = 0
            elif low < high:
                seen = scores if visible is None else scores.masked_fill(~visible, float("inf"))
                minimum = seen.min(-1, keepdim=True).values
                minimum = minimum.masked_fill(minimum == float("inf"), 0.0)
                scores = torch.lerp(minimum, scores, columns)
        if position_bias is not None:
            scores = scores + position_bias[:, :, start:stop, low:high].to(score_dtype)
        if visible is not None:
            scores = scores.masked_fill(~visible, float("-inf"))
        output, log_sum_exp = _softmax_times_value(
            scores, weight, sink, value[:, :, own], shared_value
        )
        outputs.append(output)
        log_sum_exps.append(log_sum_exp)
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)
    if not return_lse:
        return output, None
    return output, torch.cat(log_sum_exps, dim=2).squeeze(-1)


def _softmax_times_value(
    scores: Tensor,
    weight: Tensor | None,
    sink: Tensor | None,
    value: Tensor,
    prefix_value: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """softmax(scores + log weight ⊕ sink)·v, 0 and -inf for a row without a key.

    Returns: ``[B, Hq, rows, Dv]`` in ``value.dtype``, ``[B, Hq, rows, 1]``.
    """
    zeroed = None
    if weight is not None:
        # exp(s + log m) = m·exp(s); at m = 0 only the second form has a gradient to m
        zeroed = torch.where(weight > 0, torch.ones_like(weight), weight)
        scores = scores + torch.where(weight > 0, weight, torch.ones_like(weight)).log()
    counting = scores.detach()
    if weight is not None:
        counting = counting.masked_fill(weight.detach() <= 0, float("-inf"))
    if scores.shape[-1]:
        maximum = counting.amax(-1, keepdim=True)
    else:
        maximum = scores.new_full((*scores.shape[:-1], 1), float("-inf"))
    if sink is not None:
        maximum = torch.maximum(maximum, sink.detach())
    maximum = maximum.masked_fill(maximum == float("-inf"), 0.0)
    if zeroed is None:
        exponentials = torch.exp(scores - maximum)
    else:  # only columns with m = 0 can exceed the maximum: no overflow there, else 0·inf
        exponentials = torch.exp((scores - maximum).clamp(max=80.0)) * zeroed
    normaliser = exponentials.sum(-1, keepdim=True)
    if sink is not None:
        normaliser = normaliser + torch.exp(sink - maximum)
    dead = normaliser == 0
    normaliser = normaliser.masked_fill(dead, 1.0)
    probabilities = exponentials / normaliser
    if zeroed is not None:
        probabilities = probabilities.masked_fill(dead, 0.0)  # no gradient to a dead row's factors
    output = _grouped_values(probabilities.to(value.dtype), value, prefix_value)
    log_sum_exp = (normaliser.log() + maximum).masked_fill(dead, float("-inf"))
    return output, log_sum_exp
