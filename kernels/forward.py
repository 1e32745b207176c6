"""Fused attention forward with one factor per key: kernel and launcher.

Legend: B batch, Hq/Hk query/key heads, Tq/Tk query/key tokens, D head dim, Dv value dim.
The online softmax and the deferred columns of ``min_shift`` are derived in README.md.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import NO_NUMBERS, RowNumbers, prepare, strides
from .persistent import programs_at_once, section_of
from .prepass import key_ranges
from .primitives import block_of_turn, split_program
from .tiles import (
    finite_minimum,
    initial_state,
    load_queries,
    segment_tiles,
    store_rows,
    walk_deferred,
    walk_tiles,
)


@triton.jit
def _attend_block(
    batch,
    head,
    start_m,
    out_ptr,
    lse_ptr,
    minimum_ptr,
    argmin_ptr,
    rest_ptr,
    query_ptr,
    key_ptr,
    value_ptr,
    factor_ptr,
    before_ptr,
    flagged_ptr,
    bias_ptr,
    padding_ptr,
    range_ptr,
    mask_ptr,
    sinks_ptr,
    seed_ptr,
    query_offset,
    rows,
    keys,
    heads,
    group,
    window,
    unit,
    inner_scale,
    threshold,
    keep_scale,
    stride_out,
    stride_query,
    stride_key,
    stride_value,
    stride_factor,
    stride_tiles,
    stride_bias,
    stride_padding,
    stride_mask,
    SPEC: tl.constexpr,
):
    """Output and log-sum-exp of ``block_m`` query rows of one head, from row ``start_m`` on."""
    FIRST_VISIT: tl.constexpr = (
        "ones" if SPEC.has_key_factor and SPEC.mode == "min_shift" else "every"
    )
    if SPEC.offset_in_memory:
        query_offset = tl.load(query_offset).to(tl.int32)
    key_head = (head // group).to(tl.int64)
    batch = batch.to(tl.int64)
    head = head.to(tl.int64)
    first_row = start_m.to(tl.int64)
    rows_left = rows - start_m
    tiles = tl.cdiv(keys, SPEC.block_n)

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
    if SPEC.has_padding:
        range_ptr += batch * 3

    offs_m = tl.arange(0, SPEC.block_m)
    first_position = query_offset + start_m
    low, high, inner_low, inner_high, keys = segment_tiles(
        range_ptr, first_position, rows_left, keys, window, SPEC
    )
    if SPEC.wide:
        offs_m = offs_m.to(tl.int64)
    stride_row = (stride_query[2], stride_query[3])
    queries = load_queries(query_ptr, offs_m, stride_row, rows_left, SPEC)
    pointers = (key_ptr, value_ptr, factor_ptr, before_ptr, bias_ptr, padding_ptr, mask_ptr)
    padding = (batch, stride_padding[0])
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
    dropout = (seed_ptr, threshold, 0, (batch * heads + head).to(tl.int32), start_m)
    state = walk_tiles(
        initial_state(sinks_ptr, head, SPEC), (low, high, inner_low, inner_high), queries,
        first_position, pointers, padding, strides, limits, units, dropout, SPEC, FIRST_VISIT,
    )  # fmt: skip
    if FIRST_VISIT == "ones":
        tile_row = batch * stride_tiles[0] + head * stride_tiles[1]
        flagged_ptr += tile_row * tiles
        if not SPEC.skip_plain:
            before_ptr += tile_row * (tiles + 1)
        state = walk_deferred(
            finite_minimum(state),
            (flagged_ptr, tl.load(before_ptr + low), tl.load(before_ptr + high)), queries,
            first_position, pointers, padding, strides, limits, units, dropout, SPEC,
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


@triton.jit
def _by_turn(stride, none):
    """Strides, with the rows' made to depend on a number that is computed in each turn."""
    return stride[0], stride[1], stride[2] + none, stride[3]


