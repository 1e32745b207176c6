"""Backward kernel for what has a number per query row, which the others read.

Legend: B batch, Hq/Hk query/key heads, Tq query tokens, Tk keys of the segment, D head dim, Dv
value dim. A row is counted from the query's first, a column from the first key of all segments.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .backward_tiles import load_row_numbers, load_rows, visit_keys
from .primitives import split_program
from .tiles import segment_tiles


@triton.jit(do_not_specialize=["query_offset", "rows", "keys", "heads", "group", "window"])
def _attention_bwd_rows_kernel(
    delta_ptr,  # [B, Hq, Tq], contiguous, as is all that has a number per row
    d_minimum_ptr,
    out_ptr,  # [B, Hq, Tq, Dv]
    d_out_ptr,  # [B, Hq, Tq, Dv]
    d_lse_ptr,
    lse_ptr,
    rest_ptr,
    minimum_ptr,
    argmin_ptr,
    query_ptr,  # [B, Hq, Tq, D]
    key_ptr,  # [B, Hk, Tk, D]
    value_ptr,  # [B, Hk, Tk, Dv]
    factor_ptr,  # [B, Hq, Tk]
    before_ptr,  # [B, Hq, tiles + 1], see factor_tiles
    flagged_ptr,  # [B, Hq, tiles]
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
    unit,
    inner_scale,
    keep_scale,
    threshold,
    stride_out,
    stride_d_out,
    stride_query,
    stride_key,
    stride_value,
    stride_factor,
    stride_tiles,  # (batch, head), in rows
    stride_bias,
    stride_padding,
    stride_mask,
    SPEC: tl.constexpr,
    STAGE: tl.constexpr,
    HAS_D_LSE: tl.constexpr,
    CONTINUES: tl.constexpr,
):
    """A number for each of ``block_m`` rows.

    STAGE ``outputs`` finds δ from the output; ``sums`` finds it over a segment's keys, which leaves
    no more rounding in a difference from δ than a softmax does; ``minimum`` adds up the gradient of
    ``min_shift``'s minimum over a segment's flagged tiles. CONTINUES adds to another segment's.
    """
    batch, head, start_m = split_program(tl.program_id(0), rows, heads, SPEC.block_m, SPEC.causal)
    if SPEC.offset_in_memory:
        query_offset = tl.load(query_offset).to(tl.int32)
    key_head = (head // group).to(tl.int64)
    batch = batch.to(tl.int64)
    head = head.to(tl.int64)
    first_row = start_m.to(tl.int64)
    rows_left = rows - start_m
    saved = (batch * heads + head) * rows + first_row
    BLOCK_M: tl.constexpr = SPEC.block_m
    offs_m = tl.arange(0, BLOCK_M)
    inside = offs_m < rows_left
    wide_m = offs_m
    if SPEC.wide:
        wide_m = offs_m.to(tl.int64)

    d_out_ptr += batch * stride_d_out[0] + head * stride_d_out[1] + first_row * stride_d_out[2]
    d_outs = load_rows(
        d_out_ptr, wide_m, (stride_d_out[2], stride_d_out[3]), rows_left,
        SPEC.v0, SPEC.v1, SPEC.value_dim, True,
    )  # fmt: skip
    result_ptr = d_minimum_ptr if STAGE == "minimum" else delta_ptr
    result_ptr += saved
    total = tl.zeros([BLOCK_M], tl.float32)
    if CONTINUES:
        total += tl.load(result_ptr + offs_m, mask=inside, other=0.0)
    elif HAS_D_LSE and STAGE == "outputs":
        total -= tl.load(d_lse_ptr + saved + offs_m, mask=inside, other=0.0)

    if STAGE == "outputs":
        out_ptr += batch * stride_out[0] + head * stride_out[1] + first_row * stride_out[2]
        outs = load_rows(
            out_ptr, wide_m, (stride_out[2], stride_out[3]), rows_left,
            SPEC.v0, SPEC.v1, SPEC.value_dim, True,
        )  # fmt: skip
        total += tl.sum(outs[0].to(tl.float32) * d_outs[0].to(tl.float32), 1)
        if SPEC.v1 > 0:
            total += tl.sum(outs[1].to(tl.float32) * d_outs[1].to(tl.float32), 1)
    else:
        query_ptr += batch * stride_query[0] + head * stride_query[1] + first_row * stride_query[2]
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
        tiles = tl.cdiv(keys, SPEC.block_n)
        position = query_offset + start_m - first_column
        low, high, _low, _high, keys = segment_tiles(
            range_ptr, position, rows_left, keys, window, SPEC
        )
        queries = load_rows(
            query_ptr, wide_m, (stride_query[2], stride_query[3]), rows_left,
            SPEC.d0, SPEC.d1, SPEC.head_dim, True,
        )  # fmt: skip
        lse, rest, delta, d_lse, minimum, argmin, _unknown = load_row_numbers(
            (lse_ptr, rest_ptr, delta_ptr, d_lse_ptr, minimum_ptr, argmin_ptr, d_minimum_ptr),
            saved, offs_m, rows_left, SPEC, False,
        )  # fmt: skip
        # not found yet, and no part of what is summed: its memory may hold anything
        d_minimum = tl.zeros([BLOCK_M], tl.float32)[:, None]
        if STAGE == "sums":
            # without them d_logits are what δ is the sum of
            delta = tl.zeros([BLOCK_M], tl.float32)[:, None]
            d_lse = tl.zeros([BLOCK_M], tl.float32)[:, None]
        row_numbers = (lse, rest, delta, d_lse, minimum, argmin, d_minimum)
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
        if STAGE == "sums":
            for tile in tl.range(low, high, num_stages=1):
                _keys, _factor, d_logits, _scores = visit_keys(
                    tile, queries, d_outs, row_numbers, position, pointers, strides, limits, units,
                    dropout, SPEC, True,
                )  # fmt: skip
                total += tl.sum(d_logits, 1)
        else:
            tile_row = batch * stride_tiles[0] + head * stride_tiles[1]
            before_ptr += tile_row * (tiles + 1)
            flagged_ptr += tile_row * tiles
            start = tl.load(before_ptr + low)
            for index in tl.range(start, tl.load(before_ptr + high), num_stages=1):
                tile = tl.load(flagged_ptr + index)
                _keys, factor, d_logits, _scores = visit_keys(
                    tile, queries, d_outs, row_numbers, position, pointers, strides, limits, units,
                    dropout, SPEC, True,
                )  # fmt: skip
                total += tl.sum((1.0 - factor) * d_logits, 1)
    tl.store(result_ptr + offs_m, total, mask=inside)
