"""The emulator of Gluon runs a correct pipelined kernel and reports every way to break it."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("triton.experimental.gluon", reason="the emulator emulates Triton's Gluon")

import gluon_gemm
from gluon_interpreter import emulate
from gluon_machine import (
    AccumulatorError,
    BarrierError,
    BoundsError,
    DeadlockError,
    FenceError,
    RaceError,
    UnfinishedError,
)
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

ROOT = Path(__file__).parent.parent
GLUON = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


def descriptor(tensor: torch.Tensor, block: list[int]) -> TensorDescriptor:
    layout = gl.NVMMASharedLayout.get_default_for(block, GLUON[tensor.dtype])
    return TensorDescriptor.from_tensor(tensor, block, layout)


def multiply(
    module: ModuleType,
    shape: tuple[int, int, int],
    *,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    programs: int = 1,
    stages: int = 2,
    tma_store: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``a``, ``b`` and the kernel's product of the two."""
    rows, columns, depth = shape
    generator = torch.Generator().manual_seed(1)
    a = torch.randn(rows, depth, generator=generator).to(dtype)
    b = torch.randn(depth, columns, generator=generator).to(dtype)
    c = torch.full((rows, columns), torch.nan, dtype=dtype)
    emulate(
        module.gemm_kernel,
        (programs,),
        descriptor(a, [64, 64]),
        descriptor(b, [64, 64]),
        descriptor(c, [64, 64]),
        c,
        *shape,
        seed=seed,
        STAGES=stages,
        TMA_STORE=tma_store,
    )
    return a, b, c


@pytest.mark.parametrize("dtype", GLUON, ids=str)
@pytest.mark.parametrize("tma_store", [True, False], ids=["tma", "pointers"])
@pytest.mark.parametrize("seed", range(9))
def test_gemm(dtype: torch.dtype, tma_store: bool, seed: int) -> None:
    a, b, c = multiply(
        gluon_gemm,
        (300, 136, 256),
        dtype=dtype,
        seed=seed,
        programs=2,
        stages=2 + seed % 2,
        tma_store=tma_store,
    )
    exact = a.double() @ b.double()
    # sums of products in float32 in any order, then one rounding to the output's dtype
    summed = 256 * 2**-24 * (a.double().abs() @ b.double().abs())
    rounded = torch.finfo(dtype).eps / 2 * exact.abs()
    excess = (c.double() - exact).abs() - (summed + rounded * (1 + 2**-10))
    print(f"largest error {(c.double() - exact).abs().max():.3e}, excess {excess.max():.3e}")
    assert bool((excess <= 0).all())


FULL_WAIT = "mbarrier.wait(full.index(stage), phase)"
EMPTY_WAIT = "mbarrier.wait(empty.index(stage), phase ^ 1)"
RELEASE = "mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), pred=k > 0)"
LAST_RELEASE = "mbarrier.arrive(empty.index((step - 1) % STAGES), count=1)"
BYTES = "2 * a_desc.block_type.nbytes + b_desc.block_type.nbytes"
LAST_WAIT = "warpgroup_mma_wait(num_outstanding=0, deps=[product])"
INSIDE = "inside = (offs_row[:, None] < rows) & (offs_column[None, :] < columns)"
EMPTY_INIT = "mbarrier.init(empty.index(stage), count=2)"
# what is replaced, by what, the error and what it says
MUTANTS = {
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
        (RaceError, DeadlockError),
        "overwrites|before the wait|waits",
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
        "more than its phase awaits|overwrites|before the wait|waits",
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


def mutant(folder: Path, replaced: tuple[str, ...]) -> ModuleType:
    """gluon_gemm with texts replaced: old, new, old, new ..."""
    text = Path(gluon_gemm.__file__).read_text()
    for old, new in zip(replaced[::2], replaced[1::2], strict=True):
        assert text.count(old) == 1, (old, text.count(old))
        text = text.replace(old, new)
    path = folder / "mutant_gemm.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location("mutant_gemm", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_found(name: str, tmp_path: Path) -> None:
    replaced, error, message = MUTANTS[name]
    module = mutant(tmp_path, replaced)
    for seed in range(9):
        with pytest.raises(error, match=message) as caught:
            multiply(module, (300, 136, 320), seed=seed, tma_store=error is not BoundsError)
        print(seed, caught.type.__name__, caught.value)


def test_store_without_a_wait(tmp_path: Path) -> None:
    module = mutant(tmp_path, ("tma.store_wait(0)", "pass"))
    with pytest.raises(UnfinishedError, match="store_wait is missing"):
        multiply(module, (128, 64, 64))


def test_what_is_emulated_compiles() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, gluon_gemm.__file__],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for report in json.loads(done.stdout):
        assert report["wgmma"] and report["tma"] and report["shared"] < 227 << 10, report
