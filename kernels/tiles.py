"""The walk over key tiles, shared by the kernels: what one tile adds to a block of rows.

A kernel walks one segment of keys or several, one after the other, with the same softmax state.
Positions and tiles are counted from the segment's first key.

Legend: B batch, Hq/Hk query/key heads, Tq/Tk query/key tokens, D head dim, Dv value dim.
The online softmax and the deferred columns of ``min_shift`` are derived in README.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from .primitives import (
    dot,
    in_band,
    kept,
    key_tiles,
    load_columns,
    manipulate,
    softmax_step,
    store_columns,
    tanh,
)


@dataclass(frozen=True)
class Variant:
    """Everything the kernel knows at compile time; head dims are split as D = d0 + d1."""

    mode: str
    causal: bool
    has_window: bool
    has_key_factor: bool
    has_softcap: bool
    has_bias: bool
    bias_per_key: bool  # the same for every row, as in ALiBi
    has_padding: bool
    has_mask: bool
    has_sinks: bool
    has_dropout: bool
    save_minimum: bool  # where each row's minimum stands goes to memory, for the backward pass
    save_rest: bool  # and what rounding takes from the log-sum-exp
    d_lse_apart: bool  # backward: the log-sum-exp's gradient is not part of δ
    offset_in_memory: bool  # query_offset is a pointer
    skip_plain: bool  # branch around the manipulation where all factors are 1
    persistent: bool  # a program takes blocks in turns; the forward kernel without a prefix only
    scaled: bool  # scores become base-2 logits before, not within, the softmax's exp2
    wide: bool  # offsets within a tile exceed 32 bits
    block_m: int
    block_n: int
    edge_stages: int
    head_dim: int
    d0: int
    d1: int
    value_dim: int
    v0: int
    v1: int


@triton.jit
def visit_tile(
    acc0,
    acc1,
    row_max,
    row_sum,
    row_min,
    row_argmin,
    tile,
    queries,
    positions,
    pointers,
    strides,
    limits,
    units,
    dropout,
    SPEC: tl.constexpr,
    VISIT: tl.constexpr,
    EDGE: tl.constexpr,
):
    """Add one key tile to the softmax state of a block of rows.

    VISIT says which columns: ``every``, or for ``min_shift`` first the ``ones`` (while tracking
    the row minimum of all visible columns), then, in flagged tiles only, the ``deferred`` rest.
    EDGE tiles check the band, the padding and the number of keys, the others need not.
    ``dropout`` holds the seed's address, the threshold, the first column of the segment, the number
    of the batch row and head, and the first row.
    """
    BLOCK_M: tl.constexpr = SPEC.block_m
    BLOCK_N: tl.constexpr = SPEC.block_n
    MODE: tl.constexpr = SPEC.mode
    MASKED: tl.constexpr = EDGE or SPEC.has_mask
    key_ptr, value_ptr, factor_ptr, before_ptr, bias_ptr, padding_ptr, mask_ptr = pointers
    stride_key, stride_value, stride_factor, stride_bias, stride_padding, stride_mask = strides
    rows, keys, window = limits
    unit, inner_scale = units
    seed_ptr, threshold, first_column, batch_head, first_row = dropout

    start_n = tile * BLOCK_N
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    if SPEC.wide:
        offs_m = offs_m.to(tl.int64)
        offs_n = offs_n.to(tl.int64)
    first = start_n.to(tl.int64)
    inside = keys - start_n  # keys from this tile on

    key_ptr += first * stride_key[0]
    key0 = load_columns(key_ptr, offs_n, stride_key, inside, 0, SPEC.d0, SPEC.head_dim, EDGE)
    scores = dot(queries[0], tl.trans(key0), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
    if SPEC.d1 > 0:
        key1 = load_columns(
            key_ptr, offs_n, stride_key, inside, SPEC.d0, SPEC.d1, SPEC.head_dim, EDGE
        )
        scores = dot(queries[1], tl.trans(key1), scores)
    if SPEC.has_softcap:
        scores = tanh(scores * inner_scale, queries[0].dtype == tl.float32)
    if SPEC.scaled:
        scores = scores * unit

    if EDGE:
        visible = in_band(
            positions[:, None], (start_n + offs_n)[None, :], keys, window,
            SPEC.causal, SPEC.has_window,
        )  # fmt: skip
        if SPEC.has_padding:
            padding_ptr += first * stride_padding
            shown = tl.load(padding_ptr + offs_n * stride_padding, mask=offs_n < inside, other=0)
            visible = visible & (shown != 0)[None, :]
    if SPEC.has_bias or SPEC.has_mask:
        readable = (offs_m[:, None] < rows) & (offs_n[None, :] < inside)
    if SPEC.has_mask:
        mask_ptr += first * stride_mask[1]
        mask_ptr += offs_m[:, None] * stride_mask[0] + offs_n[None, :] * stride_mask[1]
        shown = tl.load(mask_ptr, mask=readable, other=0)  # [BLOCK_M, BLOCK_N]
        if EDGE:
            visible = visible & (shown != 0)
        else:
            visible = shown != 0

    HIDE_FIRST: tl.constexpr = MASKED and VISIT == "ones"  # nothing is multiplied in this visit
    if HIDE_FIRST:
        scores = tl.where(visible, scores, float("-inf"))
        candidates = tl.where(scores == float("-inf"), float("inf"), scores)
    elif VISIT == "ones":
        candidates = scores
    if VISIT == "ones":
        if SPEC.save_minimum:
            lowest, place = tl.min(candidates, 1, return_indices=True)
            place += first_column + start_n
            # of equal scores the first, though edge tiles are visited last
            better = (lowest < row_min) | ((lowest == row_min) & (place < row_argmin))
            row_argmin = tl.where(better, place, row_argmin)
        else:
            lowest = tl.min(candidates, 1)
        row_min = tl.minimum(row_min, lowest)
    key_bias = None
    if SPEC.bias_per_key:
        bias_ptr += first * stride_bias[1]
        key_bias = tl.load(bias_ptr + offs_n * stride_bias[1], mask=offs_n < inside, other=0.0)
        key_bias = (key_bias.to(tl.float32) * 1.4426950408889634)[None, :]  # log2(e)
    if SPEC.has_key_factor:
        factor_ptr += first * stride_factor
        if SPEC.skip_plain and VISIT != "deferred":
            flagged = tl.load(before_ptr + tile + 1) != tl.load(before_ptr + tile)
            if flagged:
                factor = tl.load(
                    factor_ptr + offs_n * stride_factor, mask=offs_n < inside, other=1.0
                )
                scores = manipulate(
                    scores, factor[None, :], key_bias, row_min[:, None], MODE, VISIT
                )
            else:
                if SPEC.bias_per_key:
                    scores += key_bias
        else:
            factor = tl.load(factor_ptr + offs_n * stride_factor, mask=offs_n < inside, other=1.0)
            scores = manipulate(scores, factor[None, :], key_bias, row_min[:, None], MODE, VISIT)
    elif SPEC.bias_per_key:
        scores += key_bias
    if SPEC.has_bias and not SPEC.bias_per_key:
        bias_ptr += first * stride_bias[1]
        bias_ptr += offs_m[:, None] * stride_bias[0] + offs_n[None, :] * stride_bias[1]
        bias = tl.load(bias_ptr, mask=readable, other=0.0)  # [BLOCK_M, BLOCK_N]
        scores += bias.to(tl.float32) * 1.4426950408889634  # log2(e)
    if MASKED and not HIDE_FIRST:
        scores = tl.where(visible, scores, float("-inf"))

    weights, rescale, row_max, row_sum = softmax_step(scores, row_max, row_sum, unit, SPEC.scaled)
    if SPEC.has_dropout:  # the sum above is of all weights
        keep = kept(
            seed_ptr, (first_row + tl.arange(0, BLOCK_M))[:, None],
            (first_column + start_n + tl.arange(0, BLOCK_N))[None, :], batch_head, threshold,
        )  # fmt: skip
        weights = tl.where(keep, weights, 0.0)
    weights = weights.to(queries[0].dtype)
    value_ptr += first * stride_value[0]
    value0 = load_columns(value_ptr, offs_n, stride_value, inside, 0, SPEC.v0, SPEC.value_dim, EDGE)
    acc0 = dot(weights, value0, acc0 * rescale[:, None])
    if SPEC.v1 > 0:
        value1 = load_columns(
            value_ptr, offs_n, stride_value, inside, SPEC.v0, SPEC.v1, SPEC.value_dim, EDGE
        )
        acc1 = dot(weights, value1, acc1 * rescale[:, None])
    return acc0, acc1, row_max, row_sum, row_min, row_argmin


@triton.jit
def segment_tiles(range_ptr, first_position, rows_left, keys, window, SPEC: tl.constexpr):
    """Tiles of a segment that a block of rows walks, see ``key_tiles``, and its visible keys' end.

    ``range_ptr`` points to the batch row's line of ``key_ranges``.
    """
    last_position = first_position + tl.minimum(rows_left, SPEC.block_m) - 1
    first_key = 0
    if SPEC.has_padding:
        first_key = tl.load(range_ptr)
        keys = tl.load(range_ptr + 1)
    low, high, inner_low, inner_high = key_tiles(
        first_position, last_position, first_key, keys, window,
        SPEC.causal, SPEC.has_window, SPEC.block_n,
    )  # fmt: skip
    if SPEC.has_padding:  # holes make every tile an edge
        inner_high = tl.where(tl.load(range_ptr + 2) != 0, inner_high, inner_low)
    return low, high, inner_low, inner_high, keys


@triton.jit
def walk_tiles(
    state,
    ranges,
    queries,
    first_position,
    pointers,
    padding,
    strides,
    limits,
    units,
    dropout,
    SPEC: tl.constexpr,
    VISIT: tl.constexpr,
):
    """Visit the tiles of a segment: the inner ones unmasked, then the edges on both sides.

    Args:
        state: accumulators, running maximum and sum, minimum of each row and its column.
        ranges: low, high, inner_low, inner_high of :func:`segment_tiles`.
        padding: batch row and batch stride of the padding mask, whose line is found only for
            the edges: registers are scarce in the inner loop.
    """
    acc0, acc1, row_max, row_sum, row_min, row_argmin = state
    low, high, inner_low, inner_high = ranges
    for tile in range(inner_low, inner_high):
        acc0, acc1, row_max, row_sum, row_min, row_argmin = visit_tile(
            acc0, acc1, row_max, row_sum, row_min, row_argmin, tile, queries, None,
            pointers, strides, limits, units, dropout, SPEC, VISIT, False,
        )  # fmt: skip
    positions = first_position + tl.arange(0, SPEC.block_m)
    key_ptr, value_ptr, factor_ptr, before_ptr, bias_ptr, padding_ptr, mask_ptr = pointers
    if SPEC.has_padding:
        padding_ptr += padding[0] * padding[1]
    pointers = (key_ptr, value_ptr, factor_ptr, before_ptr, bias_ptr, padding_ptr, mask_ptr)
    # the edge tiles on the left, then those on the right
    left = inner_low - low
    for edge in tl.range(0, left + high - inner_high, num_stages=SPEC.edge_stages):
        tile = tl.where(edge < left, low + edge, inner_high + edge - left)
        acc0, acc1, row_max, row_sum, row_min, row_argmin = visit_tile(
            acc0, acc1, row_max, row_sum, row_min, row_argmin, tile, queries, positions,
            pointers, strides, limits, units, dropout, SPEC, VISIT, True,
        )  # fmt: skip
    return acc0, acc1, row_max, row_sum, row_min, row_argmin


@triton.jit
def walk_deferred(
    state,
    flagged,
    queries,
    first_position,
    pointers,
    padding,
    strides,
    limits,
    units,
    dropout,
    SPEC: tl.constexpr,
):
    """Visit the flagged tiles of a segment for the columns that ``min_shift`` deferred.

    Args:
        state: see :func:`walk_tiles`; the minimum of each row is final and finite.
        flagged: pointer to the flagged tiles, first and last index into them.
    """
    acc0, acc1, row_max, row_sum, row_min, row_argmin = state
    flagged_ptr, start, stop = flagged
    positions = first_position + tl.arange(0, SPEC.block_m)
    key_ptr, value_ptr, factor_ptr, before_ptr, bias_ptr, padding_ptr, mask_ptr = pointers
    if SPEC.has_padding:
        padding_ptr += padding[0] * padding[1]
    pointers = (key_ptr, value_ptr, factor_ptr, before_ptr, bias_ptr, padding_ptr, mask_ptr)
    for index in tl.range(start, stop, num_stages=1):
        tile = tl.load(flagged_ptr + index)
        acc0, acc1, row_max, row_sum, row_min, row_argmin = visit_tile(
            acc0, acc1, row_max, row_sum, row_min, row_argmin, tile, queries, positions,
            pointers, strides, limits, units, dropout, SPEC, "deferred", True,
        )  # fmt: skip
    return acc0, acc1, row_max, row_sum, row_min, row_argmin


@triton.jit
def initial_state(sinks_ptr, head, SPEC: tl.constexpr):
    """Softmax state of a block of rows before its first tile."""
    BLOCK_M: tl.constexpr = SPEC.block_m
    UNUSED: tl.constexpr = 16  # width of an accumulator that is never touched and compiled away
    V0: tl.constexpr = SPEC.v0
    V1: tl.constexpr = SPEC.v1 if SPEC.v1 > 0 else UNUSED
    acc0 = tl.zeros([BLOCK_M, V0], tl.float32)
    acc1 = tl.zeros([BLOCK_M, V1], tl.float32)
    row_min = tl.full([BLOCK_M], float("inf"), tl.float32)
    row_argmin = tl.full([BLOCK_M], 0x7FFFFFFF, tl.int32)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    if SPEC.has_sinks:  # one more logit, without a value
        row_max = (
            tl.zeros([BLOCK_M], tl.float32)
            + tl.load(sinks_ptr + head).to(tl.float32) * 1.4426950408889634
        )
        row_sum += 1.0
    return acc0, acc1, row_max, row_sum, row_min, row_argmin


@triton.jit
def finite_minimum(state):
    """The state with a minimum for rows that see no key, where any finite number serves."""
    acc0, acc1, row_max, row_sum, row_min, row_argmin = state
    row_min = tl.where(row_min == float("inf"), 0.0, row_min)
    return acc0, acc1, row_max, row_sum, row_min, row_argmin


@triton.jit
def load_queries(query_ptr, offs_m, stride_row, rows_left, SPEC: tl.constexpr):
    """One ``[BLOCK_M, d]`` tile for each part of the head dim."""
    query0 = load_columns(query_ptr, offs_m, stride_row, rows_left, 0, SPEC.d0, SPEC.head_dim, True)
    queries = (query0,)
    if SPEC.d1 > 0:
        query1 = load_columns(
            query_ptr, offs_m, stride_row, rows_left, SPEC.d0, SPEC.d1, SPEC.head_dim, True
        )
        queries = (query0, query1)
    return queries


@triton.jit
def store_rows(
    state, out_ptr, saved_ptrs, offs_m, stride_row, rows_left, keep_scale, SPEC: tl.constexpr
):
    """Normalise a block of rows and write its output, log-sum-exp and minimum.

    ``saved_ptrs`` are those of the log-sum-exp, the minimum, its column and the rest of the
    log-sum-exp; ``keep_scale`` is 1 / (1 - dropout).
    """
    acc0, acc1, row_max, row_sum, row_min, row_argmin = state
    lse_ptr, minimum_ptr, argmin_ptr, rest_ptr = saved_ptrs
    dead = row_sum == 0.0
    row_sum = tl.where(dead, 1.0, row_sum)
    row_max = tl.where(dead, 0.0, row_max)
    lse = (row_max + tl.log2(row_sum)) * 0.6931471805599453  # ln 2
    tl.store(lse_ptr + offs_m, tl.where(dead, float("-inf"), lse), mask=offs_m < rows_left)
    if SPEC.save_rest:
        # the backward pass reads lse * log2(e), which differs from row_max + log2(row_sum)
        rest = (row_max - lse * 1.4426950408889634) + tl.log2(row_sum)
        tl.store(rest_ptr + offs_m, rest, mask=offs_m < rows_left)
    if SPEC.save_minimum:
        tl.store(minimum_ptr + offs_m, row_min, mask=offs_m < rows_left)
        tl.store(argmin_ptr + offs_m, row_argmin, mask=offs_m < rows_left)
    share = 1.0 / row_sum
    if SPEC.has_dropout:
        share = share * keep_scale
    store_columns(
        out_ptr, acc0 * share[:, None], offs_m, stride_row, rows_left, 0, SPEC.v0, SPEC.value_dim
    )
    if SPEC.v1 > 0:
        store_columns(
            out_ptr, acc1 * share[:, None], offs_m, stride_row, rows_left,
            SPEC.v0, SPEC.v1, SPEC.value_dim,
        )  # fmt: skip
