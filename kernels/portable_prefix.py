"""Manipulated attention behind a shared prefix, in plain PyTorch operators.

No batch row gets a copy of the prefix: the queries of all rows meet it in one product per key
head. On a CPU without gradients the work is done in ``portable_blocks``, else by
``attention_eager``, whose operators autograd and ``torch.compile`` can follow.

Legend: B batch, Hq/Hk query/key heads, Tq/Tk query/key tokens, Tp prefix tokens, D head dim, Dv
value dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .portable import attention_portable
from .portable_blocks import attention_blocks
from .portable_eager import attention_eager
from .portable_paths import SCORE_BLOCKS, prefix_path
from .visibility import Visibility


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
    dropout: float,
    dropout_seed: Tensor | None,
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
    prefix_tokens = prefix_key.shape[2]
    if query.shape[2] == 0 or prefix_tokens == 0:
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
            dropout=dropout,
            dropout_seed=dropout_seed,
            return_lse=return_lse,
        )
    visibility = Visibility(causal, query_offset, window, mask, prefix_tokens + key.shape[2])
    tensors = (query, key, value, key_factor, prefix_key, prefix_value, sinks, position_bias)
    if prefix_path(*tensors, dropout=dropout).kernel == SCORE_BLOCKS:
        return attention_blocks(
            query,
            key,
            value,
            key_factor,
            prefix_key,
            prefix_value,
            mode=mode,
            scale=scale,
            softcap=softcap,
            sinks=sinks,
            position_bias=position_bias,
            visibility=visibility,
            return_lse=return_lse,
        )
    factor = None
    if key_factor is not None:
        factor = key_factor[:, None, :] if key_factor.dim() == 2 else key_factor
        ones = factor.new_ones(*factor.shape[:2], visibility.key_tokens - factor.shape[-1])
        factor = torch.cat([ones, factor], dim=-1)  # [B, 1|Hq, Tp + Tk]
    return attention_eager(
        query,
        key.expand(batch, -1, -1, -1),
        value.expand(batch, -1, -1, -1),
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
        prefix=(prefix_key, prefix_value),
    )
