"""Toy kernels, each about one rule of shared memory, mbarriers or TMA that the emulator keeps."""

# kernels carry no Python types
# pyright: reportOperatorIssue=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false
from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton.experimental.gluon", reason="the emulator emulates Triton's Gluon")

from gluon_emulator.cases import descriptor
from gluon_emulator.errors import (
    BarrierError,
    BoundsError,
    DeadlockError,
    FenceError,
    OperandError,
    RaceError,
    UnfinishedError,
)
from gluon_emulator.interpreter import emulate
from gluon_emulator.shared import Region, SharedMemory
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
)


@gluon.jit
def _write(x_ptr, memory, bars, CASE: gl.constexpr):
    """Hands its half of ``memory`` over, perhaps too early, and writes it again when told to."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    offs_m = gl.arange(0, 64, layout=gl.SliceLayout(1, layout))[:, None]
    offs_n = gl.arange(0, 32, layout=gl.SliceLayout(0, layout))[None, :]
    half = memory.slice(0, 32, dim=1)
    half.store(gl.load(x_ptr + offs_m * 64 + offs_n))
    if CASE == "the other half":
        memory.slice(32, 32, dim=1).store(gl.load(x_ptr + offs_m * 64 + offs_n))
    if CASE == "handed over by expect":
        mbarrier.expect(bars.index(0), 0)
    else:
        mbarrier.arrive(bars.index(0))
    if CASE == "written after it":
        half.store(gl.load(x_ptr + offs_m * 64 + offs_n))
    mbarrier.wait(bars.index(1), 0)
    half.store(gl.load(x_ptr + offs_m * 64 + 32 + offs_n))


@gluon.jit
def _read(x_ptr, memory, bars, CASE: gl.constexpr):
    """Reads what it is handed and gives it back, perhaps too early."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    offs_m = gl.arange(0, 64, layout=gl.SliceLayout(1, layout))[:, None]
    offs_n = gl.arange(0, 32, layout=gl.SliceLayout(0, layout))[None, :]
    if CASE != "not waited for":
        mbarrier.wait(bars.index(0), 0)
    if CASE == "given back early":
        mbarrier.arrive(bars.index(1))
    if CASE == "all is read":
        memory.load(layout)
    values = memory.slice(0, 32, dim=1).load(layout)
    gl.store(x_ptr + offs_m * 64 + offs_n, values + values)
    if CASE != "given back early":
        mbarrier.arrive(bars.index(1))


@gluon.jit
def _hand_over_kernel(x_ptr, CASE: gl.constexpr):
    layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    memory = gl.allocate_shared_memory(gl.float16, [64, 64], layout)
    bars = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(bars.index(i), count=1)
    arguments = (x_ptr, memory, bars, CASE)
    gl.warp_specialize([(_read, arguments), (_write, arguments)], [4], [40])


HAND_OVER = {
    "well": None,
    "the other half": None,
    "not waited for": "reads memory.*(never written|nothing orders it after a store)",
    "given back early": "overwrites memory.*a load|reads memory.*a store",
    "written after it": "overwrites memory.*a load|reads memory.*a store",
    "handed over by expect": "reads memory.*nothing orders it after a store",
    "all is read": "reads memory in _read.*never written",
}


@pytest.mark.parametrize("seed", range(9))
@pytest.mark.parametrize("case", HAND_OVER)
def test_hand_over(case: str, seed: int) -> None:
    x = torch.arange(64 * 64, dtype=torch.float32).reshape(64, 64).to(torch.float16) / 64
    before, message = x.clone(), HAND_OVER[case]
    if message is not None:
        with pytest.raises(RaceError, match=message):
            emulate(_hand_over_kernel, 1, x, case, seed=seed)
        return
    emulate(_hand_over_kernel, 1, x, case, seed=seed)
    assert torch.equal(x[:, :32], before[:, :32] * 2) and torch.equal(x[:, 32:], before[:, 32:])


@gluon.jit
def _refill(desc, memory, bars, CASE: gl.constexpr):
    for i in range(2):
        if i == 1:
            mbarrier.wait(bars.index(1), 0)
        mbarrier.expect(bars.index(0), desc.block_type.nbytes)
        tma.async_copy_global_to_shared(desc, [64 * i, 0], bars.index(0), memory)


