"""The attention kernel of packed query rows, for packed_prefix.py and decode.py; see README.md.

The *prefix* are the keys that all rows of a tile share: those in front of every batch row's own,
or, with a cache each (SPEC.one_batch), all keys of one batch row.

Legend: B batch, C caches (1 or B), Hq/Hk query/key heads, Tq query tokens, Tp/Tk keys of the prefix
and of a row's own, D head dim, Dv value dim. BLOCK_M packed rows and BLOCK_N keys make a tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .packed_visit import gather_columns, scatter_columns, visit_tile
from .primitives import key_tiles


@triton.jit
def _prefix_tiles(
    first_position,
    last_position,
    range_ptr,
    row_batch,
    prefix_keys,
    window,
    SPEC: tl.constexpr,
):
    """Prefix tiles ``[low, high)`` that some packed row sees, and those that all see entirely."""
    low, high, inner_low, inner_high = key_tiles(
        first_position, last_position, 0, prefix_keys, window,
        SPEC.causal, SPEC.has_window, SPEC.block_n,
    )  # fmt: skip
    if SPEC.has_padding:
        first = tl.load(range_ptr + row_batch * 3)  # [BLOCK_M]
        stop = tl.load(range_ptr + row_batch * 3 + 1)
        whole = tl.load(range_ptr + row_batch * 3 + 2)
        low = tl.minimum(tl.maximum(low, tl.min(first, 0) // SPEC.block_n), high)
        high = tl.maximum(low, tl.minimum(high, tl.cdiv(tl.max(stop, 0), SPEC.block_n)))
        inner_low = tl.maximum(inner_low, tl.cdiv(tl.max(first, 0), SPEC.block_n))
        inner_low = tl.minimum(tl.maximum(inner_low, low), high)
        inner_high = tl.minimum(inner_high, tl.min(stop, 0) // SPEC.block_n)
        inner_high = tl.where(tl.min(whole, 0) != 0, inner_high, inner_low)
        inner_high = tl.minimum(tl.maximum(inner_high, inner_low), high)
    return low, high, inner_low, inner_high


@triton.jit
def _add_partials(
    acc0,
    acc1,
    row_max,
    row_sum,
    partial_ptr,  # [splits, C · Hk · packed rows, Dv]
    stats_ptr,  # [3, splits, C · Hk · packed rows]: maximum, sum, minimum
    first_row,  # of the block, among those of all key heads
    offs_row,  # [BLOCK_M]
    rows_per_split,
    first_split,
    stop_split,
    splits,
    SPEC: tl.constexpr,
):
    """Add the partial states of some splits to a state: the larger maximum rescales the other."""
    for split in tl.range(first_split, stop_split, loop_unroll_factor=4):  # loads in flight at once
        first = first_row + split * rows_per_split
        part_max = tl.load(stats_ptr + first + offs_row)
        part_sum = tl.load(stats_ptr + first + splits * rows_per_split + offs_row)
        new_max = tl.maximum(row_max, part_max)
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        rescale = tl.exp2(row_max - shift)
        share = tl.exp2(part_max - shift)
        row_sum = row_sum * rescale + part_sum * share
        part_ptr = partial_ptr + first * SPEC.value_dim
        offs = offs_row * SPEC.value_dim
        part0 = gather_columns(part_ptr, offs, 1, None, 0, SPEC.v0, SPEC.value_dim, False)
        acc0 = acc0 * rescale[:, None] + part0 * share[:, None]
        if SPEC.v1 > 0:
            part1 = gather_columns(part_ptr, offs, 1, None, SPEC.v0, SPEC.v1, SPEC.value_dim, False)
            acc1 = acc1 * rescale[:, None] + part1 * share[:, None]
        row_max = new_max
    return acc0, acc1, row_max, row_sum


@triton.jit
def _merge_minima(row_min, stats_ptr, first_row, offs_row, rows_per_split, splits):
    """The minimum of each row over all splits; ``stats_ptr`` as of :func:`_add_partials`."""
    stats_ptr += first_row + 2 * splits * rows_per_split
    for split in tl.range(0, splits, loop_unroll_factor=4):
        row_min = tl.minimum(row_min, tl.load(stats_ptr + split * rows_per_split + offs_row))
    return row_min


@triton.jit
def _deferred_parts(factor_ptr, factor_rows, stride, first_key, end, SPEC: tl.constexpr):
    """From the first to the last part, DEFER_N keys each, of ``scan_n`` keys with some m ≠ 1."""
    offs_n = first_key + tl.arange(0, SPEC.scan_n)
    pointers = factor_ptr + factor_rows[:, None] + (offs_n.to(factor_rows.dtype) * stride)[None, :]
    factor = tl.load(pointers, mask=(offs_n < end)[None, :], other=1.0)
    touched = tl.max((factor != 1.0).to(tl.int32), 0) != 0  # [scan_n]
    low = tl.min(tl.where(touched, offs_n, end), 0)
    high = tl.max(tl.where(touched, offs_n + 1, 0), 0)
    return low // SPEC.defer_n, tl.cdiv(high, SPEC.defer_n)


@triton.jit(
    # nothing that grows with a cache: while one is filled, a kernel is compiled once
    do_not_specialize=[
        "query_offset", "batch", "rows", "prefix_keys", "own_keys", "heads", "group", "splits",
        "state_rows", "factor_start", "window", "factor_ptr", "bias_ptr", "padding_ptr", "mask_ptr",
        "stride_factor_batch", "stride_factor_head", "stride_bias_batch", "stride_bias_head",
        "stride_bias_row", "stride_padding_batch", "stride_mask_batch", "stride_mask_head",
        "stride_mask_row",
    ]
)  # fmt: skip
def _packed_fwd_kernel(
    out_ptr,  # [B, Hq, Tq, Dv]
    lse_ptr,  # [B, Hq, Tq], contiguous
    partial_ptr,  # [splits, C, Hk, batch · group · Tq, Dv]
    stats_ptr,  # [3, splits, C, Hk, batch · group · Tq]
    query_ptr,  # [B, Hq, Tq, D]
    key_ptr,  # [B, Hk, Tk, D]
    value_ptr,  # [B, Hk, Tk, Dv]
    prefix_key_ptr,  # [C, Hk, Tp, D]
    prefix_value_ptr,  # [C, Hk, Tp, Dv]
    factor_ptr,  # [B, Hq, Tp + Tk], or [B, Hq, Tk] with factor_start = Tp
    before_ptr,  # [Hk or 1, blocks, tiles + 1], see packed_tiles
    tiles_ptr,  # [Hk or 1, blocks, tiles]
    bias_ptr,  # [B, Hq, Tq, Tp + Tk]
    padding_ptr,  # [B, Tp + Tk]
    range_ptr,  # [B, 3], see key_ranges
    mask_ptr,  # [B, Hq, Tq, Tp + Tk]
    sinks_ptr,  # [Hq]
    query_offset,  # a number or a pointer to one
    batch,  # rows that share a prefix: B / C
    rows,
    prefix_keys,
    own_keys,
    heads,
    group,  # query heads per key head
    splits,
    state_rows,  # packed rows of all caches and key heads
    factor_start,  # key index of the first factor
    window,
    unit,  # base-2 logits per raw score
    inner_scale,  # of q·k inside the softcap's tanh
    stride_out,
    stride_query,
    stride_key,
    stride_value,
    stride_prefix_key,
    stride_prefix_value,
    stride_factor_batch,
    stride_factor_head,
    stride_bias_batch,
    stride_bias_head,
    stride_bias_row,
    stride_padding_batch,
    stride_mask_batch,
    stride_mask_head,
    stride_mask_row,
    key_strides,  # of factor, bias, padding, mask
    SPEC: tl.constexpr,
):
    """Output and log-sum-exp of BLOCK_M packed rows of one key head, or a part of their state."""
    BLOCK_M: tl.constexpr = SPEC.block_m
    BLOCK_N: tl.constexpr = SPEC.block_n
    EDGE_N: tl.constexpr = SPEC.edge_n  # narrower: an edge tile gathers numbers for every row
    PARTS: tl.constexpr = BLOCK_N // EDGE_N
    UNUSED: tl.constexpr = 16  # width of an accumulator that is never touched and compiled away
    V0: tl.constexpr = SPEC.v0
    V1: tl.constexpr = SPEC.v1 if SPEC.v1 > 0 else UNUSED
    DEFERS: tl.constexpr = SPEC.has_key_factor and SPEC.mode == "min_shift"
    FIRST_VISIT: tl.constexpr = "ones" if DEFERS else "every"
    PART: tl.constexpr = SPEC.stage == "partial" or SPEC.stage == "deferred"
    packed_rows = batch * group * rows
    blocks = tl.cdiv(packed_rows, BLOCK_M)
    program = tl.program_id(0)
    # neighbours read the same keys at the same time
    block = program % blocks
    split = 0
    state = program // blocks  # which key head, of which cache
    if PART:
        split = state % splits
        state = state // splits
    key_head = state
    if SPEC.one_batch:
        key_head = state % (heads // group)
    if SPEC.offset_in_memory:
        query_offset = tl.load(query_offset).to(tl.int32)

    # rows beyond the last repeat it and are not stored
    start_m = block * BLOCK_M
    offs_m = start_m + tl.arange(0, BLOCK_M)
    inside_m = offs_m < packed_rows
    offs_m = tl.minimum(offs_m, packed_rows - 1)
    token = offs_m % rows
    head = offs_m // rows % group  # within the group, as row_batch within the block
    if SPEC.one_batch:
        first_batch = state // (heads // group)
        row_batch = tl.zeros_like(token)
    else:
        first_batch = start_m // rows // group
        row_batch = offs_m // rows // group - first_batch
    own_columns = 0
    if SPEC.has_own:
        last_batch = (tl.minimum(start_m + BLOCK_M, packed_rows) - 1) // rows // group
        own_columns = (last_batch - first_batch + 1) * own_keys
    positions = query_offset + token
    if SPEC.wide:
        token = token.to(tl.int64)
        head = head.to(tl.int64)
        row_batch = row_batch.to(tl.int64)
    key_head = key_head.to(tl.int64)
    first_head = key_head * group
    first_batch = first_batch.to(tl.int64)
    state_row = state.to(tl.int64) * packed_rows + start_m
    rows_per_split = state_rows.to(tl.int64)

    acc0 = tl.zeros([BLOCK_M, V0], tl.float32)
    acc1 = tl.zeros([BLOCK_M, V1], tl.float32)
    row_min = tl.full([BLOCK_M], float("inf"), tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    if SPEC.has_sinks and not PART:  # one more logit, without a value
        sink = tl.load(sinks_ptr + first_head + head).to(tl.float32)
        row_max = sink * 1.4426950408889634  # log2(e)
        row_sum += 1.0
    if SPEC.stage == "merge" or SPEC.stage == "deferred":
        first_split = split
        stop_split = split + 1
        if SPEC.stage == "merge":
            stop_split = splits
        acc0, acc1, row_max, row_sum = _add_partials(
            acc0, acc1, row_max, row_sum, partial_ptr, stats_ptr, state_row, offs_m - start_m,
            rows_per_split, first_split, stop_split, splits, SPEC,
        )  # fmt: skip

    if SPEC.stage != "merge":
        query_ptr += first_batch * stride_query[0] + first_head * stride_query[1]
        offs = row_batch * stride_query[0] + head * stride_query[1] + token * stride_query[2]
        query0 = gather_columns(
            query_ptr, offs, stride_query[3], inside_m, 0, SPEC.d0, SPEC.head_dim, False
        )
        queries = (query0,)
        if SPEC.d1 > 0:
            query1 = gather_columns(
                query_ptr, offs, stride_query[3], inside_m, SPEC.d0, SPEC.d1, SPEC.head_dim, False
            )
            queries = (query0, query1)
        if SPEC.has_key_factor:
            factor_ptr += first_batch * stride_factor_batch + first_head * stride_factor_head
        if SPEC.has_bias:
            bias_ptr += first_batch * stride_bias_batch + first_head * stride_bias_head
        if SPEC.has_padding:
            padding_ptr += first_batch * stride_padding_batch
            range_ptr += first_batch * 3
        if SPEC.has_mask:
            mask_ptr += first_batch * stride_mask_batch + first_head * stride_mask_head
        factor_rows = row_batch * stride_factor_batch + head * stride_factor_head
        padding_rows = row_batch * stride_padding_batch
        if SPEC.one_batch:  # what all rows of a tile share is one row
            padding_rows = tl.zeros([1], row_batch.dtype)
            if not SPEC.factor_per_head:
                factor_rows = tl.zeros([1], row_batch.dtype)
        packed = (
            positions,
            row_batch,
            factor_rows,
            row_batch * stride_bias_batch + head * stride_bias_head + token * stride_bias_row,
            padding_rows,
            row_batch * stride_mask_batch + head * stride_mask_head + token * stride_mask_row,
        )
        prefix_key_ptr += key_head * stride_prefix_key[1]
        prefix_value_ptr += key_head * stride_prefix_value[1]
        if SPEC.one_batch:
            prefix_key_ptr += first_batch * stride_prefix_key[0]
            prefix_value_ptr += first_batch * stride_prefix_value[0]
        prefix = (prefix_key_ptr, prefix_value_ptr)
        prefix_strides = (stride_prefix_key, stride_prefix_value)
        own = prefix
        own_strides = prefix_strides
        if SPEC.has_own:
            own = (
                key_ptr + first_batch * stride_key[0] + key_head * stride_key[1],
                value_ptr + first_batch * stride_value[0] + key_head * stride_value[1],
            )
            own_strides = (stride_key, stride_value)
        tiles = tl.cdiv(prefix_keys, BLOCK_N)
        if SPEC.lists_tiles:
            tile_row = block.to(tl.int64)
            if SPEC.factor_per_head:
                tile_row += key_head * blocks
            before_ptr += tile_row * (tiles + 1)
            tiles_ptr += tile_row * tiles
        features = (factor_ptr, before_ptr, bias_ptr, padding_ptr, mask_ptr)
        sizes = (prefix_keys, tl.maximum(own_keys, 1), own_columns, factor_start, window)
        units = (unit, inner_scale)
        low, high, inner_low, inner_high = _prefix_tiles(
            query_offset, query_offset + rows - 1, range_ptr, row_batch,
            prefix_keys, window, SPEC,
        )  # fmt: skip
        own_tiles = tl.cdiv(own_columns, EDGE_N)

        start = low
        stop = high
        if PART:
            share = tl.cdiv(high - low, splits)
            start = tl.minimum(low + split * share, high)
            stop = tl.minimum(start + share, high)
            inner_low = tl.minimum(tl.maximum(inner_low, start), stop)
            inner_high = tl.minimum(tl.maximum(inner_high, inner_low), stop)
            own_tiles = tl.where(split == splits - 1, own_tiles, 0)
        if SPEC.stage != "deferred":
            first_plain = inner_low
            stop_plain = inner_high
            first_flagged = 0
            flagged = 0
            if SPEC.lists_tiles:
                first_flagged = tl.load(before_ptr + inner_low)
                flagged = tl.load(before_ptr + inner_high) - first_flagged
                first_plain -= first_flagged
                stop_plain -= first_flagged + flagged
            for index in range(first_plain, stop_plain):
                tile = index
                if SPEC.lists_tiles:  # plain tiles are listed from the end
                    tile = tl.load(tiles_ptr + tiles - 1 - index)
                acc0, acc1, row_max, row_sum, row_min = visit_tile(
                    acc0, acc1, row_max, row_sum, row_min, tile, queries, packed,
                    prefix, prefix_strides, features, key_strides, sizes, units,
                    SPEC, FIRST_VISIT, False, False, BLOCK_N,
                )  # fmt: skip
            # the edge tiles on the left and on the right, then the flagged ones between them
            left = inner_low - start
            edges = left + stop - inner_high
            for part in tl.range(0, (edges + flagged) * PARTS, num_stages=1):
                index = part // PARTS
                tile = tl.where(index < left, start + index, inner_high + index - left)
                if SPEC.lists_tiles:
                    pointer = tiles_ptr + first_flagged + index - edges
                    tile = tl.load(pointer, mask=index >= edges, other=tile)
                tile = tile * PARTS + part % PARTS
                acc0, acc1, row_max, row_sum, row_min = visit_tile(
                    acc0, acc1, row_max, row_sum, row_min, tile, queries, packed,
                    prefix, prefix_strides, features, key_strides, sizes, units,
                    SPEC, FIRST_VISIT, False, True, EDGE_N,
                )  # fmt: skip
            if SPEC.has_own:
                for tile in tl.range(0, own_tiles, num_stages=1):
                    acc0, acc1, row_max, row_sum, row_min = visit_tile(
                        acc0, acc1, row_max, row_sum, row_min, tile, queries, packed,
                        own, own_strides, features, key_strides, sizes, units,
                        SPEC, FIRST_VISIT, True, True, EDGE_N,
                    )  # fmt: skip
        if DEFERS and SPEC.stage != "partial":
            if SPEC.stage == "deferred":
                row_min = _merge_minima(
                    row_min, stats_ptr, state_row, offs_m - start_m, rows_per_split, splits
                )
            # a row that sees no key has no minimum; any finite number serves
            row_min = tl.where(row_min == float("inf"), 0.0, row_min)
            if SPEC.lists_tiles:
                first_part = tl.load(before_ptr + start) * PARTS
                stop_part = tl.load(before_ptr + stop) * PARTS
                for part in tl.range(first_part, stop_part, num_stages=1):
                    tile = tl.load(tiles_ptr + part // PARTS) * PARTS + part % PARTS
                    acc0, acc1, row_max, row_sum, row_min = visit_tile(
                        acc0, acc1, row_max, row_sum, row_min, tile, queries, packed,
                        prefix, prefix_strides, features, key_strides, sizes, units,
                        SPEC, "deferred", False, True, EDGE_N,
                    )  # fmt: skip
            elif SPEC.prefix_factor:
                end = tl.minimum(stop * BLOCK_N, prefix_keys)
                for first in tl.range(start * BLOCK_N, end, SPEC.scan_n, num_stages=1):
                    first_part, stop_part = _deferred_parts(
                        factor_ptr, factor_rows, key_strides[0], first, end, SPEC
                    )
                    for index in tl.range(first_part, stop_part, num_stages=1):
                        tile = index
                        acc0, acc1, row_max, row_sum, row_min = visit_tile(
                            acc0, acc1, row_max, row_sum, row_min, tile, queries, packed,
                            prefix, prefix_strides, features, key_strides, sizes, units,
                            SPEC, "deferred", False, True, SPEC.defer_n,
                        )  # fmt: skip
            if SPEC.has_own:
                for tile in tl.range(0, own_tiles, num_stages=1):
                    acc0, acc1, row_max, row_sum, row_min = visit_tile(
                        acc0, acc1, row_max, row_sum, row_min, tile, queries, packed,
                        own, own_strides, features, key_strides, sizes, units,
                        SPEC, "deferred", True, True, EDGE_N,
                    )  # fmt: skip

    if PART:
        state_row += split * rows_per_split
        offs = offs_m - start_m
        stats_ptr += state_row
        tl.store(stats_ptr + offs, row_max, mask=inside_m)
        tl.store(stats_ptr + splits * rows_per_split + offs, row_sum, mask=inside_m)
        if SPEC.stage == "partial" and DEFERS:
            tl.store(stats_ptr + 2 * splits * rows_per_split + offs, row_min, mask=inside_m)
        partial_ptr += state_row * SPEC.value_dim
        offs *= SPEC.value_dim
        scatter_columns(partial_ptr, acc0, offs, 1, inside_m, 0, V0, SPEC.value_dim)
        if SPEC.v1 > 0:
            scatter_columns(partial_ptr, acc1, offs, 1, inside_m, V0, V1, SPEC.value_dim)
    else:
        dead = row_sum == 0.0
        row_sum = tl.where(dead, 1.0, row_sum)
        lse = (row_max + tl.log2(row_sum)) * 0.6931471805599453  # ln 2
        lse = tl.where(dead, float("-inf"), lse)
        lse_ptr += (first_batch * heads + first_head) * rows
        tl.store(lse_ptr + (row_batch * heads + head) * rows + token, lse, mask=inside_m)
        out_ptr += first_batch * stride_out[0] + first_head * stride_out[1]
        offs = row_batch * stride_out[0] + head * stride_out[1] + token * stride_out[2]
        share = (1.0 / row_sum)[:, None]
        scatter_columns(out_ptr, acc0 * share, offs, stride_out[3], inside_m, 0, V0, SPEC.value_dim)
        if SPEC.v1 > 0:
            scatter_columns(
                out_ptr, acc1 * share, offs, stride_out[3], inside_m, V0, V1, SPEC.value_dim
            )
