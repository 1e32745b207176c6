"""The Hopper kernel's consumers: a warpgroup each for 64 rows of queries.

In each step the product of the queries with a tile of keys and the product of the last weights
with their tile of values are in flight together, and the softmax of the new scores runs beside
the second of them.

Legend: B batch, Hq/Hk query/key heads, Tq/Tk query/key tokens, D head dim, Dv value dim.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .hopper_work import (
    CONSUMERS,
    ROWS,
    deferred_tiles,
    factor_row,
    piece_of_work,
    ring,
    visible_tiles,
)
from .primitives import in_band, manipulate, softmax_step


@gluon.jit
def _start_scores(queries, key_tile, SPEC: gl.constexpr):
    """Start the product of a consumer's queries with a tile of keys."""
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SPEC.block_n, 16])
    scores = gl.full([ROWS, SPEC.block_n], 0.0, gl.float32, LAYOUT)
    keys = key_tile.reshape([SPEC.block_n, SPEC.head_dim]).permute([1, 0])
    rows = queries.reshape([ROWS, SPEC.head_dim])
    return warpgroup_mma(rows, keys, scores, use_acc=False, is_async=True)


@gluon.jit
def _start_output(weights, value_tile, acc, SPEC: gl.constexpr):
    """Start adding the product of the weights, in registers, with a tile of values."""
    values = value_tile.reshape([SPEC.block_n, SPEC.value_dim])
    return warpgroup_mma(weights, values, acc, is_async=True)


@gluon.jit
def _as_operand(weights, DTYPE: gl.constexpr, SPEC: gl.constexpr):
    """Weights as the left operand of the product with the values."""
    OUTPUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SPEC.value_dim, 16])
    return gl.convert_layout(weights.to(DTYPE), gl.DotOperandLayout(0, OUTPUT, 2))


@gluon.jit
def _is_flagged(factor, tile, SPEC: gl.constexpr):
    """Whether a tile holds a factor other than 1."""
    flagged = False
    if SPEC.mode != "plain":
        flagged = gl.load(factor[0] + tile + 1) != gl.load(factor[0] + tile)
    return flagged


@gluon.jit
def _weigh(
    scores, stats, tile, flagged, factor, first_position, limits,
    SPEC: gl.constexpr, VISIT: gl.constexpr, EDGE: gl.constexpr,
):  # fmt: skip
    """Manipulate and mask a tile of scores, and take it into the softmax.

    VISIT is as in ``tiles.visit_tile``; EDGE tiles check causality and the number of keys.
    Returns: weights, the rescaling of what was before, and the rows' statistics.
    """
    LAYOUT: gl.constexpr = scores.type.layout
    MODE: gl.constexpr = SPEC.mode
    row_max, row_sum, row_min = stats
    keys, unit = limits
    start_n = tile * SPEC.block_n
    if SPEC.scaled:
        scores = scores * unit
    if EDGE:
        offs_n = gl.arange(0, SPEC.block_n, gl.SliceLayout(0, LAYOUT))
        offs_m = gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
        visible = in_band(
            (first_position - start_n + offs_m)[:, None], offs_n[None, :], keys - start_n, 0,
            SPEC.causal, False,
        )  # fmt: skip
    if VISIT == "ones":
        if EDGE:
            scores = gl.where(visible, scores, float("-inf"))
            row_min = gl.minimum(row_min, gl.min(gl.where(visible, scores, float("inf")), 1))
        else:
            row_min = gl.minimum(row_min, gl.min(scores, 1))
    if SPEC.mode != "plain":
        if flagged:
            columns = gl.arange(0, SPEC.block_n, gl.SliceLayout(0, LAYOUT))
            places = factor[1] + start_n + columns
            if EDGE:
                factors = gl.load(places, mask=columns < keys - start_n, other=1.0)
            else:
                factors = gl.load(places)
            scores = manipulate(scores, factors[None, :], None, row_min[:, None], MODE, VISIT)
    if EDGE and VISIT != "ones":
        scores = gl.where(visible, scores, float("-inf"))
    weights, rescale, row_max, row_sum = softmax_step(scores, row_max, row_sum, unit, SPEC.scaled)
    return weights, rescale, (row_max, row_sum, row_min)


