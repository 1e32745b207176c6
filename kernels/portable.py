"""Manipulated attention in plain PyTorch operators, for machines and cases without our kernels.

Where the algebra allows, the manipulation is folded into ``scaled_dot_product_attention``:

- ``multiplicative``: m·(q·k) = q·(m k), so the keys are scaled;
- ``log_additive``: log m is a bias per key;
- ``min_shift``: c + m (s − c) = q·(m k) + (1 − m) c, one more head dimension that holds the row
  minimum c in the query and 1 − m in the key.

Otherwise (soft cap, sinks, log-sum-exp, anything that half precision would round before the
softmax, a gradient to a ``log_additive`` factor) blocks of query rows are computed eagerly, so that
memory stays proportional to ``Tk``.

Legend: B batch, Hq/Hk query/key heads, Tq/Tk query/key tokens, D head dim, Dv value dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_SCORES_PER_BLOCK = 1 << 23
_CAUSAL_BLOCK = 64  # rows: small enough that a causal block skips most of the keys it cannot see


@dataclass(frozen=True)
class _Visibility:
    """Which keys each query row may see, materialised one block of rows at a time."""

    causal: bool
    query_offset: int | Tensor
    window: int | None
    mask: Tensor | None  # bool [B, Tk] or [B|1, Hq|1, Tq, Tk]
    key_tokens: int

    def key_range(self, start: int, stop: int) -> tuple[int, int]:
        """Keys that rows ``start..stop`` can see at all; all of them if the offset is a tensor."""
        if isinstance(self.query_offset, Tensor):
            return 0, self.key_tokens
        low, high = 0, self.key_tokens
        if self.causal:
            high = min(high, stop + self.query_offset)
        if self.window is not None:
            low = max(low, start + self.query_offset - self.window + 1)
            high = min(high, stop - 1 + self.query_offset + self.window)
        return low, max(low, high)

    def block(
        self, start: int, stop: int, low: int, high: int, device: torch.device
    ) -> Tensor | None:
        """Bool ``[B|1, Hq|1, rows, keys]``; ``None`` where every key is visible."""
        visible = None
        if not self._band_is_full(start, stop, low, high):
            row = torch.arange(start, stop, device=device)[:, None] + self.query_offset
            column = torch.arange(low, high, device=device)[None, :]
            distance = row - column  # [rows, keys]
            visible = distance >= 0 if self.causal else None
            if self.window is not None:
                near = (distance if self.causal else distance.abs()) < self.window
                visible = near if visible is None else visible & near
            visible = None if visible is None else visible[None, None]
        if self.mask is not None:
            if self.mask.dim() == 2:
                given = self.mask[:, None, None, low:high]
            else:
                given = self.mask[:, :, start:stop, low:high]
            visible = given if visible is None else visible & given
        return visible

    def _band_is_full(self, start: int, stop: int, low: int, high: int) -> bool:
        """Whether neither the diagonal nor the window cuts into this block."""
        if not self.causal and self.window is None:
            return True
        if isinstance(self.query_offset, Tensor):
            return False
        first, last = start + self.query_offset, stop - 1 + self.query_offset
        if self.causal and high - 1 > first:
            return False
        if self.window is None:
            return True
        return last - low < self.window and (self.causal or high - 1 - first < self.window)


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
    visibility = _Visibility(causal, query_offset, window, mask, key_tokens)
    if position_bias is not None:
        position_bias = position_bias.expand(
            position_bias.shape[0], position_bias.shape[1], query_tokens, key_tokens
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

    half = query.dtype in (torch.float16, torch.bfloat16)
    eager = (
        softcap is not None
        or sinks is not None
        or return_lse
        or (half and position_bias is not None)
        or (half and factor is not None and mode != "multiplicative")
        or (factor is not None and mode == "log_additive" and factor.requires_grad)
    )
    if eager:
        return _attention_eager(
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


def _row_minimum(query: Tensor, key: Tensor, scale: float, visibility: _Visibility) -> Tensor:
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


def _grouped_scores(query: Tensor, key: Tensor) -> Tensor:
    """q·kᵀ with grouped heads and no copy of the keys: ``[B, Hq, rows, keys]``."""
    batch, query_heads, rows, head_dim = query.shape
    key_heads = key.shape[1]
    grouped = query.reshape(batch, key_heads, query_heads // key_heads * rows, head_dim)
    return (grouped @ key.transpose(-1, -2)).view(batch, query_heads, rows, key.shape[2])


def _grouped_values(probabilities: Tensor, value: Tensor) -> Tensor:
    """p·v with grouped heads and no copy of the values: ``[B, Hq, rows, Dv]``."""
    batch, query_heads, rows, keys = probabilities.shape
    key_heads = value.shape[1]
    grouped = probabilities.reshape(batch, key_heads, query_heads // key_heads * rows, keys)
    return (grouped @ value).view(batch, query_heads, rows, value.shape[-1])


def _attention_sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    position_bias: Tensor | None,
    scale: float,
    visibility: _Visibility,
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
        if mask is not None:  # a row that sees nothing gives 0
            seen = mask if mask.dtype == torch.bool else mask != float("-inf")
            output = torch.where(seen.any(-1, keepdim=True), output, torch.zeros_like(output))
        outputs.append(output)
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)


def _attention_eager(
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
    visibility: _Visibility,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """Attention by blocks of query rows, scores held for one block only."""
    batch, query_heads, query_tokens, _ = query.shape
    score_dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    if factor is not None:
        factor = factor.to(score_dtype)[:, :, None, :]  # [B, 1|Hq, 1, Tk]
    sink = None if sinks is None else sinks.to(score_dtype)[None, :, None, None]
    rows_per_block = max(16, _SCORES_PER_BLOCK // max(1, batch * query_heads * key.shape[2]))
    if visibility.causal:
        rows_per_block = min(rows_per_block, _CAUSAL_BLOCK)
    outputs, log_sum_exps = [], []
    for start in range(0, query_tokens, rows_per_block):
        stop = min(start + rows_per_block, query_tokens)
        low, high = visibility.key_range(start, stop)
        scores = _grouped_scores(query[:, :, start:stop], key[:, :, low:high])
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
        output, log_sum_exp = _softmax_times_value(scores, weight, sink, value[:, :, low:high])
        outputs.append(output)
        log_sum_exps.append(log_sum_exp)
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)
    if not return_lse:
        return output, None
    return output, torch.cat(log_sum_exps, dim=2).squeeze(-1)


def _softmax_times_value(
    scores: Tensor, weight: Tensor | None, sink: Tensor | None, value: Tensor
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
    output = _grouped_values(probabilities.to(value.dtype), value)
    log_sum_exp = (normaliser.log() + maximum).masked_fill(dead, float("-inf"))
    return output, log_sum_exp
