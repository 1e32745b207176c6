"""Backward kernel that owns keys: what is summed over query rows, and over rows that share a key.

Tiles stand on their side, [N keys, M rows], so that no product needs a transposed operand that was
just computed.

Legend: B batch, Hq/Hk query/key heads, Tq query tokens, Tk keys of the segment, D head dim, Dv
value dim. A row is counted from the query's first, a column from the first key of all segments.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .backward_tiles import (
    differentiate_tile,
    load_key_numbers,
    load_row_numbers,
    load_rows,
    load_tile,
    tile_visibility,
)
from .primitives import dot, kept, row_blocks, store_columns


@triton.jit
def _visit(
    block,
    state,
    keys_tile,
    values_tile,
    key_numbers,
    start_n,
    position,
    pointers,
    strides,
    limits,
    units,
    dropout,
    SPEC: tl.constexpr,
    LINEAR: tl.constexpr,
):
    """Add a block of query rows of one head to the gradients of a tile of keys.

    ``position`` is that of the first query row, counted like the segment's keys.
    """
    d_key0, d_key1, d_value0, d_value1, d_factor, d_bias = state
    factor, key_bias, shown = key_numbers
    query_ptr, d_out_ptr, bias_ptr, mask_ptr, row_ptrs, saved = pointers
    stride_query, stride_d_out, stride_bias, stride_mask = strides
    rows, keys, window = limits
    seed_ptr, threshold, first_column, batch_head = dropout
    start_m = block * SPEC.block_m
    first = start_m.to(tl.int64)
    rows_left = rows - start_m
    offs_m = tl.arange(0, SPEC.block_m)
    offs_n = tl.arange(0, SPEC.block_n)
    columns = (first_column + start_n + offs_n)[:, None]
    keep = 0
    if SPEC.has_dropout:
        keep = kept(seed_ptr, (start_m + offs_m)[None, :], columns, batch_head, threshold)
    row_numbers = load_row_numbers(row_ptrs, saved + first, offs_m, rows_left, SPEC, True)
    positions = (position + start_m + offs_m)[None, :]
    if SPEC.wide:
        offs_m = offs_m.to(tl.int64)
        offs_n = offs_n.to(tl.int64)
    query_ptr += first * stride_query[0]
    d_out_ptr += first * stride_d_out[0]
    queries = load_rows(
        query_ptr, offs_m, stride_query, rows_left, SPEC.d0, SPEC.d1, SPEC.head_dim, True
    )
    d_outs = load_rows(
        d_out_ptr, offs_m, stride_d_out, rows_left, SPEC.v0, SPEC.v1, SPEC.value_dim, True
    )
    if SPEC.has_mask:
        mask_ptr += first * stride_mask[0]
    visible = tile_visibility(
        mask_ptr, shown, offs_m[None, :], offs_n[:, None], positions, start_n, stride_mask,
        (rows_left, keys, window), SPEC, True,
    )  # fmt: skip
    bias = 0
    if SPEC.has_bias and not SPEC.bias_per_key:
        bias = load_tile(
            bias_ptr + first * stride_bias[0], offs_m[None, :], offs_n[:, None], stride_bias,
            rows_left, keys - start_n,
        ).to(tl.float32)  # fmt: skip
        bias = bias * 1.4426950408889634  # log2(e)
    weights, d_logits, d_factors, d_scores = differentiate_tile(
        queries, d_outs, keys_tile, values_tile, row_numbers, factor, key_bias, bias, visible,
        keep, columns, units, SPEC, True, True, LINEAR,
    )  # fmt: skip
    weights = weights.to(queries[0].dtype)
    d_value0 = dot(weights, d_outs[0], d_value0)
    if SPEC.v1 > 0:
        d_value1 = dot(weights, d_outs[1], d_value1)
    if SPEC.has_key_factor and not LINEAR:
        d_factor += tl.sum(d_factors, 1)
    if SPEC.bias_per_key:
        d_bias += tl.sum(d_logits, 1)
    d_scores = d_scores.to(queries[0].dtype)
    d_key0 = dot(d_scores, queries[0], d_key0)
    if SPEC.d1 > 0:
        d_key1 = dot(d_scores, queries[1], d_key1)
    return d_key0, d_key1, d_value0, d_value1, d_factor, d_bias


@triton.jit(
    do_not_specialize=["query_offset", "rows", "keys", "heads", "group", "batches", "window"]
)
def _attention_bwd_dkv_kernel(
    d_key_ptr,  # [B | 1, Hk, Tk, D]
    d_value_ptr,  # [B | 1, Hk, Tk, Dv]
    d_factor_ptr,  # [B, Hq | Hk, Tk], float32
    d_bias_ptr,  # [B, Hq, Tk], float32
    d_out_ptr,  # [B, Hq, Tq, Dv]
    lse_ptr,  # [B, Hq, Tq], contiguous, as is all that has a number per row
    rest_ptr,
    delta_ptr,
    d_lse_ptr,
    minimum_ptr,
    argmin_ptr,
    d_minimum_ptr,
    query_ptr,  # [B, Hq, Tq, D]
    key_ptr,  # [B | 1, Hk, Tk, D]
    value_ptr,  # [B | 1, Hk, Tk, Dv]
    factor_ptr,  # [B, Hq, Tk]
    bias_ptr,  # [B, Hq, Tq, Tk]
    padding_ptr,  # [B, Tk]
    range_ptr,  # [B, 3], see key_ranges
    mask_ptr,  # [B, Hq, Tq, Tk]
    seed_ptr,  # [1]
    query_offset,  # a number or a pointer to one, counted from the first of all keys
    first_column,  # of the segment
    rows,
    keys,
    heads,
    group,  # query heads per key head
    batches,  # rows of the batch that share the keys
    window,
    scale,
    unit,
    inner_scale,
    keep_scale,
    threshold,
    stride_d_key,
    stride_d_value,
    stride_d_factor,
    stride_d_bias,
    stride_d_out,
    stride_query,
    stride_key,
    stride_value,
    stride_factor,
    stride_bias,
    stride_padding,
    stride_mask,
    SPEC: tl.constexpr,
    FACTOR_PER_HEAD: tl.constexpr,
    WANTS_FACTOR: tl.constexpr,
    WANTS_BIAS: tl.constexpr,
    LINEAR: tl.constexpr,
):
    """Gradients of ``block_n`` keys and values of one head, and of what has a number per key.

    Keys that several query heads, or all rows of the batch, share gather all of them here: one
    program writes each number, in one order, without atomics.

    LINEAR holds where scores are m q·k, with one m for all that the program gathers: then the
    gradient of m is k times that of m k, and no tile needs it.
    """
    UNUSED: tl.constexpr = 16  # width of an accumulator that is never touched and compiled away
    BLOCK_N: tl.constexpr = SPEC.block_n
    D0: tl.constexpr = SPEC.d0
    D1: tl.constexpr = SPEC.d1 if SPEC.d1 > 0 else UNUSED
    V0: tl.constexpr = SPEC.v0
    V1: tl.constexpr = SPEC.v1 if SPEC.v1 > 0 else UNUSED
    key_heads = heads // group
    tiles = tl.cdiv(keys, BLOCK_N)
    tile = tl.program_id(0) % tiles  # the first, which most rows see under a causal mask, start
    key_head = ((tl.program_id(0) // tiles) % key_heads).to(tl.int64)
    first_batch = tl.program_id(0) // tiles // key_heads * batches
    if SPEC.offset_in_memory:
        query_offset = tl.load(query_offset).to(tl.int32)
    position = query_offset - first_column
    start_n = tile * BLOCK_N
    first = start_n.to(tl.int64)
    offs_n = tl.arange(0, BLOCK_N)
    wide_n = offs_n
    if SPEC.wide:
        wide_n = offs_n.to(tl.int64)
    inside = keys - start_n

    key_row = first_batch.to(tl.int64)
    key_ptr += key_row * stride_key[0] + key_head * stride_key[1] + first * stride_key[2]
    value_ptr += key_row * stride_value[0] + key_head * stride_value[1] + first * stride_value[2]
    keys_tile = load_rows(
        key_ptr, wide_n, (stride_key[2], stride_key[3]), inside,
        SPEC.d0, SPEC.d1, SPEC.head_dim, True,
    )  # fmt: skip
    values_tile = load_rows(
        value_ptr, wide_n, (stride_value[2], stride_value[3]), inside,
        SPEC.v0, SPEC.v1, SPEC.value_dim, True,
    )  # fmt: skip
    d_key0 = tl.zeros([BLOCK_N, D0], tl.float32)
    d_key1 = tl.zeros([BLOCK_N, D1], tl.float32)
    d_value0 = tl.zeros([BLOCK_N, V0], tl.float32)
    d_value1 = tl.zeros([BLOCK_N, V1], tl.float32)
    # d_factors are in the unit of scores, or already without one
    natural = 0.6931471805599453  # ln 2
    if SPEC.mode == "log_additive":
        natural = 1.0
    elif not SPEC.scaled:
        natural = unit * 0.6931471805599453

    for row in range(batches):
        batch = (first_batch + row).to(tl.int64)
        d_factor = tl.zeros([BLOCK_N], tl.float32)
        shown = 0
        first_key = 0
        stop = keys
        if SPEC.has_padding:
            first_key = tl.load(range_ptr + batch * 3)
            stop = tl.load(range_ptr + batch * 3 + 1)
            shown_ptr = padding_ptr + batch * stride_padding[0] + first * stride_padding[1]
            shown = tl.load(shown_ptr + wide_n * stride_padding[1], mask=offs_n < inside, other=0)
            shown = (shown != 0)[:, None]
        low, high = row_blocks(
            start_n, first_key, stop, position, rows, window,
            SPEC.causal, SPEC.has_window, SPEC.block_m, BLOCK_N,
        )  # fmt: skip
        for member in range(group):
            head = key_head * group + member
            factor_row = 0
            bias_row = 0
            mask_row = 0
            if SPEC.has_key_factor:
                factor_row = factor_ptr + batch * stride_factor[0] + head * stride_factor[1]
                factor_row += first * stride_factor[2]
            if SPEC.has_bias:
                bias_row = bias_ptr + batch * stride_bias[0] + head * stride_bias[1]
                bias_row += first * stride_bias[3]
            if SPEC.has_mask:
                mask_row = mask_ptr + batch * stride_mask[0] + head * stride_mask[1]
                mask_row += first * stride_mask[3]
            factor, key_bias = load_key_numbers(
                factor_row, bias_row, wide_n, (stride_factor[2], stride_bias[3]), inside, SPEC
            )
            if SPEC.has_key_factor:
                factor = factor[:, None]
            if SPEC.bias_per_key:
                key_bias = key_bias[:, None]
            saved = (batch * heads + head) * rows
            pointers = (
                query_ptr + batch * stride_query[0] + head * stride_query[1],
                d_out_ptr + batch * stride_d_out[0] + head * stride_d_out[1],
                bias_row, mask_row,
                (lse_ptr, rest_ptr, delta_ptr, d_lse_ptr, minimum_ptr, argmin_ptr, d_minimum_ptr),
                saved,
            )  # fmt: skip
            strides = (
                (stride_query[2], stride_query[3]),
                (stride_d_out[2], stride_d_out[3]),
                (stride_bias[2], stride_bias[3]),
                (stride_mask[2], stride_mask[3]),
            )
            limits = (rows, stop, window)
            units = (unit, inner_scale, keep_scale)
            key_numbers = (factor, key_bias, shown)
            dropout = (seed_ptr, threshold, first_column, (batch * heads + head).to(tl.int32))
            d_bias = tl.zeros([BLOCK_N], tl.float32)
            # one masked loop: a second one for inner blocks costs registers that are not there
            for index in range(high - low):
                block = low + index
                d_key0, d_key1, d_value0, d_value1, d_factor, d_bias = _visit(
                    block, (d_key0, d_key1, d_value0, d_value1, d_factor, d_bias),
                    keys_tile, values_tile, key_numbers, start_n, position, pointers, strides,
                    limits, units, dropout, SPEC, LINEAR,
                )  # fmt: skip
            if WANTS_FACTOR and FACTOR_PER_HEAD and not LINEAR:
                place = d_factor_ptr + batch * stride_d_factor[0] + head * stride_d_factor[1]
                place += first * stride_d_factor[2]
                tl.store(
                    place + wide_n * stride_d_factor[2], d_factor * natural, mask=offs_n < inside
                )
                d_factor = tl.zeros([BLOCK_N], tl.float32)
            if WANTS_BIAS:
                place = d_bias_ptr + batch * stride_d_bias[0] + head * stride_d_bias[1]
                place += first * stride_d_bias[2]
                tl.store(place + wide_n * stride_d_bias[2], d_bias, mask=offs_n < inside)
        if WANTS_FACTOR and not FACTOR_PER_HEAD and not LINEAR:
            place = d_factor_ptr + batch * stride_d_factor[0] + key_head * stride_d_factor[1]
            place += first * stride_d_factor[2]
            tl.store(place + wide_n * stride_d_factor[2], d_factor * natural, mask=offs_n < inside)

    d_value_ptr += key_row * stride_d_value[0] + key_head * stride_d_value[1]
    d_value_ptr += first * stride_d_value[2]
    stride_row = (stride_d_value[2], stride_d_value[3])
    store_columns(d_value_ptr, d_value0, wide_n, stride_row, inside, 0, SPEC.v0, SPEC.value_dim)
    if SPEC.v1 > 0:
        store_columns(
            d_value_ptr, d_value1, wide_n, stride_row, inside, SPEC.v0, SPEC.v1, SPEC.value_dim
        )
    if LINEAR:
        # of the only batch row and, if factors differ by head, of the only head
        factor_head = key_head * group
        factor_ptr += key_row * stride_factor[0] + factor_head * stride_factor[1]
        factor_ptr += first * stride_factor[2]
        factor = tl.load(factor_ptr + wide_n * stride_factor[2], mask=offs_n < inside, other=1.0)
        if WANTS_FACTOR:
            # loaded again, for registers would hold it all along
            again = load_rows(
                key_ptr, wide_n, (stride_key[2], stride_key[3]), inside,
                SPEC.d0, SPEC.d1, SPEC.head_dim, True,
            )  # fmt: skip
            d_factor = tl.sum(d_key0 * again[0].to(tl.float32), 1)
            if SPEC.d1 > 0:
                d_factor += tl.sum(d_key1 * again[1].to(tl.float32), 1)
            d_factor_ptr += key_row * stride_d_factor[0] + key_head * stride_d_factor[1]
            d_factor_ptr += first * stride_d_factor[2]
            tl.store(
                d_factor_ptr + wide_n * stride_d_factor[2], d_factor * scale, mask=offs_n < inside
            )
        d_key0 *= factor[:, None]
        d_key1 *= factor[:, None]
    d_key_ptr += key_row * stride_d_key[0] + key_head * stride_d_key[1] + first * stride_d_key[2]
    stride_row = (stride_d_key[2], stride_d_key[3])
    store_columns(d_key_ptr, d_key0 * scale, wide_n, stride_row, inside, 0, SPEC.d0, SPEC.head_dim)
    if SPEC.d1 > 0:
        store_columns(
            d_key_ptr, d_key1 * scale, wide_n, stride_row, inside, SPEC.d0, SPEC.d1, SPEC.head_dim
        )
