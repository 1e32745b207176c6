"""The Hopper kernel's producer: one warp that starts the copies of all tiles, by TMA.

Legend: B batch, Hq/Hk query/key heads, Tq/Tk query/key tokens, D head dim, Dv value dim.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from .hopper_work import (
    CONSUMERS,
    ROWS,
    deferred_tiles,
    factor_row,
    piece_of_work,
    ring,
    visible_tiles,
)


@gluon.jit
def _load_tile(descriptor, batch, head, tile, step, buffers, full, empty, SPEC: gl.constexpr):
    """Wait until a slot is free, then start the copy of one tile of keys or values into it."""
    slot, parity = ring(step, SPEC.stages)
    mbarrier.wait(empty.index(slot), parity ^ 1)
    mbarrier.expect(full.index(slot), descriptor.block_type.nbytes)
    corner = [batch, head, tile * SPEC.block_n, 0]
    tma.async_copy_global_to_shared(descriptor, corner, full.index(slot), buffers.index(slot))


@gluon.jit
def _tile_of(index, high, flagged_ptr, SPEC: gl.constexpr):
    """The tile of a step: from the last seen down to 0, then those that min_shift deferred."""
    tile = high - 1 - index
    if SPEC.mode == "min_shift":
        if tile < 0:
            tile = gl.load(flagged_ptr + (index - high))
    return tile


@gluon.jit
def produce(descriptors, buffers, barriers, lists, order, shape, sharing, SPEC: gl.constexpr):
    """Load queries, keys and values in the order in which the consumers use them."""
    query_tma, key_tma, value_tma = descriptors
    queries, key_ring, value_ring = buffers
    query_full, query_empty, key_full, key_empty, value_full, value_empty = barriers
    before_ptr, flagged_base = lists
    rows, keys, query_offset, factor_heads = shape
    key_batches, value_batches = sharing
    tiles = gl.cdiv(keys, SPEC.block_n)
    step = 0  # tiles so far
    pieces = 0  # of work so far
    turns = gl.cdiv(rows, ROWS * CONSUMERS) * order[1]
    for turn in range(gl.program_id(0), turns, gl.num_programs(0)):
        batch, head, start = piece_of_work(turn, order, SPEC)
        for consumer in gl.static_range(CONSUMERS):
            mbarrier.wait(query_empty.index(consumer), (pieces & 1) ^ 1)
            mbarrier.expect(query_full.index(consumer), query_tma.block_type.nbytes)
            corner = [batch, head, start + consumer * ROWS, 0]
            tma.async_copy_global_to_shared(
                query_tma, corner, query_full.index(consumer), queries.index(consumer)
            )
        pieces += 1  # noqa: SIM113 - Gluon has no enumerate
        high, _ = visible_tiles(start, rows, keys, query_offset, SPEC)
        row = factor_row(batch, head, factor_heads)
        count = high + deferred_tiles(before_ptr, row, tiles, high, SPEC)
        flagged_ptr = flagged_base
        if SPEC.mode == "min_shift":
            flagged_ptr += row * tiles
        key_head = head // order[4]
        # a tile's values are needed a step after its keys
        for index in range(0, count + 1):
            if index < count:
                tile = _tile_of(index, high, flagged_ptr, SPEC)
                _load_tile(
                    key_tma, batch * key_batches, key_head, tile, step + index,
                    key_ring, key_full, key_empty, SPEC,
                )  # fmt: skip
            if index > 0:
                tile = _tile_of(index - 1, high, flagged_ptr, SPEC)
                _load_tile(
                    value_tma, batch * value_batches, key_head, tile, step + index - 1,
                    value_ring, value_full, value_empty, SPEC,
                )  # fmt: skip
        step += count
