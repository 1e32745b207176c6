"""Which key tiles a block of packed query rows visits with factors; see packed_prefix.py.

Legend: B batch, Hq/Hk query/key heads, Tp keys of the prefix.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .packed_configs import PackedConfig
from .prepass import factor_tiles

_TILES_PER_STEP = 16


@triton.jit(do_not_specialize=["tiles", "batch", "rows", "heads", "group"])
def _packed_tiles_kernel(
    before_ptr,  # [B, Hq or 1, tiles + 1], see factor_tiles
    packed_before_ptr,  # [Hk or 1, blocks, tiles + 1]
    packed_tiles_ptr,  # [Hk or 1, blocks, tiles]
    tiles,
    batch,
    rows,
    heads,
    group,
    PER_HEAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """One block of packed rows: partition the key tiles by whether some row flags them."""
    block = tl.program_id(0)
    key_head = tl.program_id(1)
    offs_m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_m = tl.minimum(offs_m, batch * group * rows - 1) // rows
    factor_row = offs_m // group
    if PER_HEAD:
        factor_row = factor_row * heads + key_head * group + offs_m % group
    before_ptr += factor_row.to(tl.int64)[:, None] * (tiles + 1)  # [BLOCK_M, 1]
    packed_row = (key_head * tl.num_programs(0) + block).to(tl.int64)
    packed_before_ptr += packed_row * (tiles + 1)
    packed_tiles_ptr += packed_row * tiles
    count = tl.zeros([], tl.int32)
    tl.store(packed_before_ptr, count)
    for first in range(0, tiles, BLOCK_T):
        offs_t = first + tl.arange(0, BLOCK_T)
        known = offs_t < tiles
        before = tl.load(before_ptr + offs_t[None, :], mask=known[None, :], other=0)
        after = tl.load(before_ptr + offs_t[None, :] + 1, mask=known[None, :], other=0)
        flag = tl.max((before != after).to(tl.int32), 0)  # [BLOCK_T]
        upto = count + tl.cumsum(flag, 0)  # each tile included
        tl.store(packed_before_ptr + 1 + offs_t, upto, mask=known)
        place = tl.where(flag == 1, upto - 1, tiles - (offs_t + 1 - upto))
        tl.store(packed_tiles_ptr + place, offs_t, mask=known)
        count += tl.sum(flag, 0)


def packed_tiles(
    key_factor: Tensor, rows: int, heads: int, key_heads: int, config: PackedConfig
) -> tuple[Tensor, Tensor]:
    """Partition the key tiles of each block of packed rows: some factor is not 1, or all are 1.

    Args:
        key_factor: ``[B, H, Tp]`` float32, any strides; H = 1 if all heads share a row, else Hq.
        rows: query tokens per batch row.
    Returns: int32 ``[Hk or 1, blocks, tiles + 1]``, the number of flagged tiles before each tile,
        and int32 ``[Hk or 1, blocks, tiles]``, first the flagged tiles in ascending order, then
        the others in descending order.
    """
    batch, factor_heads, _ = key_factor.shape
    before, _ = factor_tiles(key_factor, config.block_n)
    tiles = before.shape[2] - 1
    group = heads // key_heads
    blocks = triton.cdiv(batch * group * rows, config.block_m)
    sharing = key_heads if factor_heads > 1 else 1
    packed_before = before.new_empty(sharing, blocks, tiles + 1)
    packed = before.new_empty(sharing, blocks, tiles)
    _packed_tiles_kernel[(blocks, sharing)](
        before,
        packed_before,
        packed,
        tiles,
        batch,
        rows,
        heads,
        group,
        PER_HEAD=factor_heads > 1,
        BLOCK_M=config.block_m,
        BLOCK_T=_TILES_PER_STEP,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return packed_before, packed
