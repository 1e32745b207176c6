"""Fused attention forward with one factor per key: kernel and launcher.

Legend: B batch, Hq/Hk query/key heads, Tq/Tk query/key tokens, D head dim, Dv value dim.
The online softmax and the deferred columns of ``min_shift`` are derived in README.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import device_architecture, extra_load, forward_config, split_head_dim
from .prepass import factor_tiles, key_ranges
from .primitives import (
    dot,
    in_band,
    key_tiles,
    load_columns,
    manipulate,
    softmax_step,
    split_program,
    store_columns,
    tanh,
)

_LOG2_E = math.log2(math.e)
_FAR = 1 << 30  # a window that hides nothing; position + window stays within int32


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
    offset_in_memory: bool  # query_offset is a pointer
    skip_plain: bool  # branch around the manipulation where all factors are 1
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
def _visit_tile(
    acc0,
    acc1,
    row_max,
    row_sum,
    row_min,
    tile,
    queries,
    positions,
    pointers,
    strides,
    limits,
    units,
    SPEC: tl.constexpr,
    VISIT: tl.constexpr,
    EDGE: tl.constexpr,
):
    """Add one key tile to the softmax state of a block of rows.

    VISIT says which columns: ``every``, or for ``min_shift`` first the ``ones`` (while tracking
    the row minimum of all visible columns), then, in flagged tiles only, the ``deferred`` rest.
    EDGE tiles check the band, the padding and the number of keys, the others need not.
    """
    BLOCK_M: tl.constexpr = SPEC.block_m
    BLOCK_N: tl.constexpr = SPEC.block_n
    MODE: tl.constexpr = SPEC.mode
    MASKED: tl.constexpr = EDGE or SPEC.has_mask
    key_ptr, value_ptr, factor_ptr, before_ptr, bias_ptr, padding_ptr, mask_ptr = pointers
    stride_key, stride_value, stride_factor, stride_bias, stride_padding, stride_mask = strides
    rows, keys, window = limits
    unit, inner_scale = units

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
        visible = in_band(positions, start_n + offs_n, keys, window, SPEC.causal, SPEC.has_window)
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
        lowest = tl.min(tl.where(scores == float("-inf"), float("inf"), scores), 1)
        row_min = tl.minimum(row_min, lowest)
    elif VISIT == "ones":
        row_min = tl.minimum(row_min, tl.min(scores, 1))
    key_bias = None
    if SPEC.bias_per_key:
        bias_ptr += first * stride_bias[1]
        key_bias = tl.load(bias_ptr + offs_n * stride_bias[1], mask=offs_n < inside, other=0.0)
        key_bias = key_bias.to(tl.float32) * 1.4426950408889634  # log2(e)
    if SPEC.has_key_factor:
        factor_ptr += first * stride_factor
        if SPEC.skip_plain and VISIT != "deferred":
            flagged = tl.load(before_ptr + tile + 1) != tl.load(before_ptr + tile)
            if flagged:
                factor = tl.load(
                    factor_ptr + offs_n * stride_factor, mask=offs_n < inside, other=1.0
                )
                scores = manipulate(scores, factor, key_bias, row_min, MODE, VISIT)
            else:
                if SPEC.bias_per_key:
                    scores += key_bias[None, :]
        else:
            factor = tl.load(factor_ptr + offs_n * stride_factor, mask=offs_n < inside, other=1.0)
            scores = manipulate(scores, factor, key_bias, row_min, MODE, VISIT)
    elif SPEC.bias_per_key:
        scores += key_bias[None, :]
    if SPEC.has_bias and not SPEC.bias_per_key:
        bias_ptr += first * stride_bias[1]
        bias_ptr += offs_m[:, None] * stride_bias[0] + offs_n[None, :] * stride_bias[1]
        bias = tl.load(bias_ptr, mask=readable, other=0.0)  # [BLOCK_M, BLOCK_N]
        scores += bias.to(tl.float32) * 1.4426950408889634  # log2(e)
    if MASKED and not HIDE_FIRST:
        scores = tl.where(visible, scores, float("-inf"))

    weights, rescale, row_max, row_sum = softmax_step(scores, row_max, row_sum, unit, SPEC.scaled)
    weights = weights.to(queries[0].dtype)
    value_ptr += first * stride_value[0]
    value0 = load_columns(value_ptr, offs_n, stride_value, inside, 0, SPEC.v0, SPEC.value_dim, EDGE)
    acc0 = dot(weights, value0, acc0 * rescale[:, None])
    if SPEC.v1 > 0:
        value1 = load_columns(
            value_ptr, offs_n, stride_value, inside, SPEC.v0, SPEC.v1, SPEC.value_dim, EDGE
        )
        acc1 = dot(weights, value1, acc1 * rescale[:, None])
    return acc0, acc1, row_max, row_sum, row_min


@triton.jit(do_not_specialize=["query_offset", "rows", "keys", "heads", "group", "window"])
def _attention_fwd_kernel(
    out_ptr,  # [B, Hq, Tq, Dv]
    lse_ptr,  # [B, Hq, Tq], contiguous
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
    sinks_ptr,  # [Hq]
    query_offset,  # a number or a pointer to one
    rows,
    keys,
    heads,
    group,  # query heads per key head
    window,
    unit,  # base-2 logits per raw score
    inner_scale,  # of q·k inside the softcap's tanh
    stride_out,
    stride_query,
    stride_key,
    stride_value,
    stride_factor,
    stride_tiles,  # (batch, head), in rows
    stride_bias,
    stride_padding,
    stride_mask,
    SPEC: tl.constexpr,
):
    """Output and log-sum-exp of ``block_m`` query rows of one head."""
    BLOCK_M: tl.constexpr = SPEC.block_m
    BLOCK_N: tl.constexpr = SPEC.block_n
    UNUSED: tl.constexpr = 16  # width of an accumulator that is never touched and compiled away
    V0: tl.constexpr = SPEC.v0
    V1: tl.constexpr = SPEC.v1 if SPEC.v1 > 0 else UNUSED
    FIRST_VISIT: tl.constexpr = (
        "ones" if SPEC.has_key_factor and SPEC.mode == "min_shift" else "every"
    )
    batch, head, start_m = split_program(tl.program_id(0), rows, heads, BLOCK_M, SPEC.causal)
    if SPEC.offset_in_memory:
        query_offset = tl.load(query_offset).to(tl.int32)
    key_head = (head // group).to(tl.int64)
    batch = batch.to(tl.int64)
    head = head.to(tl.int64)
    first_row = start_m.to(tl.int64)
    rows_left = rows - start_m
    tiles = tl.cdiv(keys, BLOCK_N)

    # what the inner loop does not need is computed after it: registers are scarce
    query_ptr += batch * stride_query[0] + head * stride_query[1] + first_row * stride_query[2]
    key_ptr += batch * stride_key[0] + key_head * stride_key[1]
    value_ptr += batch * stride_value[0] + key_head * stride_value[1]
    if SPEC.has_key_factor:
        factor_ptr += batch * stride_factor[0] + head * stride_factor[1]
        if SPEC.skip_plain:
            before_ptr += (batch * stride_tiles[0] + head * stride_tiles[1]) * (tiles + 1)
    if SPEC.has_bias:
        bias_ptr += batch * stride_bias[0] + head * stride_bias[1] + first_row * stride_bias[2]
    if SPEC.has_mask:
        mask_ptr += batch * stride_mask[0] + head * stride_mask[1] + first_row * stride_mask[2]

    offs_m = tl.arange(0, BLOCK_M)
    first_position = query_offset + start_m
    last_position = first_position + tl.minimum(rows_left, BLOCK_M) - 1
    first_key = 0
    if SPEC.has_padding:
        range_ptr += batch * 3
        first_key = tl.load(range_ptr)
        keys = tl.load(range_ptr + 1)
    low, high, inner_low, inner_high = key_tiles(
        first_position, last_position, first_key, keys, window,
        SPEC.causal, SPEC.has_window, BLOCK_N,
    )  # fmt: skip
    if SPEC.has_padding:  # holes make every tile an edge
        inner_high = tl.where(tl.load(range_ptr + 2) != 0, inner_high, inner_low)
    if SPEC.wide:
        offs_m = offs_m.to(tl.int64)
    stride_row = (stride_query[2], stride_query[3])
    query0 = load_columns(query_ptr, offs_m, stride_row, rows_left, 0, SPEC.d0, SPEC.head_dim, True)
    queries = (query0,)
    if SPEC.d1 > 0:
        query1 = load_columns(
            query_ptr, offs_m, stride_row, rows_left, SPEC.d0, SPEC.d1, SPEC.head_dim, True
        )
        queries = (query0, query1)
    pointers = (key_ptr, value_ptr, factor_ptr, before_ptr, bias_ptr, padding_ptr, mask_ptr)
    strides = (
        (stride_key[2], stride_key[3]),
        (stride_value[2], stride_value[3]),
        stride_factor[2],
        (stride_bias[2], stride_bias[3]),
        stride_padding[1],
        (stride_mask[2], stride_mask[3]),
    )
    limits = (rows_left, keys, window)
    units = (unit, inner_scale)

    acc0 = tl.zeros([BLOCK_M, V0], tl.float32)
    acc1 = tl.zeros([BLOCK_M, V1], tl.float32)
    row_min = tl.full([BLOCK_M], float("inf"), tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    if SPEC.has_sinks:  # one more logit, without a value
        row_max = (
            tl.zeros([BLOCK_M], tl.float32)
            + tl.load(sinks_ptr + head).to(tl.float32) * 1.4426950408889634
        )
        row_sum += 1.0

    for tile in range(inner_low, inner_high):
        acc0, acc1, row_max, row_sum, row_min = _visit_tile(
            acc0, acc1, row_max, row_sum, row_min, tile, queries, None,
            pointers, strides, limits, units, SPEC, FIRST_VISIT, False,
        )  # fmt: skip
    positions = first_position + tl.arange(0, BLOCK_M)
    if SPEC.has_padding:
        padding_ptr += batch * stride_padding[0]
    pointers = (key_ptr, value_ptr, factor_ptr, before_ptr, bias_ptr, padding_ptr, mask_ptr)
    # the edge tiles on the left, then those on the right
    left = inner_low - low
    for edge in tl.range(0, left + high - inner_high, num_stages=SPEC.edge_stages):
        tile = tl.where(edge < left, low + edge, inner_high + edge - left)
        acc0, acc1, row_max, row_sum, row_min = _visit_tile(
            acc0, acc1, row_max, row_sum, row_min, tile, queries, positions,
            pointers, strides, limits, units, SPEC, FIRST_VISIT, True,
        )  # fmt: skip
    if FIRST_VISIT == "ones":
        # a row that sees no key has no minimum; any finite number serves
        row_min = tl.where(row_min == float("inf"), 0.0, row_min)
        tile_row = batch * stride_tiles[0] + head * stride_tiles[1]
        flagged_ptr += tile_row * tiles
        if not SPEC.skip_plain:
            before_ptr += tile_row * (tiles + 1)
        for index in tl.range(tl.load(before_ptr + low), tl.load(before_ptr + high), num_stages=1):
            tile = tl.load(flagged_ptr + index)
            acc0, acc1, row_max, row_sum, row_min = _visit_tile(
                acc0, acc1, row_max, row_sum, row_min, tile, queries, positions,
                pointers, strides, limits, units, SPEC, "deferred", True,
            )  # fmt: skip

    dead = row_sum == 0.0
    row_sum = tl.where(dead, 1.0, row_sum)
    lse = tl.where(dead, float("-inf"), (row_max + tl.log2(row_sum)) * 0.6931471805599453)  # ln 2
    lse_ptr += (batch * heads + head) * rows + first_row
    tl.store(lse_ptr + offs_m, lse, mask=offs_m < rows_left)
    out_ptr += batch * stride_out[0] + head * stride_out[1] + first_row * stride_out[2]
    stride_row = (stride_out[2], stride_out[3])
    share = 1.0 / row_sum
    store_columns(
        out_ptr, acc0 * share[:, None], offs_m, stride_row, rows_left, 0, V0, SPEC.value_dim
    )
    if SPEC.v1 > 0:
        store_columns(
            out_ptr, acc1 * share[:, None], offs_m, stride_row, rows_left, V0, V1, SPEC.value_dim
        )


def attention_fwd(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_factor: Tensor | None = None,
    *,
    mode: str = "multiplicative",
    causal: bool = False,
    query_offset: int | Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    position_bias: Tensor | None = None,
    key_padding: Tensor | None = None,
    block_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Launch the fused forward kernel. Arguments are taken as validated by the op.

    Nothing is copied: batch 1, broadcast dimensions and any strides are read in place.

    Args:
        query: ``[B, Hq, Tq, D]``, fp16, bf16 or fp32; D and Dv at most 256.
        key, value: ``[B|1, Hk, Tk, D]`` and ``[B|1, Hk, Tk, Dv]``; Hk divides Hq.
        key_factor: ``[B, Tk]`` or ``[B, Hq, Tk]`` float32; 1 keeps a key, < 1 suppresses it.
        mode: ``multiplicative``, ``min_shift`` or ``log_additive``.
        query_offset: key index at which query row 0 stands, a number or a 0-d integer tensor on
            the device (read there, never on the host); ``None`` means ``Tk - Tq``.
        window: a query at position p sees keys j with ``p - j < window`` (``|p - j|`` if not
            causal).
        softcap: scores become ``softcap · tanh(score / softcap)`` before the manipulation.
        sinks: ``[Hq]`` logits that take part in the normaliser only.
        position_bias: broadcastable to ``[B, Hq, Tq, Tk]``, added after the manipulation.
        key_padding: bool ``[B, Tk]``, True = visible.
        block_mask: bool ``[B|1, Hq|1, Tq, Tk]``, True = visible.
    Returns: output ``[B, Hq, Tq, Dv]`` in ``query.dtype``, laid out in memory as
        ``[B, Tq, Hq, Dv]``, and log-sum-exp ``[B, Hq, Tq]`` float32, natural log. A row that sees
        no key gives 0 and -inf (with a sink: the sink).
    """
    batch, heads, rows, head_dim = query.shape
    key_heads, keys, value_dim = value.shape[1:]
    out = query.new_empty(batch, rows, heads, value_dim).transpose(1, 2)
    lse = torch.empty(batch, heads, rows, dtype=torch.float32, device=query.device)
    if batch * heads * rows == 0:
        return out, lse

    bias_per_key = position_bias is not None and (
        position_bias.shape[2] == 1 or position_bias.stride(2) == 0
    )
    kind = "plain" if key_factor is None else mode
    optional = {
        "window": window,
        "softcap": softcap,
        "alibi" if bias_per_key else "bias": position_bias,
        "padding": key_padding,
        "mask": block_mask,
    }
    features = {name for name, feature in optional.items() if feature is not None}
    config = forward_config(
        device_architecture(query.device, triton.knobs.runtime.interpret),
        head_dim,
        value_dim,
        query.dtype,
        kind,
        rows,
        load=extra_load(kind, features),
    )
    key = key.expand(batch, -1, -1, -1)
    value = value.expand(batch, -1, -1, -1)
    shape = (batch, heads, rows, keys)
    before = flagged = None
    stride_tiles = (0, 0)
    if key_factor is not None:
        if key_factor.dim() == 2:
            key_factor = key_factor[:, None]  # [B, 1, Tk]
        if mode == "min_shift" or config.skip_plain_tiles:
            before, flagged = factor_tiles(key_factor, config.block_n)
            stride_tiles = (key_factor.shape[1], int(key_factor.shape[1] > 1))
        key_factor = key_factor.expand(batch, heads, keys)
    if position_bias is not None:
        position_bias = position_bias.expand(shape)
    if block_mask is not None:
        block_mask = block_mask.view(torch.uint8).expand(shape)
    ranges = None
    if key_padding is not None:
        key_padding = key_padding.view(torch.uint8)
        ranges = key_ranges(key_padding)
    if query_offset is None:
        query_offset = keys - rows
    if scale is None:
        scale = head_dim**-0.5
    unit = (scale if softcap is None else softcap) * _LOG2_E

    tensors = (query, key, value, out, key_factor, position_bias, block_mask)
    longest = max(abs(stride) for t in tensors if t is not None for stride in t.stride()[-2:])
    d0, d1 = split_head_dim(head_dim)
    v0, v1 = split_head_dim(value_dim)
    spec = Variant(
        mode=kind,
        causal=causal,
        has_window=window is not None,
        has_key_factor=key_factor is not None,
        has_softcap=softcap is not None,
        has_bias=position_bias is not None,
        bias_per_key=bias_per_key,
        has_padding=key_padding is not None,
        has_mask=block_mask is not None,
        has_sinks=sinks is not None,
        offset_in_memory=isinstance(query_offset, Tensor),
        skip_plain=config.skip_plain_tiles,
        # exp2's multiply-add applies a positive unit for nothing, where nothing is added before it
        scaled=position_bias is not None or kind == "log_additive" or unit <= 0,
        wide=longest * 256 >= 1 << 31,
        block_m=config.block_m,
        block_n=config.block_n,
        edge_stages=config.edge_stages,
        head_dim=head_dim,
        d0=d0,
        d1=d1,
        value_dim=value_dim,
        v0=v0,
        v1=v1,
    )
    _attention_fwd_kernel[(triton.cdiv(rows, config.block_m) * batch * heads,)](
        out,
        lse,
        query,
        key,
        value,
        key_factor,
        before,
        flagged,
        position_bias,
        key_padding,
        ranges,
        block_mask,
        None if sinks is None else sinks.contiguous(),
        query_offset,
        rows,
        keys,
        heads,
        heads // key_heads,
        _FAR if window is None else min(window, _FAR),
        unit,
        0.0 if softcap is None else scale / softcap,
        out.stride(),
        query.stride(),
        key.stride(),
        value.stride(),
        (0, 0, 0) if key_factor is None else key_factor.stride(),
        stride_tiles,
        (0, 0, 0, 0) if position_bias is None else position_bias.stride(),
        (0, 0) if key_padding is None else key_padding.stride(),
        (0, 0, 0, 0) if block_mask is None else block_mask.stride(),
        SPEC=spec,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=True,
    )
    return out, lse