@triton.jit(
    do_not_specialize=[
        "query_offset", "rows", "keys", "heads", "group", "window", "lines", "section",
    ]
)  # fmt: skip
def _attention_fwd_kernel(
    out_ptr,  # [B, Hq, Tq, Dv]
    lse_ptr,  # [B, Hq, Tq], contiguous
    minimum_ptr,  # [B, Hq, Tq], contiguous
    argmin_ptr,  # [B, Hq, Tq], contiguous
    rest_ptr,  # [B, Hq, Tq], contiguous
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
    seed_ptr,  # [1]
    query_offset,  # a number or a pointer to one
    rows,
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
    stride_key,
    stride_value,
    stride_factor,
    stride_tiles,  # (batch, head), in rows
    stride_bias,
    stride_padding,
    stride_mask,
    lines,  # of the persistent grid: B · Hq
    section,  # and how many of them are walked together, see persistent.py
    SPEC: tl.constexpr,
):
    """Blocks of query rows: one for a program or, where the grid is persistent, every so many."""
    if SPEC.persistent:
        turns = tl.cdiv(rows, SPEC.block_m) * lines
        for turn in tl.range(
            tl.program_id(0), turns, tl.num_programs(0), num_stages=1, disable_licm=True
        ):  # fmt: skip
            batch, head, start_m = block_of_turn(
                turn, rows, lines, section, heads, group, stride_key[0] == 0, SPEC.block_m,
                SPEC.causal,
            )  # fmt: skip
            # 0, which the compiler cannot know: the addresses of all loops, found before the turns,
            # would take more registers than there are
            none = batch // lines * 16
            _attend_block(
                batch, head, start_m, out_ptr, lse_ptr, minimum_ptr, argmin_ptr, rest_ptr,
                query_ptr, key_ptr, value_ptr, factor_ptr, before_ptr, flagged_ptr, bias_ptr,
                padding_ptr, range_ptr, mask_ptr, sinks_ptr, seed_ptr, query_offset, rows, keys,
                heads, group, window, unit, inner_scale, threshold, keep_scale,
                _by_turn(stride_out, none), _by_turn(stride_query, none),
                _by_turn(stride_key, none), _by_turn(stride_value, none), stride_factor,
                stride_tiles, stride_bias, stride_padding, stride_mask, SPEC,
            )  # fmt: skip
    else:
        batch, head, start_m = split_program(
            tl.program_id(0), rows, heads, SPEC.block_m, SPEC.causal
        )
        _attend_block(
            batch, head, start_m, out_ptr, lse_ptr, minimum_ptr, argmin_ptr, rest_ptr, query_ptr,
            key_ptr, value_ptr, factor_ptr, before_ptr, flagged_ptr, bias_ptr, padding_ptr,
            range_ptr, mask_ptr, sinks_ptr, seed_ptr, query_offset, rows, keys, heads, group,
            window, unit, inner_scale, threshold, keep_scale, stride_out, stride_query, stride_key,
            stride_value, stride_factor, stride_tiles, stride_bias, stride_padding, stride_mask,
            SPEC,
        )  # fmt: skip


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
    dropout: float = 0.0,
    dropout_seed: Tensor | None = None,
    saves: RowNumbers = NO_NUMBERS,
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
        dropout, dropout_seed: share of probabilities that become 0, and an int64 tensor of one
            element that says which; see ``dropout.py``.
        saves: written, where it holds tensors, for the backward pass.
    Returns: output ``[B, Hq, Tq, Dv]`` in ``query.dtype``, laid out in memory as
        ``[B, Tq, Hq, Dv]``, and log-sum-exp ``[B, Hq, Tq]`` float32, natural log. A row that sees
        no key gives 0 and -inf (with a sink: the sink).
    """
    batch, heads, rows, _ = query.shape
    key_heads, keys, value_dim = value.shape[1:]
    out = query.new_empty(batch, rows, heads, value_dim).transpose(1, 2)
    lse = torch.empty(batch, heads, rows, dtype=torch.float32, device=query.device)
    if batch * heads * rows == 0:
        return out, lse

    call = prepare(
        query,
        value_dim,
        keys,
        key_factor,
        (query, key, value, out),
        mode=mode,
        causal=causal,
        query_offset=query_offset,
        scale=scale,
        window=window,
        softcap=softcap,
        sinks=sinks,
        position_bias=position_bias,
        key_padding=key_padding,
        block_mask=block_mask,
        dropout=dropout,
        dropout_seed=dropout_seed,
        saves=saves,
    )
    key = key.expand(batch, -1, -1, -1)
    value = value.expand(batch, -1, -1, -1)
    tiles = call.factor_tiles(call.key_factor)
    ranges = None if call.key_padding is None else key_ranges(call.key_padding)
    arguments = (
        out,
        lse,
        saves.minimum,
        saves.argmin,
        saves.rest,
        query,
        key,
        value,
        call.key_factor,
        tiles.before,
        tiles.flagged,
        call.position_bias,
        call.key_padding,
        ranges,
        call.block_mask,
        call.sinks,
        call.dropout_seed,
        call.query_offset,
        rows,
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
        key.stride(),
        value.stride(),
        strides(call.key_factor, 3),
        tiles.stride,
        strides(call.position_bias, 4),
        strides(call.key_padding, 2),
        strides(call.block_mask, 4),
    )
    options = {
        "SPEC": call.spec,
        "num_warps": call.config.num_warps,
        "num_stages": call.config.num_stages,
        "enable_fp_fusion": True,
    }
    lines, section = None, None
    blocks = triton.cdiv(rows, call.config.block_m)
    programs = blocks * batch * heads
    if call.config.persistent:
        lines = batch * heads
        at_once = programs_at_once(
            _attention_fwd_kernel, (*arguments, lines, lines), options, query
        )
        programs = min(programs, at_once)
        section = section_of(key, value, heads, blocks, programs)
    _attention_fwd_kernel[(programs,)](*arguments, lines, section, **options)
    return out, lse
