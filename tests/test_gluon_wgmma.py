"""Toy kernels, each about one rule of warpgroup_mma that the emulator keeps."""

# kernels carry no Python types
# pyright: reportOperatorIssue=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false
from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton.experimental.gluon", reason="the emulator emulates Triton's Gluon")

from gluon_emulator.cases import descriptor
from gluon_emulator.errors import AccumulatorError, OperandError, RaceError, UnfinishedError
from gluon_emulator.interpreter import emulate
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)


@gluon.jit
def _products_kernel(desc, out_ptr, CASE: gl.constexpr):
    memory = gl.allocate_shared_memory(desc.dtype, [64, 64], desc.layout)
    bars = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(bars.index(0), count=1)
    fence_async_shared()
    mbarrier.expect(bars.index(0), desc.block_type.nbytes)
    tma.async_copy_global_to_shared(desc, [0, 0], bars.index(0), memory)
    mbarrier.wait(bars.index(0), 0)
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    begun = warpgroup_mma_init(gl.zeros([64, 64], gl.float32, layout=layout))
    first = warpgroup_mma(memory, memory, begun, is_async=True)
    second = warpgroup_mma(memory, memory, first, is_async=True)
    if CASE == "continued":
        first = warpgroup_mma_wait(0, deps=[first])
    elif CASE == "arithmetic":
        second = second + 1.0
    elif CASE == "layout":
        second = gl.convert_layout(second, layout)
    elif CASE == "never":
        gl.store(out_ptr, 0.0)
    elif CASE == "overwritten":
        memory.store(gl.zeros([64, 64], desc.dtype, layout=layout))
    elif CASE == "registers":
        warpgroup_mma(memory, second, begun)
    elif CASE == "shapes":
        warpgroup_mma(memory, memory, gl.zeros([64, 32], gl.float32, layout=layout))
    elif CASE == "well":
        third = warpgroup_mma(memory, memory, begun, use_acc=False, is_async=True)
        second, third = warpgroup_mma_wait(1, deps=[second, third])
        offs_m = gl.arange(0, 64, layout=gl.SliceLayout(1, layout))[:, None]
        offs_n = gl.arange(0, 64, layout=gl.SliceLayout(0, layout))[None, :]
        gl.store(out_ptr + offs_m * 64 + offs_n, second)
        third = warpgroup_mma_wait(0, deps=[third])
        gl.store(out_ptr + 4096 + offs_m * 64 + offs_n, third)


PRODUCTS: dict[str, Any] = {
    "continued": (AccumulatorError, "a later product has accumulated into it"),
    "arithmetic": (AccumulatorError, "is used in _products_kernel"),
    "layout": (AccumulatorError, "is used in _products_kernel"),
    "never": (UnfinishedError, "2 unfinished warpgroup_mma.*warpgroup_mma_wait is missing"),
    "overwritten": (RaceError, r"a store overwrites memory.*warpgroup_mma \(operand b\)"),
    "registers": (OperandError, "needs b in shared memory"),
    "shapes": (OperandError, r"needs \[M, K\], \[K, N\] and \[M, N\]"),
}


@pytest.mark.parametrize("case", PRODUCTS)
def test_products(case: str) -> None:
    error, message = PRODUCTS[case]
    desc = descriptor(torch.zeros(64, 64, dtype=torch.float16), [64, 64])
    with pytest.raises(error, match=message):
        emulate(_products_kernel, 1, desc, torch.zeros(2, 64, 64), case)


def test_products_are_right() -> None:
    x = torch.randint(-3, 4, (64, 64), generator=torch.Generator().manual_seed(0)).half()
    out = torch.zeros(2, 64, 64)
    emulate(_products_kernel, 1, descriptor(x, [64, 64]), out, "well")
    square = x.float() @ x.float()
    assert torch.equal(out[0], 2 * square) and torch.equal(out[1], square)


def test_products_need_four_warps() -> None:
    desc = descriptor(torch.zeros(64, 64, dtype=torch.float16), [64, 64])
    with pytest.raises(OperandError, match="groups of 4 warps and 64 rows each, got 2 warps"):
        emulate(_products_kernel, 1, desc, torch.zeros(2, 64, 64), "well", num_warps=2)
