"""A warp-specialised, pipelined matrix product in Gluon: what the emulator is tried on.

Two consumers own 64 rows each of a tile; a producer fills a ring of buffers for both. The programs
are persistent: tile after tile, without a pause in the ring. Mutants are made from this file's
text, so each protocol step stands on a line of its own.
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


@gluon.jit
def tile_origin(tile, columns, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):
    """First row and column of a tile."""
    across = gl.cdiv(columns, BLOCK_N)
    return tile // across * (2 * BLOCK_M), tile % across * BLOCK_N


@gluon.jit
def produce(
    a_desc, b_desc, ring, tiles, columns, depth, BLOCK_M: gl.constexpr, STAGES: gl.constexpr
):
    """Fill the ring: two blocks of ``a`` and one of ``b`` a step."""
    a_buffers, b_buffers, full, empty = ring
    BLOCK_K: gl.constexpr = b_desc.block_shape[0]
    BLOCK_N: gl.constexpr = b_desc.block_shape[1]
    step = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        row, column = tile_origin(tile, columns, BLOCK_M, BLOCK_N)
        for k in range(0, depth, BLOCK_K):
            stage = step % STAGES
            phase = step // STAGES & 1
            mbarrier.wait(empty.index(stage), phase ^ 1)
            bar = full.index(stage)
            mbarrier.expect(bar, 2 * a_desc.block_type.nbytes + b_desc.block_type.nbytes)
            first = a_buffers.index(2 * stage)
            tma.async_copy_global_to_shared(a_desc, [row, k], bar, first)
            second = a_buffers.index(2 * stage + 1)
            tma.async_copy_global_to_shared(a_desc, [row + BLOCK_M, k], bar, second)
            tma.async_copy_global_to_shared(b_desc, [k, column], bar, b_buffers.index(stage))
            step += 1


@gluon.jit
def consume(
    c_desc,
    c_ptr,
    c_buffer,
    ring,
    sizes,
    CONSUMER: gl.constexpr,
    STAGES: gl.constexpr,
    BLOCK_K: gl.constexpr,
    TMA_STORE: gl.constexpr,
):
    """Multiply what arrives, one product in flight, and write a tile."""
    a_buffers, b_buffers, full, empty = ring
    rows, tiles, columns, depth = sizes
    BLOCK_M: gl.constexpr = c_desc.block_shape[0]
    BLOCK_N: gl.constexpr = c_desc.block_shape[1]
    accumulator_layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_N, 16]
    )
    step = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        row, column = tile_origin(tile, columns, BLOCK_M, BLOCK_N)
        row += CONSUMER * BLOCK_M
        product = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, layout=accumulator_layout)
        for k in range(0, depth, BLOCK_K):
            stage = step % STAGES
            phase = step // STAGES & 1
            mbarrier.wait(full.index(stage), phase)
            a = a_buffers.index(2 * stage + CONSUMER)
            b = b_buffers.index(stage)
            product = warpgroup_mma(a, b, product, use_acc=k > 0, is_async=True)
            product = warpgroup_mma_wait(num_outstanding=1, deps=[product])
            mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), pred=k > 0)
            step += 1
        accumulator = warpgroup_mma_wait(num_outstanding=0, deps=[product])
        mbarrier.arrive(empty.index((step - 1) % STAGES), count=1)
        result = accumulator.to(c_desc.dtype)
        if TMA_STORE:
            c_buffer.store(result)
            fence_async_shared()
            tma.async_copy_shared_to_global(c_desc, [row, column], c_buffer)
            tma.store_wait(0)
        else:
            offs_row = row + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, accumulator_layout))
            offs_column = column + gl.arange(
                0, BLOCK_N, layout=gl.SliceLayout(0, accumulator_layout)
            )
            inside = (offs_row[:, None] < rows) & (offs_column[None, :] < columns)
            pointers = c_ptr + offs_row[:, None] * columns + offs_column[None, :]
            gl.store(pointers, result, mask=inside)


@gluon.jit
def gemm_kernel(
    a_desc,
    b_desc,
    c_desc,
    c_ptr,
    rows,
    columns,
    depth,
    STAGES: gl.constexpr,
    TMA_STORE: gl.constexpr,
):
    """``c = a @ b``; ``a`` [rows, depth], ``b`` [depth, columns], ``c`` [rows, columns]."""
    BLOCK_M: gl.constexpr = a_desc.block_shape[0]
    BLOCK_K: gl.constexpr = a_desc.block_shape[1]
    BLOCK_N: gl.constexpr = b_desc.block_shape[1]
    a_buffers = gl.allocate_shared_memory(
        a_desc.dtype, [2 * STAGES, BLOCK_M, BLOCK_K], a_desc.layout
    )
    b_buffers = gl.allocate_shared_memory(b_desc.dtype, [STAGES, BLOCK_K, BLOCK_N], b_desc.layout)
    c_buffers = gl.allocate_shared_memory(c_desc.dtype, [2, BLOCK_M, BLOCK_N], c_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)
    fence_async_shared()
    ring = (a_buffers, b_buffers, full, empty)
    tiles = gl.cdiv(rows, 2 * BLOCK_M) * gl.cdiv(columns, BLOCK_N)
    sizes = (rows, tiles, columns, depth)
    first = (c_desc, c_ptr, c_buffers.index(0), ring, sizes, 0, STAGES, BLOCK_K, TMA_STORE)
    second = (c_desc, c_ptr, c_buffers.index(1), ring, sizes, 1, STAGES, BLOCK_K, TMA_STORE)
    gl.warp_specialize(
        [
            (consume, first),
            (consume, second),
            (produce, (a_desc, b_desc, ring, tiles, columns, depth, BLOCK_M, STAGES)),
        ],
        [4, 1],
        [152, 40],
    )
    for stage in gl.static_range(STAGES):
        mbarrier.invalidate(full.index(stage))
        mbarrier.invalidate(empty.index(stage))
