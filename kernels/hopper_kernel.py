"""Attention forward for sm_90 in Gluon: one warp loads by TMA, two warpgroups multiply.

The schedule and the barriers are told in README.md, "The Hopper kernel".

Legend: B batch, Hq/Hk query/key heads, Tq/Tk query/key tokens, D head dim, Dv value dim.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from .hopper_consumer import consume
from .hopper_producer import produce
from .hopper_work import CONSUMERS, ROWS


@gluon.jit
def _barriers(NUMBER: gl.constexpr, COUNT: gl.constexpr):
    """``NUMBER`` barriers, each of which ``COUNT`` arrivals complete."""
    barriers = gl.allocate_shared_memory(gl.int64, [NUMBER, 1], mbarrier.MBarrierLayout())
    for index in gl.static_range(NUMBER):
        mbarrier.init(barriers.index(index), count=COUNT)
    return barriers


@gluon.jit(
    do_not_specialize=[
        "rows", "keys", "query_offset", "lines", "section", "heads", "group", "keys_shared",
        "key_batches", "value_batches", "factor_heads",
    ]
)  # fmt: skip
def _hopper_fwd_kernel(
    output_tma,  # [B, Hq, Tq, Dv]
    query_tma,  # [B, Hq, Tq, D]
    key_tma,  # [B|1, Hk, Tk, D]
    value_tma,  # [B|1, Hk, Tk, Dv]
    lse_ptr,  # [B, Hq, Tq], contiguous
    factor_ptr,  # [B, factor_heads, Tk], contiguous
    before_ptr,  # [B, factor_heads, tiles + 1], see prepass.factor_tiles
    flagged_ptr,  # [B, factor_heads, tiles]
    rows,
    keys,
    query_offset,
    lines,  # of the persistent grid: B · Hq
    section,  # and how many of them are walked together, see persistent.py
    heads,
    group,  # query heads per key head
    keys_shared,  # 1 if all batch rows read the same keys, else 0
    key_batches,  # 1 if each batch row has its own keys, 0 if all share them
    value_batches,  # the same of the values
    factor_heads,  # heads with factors of their own, or 1
    unit,  # base-2 logits per raw score
    SPEC: gl.constexpr,
):
    """Output and log-sum-exp of all rows, by as many programs as are launched."""
    DTYPE: gl.constexpr = query_tma.dtype
    STAGES: gl.constexpr = SPEC.stages
    queries = gl.allocate_shared_memory(
        DTYPE, [CONSUMERS, 1, 1, ROWS, SPEC.head_dim], query_tma.layout
    )
    key_ring = gl.allocate_shared_memory(
        DTYPE, [STAGES, 1, 1, SPEC.block_n, SPEC.head_dim], key_tma.layout
    )
    value_ring = gl.allocate_shared_memory(
        DTYPE, [STAGES, 1, 1, SPEC.block_n, SPEC.value_dim], value_tma.layout
    )
    output = queries
    if SPEC.own_output:
        output = gl.allocate_shared_memory(
            DTYPE, [CONSUMERS, 1, 1, ROWS, SPEC.value_dim], output_tma.layout
        )
    barriers = (
        _barriers(CONSUMERS, 1),  # queries are there
        _barriers(CONSUMERS, 1),  # and used
        _barriers(STAGES, 1),  # keys are there
        _barriers(STAGES, CONSUMERS),  # and used
        _barriers(STAGES, 1),  # values are there
        _barriers(STAGES, CONSUMERS),  # and used
    )
    fence_async_shared()  # the copies see the barriers initialised
    buffers = (queries, key_ring, value_ring)
    lists = (before_ptr, flagged_ptr)
    order = (rows, lines, section, heads, group, keys_shared)
    shape = (rows, keys, query_offset, factor_heads)
    outputs = (lse_ptr, factor_ptr, unit)
    own = (queries, key_ring, value_ring, output)
    gl.warp_specialize(
        [
            (consume, (0, output_tma, own, barriers, lists, order, shape, outputs, SPEC)),
            (consume, (1, output_tma, own, barriers, lists, order, shape, outputs, SPEC)),
            (
                produce,
                (
                    (query_tma, key_tma, value_tma), buffers, barriers, lists, order, shape,
                    (key_batches, value_batches), SPEC,
                ),
            ),
        ],
        [4, 1],  # warps of the second consumer and of the producer
        [240, 24],  # and their registers per thread; the first consumer gets the second's number
    )  # fmt: skip
