"""A small specialised attention in Gluon: a second kernel for the emulator.

One consumer keeps two products of its own in flight, scores of the next keys and the weighted
values of the last ones, with weights in registers. Blocks are of rank 4, buffers of rank 2.
"""

# kernels carry no Python types
# pyright: reportOperatorIssue=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from atman_triton.kernels.primitives import manipulate, softmax_step


@gluon.jit
def fetch(query_desc, key_desc, value_desc, query_buffer, ring, tiles, STAGES: gl.constexpr):
    """Queries once, keys and values of every tile."""
    key_buffers, value_buffers, query_full, full, empty = ring
    BLOCK_N: gl.constexpr = key_desc.block_shape[2]
    head = gl.program_id(1)
    row = gl.program_id(0) * query_desc.block_shape[2]
    mbarrier.expect(query_full, query_desc.block_type.nbytes)
    tma.async_copy_global_to_shared(query_desc, [0, head, row, 0], query_full, query_buffer)
    for tile in range(tiles):
        stage = tile % STAGES
        mbarrier.wait(empty.index(stage), (tile // STAGES & 1) ^ 1)
        bar = full.index(stage)
        mbarrier.expect(bar, key_desc.block_type.nbytes + value_desc.block_type.nbytes)
        start = [0, head, tile * BLOCK_N, 0]
        tma.async_copy_global_to_shared(key_desc, start, bar, key_buffers.index(stage))
        tma.async_copy_global_to_shared(value_desc, start, bar, value_buffers.index(stage))


@gluon.jit
def tile_weights(scores, factor_ptr, tile, keys, unit, row_max, row_sum, BLOCK_N: gl.constexpr):
    """Manipulated scores through one softmax step, keys outside masked."""
    column_layout: gl.constexpr = gl.SliceLayout(0, scores.type.layout)
    offs_n = tile * BLOCK_N + gl.arange(0, BLOCK_N, layout=column_layout)
    factor = gl.load(factor_ptr + offs_n, mask=offs_n < keys, other=1.0)
    scores = manipulate(scores, factor[None, :], None, None, "multiplicative", "every")
    scores = gl.where((offs_n < keys)[None, :], scores, float("-inf"))
    return softmax_step(scores, row_max, row_sum, unit, False)


@gluon.jit
def attend(out_desc, factor_ptr, query_buffer, ring, keys, unit, tiles, STAGES: gl.constexpr):
    """Scores one tile ahead of the weighted values."""
    key_buffers, value_buffers, query_full, full, empty = ring
    BLOCK_M: gl.constexpr = query_buffer.shape[0]
    BLOCK_D: gl.constexpr = query_buffer.shape[1]
    BLOCK_N: gl.constexpr = key_buffers.shape[1]
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    weight_layout: gl.constexpr = gl.DotOperandLayout(0, out_layout, 2)
    row_layout: gl.constexpr = gl.SliceLayout(1, score_layout)
    row_max = gl.full([BLOCK_M], float("-inf"), gl.float32, layout=row_layout)
    row_sum = gl.zeros([BLOCK_M], gl.float32, layout=row_layout)
    nothing = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, layout=score_layout)
    out = gl.zeros([BLOCK_M, BLOCK_D], gl.float32, layout=out_layout)
    mbarrier.wait(query_full, 0)
    mbarrier.wait(full.index(0), 0)
    key = key_buffers.index(0).permute((1, 0))
    scores = warpgroup_mma(query_buffer, key, nothing, use_acc=False)
    weights, rescale, row_max, row_sum = tile_weights(
        scores, factor_ptr, 0, keys, unit, row_max, row_sum, BLOCK_N
    )
    for tile in range(1, tiles):
        stage = tile % STAGES
        before = (tile - 1) % STAGES
        mbarrier.wait(full.index(stage), tile // STAGES & 1)
        key = key_buffers.index(stage).permute((1, 0))
        scores = warpgroup_mma(query_buffer, key, nothing, use_acc=False, is_async=True)
        operand = gl.convert_layout(weights.to(query_buffer.dtype), weight_layout)
        out = warpgroup_mma(operand, value_buffers.index(before), out, is_async=True)
        scores = warpgroup_mma_wait(num_outstanding=1, deps=[scores])
        weights, rescale, row_max, row_sum = tile_weights(
            scores, factor_ptr, tile, keys, unit, row_max, row_sum, BLOCK_N
        )
        out = warpgroup_mma_wait(num_outstanding=0, deps=[out])
        mbarrier.arrive(empty.index(before), count=1)
        out = out * gl.convert_layout(rescale, gl.SliceLayout(1, out_layout))[:, None]
    operand = gl.convert_layout(weights.to(query_buffer.dtype), weight_layout)
    out = warpgroup_mma(operand, value_buffers.index((tiles - 1) % STAGES), out)
    out = out / gl.convert_layout(row_sum, gl.SliceLayout(1, out_layout))[:, None]
    query_buffer.store(out.to(query_buffer.dtype))  # every product that reads it is done
    fence_async_shared()
    start = [0, gl.program_id(1), gl.program_id(0) * BLOCK_M, 0]
    tma.async_copy_shared_to_global(out_desc, start, query_buffer)
    tma.store_wait(0)


@gluon.jit
def attention_kernel(
    query_desc, key_desc, value_desc, out_desc, factor_ptr, keys, unit, STAGES: gl.constexpr
):
    """Attention of [1, heads, rows, D] blocks with one factor per key; grid (row blocks, heads)."""
    BLOCK_M: gl.constexpr = query_desc.block_shape[2]
    BLOCK_N: gl.constexpr = key_desc.block_shape[2]
    BLOCK_D: gl.constexpr = query_desc.block_shape[3]
    layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    query_buffer = gl.allocate_shared_memory(query_desc.dtype, [BLOCK_M, BLOCK_D], layout)
    key_buffers = gl.allocate_shared_memory(key_desc.dtype, [STAGES, BLOCK_N, BLOCK_D], layout)
    value_buffers = gl.allocate_shared_memory(key_desc.dtype, [STAGES, BLOCK_N, BLOCK_D], layout)
    query_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(query_full, count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=1)
    fence_async_shared()
    ring = (key_buffers, value_buffers, query_full, full, empty)
    tiles = gl.cdiv(keys, BLOCK_N)
    attended = (out_desc, factor_ptr, query_buffer, ring, keys, unit, tiles, STAGES)
    fetched = (query_desc, key_desc, value_desc, query_buffer, ring, tiles, STAGES)
    gl.warp_specialize([(attend, attended), (fetch, fetched)], [1], [40])
