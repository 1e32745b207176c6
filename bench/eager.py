"""What we are measured against: the modifier matrix in eager attention, one forward per unit.

This is how the paper describes the method and how its authors released it: the whole score matrix
is multiplied by a matrix of factors, the model computes logits everywhere, and a loop goes over
the tokens. Written from the mathematics; it shares no code with what it is compared to.

Legend: B batch, Hq/Hk query/key heads, T tokens, D head dim, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, eager_mask

IMPLEMENTATION = "eager_modifier_matrix"


def modifier_matrix(key_factor: Tensor, query_tokens: int, first_row: int = 0) -> Tensor:
    """The matrix that scores are multiplied by: ``[B, Tk]`` factors as ``[B, 1, Tq, Tk]``.

    Rows before ``first_row`` hold ones.
    """
    matrix = key_factor[:, None, None, :].expand(-1, 1, query_tokens, -1).contiguous()
    matrix[:, :, :first_row] = 1
    return matrix


def attention_eager(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    matrix: Tensor | None,
    *,
    mode: str,
    visible: Tensor,
    scale: float | None = None,
) -> Tensor:
    """Eager attention with the modifier matrix.

    Args:
        query: ``[B, Hq, Tq, D]``; ``key`` and ``value`` ``[B, Hk, Tk, D]``.
        matrix: ``[B, 1, Tq, Tk]`` in ``query.dtype`` or float32; ``None`` leaves the scores alone.
        visible: bool, broadcastable to ``[B, Hq, Tq, Tk]``.
    Returns: ``[B, Hq, Tq, D]``.
    """
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if matrix is not None:
        matrix = matrix.to(scores.dtype)
        if mode == "multiplicative":
            scores = scores * matrix
        elif mode == "min_shift":
            low = scores.masked_fill(~visible, float("inf")).amin(-1, keepdim=True)
            scores = low + matrix * (scores - low)
        elif mode == "log_additive":
            scores = scores + matrix.log()
        else:
            raise ValueError(f"mode {mode!r} has no eager baseline.")
    scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
    upcast = torch.promote_types(scores.dtype, torch.float32)
    return scores.softmax(-1, dtype=upcast).to(query.dtype) @ value


def _attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    modifier: Tensor | None = None,
    mode: str = "min_shift",
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Eager attention as transformers calls it."""
    visible = attention_mask[..., : key.shape[2]] == 0
    out = attention_eager(query, key, value, modifier, mode=mode, visible=visible, scale=scaling)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(IMPLEMENTATION, _attention_forward)
AttentionMaskInterface.register(IMPLEMENTATION, eager_mask)


@torch.no_grad()
def scores_by_eager_loop(
    model: PreTrainedModel,
    prompt: Tensor,
    target: Tensor,
    units: Iterable[int],
    *,
    factor: float,
    mode: str,
    first_row: int = 0,
) -> Tensor:
    """Explain by a loop of full forwards: one per suppressed token, logits for every position.

    Args:
        model: a decoder that hands unknown keyword arguments on to its attention function.
        prompt, target: ``[P]`` and ``[T]`` token ids.
        units: positions of the prompt to suppress, one after another.
        first_row: rows before it are left alone; the first that predicts a target token makes the
            scores direct effects.
    Returns: ``[T, units]``: how much the loss of each target token rises.
    """
    tokens = torch.cat([prompt, target[:-1]])[None]  # [1, P + T - 1]
    length = tokens.shape[1]
    before = model.config._attn_implementation or "eager"
    model.set_attn_implementation(IMPLEMENTATION)

    def logprobs(modifier: Tensor | None) -> Tensor:
        logits = model(tokens, modifier=modifier, mode=mode, use_cache=False).logits[0]  # [.., V]
        scored = torch.log_softmax(logits[len(prompt) - 1 :], -1)  # [T, V]
        return scored.gather(1, target[:, None])[:, 0]

    try:
        base = logprobs(None)
        columns = []
        for unit in units:
            key_factor = torch.ones(1, length, dtype=model.dtype, device=tokens.device)
            key_factor[0, unit] = factor
            columns.append(base - logprobs(modifier_matrix(key_factor, length, first_row)))
    finally:
        model.set_attn_implementation(before)
    return torch.stack(columns, 1)
