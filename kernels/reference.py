"""The oracle: attention with manipulated scores, written for reading, in plain PyTorch.

Everything else in this project is measured against this file in float64. It holds whole
``[B, Hq, Tq, Tk]`` score tensors and must never be imported by optimised code.

Legend: B batch, Hq/Hk query/key heads, Tq/Tk query/key tokens, D head dim, Dv value dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .dropout import keep_mask

MODES = ("multiplicative", "min_shift", "min_shift_full", "log_additive")


def visible_keys(
    query_tokens: int,
    key_tokens: int,
    *,
    causal: bool = False,
    query_offset: int | Tensor | None = None,
    window: int | None = None,
    mask: Tensor | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Which key each query may see.

    Args:
        query_offset: key index at which query row 0 stands; ``None`` aligns the last query with
            the last key, 0 aligns the first with the first.
        window: a query at position p sees keys j with ``p - j < window`` (``|p - j| < window``
            when not causal).
        mask: bool, ``[B, Tk]`` or ``[B|1, Hq|1, Tq, Tk]``, True = visible.
    Returns: bool, broadcastable to ``[B, Hq, Tq, Tk]``.
    """
    if query_offset is None:
        query_offset = key_tokens - query_tokens
    row = torch.arange(query_tokens, device=device)[:, None] + query_offset  # [Tq, 1]
    column = torch.arange(key_tokens, device=device)[None, :]  # [1, Tk]
    visible = torch.ones(query_tokens, key_tokens, dtype=torch.bool, device=device)
    if causal:
        visible = visible & (column <= row)
    if window is not None:
        distance = row - column if causal else (row - column).abs()
        visible = visible & (distance < window)
    visible = visible[None, None]  # [1, 1, Tq, Tk]
    if mask is not None:
        visible = visible & (mask[:, None, None, :] if mask.dim() == 2 else mask)
    return visible


def manipulate_scores(scores: Tensor, factor: Tensor, mode: str, visible: Tensor) -> Tensor:
    """Apply one factor per key to raw scores, except for ``log_additive`` (see below).

    Args:
        scores: ``[B, Hq, Tq, Tk]``, scaled and capped.
        factor: broadcastable to ``scores``; 1 leaves a column alone.
        visible: bool, broadcastable to ``scores``.
    Returns: ``[B, Hq, Tq, Tk]``. ``log_additive`` (s + log m) is returned unchanged, because its
        factor multiplies the exponentials instead: the same number, with a finite gradient at
        m = 0.
    Source: AtMan (arXiv 2301.08110) Eq. 4 for ``multiplicative``; the ``min_shift`` modes
        interpolate towards the row's minimum as the authors' released code does.
    """
    if mode == "multiplicative":
        return factor * scores
    if mode == "log_additive" or not scores.shape[-1]:
        return scores
    if mode == "min_shift":
        candidates = scores.masked_fill(~visible, float("inf"))
        has_key = visible.expand_as(scores).any(-1, keepdim=True)
        # min over an index, so that the gradient goes to one argmin also where scores tie
        minimum = candidates.min(-1, keepdim=True).values
        minimum = torch.where(has_key, minimum, torch.zeros_like(minimum))  # [B, Hq, Tq, 1]
    elif mode == "min_shift_full":
        minimum = scores.min(-1, keepdim=True).values
    else:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}.")
    return minimum + factor * (scores - minimum)


def attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_factor: Tensor | None = None,
    *,
    mode: str = "multiplicative",
    causal: bool = False,
    query_offset: int | Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    position_bias: Tensor | None = None,
    mask: Tensor | None = None,
    prefix: tuple[Tensor, Tensor] | None = None,
    dropout: float = 0.0,
    dropout_seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention whose pre-softmax scores are manipulated by one factor per key.

    Matrix products run in ``query.dtype``; the softmax in float32 for half precision inputs, in
    ``query.dtype`` otherwise. Differentiable in every tensor.

    Args:
        query: ``[B, Hq, Tq, D]``, any floating dtype.
        key, value: ``[B|1, Hk, Tk, D]`` and ``[B|1, Hk, Tk, Dv]``, Hk divides Hq.
        key_factor: ``[B, Tk]`` or ``[B, Hq, Tk]``; 1 keeps a key, < 1 suppresses it.
        mode: one of :data:`MODES`.
        scale: factor on q·k, default ``D ** -0.5``.
        softcap: scores become ``softcap * tanh(score / softcap)`` before the manipulation.
        sinks: ``[Hq]`` logits that take part in the normaliser only.
        position_bias: broadcastable to ``[B, Hq, Tq, Tk]``, added after the manipulation.
        causal, query_offset, window, mask: see :func:`visible_keys`.
        prefix: key ``[1, Hk, Tp, D]`` and value ``[1, Hk, Tp, Dv]`` in front of every batch row's
            own; everything above then spans ``Tp + Tk`` keys. A ``key_factor`` of length Tk has
            ones on the prefix.
        dropout: share of the probabilities that becomes 0; the others are divided by what is left.
        dropout_seed: int64 of one element, needed with dropout; see :func:`keep_mask`.
    Returns: output ``[B, Hq, Tq, Dv]`` in ``query.dtype`` and log-sum-exp ``[B, Hq, Tq]`` (natural
        log, sinks included). A row that sees no key gives 0 and -inf (the sink, if there is one).
    Source: AtMan (arXiv 2301.08110), Eq. 4.
    """
    batch, query_heads, query_tokens, head_dim = query.shape
    if prefix is not None:
        prefix_key, prefix_value = (tensor.expand(batch, -1, -1, -1) for tensor in prefix)
        if key_factor is not None and key_factor.shape[-1] == key.shape[2]:
            ones = key_factor.new_ones(*key_factor.shape[:-1], prefix_key.shape[2])
            key_factor = torch.cat([ones, key_factor], dim=-1)
        key = torch.cat([prefix_key, key.expand(batch, -1, -1, -1)], dim=2)
        value = torch.cat([prefix_value, value.expand(batch, -1, -1, -1)], dim=2)
    key_heads, key_tokens = key.shape[1], key.shape[2]
    group = query_heads // key_heads
    key = key.expand(batch, -1, -1, -1).repeat_interleave(group, dim=1)  # [B, Hq, Tk, D]
    value = value.expand(batch, -1, -1, -1).repeat_interleave(group, dim=1)  # [B, Hq, Tk, Dv]
    score_scale = head_dim**-0.5 if scale is None else scale

    scores = (query @ key.transpose(-1, -2)) * score_scale  # [B, Hq, Tq, Tk]
    if scores.dtype in (torch.float16, torch.bfloat16):
        scores = scores.float()
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    visible = visible_keys(
        query_tokens,
        key_tokens,
        causal=causal,
        query_offset=query_offset,
        window=window,
        mask=mask,
        device=query.device,
    )
    weight = None
    if key_factor is not None:
        factor = key_factor.to(scores.dtype)
        factor = factor[:, None, None, :] if factor.dim() == 2 else factor[:, :, None, :]
        scores = manipulate_scores(scores, factor, mode, visible)
        weight = factor if mode == "log_additive" else None
    if position_bias is not None:
        scores = scores + position_bias.to(scores.dtype)
    scores = scores.masked_fill(~visible, float("-inf"))

    counting = scores.detach()
    if weight is not None:
        counting = counting.masked_fill(weight.detach() <= 0, float("-inf"))
    if key_tokens:
        maximum = counting.amax(-1, keepdim=True)  # of the keys that count: others may overflow
    else:
        maximum = scores.new_full((*scores.shape[:-1], 1), float("-inf"))
    if sinks is not None:
        sink = sinks.to(scores.dtype)[None, :, None, None]  # [1, Hq, 1, 1]
        maximum = torch.maximum(maximum, sink.detach())
    maximum = torch.where(maximum == float("-inf"), torch.zeros_like(maximum), maximum)
    # only a key of weight 0 can exceed the maximum; its exponential must not overflow to 0·inf
    limit = 700.0 if scores.dtype == torch.float64 else 80.0
    exponentials = torch.exp((scores - maximum).clamp(max=limit))
    if weight is not None:
        exponentials = weight * exponentials
    normaliser = exponentials.sum(-1, keepdim=True)  # [B, Hq, Tq, 1]
    if sinks is not None:
        normaliser = normaliser + torch.exp(sink - maximum)
    dead = normaliser == 0
    probabilities = (exponentials / normaliser.masked_fill(dead, 1.0)).masked_fill(dead, 0.0)
    if dropout:
        if dropout_seed is None:
            raise ValueError("dropout needs a dropout_seed, got None.")
        keep = keep_mask(
            dropout_seed,
            dropout,
            heads=query_heads,
            batch=(0, batch),
            rows=(0, query_tokens),
            columns=(0, key_tokens),
        )
        probabilities = torch.where(keep, probabilities / (1 - dropout), 0.0)
    output = probabilities.to(value.dtype) @ value  # [B, Hq, Tq, Dv]
    log_normaliser = normaliser.masked_fill(dead, 1.0).log() + maximum
    return output, log_normaliser.masked_fill(dead, float("-inf")).squeeze(-1)
