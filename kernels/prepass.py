"""What the attention kernels read instead of asking the host: flagged tiles, visible key ranges.

What grows with the number of keys is not specialised: a growing cache compiles nothing again.

Legend: B batch, H heads, Tk key tokens.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILES_PER_STEP = 16
_KEYS_PER_STEP = 4096


@triton.jit(do_not_specialize=["keys", "heads", "factor_ptr", "stride_batch", "stride_head"])
def _factor_tiles_kernel(
    factor_ptr,  # [B, H, Tk]
    before_ptr,  # [B * H, tiles + 1]
    flagged_ptr,  # [B * H, tiles]
    keys,
    heads,
    stride_batch,
    stride_head,
    stride_key,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """One factor row: list its flagged tiles and count them before each tile."""
    row = tl.program_id(0)
    tiles = tl.cdiv(keys, BLOCK_N)
    factor_ptr += (row // heads).to(tl.int64) * stride_batch
    factor_ptr += (row % heads).to(tl.int64) * stride_head
    before_ptr += row.to(tl.int64) * (tiles + 1)
    flagged_ptr += row.to(tl.int64) * tiles
    count = tl.zeros([], tl.int32)
    tl.store(before_ptr, count)
    for first in range(0, tiles, BLOCK_T):
        offs_t = first + tl.arange(0, BLOCK_T)
        offs_n = offs_t[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        pointers = factor_ptr + offs_n.to(tl.int64) * stride_key
        factor = tl.load(pointers, mask=offs_n < keys, other=1.0)  # [BLOCK_T, BLOCK_N]
        flag = tl.max((factor != 1.0).to(tl.int32), 1)
        upto = count + tl.cumsum(flag, 0)  # [BLOCK_T], each tile included
        tl.store(before_ptr + 1 + offs_t, upto, mask=offs_t < tiles)
        tl.store(flagged_ptr + upto - 1, offs_t, mask=(offs_t < tiles) & (flag == 1))
        count += tl.sum(flag, 0)


def factor_tiles(key_factor: Tensor, block_n: int) -> tuple[Tensor, Tensor]:
    """Flag the key tiles that hold a factor other than 1.

    Args:
        key_factor: ``[B, H, Tk]`` float32, any strides; H = 1 if all heads share a row.
        block_n: keys in a tile.
    Returns: int32 ``[B, H, tiles + 1]``, the number of flagged tiles before each tile, and int32
        ``[B, H, tiles]``, the flagged tiles in ascending order (undefined past their number).
        Flagged tiles in ``[low, high)`` are ``flagged[before[low]:before[high]]``.
    """
    batch, heads, keys = key_factor.shape
    tiles = triton.cdiv(keys, block_n)
    before = torch.empty(batch, heads, tiles + 1, dtype=torch.int32, device=key_factor.device)
    flagged = torch.empty(batch, heads, tiles, dtype=torch.int32, device=key_factor.device)
    if batch * heads:
        _factor_tiles_kernel[(batch * heads,)](
            key_factor,
            before,
            flagged,
            keys,
            heads,
            *key_factor.stride(),
            BLOCK_N=block_n,
            BLOCK_T=_TILES_PER_STEP,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return before, flagged


@triton.jit(do_not_specialize=["keys", "padding_ptr", "stride_batch"])
def _key_range_kernel(
    padding_ptr,  # [B, Tk]
    range_ptr,  # [B, 3]
    keys,
    stride_batch,
    stride_key,
    BLOCK_N: tl.constexpr,
):
    """One row of a padding mask: its first visible key, the end, and whether it has no holes."""
    row = tl.program_id(0).to(tl.int64)
    padding_ptr += row * stride_batch
    first = tl.zeros([], tl.int32) + keys
    stop = tl.zeros([], tl.int32)
    count = tl.zeros([], tl.int32)
    for start in range(0, keys, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        pointers = padding_ptr + offs_n.to(tl.int64) * stride_key
        shown = tl.load(pointers, mask=offs_n < keys, other=0) != 0
        first = tl.minimum(first, tl.min(tl.where(shown, offs_n, keys), 0))
        stop = tl.maximum(stop, tl.max(tl.where(shown, offs_n + 1, 0), 0))
        count += tl.sum(shown.to(tl.int32), 0)
    tl.store(range_ptr + row * 3, first)
    tl.store(range_ptr + row * 3 + 1, stop)
    tl.store(range_ptr + row * 3 + 2, (count == stop - first).to(tl.int32))


def key_ranges(key_padding: Tensor) -> Tensor:
    """Where the visible keys of each row stand, so that padding costs nothing but its tiles.

    Args:
        key_padding: ``[B, Tk]`` uint8 or bool, non-zero = visible, any strides.
    Returns: int32 ``[B, 3]``: first visible key, one past the last, and 1 if all between them are
        visible. Without any visible key the first is Tk and the end 0.
    """
    batch, keys = key_padding.shape
    ranges = torch.empty(batch, 3, dtype=torch.int32, device=key_padding.device)
    _key_range_kernel[(batch,)](
        key_padding,
        ranges,
        keys,
        *key_padding.stride(),
        BLOCK_N=_KEYS_PER_STEP,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return ranges
