"""Manipulated attention behind a shared prefix, in plain PyTorch operators.

Legend: B batch, Hq/Hk query/key heads, Tq/Tk query/key tokens, Tp prefix tokens, D head dim, Dv
value dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .portable import attention_portable


def attention_portable_prefix(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_factor: Tensor | None,
    prefix_key: Tensor,
    prefix_value: Tensor,
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

    Args:
        key_factor: ``[B, Tp + Tk]`` or ``[B, Hq, Tp + Tk]``; of length Tk it leaves the prefix
            alone.
        prefix_key, prefix_value: ``[1, Hk, Tp, D]`` and ``[1, Hk, Tp, Dv]``, in front of every
            row's keys.
    Returns: output ``[B, Hq, Tq, Dv]`` and, if asked for, log-sum-exp ``[B, Hq, Tq]`` float32
        (float64 for float64 inputs).
    """
    batch = query.shape[0]
    if key_factor is not None and key_factor.shape[-1] == key.shape[2]:
        ones = key_factor.new_ones(*key_factor.shape[:-1], prefix_key.shape[2])
        key_factor = torch.cat([ones, key_factor], dim=-1)
    key, value = (
        torch.cat([shared.expand(batch, -1, -1, -1), own.expand(batch, -1, -1, -1)], dim=2)
        for shared, own in ((prefix_key, key), (prefix_value, value))
    )
    return attention_portable(
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
        return_lse=return_lse,
    )
