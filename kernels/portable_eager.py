"""Manipulated attention by blocks of query rows, in operators that autograd and compile can follow.

Serves every feature. Scores exist for one block at a time, in the backward pass too: there a block
is computed once more, unless it is so narrow that keeping its scores costs no more than keeping its
queries.

Legend: B batch, Hq/Hk query/key heads, Tq/Tk query/key tokens, Tp prefix tokens, D head dim, Dv
value dim.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .dropout import keep_mask
from .recompute import recomputed
from .visibility import Visibility

SCORES_PER_BLOCK = 1 << 23
CAUSAL_BLOCK = 64  # rows: small enough that a causal block skips most of the keys it cannot see


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
    dropout: float,
    dropout_seed: Tensor | None,
    return_lse: bool,
    prefix: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Attention by blocks of query rows, scores held for one block only.

    Args:
        key: ``[B, Hk, Tk, D]``; also ``value`` has every batch row.
        factor: ``[B, 1|Hq, Tp + Tk]``.
        prefix: keys ``[1, Hk, Tp, D]`` and values in front of ``key``; ``visibility`` spans both.
    """
    batch, query_heads, query_tokens, head_dim = query.shape
    key_tokens = visibility.key_tokens
    prefix_tokens = key_tokens - key.shape[2]
    if position_bias is not None:
        position_bias = position_bias.expand(-1, -1, query_tokens, key_tokens)
    score_dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    if factor is not None:
        factor = factor.to(score_dtype)[:, :, None, :]  # [B, 1|Hq, 1, Tk]
    sink = None if sinks is None else sinks.to(score_dtype)[None, :, None, None]
    seed = None if dropout_seed is None else dropout_seed.clone()  # it may be counted up in place
    visibility = as_it_is_now(visibility)
    rows_per_block = max(16, SCORES_PER_BLOCK // max(1, batch * query_heads * key_tokens))
    if visibility.causal:
        rows_per_block = min(rows_per_block, CAUSAL_BLOCK)
    outputs, log_sum_exps = [], []
    for start in range(0, query_tokens, rows_per_block):
        stop = min(start + rows_per_block, query_tokens)
        # a minimum over all keys needs the scores of hidden ones
        whole = factor is not None and mode == "min_shift_full"
        low, high = (0, key_tokens) if whole else visibility.key_range(start, stop)
        own = slice(max(low - prefix_tokens, 0), max(high - prefix_tokens, 0))
        shared_key, shared_value = None, None
        if prefix is not None:
            shared_key, shared_value = (part[:, :, low:high] for part in prefix)
        block = _Block(
            mode, scale, softcap, visibility, (start, stop, low, high), dropout, seed, return_lse
        )
        arguments = (
            query[:, :, start:stop],
            key[:, :, own],
            value[:, :, own],
            shared_key,
            shared_value,
            None if factor is None else factor[..., low:high],
            sink,
            None if position_bias is None else position_bias[:, :, start:stop, low:high],
            visibility.mask,
        )
        parts = recomputed(block, *arguments) if high - low > head_dim else block(*arguments)
        outputs.append(parts[0])
        log_sum_exps += parts[1:]
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)
    if not return_lse:
        return output, None
    return output, torch.cat(log_sum_exps, dim=2).squeeze(-1)


def as_it_is_now(visibility: Visibility) -> Visibility:
    """The same with an offset that nobody else changes before the backward pass."""
    if not isinstance(visibility.query_offset, Tensor):
        return visibility
    return replace(visibility, query_offset=visibility.query_offset.clone())


@dataclass(frozen=True)
class _Block:
    """Attention of some query rows to the keys that they may see."""

    mode: str
    scale: float
    softcap: float | None
    visibility: Visibility
    place: tuple[int, int, int, int]  # first and last + 1 of query rows and keys
    dropout: float
    dropout_seed: Tensor | None
    return_lse: bool

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        shared_key: Tensor | None,
        shared_value: Tensor | None,
        factor: Tensor | None,
        sink: Tensor | None,
        position_bias: Tensor | None,
        mask: Tensor | None,
    ) -> tuple[Tensor, ...]:
        """Output ``[B, Hq, rows, Dv]``, and log-sum-exp ``[B, Hq, rows, 1]`` if asked for.

        The tensors are slices at ``place``, ``factor`` ``[B, 1|Hq, 1, keys]``; ``mask`` is whole.
        """
        start, stop, low, high = self.place
        score_dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
        scores = grouped_scores(query, key, shared_key).to(score_dtype) * self.scale
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        visibility = replace(self.visibility, mask=mask)
        visible = visibility.block(start, stop, low, high, query.device)
        weight = None
        if factor is not None:
            if self.mode == "multiplicative":
                scores = scores * factor
            elif self.mode == "log_additive":
                weight = factor  # m·exp(s): finite gradient at m = 0
            elif low < high:
                full = visible is None or self.mode == "min_shift_full"
                seen = scores if full else scores.masked_fill(~visible, float("inf"))
                minimum = seen.min(-1, keepdim=True).values
                minimum = minimum.masked_fill(minimum == float("inf"), 0.0)
                scores = torch.lerp(minimum, scores, factor)
        if position_bias is not None:
            scores = scores + position_bias.to(score_dtype)
        if visible is not None:
            scores = scores.masked_fill(~visible, float("-inf"))
        probabilities, log_sum_exp = _softmax(scores, weight, sink)
        if self.dropout_seed is not None:
            keep = keep_mask(
                self.dropout_seed,
                self.dropout,
                heads=query.shape[1],
                batch=(0, query.shape[0]),
                rows=(start, stop),
                columns=(low, high),
            )
            probabilities = probabilities.masked_fill(~keep, 0.0) / (1 - self.dropout)
        output = _grouped_values(probabilities.to(value.dtype), value, shared_value)
        return (output, log_sum_exp) if self.return_lse else (output,)


def grouped_scores(query: Tensor, key: Tensor, prefix_key: Tensor | None = None) -> Tensor:
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


def _softmax(scores: Tensor, weight: Tensor | None, sink: Tensor | None) -> tuple[Tensor, Tensor]:
    """softmax(scores + log weight ⊕ sink), 0 and -inf for a row without a key.

    Returns: probabilities ``[B, Hq, rows, keys]`` and log-sum-exp ``[B, Hq, rows, 1]``.
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
        limit = 700.0 if scores.dtype == torch.float64 else 80.0
        exponentials = torch.exp((scores - maximum).clamp(max=limit)) * zeroed
    normaliser = exponentials.sum(-1, keepdim=True)
    if sink is not None:
        normaliser = normaliser + torch.exp(sink - maximum)
    dead = normaliser == 0
    normaliser = normaliser.masked_fill(dead, 1.0)
    probabilities = exponentials / normaliser
    if zeroed is not None:
        probabilities = probabilities.masked_fill(dead, 0.0)  # no gradient to a dead row's factors
    return probabilities, (normaliser.log() + maximum).masked_fill(dead, float("-inf"))
