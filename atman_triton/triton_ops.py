"""The fused kernels as torch operators, so that compile, opcheck and fake tensors know them.

Legend: B batch, Hq/Hk query/key heads, Tq/Tk query/key tokens, Tp prefix tokens, D head dim, Dv
value dim. Arguments are those of ``kernels/forward.py`` and ``kernels/shared_prefix.py``, taken as
validated; an offset that lives on the device comes as ``offset_tensor``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("atman_triton::attention_fwd", mutates_args=())
def attention_triton(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_factor: Tensor | None,
    sinks: Tensor | None,
    position_bias: Tensor | None,
    key_padding: Tensor | None,
    block_mask: Tensor | None,
    offset_tensor: Tensor | None,
    query_offset: int,
    mode: str,
    causal: bool,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Output ``[B, Hq, Tq, Dv]`` and log-sum-exp ``[B, Hq, Tq]`` by the fused kernel."""
    from .kernels.forward import attention_fwd  # triton is optional, so it is imported here

    return attention_fwd(
        query,
        key,
        value,
        key_factor,
        mode=mode,
        causal=causal,
        query_offset=query_offset if offset_tensor is None else offset_tensor,
        scale=scale,
        window=window,
        softcap=softcap,
        sinks=sinks,
        position_bias=position_bias,
        key_padding=key_padding,
        block_mask=block_mask,
    )


@torch.library.custom_op("atman_triton::shared_prefix_fwd", mutates_args=())
def shared_prefix_triton(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    key_factor: Tensor | None,
    sinks: Tensor | None,
    position_bias: Tensor | None,
    key_padding: Tensor | None,
    block_mask: Tensor | None,
    offset_tensor: Tensor | None,
    query_offset: int,
    mode: str,
    causal: bool,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """The same behind a prefix ``[1, Hk, Tp, D]``, by the kernel that suits the number of rows."""
    from .kernels.configs import packs_queries  # triton is optional, so it is imported here
    from .kernels.packed_prefix import packed_prefix_fwd
    from .kernels.shared_prefix import shared_prefix_fwd

    batch, heads, queries, _ = query.shape
    packs = packs_queries(queries, batch * heads // key.shape[1])
    return (packed_prefix_fwd if packs else shared_prefix_fwd)(
        query,
        key,
        value,
        prefix_key,
        prefix_value,
        key_factor,
        mode=mode,
        causal=causal,
        query_offset=query_offset if offset_tensor is None else offset_tensor,
        scale=scale,
        window=window,
        softcap=softcap,
        sinks=sinks,
        position_bias=position_bias,
        key_padding=key_padding,
        block_mask=block_mask,
    )


def _fake(query: Tensor, _key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    batch, query_heads, query_tokens, _head_dim = query.shape
    # heads beside dims in memory, as the kernels write it and transformers wants it next
    output = query.new_empty(batch, query_tokens, query_heads, value.shape[-1]).transpose(1, 2)
    lse = query.new_empty(batch, query_heads, query_tokens, dtype=torch.float32)
    return output, lse


def _refuse_backward(ctx: object, *grads: Tensor) -> None:
    raise NotImplementedError(
        "backend='triton' has no backward pass; use backend='auto' or 'torch' for gradients."
    )


for _op in (attention_triton, shared_prefix_triton):
    _op.register_fake(_fake)
    _op.register_autograd(_refuse_backward)
