"""Backward kernel for a position bias that has a number per query row and key.

Its gradient is as large as the bias itself; nothing else here is. Rows of the batch and heads that
share a bias are summed by the program that owns a tile of it.

Legend: B batch, Hq/Hk query/key heads, Tq query tokens, Tk keys of the segment, D head dim, Dv
value dim.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .backward_tiles import load_row_numbers, load_rows, visit_keys
from .tiles import segment_tiles


@triton.jit(do_not_specialize=["query_offset", "rows", "keys", "heads", "group", "window"])
def _attention_bwd_bias_kernel(
    d_bias_ptr,  # [B | 1, Hq | 1, Tq, Tk]
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
    bias_heads,
    shared_batches,  # rows of the batch that share a bias
    shared_heads,
    window,
    unit,
    inner_scale,
    keep_scale,
    threshold,
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
):
    """Gradient of one tile of the bias."""
    tiles = tl.cdiv(keys, SPEC.block_n)
    blocks = tl.cdiv(rows, SPEC.block_m)
    tile = tl.program_id(0) % tiles
    start_m = tl.program_id(0) // tiles % blocks * SPEC.block_m
    bias_row = tl.program_id(0) // tiles // blocks
    bias_batch = bias_row // bias_heads
    bias_head = bias_row % bias_heads
    if SPEC.offset_in_memory:
        query_offset = tl.load(query_offset).to(tl.int32)
    position = query_offset + start_m - first_column
    first_row = start_m.to(tl.int64)
    rows_left = rows - start_m
    offs_m = tl.arange(0, SPEC.block_m)
    wide_m = offs_m
    if SPEC.wide:
        wide_m = offs_m.to(tl.int64)
    strides = (
        (stride_key[2], stride_key[3]),
        (stride_value[2], stride_value[3]),
        stride_factor[2],
        (stride_bias[2], stride_bias[3]),
        stride_padding[1],
        (stride_mask[2], stride_mask[3]),
    )
    BLOCK_M: tl.constexpr = SPEC.block_m
    BLOCK_N: tl.constexpr = SPEC.block_n
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for row in range(shared_batches):
        batch = (bias_batch * shared_batches + row).to(tl.int64)
        padding_row = 0
        range_row = 0
        if SPEC.has_padding:
            padding_row = padding_ptr + batch * stride_padding[0]
            range_row = range_ptr + batch * 3
        low, high, _low, _high, stop = segment_tiles(
            range_row, position, rows_left, keys, window, SPEC
        )
        seen = (tile >= low) & (tile < high)
        for member in range(tl.where(seen, shared_heads, 0)):
            head = (bias_head * shared_heads + member).to(tl.int64)
            key_head = head // group
            saved = (batch * heads + head) * rows + first_row
            factor_row = 0
            mask_row = 0
            if SPEC.has_key_factor:
                factor_row = factor_ptr + batch * stride_factor[0] + head * stride_factor[1]
            if SPEC.has_mask:
                mask_row = mask_ptr + batch * stride_mask[0] + head * stride_mask[1]
                mask_row += first_row * stride_mask[2]
            row_numbers = load_row_numbers(
                (lse_ptr, rest_ptr, delta_ptr, d_lse_ptr, minimum_ptr, argmin_ptr, d_minimum_ptr),
                saved, offs_m, rows_left, SPEC, False,
            )  # fmt: skip
            query_row = query_ptr + batch * stride_query[0] + head * stride_query[1]
            queries = load_rows(
                query_row + first_row * stride_query[2], wide_m,
                (stride_query[2], stride_query[3]), rows_left,
                SPEC.d0, SPEC.d1, SPEC.head_dim, True,
            )  # fmt: skip
            d_out_row = d_out_ptr + batch * stride_d_out[0] + head * stride_d_out[1]
            d_outs = load_rows(
                d_out_row + first_row * stride_d_out[2], wide_m,
                (stride_d_out[2], stride_d_out[3]), rows_left,
                SPEC.v0, SPEC.v1, SPEC.value_dim, True,
            )  # fmt: skip
            bias_start = batch * stride_bias[0] + head * stride_bias[1] + first_row * stride_bias[2]
            pointers = (
                key_ptr + batch * stride_key[0] + key_head * stride_key[1],
                value_ptr + batch * stride_value[0] + key_head * stride_value[1],
                factor_row, bias_ptr + bias_start, padding_row, mask_row,
            )  # fmt: skip
            batch_head = (batch * heads + head).to(tl.int32)
            _keys, _factor, d_logits, _scores = visit_keys(
                tile, queries, d_outs, row_numbers, position, pointers, strides,
                (rows_left, stop, window), (unit, inner_scale, keep_scale),
                (seed_ptr, threshold, first_column, batch_head, start_m), SPEC, True,
            )  # fmt: skip
            total += d_logits
    offs_n = tl.arange(0, SPEC.block_n)
    inside = keys - tile * SPEC.block_n
    if SPEC.wide:
        offs_n = offs_n.to(tl.int64)
    d_bias_ptr += bias_batch.to(tl.int64) * stride_d_bias[0]
    d_bias_ptr += bias_head.to(tl.int64) * stride_d_bias[1] + first_row * stride_d_bias[2]
    d_bias_ptr += (tile * SPEC.block_n).to(tl.int64) * stride_d_bias[3]
    d_bias_ptr += wide_m[:, None] * stride_d_bias[2] + offs_n[None, :] * stride_d_bias[3]
    written = (offs_m[:, None] < rows_left) & (offs_n[None, :] < inside)
    tl.store(d_bias_ptr, total.to(d_bias_ptr.dtype.element_ty), mask=written)