@gluon.jit
def _drain(out_ptr, memory, bars, CASE: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    offs_m = gl.arange(0, 64, layout=gl.SliceLayout(1, layout))[:, None]
    offs_n = gl.arange(0, 64, layout=gl.SliceLayout(0, layout))[None, :]
    for i in range(2):
        mbarrier.wait(bars.index(0), i)
        values = memory.load(layout)
        gl.store(out_ptr + (i * 64 + offs_m) * 64 + offs_n, values)
        if i == 0:
            if CASE != "no fence":
                fence_async_shared()
            mbarrier.arrive(bars.index(1))


@gluon.jit
def _refill_kernel(desc, out_ptr, CASE: gl.constexpr):
    memory = gl.allocate_shared_memory(desc.dtype, [64, 64], desc.layout)
    bars = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(bars.index(i), count=1)
    if CASE != "no fence after init":
        fence_async_shared()
    drained = (out_ptr, memory, bars, CASE)
    gl.warp_specialize([(_drain, drained), (_refill, (desc, memory, bars, CASE))], [1], [40])


@pytest.mark.parametrize("padding", ["zero", "nan"])
@pytest.mark.parametrize("seed", range(9))
def test_copy_over_loads(padding: str, seed: int) -> None:
    x = torch.randn(100, 48, generator=torch.Generator().manual_seed(seed)).to(torch.float16)
    out = torch.full((128, 64), 7.0, dtype=torch.float16)
    desc = descriptor(x, [64, 64], padding=padding)
    with pytest.raises(FenceError, match=r"TMA copy of desc to memory uses memory.*after a load"):
        emulate(_refill_kernel, 1, desc, out, "no fence", seed=seed)
    with pytest.raises(FenceError, match=r"TMA copy of desc in _refill .* without .* its init"):
        emulate(_refill_kernel, 1, desc, out, "no fence after init", seed=seed)
    emulate(_refill_kernel, 1, desc, out, "", seed=seed)
    filled = torch.full((128, 64), 0.0 if padding == "zero" else torch.nan, dtype=torch.float16)
    filled[:100, :48] = x
    torch.testing.assert_close(out, filled, rtol=0, atol=0, equal_nan=True)


@gluon.jit
def _misuse_kernel(desc, CASE: gl.constexpr):
    memory = gl.allocate_shared_memory(desc.dtype, [2, 64, 64], desc.layout)
    bars = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(bars.index(i), count=2 - i)
    fence_async_shared()
    counted = bars.index(0)
    bar = bars.index(1)
    if CASE == "arrivals":
        mbarrier.arrive(counted, count=3)
    elif CASE == "parity":
        mbarrier.wait(counted, 2)
    elif CASE == "invalidated":
        mbarrier.invalidate(counted)
        mbarrier.arrive(counted)
    elif CASE == "index":
        memory.index(2)
    elif CASE == "whole batch":
        mbarrier.arrive(bars)
    elif CASE == "alone":
        mbarrier.arrive(counted)
        mbarrier.wait(counted, 0)
    elif CASE == "shape":
        mbarrier.expect(bar, desc.block_type.nbytes)
        tma.async_copy_global_to_shared(desc, [0, 0], bar, memory)
    elif CASE == "coordinates":
        mbarrier.expect(bar, desc.block_type.nbytes)
        tma.async_copy_global_to_shared(desc, [0], bar, memory.index(0))
    elif CASE == "alignment":
        mbarrier.expect(bar, desc.block_type.nbytes)
        tma.async_copy_global_to_shared(desc, [0, 4], bar, memory.index(0))
    elif CASE == "not waited for":
        mbarrier.expect(bar, desc.block_type.nbytes)
        tma.async_copy_global_to_shared(desc, [0, 0], bar, memory.index(0))
    elif CASE == "invalidated in flight":
        mbarrier.expect(bar, 2 * desc.block_type.nbytes)
        tma.async_copy_global_to_shared(desc, [0, 0], bar, memory.index(0))
        mbarrier.invalidate(bar)
    elif CASE == "unwritten store":
        tma.async_copy_shared_to_global(desc, [0, 0], memory.index(0))
    elif CASE == "predicated":
        mbarrier.expect(bar, desc.block_type.nbytes, pred=False)
        tma.async_copy_global_to_shared(desc, [0, 0], bar, memory.index(0), pred=False)
        mbarrier.arrive(bar, pred=False)
        mbarrier.wait(bar, 0, pred=False)
        mbarrier.wait(bar, 1)


MISUSES: dict[str, Any] = {
    "arrivals": (BarrierError, r"arrives 3 times at bars\[0\] \(phase 0, 2 of 2 arrivals"),
    "parity": (BarrierError, r"bars\[0\].*must be 0 or 1, not 2"),
    "invalidated": (BarrierError, r"arrive at bars\[0\], which is invalidated"),
    "index": (BoundsError, "index of memory must be below 2, got 2"),
    "whole batch": (OperandError, "one int64 of shared memory"),
    "alone": (DeadlockError, r"parity 0 of bars\[0\] \(phase 0, 1 of 2 arrivals"),
    "shape": (OperandError, r"desc moves blocks \[64, 64\] of fp16, got memory \[2, 64, 64\]"),
    "coordinates": (OperandError, "desc needs 2 coordinates, got 1"),
    "alignment": (OperandError, "multiple of 16 bytes, got element 4"),
    "not waited for": (
        UnfinishedError,
        r"nothing has waited for the TMA copy of desc to memory\[0\] from _misuse_kernel",
    ),
    "invalidated in flight": (BarrierError, r"invalidates bars\[1\].*while copies"),
    "unwritten store": (RaceError, r"TMA store of memory\[0\] to desc reads.*never written"),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("case", MISUSES)
def test_misuse(case: str, seed: int) -> None:
    error, message = MISUSES[case]
    desc = descriptor(torch.zeros(64, 64, dtype=torch.float16), [64, 64])
    with pytest.raises(error, match=message):
        emulate(_misuse_kernel, 1, desc, case, seed=seed)


def test_predicates() -> None:
    desc = descriptor(torch.zeros(64, 64, dtype=torch.float16), [64, 64])
    emulate(_misuse_kernel, 1, desc, "predicated")


def test_descriptor_lies_in_its_tensor() -> None:
    desc = descriptor(torch.zeros(64, 64, dtype=torch.float16), [64, 64])
    desc.shape = [65, 64]
    with pytest.raises(BoundsError, match=r"desc must lie in its tensor, got shape \[65, 64\]"):
        emulate(_misuse_kernel, 1, desc, "predicated")


@gluon.jit
def _tick(bars, CASE: gl.constexpr):
    for _ in range(3):
        mbarrier.arrive(bars.index(0))


@gluon.jit
def _listen(bars, CASE: gl.constexpr):
    for i in range(3):
        mbarrier.wait(bars.index(0), i & 1)


@gluon.jit
def _ticking_kernel(CASE: gl.constexpr):
    bars = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(bars.index(0), count=1)
    gl.warp_specialize([(_listen, (bars, CASE)), (_tick, (bars, CASE))], [1], [40])


def test_missed_phase() -> None:
    found = []
    for seed in range(18):
        try:
            emulate(_ticking_kernel, 1, "", seed=seed)
        except (BarrierError, DeadlockError) as error:
            found.append(str(error))
    assert any("would miss that phase" in message for message in found), found


@gluon.jit
def _initialise(bars):
    mbarrier.init(bars.index(0), count=1)


@gluon.jit
def _arrive(bars):
    mbarrier.arrive(bars.index(0))


@gluon.jit
def _unordered_kernel():
    bars = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    gl.warp_specialize([(_initialise, (bars,)), (_arrive, (bars,))], [1], [40])


def test_init_is_ordered_before_use() -> None:
    found = set()
    for seed in range(9):
        with pytest.raises(BarrierError, match=r"was not initialised|nothing orders") as caught:
            emulate(_unordered_kernel, 1, seed=seed)
        found.add("nothing orders" in str(caught.value))
    assert True in found


_seen: list[bool] = []


def _peek(memory: SharedMemory) -> None:
    """What only the emulator can: look at shared memory without a use of it."""
    _seen.append(bool(memory.view.isnan().all()))


@gluon.jit
def _peeking_kernel(desc):
    memory = gl.allocate_shared_memory(desc.dtype, [64, 64], desc.layout)
    bars = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(bars.index(0), count=1)
    fence_async_shared()
    for i in range(2):
        mbarrier.expect(bars.index(0), desc.block_type.nbytes)
        tma.async_copy_global_to_shared(desc, [0, 0], bars.index(0), memory)
        _peek(memory)
        mbarrier.wait(bars.index(0), i)
        _peek(memory)


@pytest.mark.parametrize("seed", range(3))
def test_copies_in_flight_are_poison(seed: int) -> None:
    _seen.clear()
    desc = descriptor(torch.zeros(64, 64, dtype=torch.float16), [64, 64])
    emulate(_peeking_kernel, 1, desc, seed=seed)
    in_flight = [False, False] if seed == 1 else [True, True]  # 1: copies land at once
    assert _seen[::2] == in_flight and _seen[1::2] == [False, False]


def test_regions() -> None:
    base = torch.zeros(4, 8, dtype=torch.float16)
    whole, left, right = Region(base), Region(base[:, :4]), Region(base[:, 4:])
    turned, row = Region(base.T), Region(base[1])
    assert whole.covers(left) and not left.covers(whole) and turned.covers(right)
    assert not left.overlaps(right) and left.overlaps(row) and not left.covers(row)
    assert left.overlaps(turned) and whole.covers(turned)


@gluon.jit
def _counts_kernel(out_ptr):
    gl.store(out_ptr + gl.program_id(1) * gl.num_programs(0) + gl.program_id(0), gl.num_warps())


def test_grid() -> None:
    out = torch.zeros(3, 2, dtype=torch.int32)
    emulate(_counts_kernel, lambda arguments: (2, len(arguments["out_ptr"])), out, num_warps=8)
    assert torch.equal(out, torch.full((3, 2), 8, dtype=torch.int32))
