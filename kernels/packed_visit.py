"""One visit of packed query rows to a tile of keys; see packed_kernel.py.

Legend: B batch, Hq/Hk query/key heads, Tq query tokens, Tp/Tk keys of the prefix and of a row's
own, D head dim, Dv value dim. BLOCK_M packed rows and BLOCK_N keys make a tile.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from .primitives import dot, in_band, softmax_step, tanh


@dataclass(frozen=True)
class PackedVariant:
    """Everything the kernel knows at compile time; head dims are split as D = d0 + d1."""

    stage: str  # whole; or with split keys partial, in min_shift deferred, then merge
    mode: str
    causal: bool
    has_window: bool
    has_key_factor: bool
    prefix_factor: bool  # the factors span the prefix too
    factor_per_head: bool
    one_batch: bool  # all rows of a tile are of one batch row, which has a prefix of its own
    has_own: bool  # keys behind the prefix
    lists_tiles: bool  # tiles of the prefix in which some m is not 1 are known beforehand
    has_softcap: bool
    has_bias: bool
    has_padding: bool
    has_mask: bool
    has_sinks: bool
    offset_in_memory: bool  # query_offset is a pointer
    scaled: bool  # scores become base-2 logits before, not within, the softmax's exp2
    wide: bool  # offsets within a tile exceed 32 bits
    block_m: int
    block_n: int
    edge_n: int
    defer_n: int  # keys of a deferred tile that was not listed,
    scan_n: int  # and keys that are searched for them at once
    head_dim: int
    d0: int
    d1: int
    value_dim: int
    v0: int
    v1: int


@triton.jit
def gather_columns(
    matrix_ptr,
    offs_row,
    stride,
    inside,
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    SIZE: tl.constexpr,
    CHECK_ROWS: tl.constexpr,
):
    """``[len(offs_row), WIDTH]``: columns from FIRST of the rows that start at ``offs_row``.

    0 beyond column SIZE, and with CHECK_ROWS where a row is not ``inside``.
    """
    columns = FIRST + tl.arange(0, WIDTH).to(offs_row.dtype)
    pointers = matrix_ptr + offs_row[:, None] + columns[None, :] * stride
    if CHECK_ROWS:
        if FIRST + WIDTH > SIZE:
            return tl.load(pointers, mask=inside[:, None] & (columns[None, :] < SIZE), other=0.0)
        else:
            return tl.load(pointers, mask=inside[:, None], other=0.0)
    else:
        if FIRST + WIDTH > SIZE:
            return tl.load(pointers, mask=columns[None, :] < SIZE, other=0.0)
        else:
            return tl.load(pointers)


@triton.jit
def scatter_columns(
    matrix_ptr,
    values,
    offs_row,
    stride,
    inside,
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Inverse of :func:`gather_columns`: only ``inside`` rows are written."""
    columns = FIRST + tl.arange(0, WIDTH).to(offs_row.dtype)
    pointers = matrix_ptr + offs_row[:, None] + columns[None, :] * stride
    shown = inside[:, None]
    if FIRST + WIDTH > SIZE:
        shown = shown & (columns[None, :] < SIZE)
    tl.store(pointers, values.to(matrix_ptr.dtype.element_ty), mask=shown)


@triton.jit
def _manipulate_each(scores, factor, row_min, MODE: tl.constexpr, VISIT: tl.constexpr):
    """``primitives.manipulate`` with factors ``[BLOCK_M or 1, BLOCK_N]``."""
    if MODE == "multiplicative":
        return scores * factor
    elif MODE == "log_additive":
        logarithm = tl.log2(tl.where(factor > 0, factor, 1.0))
        return scores + tl.where(factor > 0, logarithm, float("-inf"))
    elif VISIT == "ones":
        return tl.where(factor == 1.0, scores, float("-inf"))
    else:
        tl.static_assert(MODE == "min_shift" and VISIT == "deferred")
        moved = row_min[:, None] + factor * (scores - row_min[:, None])
        return tl.where(factor != 1.0, moved, float("-inf"))