@gluon.jit
def _step(
    acc, weights, stats, tile, step, goes_on, shared, factor, first_position, limits,
    SPEC: gl.constexpr, VISIT: gl.constexpr, EDGE: gl.constexpr,
):  # fmt: skip
    """A tile's scores beside the product of the tile before with its values.

    The tile's keys are there already; those of the next are when it returns, if it ``goes_on``.
    """
    queries, key_ring, value_ring, key_full, key_empty, value_full, value_empty = shared
    ROW: gl.constexpr = gl.SliceLayout(1, acc.type.layout)
    flagged = True
    if VISIT != "deferred":
        flagged = _is_flagged(factor, tile, SPEC)
    slot, _ = ring(step, SPEC.stages)
    last_slot, last_parity = ring(step - 1, SPEC.stages)
    next_slot, next_parity = ring(step + 1, SPEC.stages)
    pending_scores = _start_scores(queries, key_ring.index(slot), SPEC)
    mbarrier.wait(value_full.index(last_slot), last_parity)
    pending = _start_output(weights, value_ring.index(last_slot), acc, SPEC)
    scores = warpgroup_mma_wait(1, deps=[pending_scores])
    mbarrier.arrive(key_empty.index(slot))
    new_weights, rescale, stats = _weigh(
        scores, stats, tile, flagged, factor, first_position, limits, SPEC, VISIT, EDGE
    )
    # Waiting for the keys here, not when they are needed, ends a basic block. Without it the
    # assembler moves the wait for the product up, before the softmax that should run beside it.
    mbarrier.wait(key_full.index(next_slot), next_parity, pred=goes_on)
    # converted behind the wait, their halves would be swapped in each register, twice
    new_weights = _as_operand(new_weights, queries.dtype, SPEC)
    acc, weights, new_weights = warpgroup_mma_wait(0, deps=[pending, weights, new_weights])
    mbarrier.arrive(value_empty.index(last_slot))
    acc = acc * gl.convert_layout(rescale, ROW)[:, None]
    return acc, new_weights, stats


@gluon.jit
def _finish(acc, stats, lse_ptr, first_row, rows, output, SPEC: gl.constexpr):
    """Normalise a block of rows, write its log-sum-exp, and put the output in shared memory."""
    ROW: gl.constexpr = gl.SliceLayout(1, acc.type.layout)
    row_max, row_sum, _ = stats
    dead = row_sum == 0.0  # a row that sees no key
    row_sum = gl.where(dead, 1.0, row_sum)
    lse = (gl.where(dead, 0.0, row_max) + gl.log2(row_sum)) * 0.6931471805599453  # ln 2
    offs_m = gl.arange(0, ROWS, row_sum.type.layout)
    lse = gl.where(dead, float("-inf"), lse)
    gl.store(lse_ptr + first_row + offs_m, lse, mask=first_row + offs_m < rows)
    acc = acc * gl.convert_layout(1.0 / row_sum, ROW)[:, None]
    tma.store_wait(0)  # the rows before these have left the shared memory
    output.reshape([ROWS, SPEC.value_dim]).store(acc.to(output.dtype))
    fence_async_shared()


