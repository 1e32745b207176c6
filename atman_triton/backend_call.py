"""One call of the op, checked, as backends are asked about it and take it.

Legend: see ``attention``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .validation import check_arguments


class Call(NamedTuple):
    """The arguments of one call of ``attention``, checked, with what is left open decided.

    Args:
        prefix: ``None`` also where it holds no keys.
        dropout_seed: as given; it is drawn when the call is run.
        needs_grad: whether autograd follows the call.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    key_factor: Tensor | None
    mode: str
    causal: bool
    query_offset: int | Tensor
    scale: float
    window: int | None
    softcap: float | None
    sinks: Tensor | None
    position_bias: Tensor | None
    mask: Tensor | None
    prefix: tuple[Tensor, Tensor] | None
    dropout: float
    dropout_seed: int | Tensor | None
    return_lse: bool
    needs_grad: bool


def checked_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_factor: Tensor | None,
    *,
    mode: str,
    causal: bool,
    query_offset: int | Tensor | None,
    scale: float | None,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    position_bias: Tensor | None,
    mask: Tensor | None,
    prefix: tuple[Tensor, Tensor] | None,
    dropout: float,
    dropout_seed: int | Tensor | None,
    return_lse: bool,
) -> Call:
    """The arguments of :func:`atman_triton.attention` as a call.

    Raises: TypeError, ValueError: naming the argument, what it must be and what came.
    """
    check_arguments(
        query,
        key,
        value,
        key_factor,
        mode=mode,
        causal=causal,
        query_offset=query_offset,
        scale=scale,
        window=window,
        softcap=softcap,
        sinks=sinks,
        position_bias=position_bias,
        mask=mask,
        prefix=prefix,
        dropout=dropout,
        dropout_seed=dropout_seed,
    )
    if prefix is not None and prefix[0].shape[2] == 0:
        prefix = None
    if query_offset is None:
        prefix_tokens = 0 if prefix is None else prefix[0].shape[2]
        query_offset = prefix_tokens + key.shape[2] - query.shape[2]
    tensors = (query, key, value, key_factor, sinks, position_bias, *(prefix or ()))
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    return Call(
        query,
        key,
        value,
        key_factor,
        mode,
        causal,
        query_offset,
        query.shape[-1] ** -0.5 if scale is None else scale,
        window,
        softcap,
        sinks,
        position_bias,
        mask,
        prefix,
        dropout,
        dropout_seed,
        return_lse,
        needs_grad,
    )
