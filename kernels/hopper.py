"""Launcher of the Hopper kernel, and what it serves.

Legend: B batch, Hq/Hk query/key heads, Tq/Tk query/key tokens, D head dim, Dv value dim.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .configs import device_architecture, device_name
from .hopper_configs import hopper_config
from .hopper_kernel import _hopper_fwd_kernel
from .hopper_tiles import ROWS_AT_ONCE, HopperConfig
from .hopper_work import ROWS, HopperVariant
from .launch import LOG2_E
from .once import made_once
from .persistent import INTERPRETED_PROGRAMS, section_of
from .prepass import factor_tiles
from .tuned import length_bucket

ELEMENTS = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}


def variant(
    config: HopperConfig, head_dim: int, value_dim: int, mode: str, causal: bool
) -> HopperVariant:
    """The compile-time description; ``mode`` is ``plain`` without factors."""
    return HopperVariant(
        mode=mode,
        causal=causal,
        scaled=mode == "log_additive",
        head_dim=head_dim,
        value_dim=value_dim,
        block_n=config.block_n,
        stages=config.stages,
        own_output=config.own_output,
    )


def block_layout(block: list[int], dtype: torch.dtype) -> Any:
    """Shared memory layout of a descriptor's block, as matrix products read it."""
    return gl.NVMMASharedLayout.get_default_for(block, ELEMENTS[dtype])


def _descriptor(tensor: Tensor, rows: int) -> TensorDescriptor:
    """TMA descriptor of ``[B, H, T, D]`` that copies ``rows`` tokens of one head at a time.

    What lies outside of the tensor is read as 0 and not written.
    """
    if tensor.data_ptr() % 16:  # a view that starts within; where it starts is not seen before
        tensor = tensor.clone()
    block = [1, 1, rows, tensor.shape[-1]]
    # a dimension of size 1 has no stride to keep, and any but a multiple of 16 bytes is refused
    strides = [
        stride if size > 1 else tensor.shape[-1]
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    ]
    return TensorDescriptor(
        tensor, list(tensor.shape), [*strides[:-1], 1], block, block_layout(block, tensor.dtype)
    )


def _once(tensor: Tensor) -> Tensor:
    """One batch row of a tensor that all batch rows share."""
    return tensor[:1] if tensor.stride(0) == 0 else tensor


def processors_of(device: torch.device) -> int:
    """How many programs run at once: one on each multiprocessor, whose registers it takes."""
    if device.type != "cuda":
        return INTERPRETED_PROGRAMS
    return torch.cuda.get_device_properties(device).multi_processor_count


def attention_fwd_hopper(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_factor: Tensor | None = None,
    *,
    mode: str = "multiplicative",
    causal: bool = False,
    query_offset: int | None = None,
    scale: float | None = None,
    config: HopperConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """Launch the Hopper kernel on arguments that :func:`why_not_hopper` has no reason against.

    Args:
        query: ``[B, Hq, Tq, D]``, fp16 or bf16; D and Dv 64, 128 or 256.
        key, value: ``[B|1, Hk, Tk, D]`` and ``[B|1, Hk, Tk, Dv]``, read in place.
        key_factor: ``[B, Tk]`` or ``[B, Hq, Tk]`` float32.
        mode, causal, query_offset, scale: as of ``forward.attention_fwd``.
        config: tiles; ``None`` takes measured ones, else the rule's.
    Returns: as ``forward.attention_fwd``: output, laid out as ``[B, Tq, Hq, Dv]``, and log-sum-exp.
    """
    batch, heads, rows, head_dim = query.shape
    key_heads, keys, value_dim = value.shape[1:]
    out = query.new_empty(batch, rows, heads, value_dim).transpose(1, 2)
    lse = torch.empty(batch, heads, rows, dtype=torch.float32, device=query.device)
    if batch * heads * rows == 0:
        return out, lse
    if keys == 0:
        return out.zero_(), lse.fill_(float("-inf"))
    mode = "plain" if key_factor is None else mode
    if config is None:
        device, interpreted = query.device, query.device.type != "cuda"
        config = hopper_config(
            head_dim,
            value_dim,
            device_architecture(device, interpreted),
            mode,
            causal,
            length_bucket(keys),
            device_name(device, interpreted),
        )
    spec = variant(config, head_dim, value_dim, mode, causal)
    key, value = _once(key), _once(value)
    before = flagged = None
    factor_heads = 1
    if key_factor is not None:
        if key_factor.dim() == 2:
            key_factor = key_factor[:, None]  # [B, 1, Tk]
        key_factor = key_factor.expand(batch, -1, -1).contiguous()
        factor_heads = key_factor.shape[1]
        size = config.block_n
        make = partial(factor_tiles, key_factor, size)
        before, flagged = made_once(("factor_tiles", size), key_factor, make)
    if scale is None:
        scale = head_dim**-0.5
    blocks = triton.cdiv(rows, ROWS_AT_ONCE)
    programs = min(processors_of(query.device), blocks * batch * heads)
    section = section_of(key.expand(batch, -1, -1, -1), value, heads, blocks, programs)
    _hopper_fwd_kernel[(programs,)](
        _descriptor(out, ROWS.value),
        _descriptor(query, ROWS.value),
        _descriptor(key, config.block_n),
        _descriptor(value, config.block_n),
        lse,
        key_factor,
        before,
        flagged,
        rows,
        keys,
        keys - rows if query_offset is None else query_offset,
        batch * heads,
        section,
        heads,
        heads // key_heads,
        int(key.shape[0] == 1),
        int(key.shape[0] > 1),
        int(value.shape[0] > 1),
        factor_heads,
        scale * LOG2_E,
        SPEC=spec,
        num_warps=4,
    )
    return out, lse
