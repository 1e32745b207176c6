"""Every way to break a pipelined kernel is reported, whatever the schedule, as what it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton.experimental.gluon", reason="the emulator emulates Triton's Gluon")

from gluon_emulator import attention, gemm
from gluon_emulator.cases import attend, multiply, mutant
from gluon_emulator.errors import (
    AccumulatorError,
    BarrierError,
    BoundsError,
    DeadlockError,
    FenceError,
    RaceError,
    UnfinishedError,
)

FULL_WAIT = "mbarrier.wait(full.index(stage), phase)"
EMPTY_WAIT = "mbarrier.wait(empty.index(stage), phase ^ 1)"
RELEASE = "mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), pred=k > 0)"
LAST_RELEASE = "mbarrier.arrive(empty.index((step - 1) % STAGES), count=1)"
BYTES = "2 * a_desc.block_type.nbytes + b_desc.block_type.nbytes"
LAST_WAIT = "warpgroup_mma_wait(num_outstanding=0, deps=[product])"
INSIDE = "inside = (offs_row[:, None] < rows) & (offs_column[None, :] < columns)"
EMPTY_INIT = "mbarrier.init(empty.index(stage), count=2)"
# what is replaced, by what, the error and what it says
GEMM = {
    "producer waits for the wrong phase": (
        (EMPTY_WAIT, EMPTY_WAIT.replace(" ^ 1", "")),
        DeadlockError,
        r"produce.*waits in produce \(.*\) for parity 0 of empty\[0\] \(phase 0, 2 of 2 arrivals",
    ),
    "consumer waits for the wrong phase": (
        (FULL_WAIT, FULL_WAIT.replace("phase)", "phase ^ 1)")),
        RaceError,
        "before the wait for the TMA copy|never written",
    ),
    "consumer does not wait": (
        (FULL_WAIT, "pass"),
        RaceError,
        "before the wait for the TMA copy|never written",
    ),
    "producer does not wait": (
        (EMPTY_WAIT, "pass"),
        (RaceError, BarrierError),
        r"overwrites a_buffers\[0\]|more than its phase awaits",
    ),
    "consumer never releases": ((RELEASE, "pass"), DeadlockError, r"parity \d of empty"),
    "last buffer of a tile is not released": (
        (LAST_RELEASE, "pass"),
        DeadlockError,
        r"parity \d of empty",
    ),
    "buffer is released before its product is done": (
        (RELEASE, "mbarrier.arrive(empty.index(stage))", LAST_RELEASE, "pass"),
        RaceError,
        r"overwrites a_buffers.*nothing orders it after warpgroup_mma \(operand a\)",
    ),
    "two products in flight": (
        ("num_outstanding=1", "num_outstanding=2"),
        RaceError,
        r"overwrites a_buffers.*warpgroup_mma \(operand a\)",
    ),
    "too few bytes expected": (
        (BYTES, "a_desc.block_type.nbytes + b_desc.block_type.nbytes"),
        BarrierError,
        "24576 in this phase.*told to expect 16384|told to expect 0",
    ),
    "too many bytes expected": (
        (BYTES, "4 * a_desc.block_type.nbytes"),
        DeadlockError,
        "0 of 1 arrivals and 8192 bytes pending",
    ),
    "no bytes expected": (
        (f"mbarrier.expect(bar, {BYTES})", "mbarrier.arrive(bar)"),
        BarrierError,
        "told to expect 0",
    ),
    "no fence before the store": (
        ("fence_async_shared()\n            tma", "tma"),
        FenceError,
        "TMA store of c_buffers.* without fence_async_shared",
    ),
    "result is not waited for": (
        (f"accumulator = {LAST_WAIT}", "accumulator = product"),
        AccumulatorError,
        r"warpgroup_mma from consume \(.*\) is used in consume",
    ),
    "result is returned by a wait that leaves it": (
        (LAST_WAIT, LAST_WAIT.replace("=0", "=1")),
        AccumulatorError,
        "is used in consume",
    ),
    "output buffer is reused before its store": (
        ("tma.store_wait(0)", "tma.store_wait(1)"),
        RaceError,
        r"a store overwrites c_buffers.*TMA store of c_buffers",
    ),
    "rows outside are stored": (
        (INSIDE, "inside = (offs_row[:, None] >= 0) & (offs_column[None, :] < columns)"),
        BoundsError,
        "A store to c_ptr must stay in its 40800 elements",
    ),
    "one arrival frees a buffer of two consumers": (
        (EMPTY_INIT, EMPTY_INIT.replace("2", "1")),
        (RaceError, DeadlockError, BarrierError),
        "overwrites|before the wait|waits|would miss that phase",
    ),
    "three arrivals are awaited of two consumers": (
        (EMPTY_INIT, EMPTY_INIT.replace("2", "3")),
        DeadlockError,
        "1 of 3 arrivals",
    ),
    "barrier is not initialised": ((EMPTY_INIT, "pass"), BarrierError, "was not initialised"),
    "barrier is initialised twice": (
        (EMPTY_INIT, f"{EMPTY_INIT}\n        {EMPTY_INIT}"),
        BarrierError,
        "initialised twice",
    ),
    "arrival counts twice": (
        (LAST_RELEASE, LAST_RELEASE.replace("count=1", "count=2")),
        (BarrierError, RaceError, DeadlockError),
        "more than its phase awaits|overwrites|before the wait|waits|would miss that phase",
    ),
    "two copies to one buffer": (
        ("a_buffers.index(2 * stage + 1)", "a_buffers.index(2 * stage)"),
        RaceError,
        r"TMA copy of a_desc .*overwrites a_buffers\[0\].*TMA copy of a_desc",
    ),
    "consumer reads the next buffer": (
        ("b = b_buffers.index(stage)", "b = b_buffers.index((stage + 1) % STAGES)"),
        RaceError,
        r"b_buffers\[1\].*(never written|before the wait)",
    ),
    "producer runs ahead": (
        ("for k in range(0, depth, BLOCK_K):\n            stage = step % STAGES\n"
         "            phase = step // STAGES & 1\n            mbarrier.wait(empty",
         "for k in range(0, depth + BLOCK_K, BLOCK_K):\n            stage = step % STAGES\n"
         "            phase = step // STAGES & 1\n            mbarrier.wait(empty"),
        (UnfinishedError, DeadlockError),
        "nothing has waited|waits",
    ),
}  # fmt: skip
BEFORE = "mbarrier.arrive(empty.index(before), count=1)"
OUT_WAIT = "out = warpgroup_mma_wait(num_outstanding=0, deps=[out])"
SCORES_WAIT = "scores = warpgroup_mma_wait(num_outstanding=1, deps=[scores])"
ATTENTION = {
    "queries are not waited for": (
        ("mbarrier.wait(query_full, 0)", "pass"),
        RaceError,
        r"warpgroup_mma \(operand a\) reads query_buffer.*(before the wait|never written)",
    ),
    "values are released before their product is done": (
        (OUT_WAIT, "pass", f"        {BEFORE}\n", f"        {BEFORE}\n        {OUT_WAIT}\n"),
        RaceError,
        r"overwrites value_buffers.*nothing orders it after warpgroup_mma \(operand b\)",
    ),
    "output is rescaled in flight": (
        (OUT_WAIT, "out = warpgroup_mma_wait(num_outstanding=1, deps=[out])"),
        AccumulatorError,
        "is used in attend",
    ),
    "scores are used in flight": (
        (SCORES_WAIT, SCORES_WAIT.replace("=1", "=2")),
        AccumulatorError,
        r"is used in \w+",
    ),
    "the next tile is released": (
        (BEFORE, BEFORE.replace("before", "stage")),
        DeadlockError,
        r"waits in fetch \(.*\) for parity 0 of empty\[0\]",
    ),
    "output is stored without a fence": (
        ("    fence_async_shared()\n    start", "    start"),
        FenceError,
        "TMA store of query_buffer",
    ),
    "factor is read beyond the keys": (
        ("mask=offs_n < keys, other=1.0", "mask=offs_n < keys + 1, other=1.0"),
        BoundsError,
        "A load from factor_ptr must stay in its 300 elements",
    ),
}  # fmt: skip


def check(run: Any, module: Any, error: Any, message: str, *sizes: Any, **options: Any) -> None:
    """Every schedule reports the error."""
    for seed in range(9):
        with pytest.raises(error, match=message) as caught:
            run(module, *sizes, seed=seed, **options)
        print(seed, caught.type.__name__, caught.value)


@pytest.mark.parametrize("name", GEMM)
def test_gemm(name: str, tmp_path: Path) -> None:
    replaced, error, message = GEMM[name]
    module = mutant(gemm, tmp_path, replaced)
    check(multiply, module, error, message, (300, 136, 320), tma_store=error is not BoundsError)


@pytest.mark.parametrize("name", ATTENTION)
def test_attention(name: str, tmp_path: Path) -> None:
    replaced, error, message = ATTENTION[name]
    check(attend, mutant(attention, tmp_path, replaced), error, message, (1, 64, 300))


def test_store_without_a_wait(tmp_path: Path) -> None:
    module = mutant(gemm, tmp_path, ("tma.store_wait(0)", "pass"))
    with pytest.raises(UnfinishedError, match="store_wait is missing"):
        multiply(module, (128, 64, 64))
