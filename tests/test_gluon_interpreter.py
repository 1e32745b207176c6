"""The emulator of Gluon runs correct kernels, which also compile for sm_90."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton.experimental.gluon", reason="the emulator emulates Triton's Gluon")

import triton
from gluon_emulator import attention, gemm
from gluon_emulator.cases import GLUON, attend, multiply

HERE = Path(__file__).parent


@pytest.mark.parametrize("dtype", GLUON, ids=str)
@pytest.mark.parametrize("tma_store", [True, False], ids=["tma", "pointers"])
@pytest.mark.parametrize("seed", range(9))
def test_gemm(dtype: torch.dtype, tma_store: bool, seed: int) -> None:
    a, b, c = multiply(
        gemm,
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


@pytest.mark.parametrize("dtype", GLUON, ids=str)
@pytest.mark.parametrize("seed", range(9))
def test_attention(dtype: torch.dtype, seed: int) -> None:
    query, key, value, factor, out = attend(
        attention, (2, 100, 300), dtype=dtype, seed=seed, stages=2 + seed % 2
    )
    scores = query.double() @ key.double().mT * factor.double() * 0.125
    weights = scores.softmax(-1)
    exact = weights @ value.double()
    # weights are rounded to the dtype, sums are not; then the result is rounded once
    half = torch.finfo(dtype).eps / 2
    bound = half * (weights @ value.double().abs() + exact.abs()) * 1.01
    if dtype == torch.float16:  # weights below its smallest normal number lose their relative error
        bound = bound + 300 * 2**-25 * value.double().abs().amax(-2, keepdim=True)
    excess = (out.double() - exact).abs() - bound - 1e-5
    print(f"largest error {(out.double() - exact).abs().max():.3e}, excess {excess.max():.3e}")
    assert bool((excess <= 0).all())


@pytest.mark.skipif(
    triton.__version__ < "3.7", reason="triton 3.6 stops at an assertion on the TMA store"
)
def test_what_is_emulated_compiles() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "gluon_emulator.compile", "gemm", "attention"],
        env=environment | {"PYTHONPATH": f"{HERE.parent}{os.pathsep}{HERE}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    reports = json.loads(done.stdout)
    assert [report["kernel"] for report in reports] == ["gemm", "gemm", "attention"]
    for report in reports:
        assert report["wgmma"] and report["tma"] and report["shared"] < 227 << 10, report
