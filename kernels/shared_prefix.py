"""Fused attention behind a prefix that all batch rows share: kernel and launcher.

One program walks the prefix's tiles, read in place with no batch stride, and then its row's own,
with one softmax state: nothing is copied and no partial results are merged.

Legend: B batch, Hq/Hk query/key heads, Tq/Tk query/key tokens, Tp prefix tokens, D head dim, Dv
value dim.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import shared_prefix_config
from .forward import attention_fwd
from .launch import NO_NUMBERS, RowNumbers, prepare, strides
from .prepass import key_ranges
from .primitives import split_program
from .tiles import (
    finite_minimum,
    initial_state,
    load_queries,
    segment_tiles,
    store_rows,
    walk_deferred,
    walk_tiles,
)


@triton.jit(
    do_not_specialize=["query_offset", "rows", "prefix_keys", "keys", "heads", "group", "window"]
)
def _shared_prefix_fwd_kernel(
    out_ptr,  # [B, Hq, Tq, Dv]
    lse_ptr,  # [B, Hq, Tq], contiguous
    minimum_ptr,  # [B, Hq, Tq], contiguous
    argmin_ptr,  # [B, Hq, Tq], contiguous
    rest_ptr,  # [B, Hq, Tq], contiguous
    query_ptr,  # [B, Hq, Tq, D]
    prefix_key_ptr,  # [1, Hk, Tp, D]
    prefix_value_ptr,  # [1, Hk, Tp, Dv]
    key_ptr,  # [B, Hk, Tk, D]
    value_ptr,  # [B, Hk, Tk, Dv]
    factor_ptr,  # [B, Hq, Tp + Tk], or [B, Hq, Tk] where PREFIX has no factors
    prefix_before_ptr,  # [B, Hq, tiles + 1], see factor_tiles
    prefix_flagged_ptr,  # [B, Hq, tiles]
    before_ptr,
    flagged_ptr,
    bias_ptr,  # [B, Hq, Tq, Tp + Tk]
    padding_ptr,  # [B, Tp + Tk]
    prefix_range_ptr,  # [B, 3], see key_ranges
    range_ptr,
    mask_ptr,  # [B, Hq, Tq, Tp + Tk]
    sinks_ptr,  # [Hq]
    seed_ptr,  # [1]
    query_offset,  # a number or a pointer to one
    rows,
    prefix_keys,
    keys,
    heads,
    group,  # query heads per key head
    window,
    unit,  # base-2 logits per raw score
    inner_scale,  # of q·k inside the softcap's tanh
    threshold,  # of dropout, see dropout.py
    keep_scale,  # 1 / (1 - dropout)
    stride_out,
    stride_query,
    stride_prefix_key,
    stride_prefix_value,
    stride_key,
    stride_value,
    stride_factor,
    stride_tiles,  # (batch, head), in rows
    stride_bias,
    stride_padding,
    stride_mask,
    SPEC: tl.constexpr,  # of the rows' own keys
    PREFIX: tl.constexpr,  # the same but for the factors
):
    """Output and log-sum-exp of ``block_m`` query rows of one head."""
    FIRST_VISIT: tl.constexpr = (
        "ones" if SPEC.has_key_factor and SPEC.mode == "min_shift" else "every"
    )
    batch, head, start_m = split_program(tl.program_id(0), rows, heads, SPEC.block_m, SPEC.causal)
    if SPEC.offset_in_memory:
        query_offset = tl.load(query_offset).to(tl.int32)
    key_head = (head // group).to(tl.int64)
    batch = batch.to(tl.int64)
    head = head.to(tl.int64)
    first_row = start_m.to(tl.int64)
    rows_left = rows - start_m
    prefix_tiles = tl.cdiv(prefix_keys, SPEC.block_n)
    tiles = tl.cdiv(keys, SPEC.block_n)
    beyond = prefix_keys.to(tl.int64)  # where the rows' own keys begin
    tile_row = batch * stride_tiles[0] + head * stride_tiles[1]

    query_ptr += batch * stride_query[0] + head * stride_query[1] + first_row * stride_query[2]
    prefix_key_ptr += key_head * stride_prefix_key[1]
    prefix_value_ptr += key_head * stride_prefix_value[1]
    if SPEC.has_key_factor:
        factor_ptr += batch * stride_factor[0] + head * stride_factor[1]
    if PREFIX.has_key_factor and (PREFIX.skip_plain or FIRST_VISIT == "ones"):
        prefix_before_ptr += tile_row * (prefix_tiles + 1)
    if SPEC.has_bias:
        bias_ptr += batch * stride_bias[0] + head * stride_bias[1] + first_row * stride_bias[2]
    if SPEC.has_mask:
        mask_ptr += batch * stride_mask[0] + head * stride_mask[1] + first_row * stride_mask[2]
    if SPEC.has_padding:
        prefix_range_ptr += batch * 3
        range_ptr += batch * 3

    offs_m = tl.arange(0, SPEC.block_m)
    if SPEC.wide:
        offs_m = offs_m.to(tl.int64)
    stride_row = (stride_query[2], stride_query[3])
    queries = load_queries(query_ptr, offs_m, stride_row, rows_left, SPEC)
    units = (unit, inner_scale)
    batch_head = (batch * heads + head).to(tl.int32)
    prefix_dropout = (seed_ptr, threshold, 0, batch_head, start_m)
    own_dropout = (seed_ptr, threshold, prefix_keys, batch_head, start_m)
    padding = (batch, stride_padding[0])
    shared_strides = (
        stride_factor[2],
        (stride_bias[2], stride_bias[3]),
        stride_padding[1],
        (stride_mask[2], stride_mask[3]),
    )

    prefix_position = query_offset + start_m  # of the first row, counted from the prefix's start
    prefix_low, prefix_high, inner_low, inner_high, prefix_stop = segment_tiles(
        prefix_range_ptr, prefix_position, rows_left, prefix_keys, window, PREFIX
    )
    prefix_pointers = (
        prefix_key_ptr, prefix_value_ptr, factor_ptr, prefix_before_ptr,
        bias_ptr, padding_ptr, mask_ptr,
    )  # fmt: skip
    prefix_strides = (
        (stride_prefix_key[2], stride_prefix_key[3]),
        (stride_prefix_value[2], stride_prefix_value[3]),
        shared_strides[0], shared_strides[1], shared_strides[2], shared_strides[3],
    )  # fmt: skip
    prefix_limits = (rows_left, prefix_stop, window)
    state = walk_tiles(
        initial_state(sinks_ptr, head, SPEC), (prefix_low, prefix_high, inner_low, inner_high),
        queries, prefix_position, prefix_pointers, padding, prefix_strides, prefix_limits, units,
        prefix_dropout, PREFIX, FIRST_VISIT,
    )  # fmt: skip

    prefix_start = 0
    prefix_end = 0
    if PREFIX.has_key_factor and FIRST_VISIT == "ones":
        prefix_start = tl.load(prefix_before_ptr + prefix_low)
        prefix_end = tl.load(prefix_before_ptr + prefix_high)

    # the rows' own keys; what spans all keys is moved on by the prefix
    key_ptr += batch * stride_key[0] + key_head * stride_key[1]
    value_ptr += batch * stride_value[0] + key_head * stride_value[1]
    if PREFIX.has_key_factor:
        factor_ptr += beyond * stride_factor[2]
    if SPEC.has_key_factor and (SPEC.skip_plain or FIRST_VISIT == "ones"):
        before_ptr += tile_row * (tiles + 1)
    if SPEC.has_bias:
        bias_ptr += beyond * stride_bias[3]
    if SPEC.has_padding:
        padding_ptr += beyond * stride_padding[1]
    if SPEC.has_mask:
        mask_ptr += beyond * stride_mask[3]
    own_position = prefix_position - prefix_keys
    low, high, inner_low, inner_high, stop = segment_tiles(
        range_ptr, own_position, rows_left, keys, window, SPEC
    )
    own_pointers = (key_ptr, value_ptr, factor_ptr, before_ptr, bias_ptr, padding_ptr, mask_ptr)
    own_strides = (
        (stride_key[2], stride_key[3]),
        (stride_value[2], stride_value[3]),
        shared_strides[0], shared_strides[1], shared_strides[2], shared_strides[3],
    )  # fmt: skip
    own_limits = (rows_left, stop, window)
    state = walk_tiles(
        state, (low, high, inner_low, inner_high), queries, own_position, own_pointers, padding,
        own_strides, own_limits, units, own_dropout, SPEC, FIRST_VISIT,
    )  # fmt: skip

    if FIRST_VISIT == "ones":
        state = finite_minimum(state)
        if PREFIX.has_key_factor:
            prefix_flagged_ptr += tile_row * prefix_tiles
            state = walk_deferred(
                state, (prefix_flagged_ptr, prefix_start, prefix_end),
                queries, prefix_position, prefix_pointers, padding, prefix_strides, prefix_limits,
                units, prefix_dropout, PREFIX,
            )  # fmt: skip
        flagged_ptr += tile_row * tiles
        start = tl.load(before_ptr + low)
        state = walk_deferred(
            state, (flagged_ptr, start, tl.load(before_ptr + high)), queries, own_position,
            own_pointers, padding, own_strides, own_limits, units, own_dropout, SPEC,
        )  # fmt: skip
    saved = (batch * heads + head) * rows + first_row
    lse_ptr += saved
    if SPEC.save_minimum:
        minimum_ptr += saved
        argmin_ptr += saved
    if SPEC.save_rest:
        rest_ptr += saved
    out_ptr += batch * stride_out[0] + head * stride_out[1] + first_row * stride_out[2]
    store_rows(
        state, out_ptr, (lse_ptr, minimum_ptr, argmin_ptr, rest_ptr), offs_m,
        (stride_out[2], stride_out[3]), rows_left, keep_scale, SPEC,
    )  # fmt: skip


def shared_prefix_fwd(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
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
    dropout: float = 0.0,
    dropout_seed: Tensor | None = None,
    saves: RowNumbers = NO_NUMBERS,
) -> tuple[Tensor, Tensor]:
    """Launch the fused kernel for a shared prefix. Arguments are taken as validated by the op.

    Nothing is copied: the prefix, batch 1, broadcast dimensions and any strides are read in place.

    Args:
        query: ``[B, Hq, Tq, D]``, fp16, bf16 or fp32; D and Dv at most 256.
        key, value: ``[B|1, Hk, Tk, D]`` and ``[B|1, Hk, Tk, Dv]``; Hk divides Hq.
        prefix_key, prefix_value: ``[1, Hk, Tp, D]`` and ``[1, Hk, Tp, Dv]``, in front of every
            row's own keys.
        key_factor: ``[B, Tp + Tk]`` or ``[B, Hq, Tp + Tk]`` float32, or of length Tk: the prefix
            then has no factors, and none are read there.
        query_offset, window, position_bias, key_padding, block_mask: as in ``attention_fwd``, over
            ``Tp + Tk`` keys; an offset of ``None`` means ``Tp + Tk - Tq``.
        mode, causal, scale, softcap, sinks, dropout, dropout_seed, saves: as in
            ``attention_fwd``, over all ``Tp + Tk`` keys.
    Returns: output ``[B, Hq, Tq, Dv]`` in ``query.dtype``, laid out in memory as
        ``[B, Tq, Hq, Dv]``, and log-sum-exp ``[B, Hq, Tq]`` float32, natural log. A row that sees
        no key gives 0 and -inf (with a sink: the sink).
    """
    features = {
        "mode": mode,
        "causal": causal,
        "query_offset": query_offset,
        "scale": scale,
        "window": window,
        "softcap": softcap,
        "sinks": sinks,
        "position_bias": position_bias,
        "key_padding": key_padding,
        "block_mask": block_mask,
        "dropout": dropout,
        "dropout_seed": dropout_seed,
    }
    prefix_keys = prefix_key.shape[2]
    if prefix_keys == 0:
        return attention_fwd(query, key, value, key_factor, **features, saves=saves)
    batch, heads, rows, _ = query.shape
    key_heads, keys, value_dim = value.shape[1:]
    out = query.new_empty(batch, rows, heads, value_dim).transpose(1, 2)
    lse = torch.empty(batch, heads, rows, dtype=torch.float32, device=query.device)
    if batch * heads * rows == 0:
        return out, lse

    call = prepare(
        query,
        value_dim,
        prefix_keys + keys,
        key_factor,
        (query, key, value, prefix_key, prefix_value, out),
        **features,
        saves=saves,
        choose_config=shared_prefix_config,
        segments=2,
    )
    key = key.expand(batch, -1, -1, -1)
    value = value.expand(batch, -1, -1, -1)
    factor = call.key_factor
    prefix_factor = own_factor = None
    if factor is not None:
        spans = factor.shape[-1] != keys
        prefix_factor = factor[..., :prefix_keys] if spans else None
        own_factor = factor[..., prefix_keys:] if spans else factor
    prefix_lists = call.factor_tiles(prefix_factor)
    own_lists = call.factor_tiles(own_factor)
    prefix_range = own_range = None
    if call.key_padding is not None:
        prefix_range = key_ranges(call.key_padding[:, :prefix_keys])
        own_range = key_ranges(call.key_padding[:, prefix_keys:])
    _shared_prefix_fwd_kernel[(triton.cdiv(rows, call.config.block_m) * batch * heads,)](
        out,
        lse,
        saves.minimum,
        saves.argmin,
        saves.rest,
        query,
        prefix_key,
        prefix_value,
        key,
        value,
        factor,
        prefix_lists.before,
        prefix_lists.flagged,
        own_lists.before,
        own_lists.flagged,
        call.position_bias,
        call.key_padding,
        prefix_range,
        own_range,
        call.block_mask,
        call.sinks,
        call.dropout_seed,
        call.query_offset,
        rows,
        prefix_keys,
        keys,
        heads,
        heads // key_heads,
        call.window,
        call.unit,
        call.inner_scale,
        call.threshold,
        call.keep_scale,
        out.stride(),
        query.stride(),
        prefix_key.stride(),
        prefix_value.stride(),
        key.stride(),
        value.stride(),
        strides(factor, 3),
        own_lists.stride,
        strides(call.position_bias, 4),
        strides(call.key_padding, 2),
        strides(call.block_mask, 4),
        SPEC=call.spec,
        PREFIX=replace(call.spec, has_key_factor=prefix_factor is not None),
        num_warps=call.config.num_warps,
        num_stages=call.config.num_stages,
        enable_fp_fusion=True,
    )
    return out, lse