@triton.jit
def visit_tile(
    acc0,
    acc1,
    row_max,
    row_sum,
    row_min,
    tile,
    queries,
    packed,
    pointers,
    strides,
    features,
    key_strides,
    sizes,
    units,
    SPEC: tl.constexpr,
    VISIT: tl.constexpr,
    OWN: tl.constexpr,
    EDGE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Add one key tile to the softmax state of BLOCK_M packed rows.

    VISIT says which columns: ``every``, or for ``min_shift`` first the ``ones`` (while tracking
    the row minimum of all visible columns), then the ``deferred`` rest. OWN tiles lay the keys of
    the block's batch rows end to end, each seen by its own rows only. Tiles that are no EDGE are
    prefix tiles seen by every row entirely; where tiles are listed, their factors are all 1.
    """
    BLOCK_M: tl.constexpr = SPEC.block_m
    MASKED: tl.constexpr = EDGE or SPEC.has_mask
    READS: tl.constexpr = SPEC.prefix_factor or (OWN and SPEC.has_key_factor)
    FACTORS: tl.constexpr = READS and (EDGE or not SPEC.lists_tiles)
    key_ptr, value_ptr = pointers
    stride_key, stride_value = strides
    factor_ptr, before_ptr, bias_ptr, padding_ptr, mask_ptr = features
    stride_factor, stride_bias, stride_padding, stride_mask = key_strides
    positions, row_batch, factor_rows, bias_rows, padding_rows, mask_rows = packed
    prefix_keys, own_keys, own_columns, factor_start, window = sizes
    unit, inner_scale = units

    column = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    if OWN:
        inside = column < own_columns
        start_k = prefix_keys.to(tl.int64)  # key index, as masks and factors count, of the tile
        key_batch = column // own_keys  # [BLOCK_N], from the block's first batch row
        offs_n = column % own_keys
    else:
        inside = column < prefix_keys
        start_k = (tile * BLOCK_N).to(tl.int64)
        offs_n = tl.arange(0, BLOCK_N)
        key_ptr += start_k * stride_key[2]
        value_ptr += start_k * stride_value[2]
    offs_k = column
    if OWN:
        offs_k = prefix_keys + offs_n
    if SPEC.wide:
        offs_n = offs_n.to(tl.int64)
    offs_key = offs_n * stride_key[2]
    offs_value = offs_n * stride_value[2]
    if OWN:
        offs_key += key_batch.to(offs_n.dtype) * stride_key[0]
        offs_value += key_batch.to(offs_n.dtype) * stride_value[0]

    key0 = gather_columns(key_ptr, offs_key, stride_key[3], inside, 0, SPEC.d0, SPEC.head_dim, EDGE)
    scores = dot(queries[0], tl.trans(key0), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
    if SPEC.d1 > 0:
        key1 = gather_columns(
            key_ptr, offs_key, stride_key[3], inside, SPEC.d0, SPEC.d1, SPEC.head_dim, EDGE
        )
        scores = dot(queries[1], tl.trans(key1), scores)
    if SPEC.has_softcap:
        scores = tanh(scores * inner_scale, queries[0].dtype == tl.float32)
    if SPEC.scaled:
        scores = scores * unit

    if EDGE:
        end = prefix_keys + own_keys if OWN else prefix_keys
        visible = in_band(
            positions[:, None], offs_k[None, :], end, window, SPEC.causal, SPEC.has_window
        )
        if OWN:
            visible = visible & (row_batch[:, None] == key_batch[None, :]) & inside[None, :]
        if SPEC.has_padding:
            padding_ptr += start_k * stride_padding
            offs = padding_rows[:, None] + (offs_n * stride_padding)[None, :]
            visible = visible & (tl.load(padding_ptr + offs, mask=inside[None, :], other=0) != 0)
    if SPEC.has_mask:
        mask_ptr += start_k * stride_mask
        offs = mask_rows[:, None] + (offs_n * stride_mask)[None, :]
        shown = tl.load(mask_ptr + offs, mask=inside[None, :], other=0) != 0  # [BLOCK_M, BLOCK_N]
        if EDGE:
            visible = visible & shown
        else:
            visible = shown

    HIDE_FIRST: tl.constexpr = MASKED and VISIT == "ones"  # nothing is multiplied in this visit
    if HIDE_FIRST:
        scores = tl.where(visible, scores, float("-inf"))
        lowest = tl.min(tl.where(scores == float("-inf"), float("inf"), scores), 1)
        row_min = tl.minimum(row_min, lowest)
    elif VISIT == "ones":
        row_min = tl.minimum(row_min, tl.min(scores, 1))
    if SPEC.has_bias:
        bias_ptr += start_k * stride_bias
    if FACTORS:
        needed = inside[None, :]
        if OWN:
            start_k -= factor_start
        elif SPEC.lists_tiles:  # nothing is read of an edge tile whose factors are all 1
            before_ptr += tile * BLOCK_N // SPEC.block_n
            needed = needed & (tl.load(before_ptr + 1) != tl.load(before_ptr))
        factor_ptr += start_k * stride_factor
        offs = factor_rows[:, None] + (offs_n * stride_factor)[None, :]
        factor = tl.load(factor_ptr + offs, mask=needed, other=1.0)  # [BLOCK_M or 1, BLOCK_N]
        scores = _manipulate_each(scores, factor, row_min, SPEC.mode, VISIT)
    if SPEC.has_bias:
        offs = bias_rows[:, None] + (offs_n * stride_bias)[None, :]
        bias = tl.load(bias_ptr + offs, mask=inside[None, :], other=0.0)  # [BLOCK_M, BLOCK_N]
        scores += bias.to(tl.float32) * 1.4426950408889634  # log2(e)
    if MASKED and not HIDE_FIRST:
        scores = tl.where(visible, scores, float("-inf"))

    weights, rescale, row_max, row_sum = softmax_step(scores, row_max, row_sum, unit, SPEC.scaled)
    weights = weights.to(queries[0].dtype)
    value0 = gather_columns(
        value_ptr, offs_value, stride_value[3], inside, 0, SPEC.v0, SPEC.value_dim, EDGE
    )
    acc0 = dot(weights, value0, acc0 * rescale[:, None])
    if SPEC.v1 > 0:
        value1 = gather_columns(
            value_ptr, offs_value, stride_value[3], inside, SPEC.v0, SPEC.v1, SPEC.value_dim, EDGE
        )
        acc1 = dot(weights, value1, acc1 * rescale[:, None])
    return acc0, acc1, row_max, row_sum, row_min