@gluon.jit
def consume(
    CONSUMER: gl.constexpr, output_tma, buffers, barriers, lists, order, shape, outputs,
    SPEC: gl.constexpr,
):  # fmt: skip
    """Attention of one block of ``ROWS`` rows in each piece of work."""
    FIRST_VISIT: gl.constexpr = "ones" if SPEC.mode == "min_shift" else "every"
    ROW: gl.constexpr = gl.SliceLayout(
        1, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SPEC.block_n, 16])
    )
    OUTPUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SPEC.value_dim, 16])
    query_buffers, key_ring, value_ring, output_buffers = buffers
    query_full, query_empty, key_full, key_empty, value_full, value_empty = barriers
    before_ptr, flagged_base = lists
    rows, keys, query_offset, factor_heads = shape
    lse_ptr, factor_ptr, unit = outputs
    queries = query_buffers.index(CONSUMER)
    output = output_buffers.index(CONSUMER)
    shared = (queries, key_ring, value_ring, key_full, key_empty, value_full, value_empty)
    limits = (keys, unit)
    tiles = gl.cdiv(keys, SPEC.block_n)
    step = 0  # tiles so far
    pieces = 0  # of work so far
    turns = gl.cdiv(rows, ROWS * CONSUMERS) * order[1]
    for turn in range(gl.program_id(0), turns, gl.num_programs(0)):
        batch, head, start = piece_of_work(turn, order, SPEC)
        high, inner = visible_tiles(start, rows, keys, query_offset, SPEC)
        row = factor_row(batch, head, factor_heads)
        count = high + deferred_tiles(before_ptr, row, tiles, high, SPEC)
        first_row = start + CONSUMER * ROWS
        first_position = query_offset + first_row
        factor = (0, 0)
        if SPEC.mode != "plain":
            factor = (before_ptr + row * (tiles + 1), factor_ptr + row * keys)
        row_max = gl.full([ROWS], float("-inf"), gl.float32, ROW)
        row_sum = gl.full([ROWS], 0.0, gl.float32, ROW)
        row_min = gl.full([ROWS], float("inf"), gl.float32, ROW)
        stats = (row_max, row_sum, row_min)
        acc = gl.full([ROWS, SPEC.value_dim], 0.0, gl.float32, OUTPUT)
        mbarrier.wait(query_full.index(CONSUMER), pieces & 1)
        pieces += 1  # noqa: SIM113 - Gluon has no enumerate
        if high > 0:
            # the first tile has no product with values beside it
            flagged = _is_flagged(factor, high - 1, SPEC)
            slot, parity = ring(step, SPEC.stages)
            next_slot, next_parity = ring(step + 1, SPEC.stages)
            mbarrier.wait(key_full.index(slot), parity)
            pending = _start_scores(queries, key_ring.index(slot), SPEC)
            scores = warpgroup_mma_wait(0, deps=[pending])
            mbarrier.arrive(key_empty.index(slot))
            weights, _, stats = _weigh(
                scores, stats, high - 1, flagged, factor, first_position, limits,
                SPEC, FIRST_VISIT, True,
            )  # fmt: skip
            weights = _as_operand(weights, queries.dtype, SPEC)
            mbarrier.wait(key_full.index(next_slot), next_parity, pred=count > 1)
            edges = gl.maximum(high - inner, 1)
            for index in range(1, edges):
                acc, weights, stats = _step(
                    acc, weights, stats, high - 1 - index, step + index, index + 1 < count,
                    shared, factor, first_position, limits, SPEC, FIRST_VISIT, True,
                )  # fmt: skip
            for index in range(edges, high):
                acc, weights, stats = _step(
                    acc, weights, stats, high - 1 - index, step + index, index + 1 < count,
                    shared, factor, first_position, limits, SPEC, FIRST_VISIT, False,
                )  # fmt: skip
            if SPEC.mode == "min_shift":
                row_max, row_sum, row_min = stats
                row_min = gl.where(row_min == float("inf"), 0.0, row_min)  # of a row without keys
                stats = (row_max, row_sum, row_min)
                flagged_ptr = flagged_base + row * tiles
                for index in range(high, count):
                    acc, weights, stats = _step(
                        acc, weights, stats, gl.load(flagged_ptr + index - high), step + index,
                        index + 1 < count, shared, factor, first_position, limits,
                        SPEC, "deferred", True,
                    )  # fmt: skip
            slot, parity = ring(step + count - 1, SPEC.stages)
            mbarrier.wait(value_full.index(slot), parity)
            pending = _start_output(weights, value_ring.index(slot), acc, SPEC)
            acc, weights = warpgroup_mma_wait(0, deps=[pending, weights])
            mbarrier.arrive(value_empty.index(slot))
            step += count
        if SPEC.own_output:
            mbarrier.arrive(query_empty.index(CONSUMER))
        lse_row = lse_ptr + (batch * order[3] + head).to(gl.int64) * rows
        _finish(acc, stats, lse_row, first_row, rows, output, SPEC)
        tma.async_copy_shared_to_global(output_tma, [batch, head, first_row, 0], output)
        if not SPEC.own_output:
            tma.store_wait(0)
            mbarrier.arrive(query_empty.index(CONSUMER))
    tma.store_wait(0)
