"""Backward kernel that owns query rows and walks over keys.

Legend: B batch, Hq/Hk query/key heads, Tq query tokens, Tk keys of the segment, D head dim, Dv
value dim. A row is counted from the query's first, a column from the first key of all segments.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .backward_tiles import load_row_numbers, load_rows, visit_keys
from .primitives import dot, split_program, store_columns
from .tiles import segment_tiles


@triton.jit(do_not_specialize=["query_offset", "rows", "keys", "heads", "group", "window"])
def _attention_bwd_dq_kernel(
    d_query_ptr,  # [B, Hq, Tq, D]
    partial_ptr,  # [B, Hq, Tq, D], float32
    d_out_ptr,  # [B, Hq, Tq, Dv]
    lse_ptr,  # [B, Hq, Tq], contiguous, as is all that has a number per row
    rest_ptr,
    delta_ptr,
    d_lse_ptr,
    minimum_ptr,
    argmin_ptr,
    d_minimum_ptr,
    query_ptr,  # [B, Hq, Tq, D]
    key_ptr,  # [B, Hk, Tk, D]
    value_ptr,  # [B, Hk, Tk, Dv]
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
    window,
    scale,
    unit,
    inner_scale,
    keep_scale,
    threshold,
    stride_d_query,
    stride_d_out,
    stride_query,
    stride_key,
    stride_value,
    stride_factor,
    stride_bias,
    stride_padding,
    stride_mask,
    SPEC: tl.constexpr,
    CONTINUES: tl.constexpr,
):
    """Gradient of ``block_m`` queries of one head; CONTINUES adds to that of another segment."""
    batch, head, start_m = split_program(tl.program_id(0), rows, heads, SPEC.block_m, SPEC.causal)
    if SPEC.offset_in_memory:
        query_offset = tl.load(query_offset).to(tl.int32)
    key_head = (head // group).to(tl.int64)
    batch = batch.to(tl.int64)
    head = head.to(tl.int64)
    first_row = start_m.to(tl.int64)
    rows_left = rows - start_m
    saved = (batch * heads + head) * rows + first_row
    offs_m = tl.arange(0, SPEC.block_m)

    query_ptr += batch * stride_query[0] + head * stride_query[1] + first_row * stride_query[2]
    d_out_ptr += batch * stride_d_out[0] + head * stride_d_out[1] + first_row * stride_d_out[2]
    key_ptr += batch * stride_key[0] + key_head * stride_key[1]
    value_ptr += batch * stride_value[0] + key_head * stride_value[1]
    if SPEC.has_key_factor:
        factor_ptr += batch * stride_factor[0] + head * stride_factor[1]
    if SPEC.has_bias:
        bias_ptr += batch * stride_bias[0] + head * stride_bias[1] + first_row * stride_bias[2]
    if SPEC.has_mask:
        mask_ptr += batch * stride_mask[0] + head * stride_mask[1] + first_row * stride_mask[2]
    if SPEC.has_padding:
        range_ptr += batch * 3
        padding_ptr += batch * stride_padding[0]
    row_numbers = load_row_numbers(
        (lse_ptr, rest_ptr, delta_ptr, d_lse_ptr, minimum_ptr, argmin_ptr, d_minimum_ptr),
        saved, offs_m, rows_left, SPEC, False,
    )  # fmt: skip
    if SPEC.wide:
        offs_m = offs_m.to(tl.int64)
    queries = load_rows(
        query_ptr, offs_m, (stride_query[2], stride_query[3]), rows_left,
        SPEC.d0, SPEC.d1, SPEC.head_dim, True,
    )  # fmt: skip
    d_outs = load_rows(
        d_out_ptr, offs_m, (stride_d_out[2], stride_d_out[3]), rows_left,
        SPEC.v0, SPEC.v1, SPEC.value_dim, True,
    )  # fmt: skip
    position = query_offset + start_m - first_column
    low, high, inner_low, inner_high, keys = segment_tiles(
        range_ptr, position, rows_left, keys, window, SPEC
    )
    pointers = (key_ptr, value_ptr, factor_ptr, bias_ptr, padding_ptr, mask_ptr)
    strides = (
        (stride_key[2], stride_key[3]),
        (stride_value[2], stride_value[3]),
        stride_factor[2],
        (stride_bias[2], stride_bias[3]),
        stride_padding[1],
        (stride_mask[2], stride_mask[3]),
    )
    limits = (rows_left, keys, window)
    units = (unit, inner_scale, keep_scale)
    dropout = (seed_ptr, threshold, first_column, (batch * heads + head).to(tl.int32), start_m)

    UNUSED: tl.constexpr = 16  # width of an accumulator that is never touched and compiled away
    BLOCK_M: tl.constexpr = SPEC.block_m
    D0: tl.constexpr = SPEC.d0
    D1: tl.constexpr = SPEC.d1 if SPEC.d1 > 0 else UNUSED
    acc0 = tl.zeros([BLOCK_M, D0], tl.float32)
    acc1 = tl.zeros([BLOCK_M, D1], tl.float32)
    for tile in range(inner_low, inner_high):
        keys_tile, _factor, _logits, d_scores = visit_keys(
            tile, queries, d_outs, row_numbers, position, pointers, strides, limits, units, dropout,
            SPEC, False,
        )  # fmt: skip
        d_scores = d_scores.to(queries[0].dtype)
        acc0 = dot(d_scores, keys_tile[0], acc0)
        if SPEC.d1 > 0:
            acc1 = dot(d_scores, keys_tile[1], acc1)
    left = inner_low - low  # the edge tiles on the left, then those on the right
    for edge in tl.range(0, left + high - inner_high, num_stages=SPEC.edge_stages):
        tile = tl.where(edge < left, low + edge, inner_high + edge - left)
        keys_tile, _factor, _logits, d_scores = visit_keys(
            tile, queries, d_outs, row_numbers, position, pointers, strides, limits, units, dropout,
            SPEC, True,
        )  # fmt: skip
        d_scores = d_scores.to(queries[0].dtype)
        acc0 = dot(d_scores, keys_tile[0], acc0)
        if SPEC.d1 > 0:
            acc1 = dot(d_scores, keys_tile[1], acc1)

    start = batch * stride_d_query[0] + head * stride_d_query[1] + first_row * stride_d_query[2]
    stride_row = (stride_d_query[2], stride_d_query[3])
    d_query_ptr += start
    acc0 *= scale
    acc1 *= scale
    if CONTINUES:
        partials = load_rows(
            partial_ptr + start, offs_m, stride_row, rows_left,
            SPEC.d0, SPEC.d1, SPEC.head_dim, True,
        )  # fmt: skip
        acc0 += partials[0]
        if SPEC.d1 > 0:
            acc1 += partials[1]
    store_columns(d_query_ptr, acc0, offs_m, stride_row, rows_left, 0, SPEC.d0, SPEC.head_dim)
    if SPEC.d1 > 0:
        store_columns(
            d_query_ptr, acc1, offs_m, stride_row, rows_left, SPEC.d0, SPEC.d1, SPEC.head_dim
        )
