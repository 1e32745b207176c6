"""What the emulator computes is what Triton's own interpreter computes; what it lacks it says."""

# kernels carry no Python types
# pyright: reportOperatorIssue=false, reportAssignmentType=false, reportGeneralTypeIssues=false
from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton.experimental.gluon", reason="the emulator emulates Triton's Gluon")

import triton
import triton.language as tl
from gluon_emulator.errors import BoundsError, EmulationError, OperandError, UnsupportedError
from gluon_emulator.interpreter import emulate, emulated
from gluon_emulator.values import scalar
from triton import knobs
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from atman_triton.kernels import primitives
from atman_triton.kernels.primitives import key_tiles, manipulate, row_blocks, softmax_step

interpreted = pytest.mark.skipif(
    not knobs.runtime.interpret, reason="kernels are compiled for this machine's GPU"
)


@triton.jit
def _integers_kernel(x_ptr, y_ptr, out_ptr, count, big, SIZE: tl.constexpr):
    offs = tl.arange(0, SIZE)
    x = tl.load(x_ptr + offs, mask=offs < count, other=-7)
    y = tl.load(y_ptr + offs)
    tl.store(out_ptr + offs, x // y)
    tl.store(out_ptr + SIZE + offs, x % y)
    tl.store(out_ptr + 2 * SIZE + offs, x * y * 77777 + big)  # wraps
    tl.store(out_ptr + 3 * SIZE + offs, (x >> 1) ^ (y & 12) | (x << 3))
    tl.store(out_ptr + 4 * SIZE + offs, tl.where(x < y, -x, ~y))
    tl.store(out_ptr + 5 * SIZE + offs, tl.cdiv(tl.abs(x), 3) + tl.sum(y) + tl.max(x, 0))
    wide = (x.to(tl.int64) * big) >> 7
    tl.store(out_ptr + 6 * SIZE + offs, wide.to(tl.int32), mask=offs > 2)
    total = count
    for i in range(count, count + 5, 2):
        if i % 2 == 0 or i > 60:
            total += i * big
        else:
            total -= i // 2
    tl.store(out_ptr + 7 * SIZE, total)


@triton.jit
def _floats_kernel(x_ptr, y_ptr, out_ptr, scale, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    offs_m, offs_n = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    offs = offs_m[:, None] * COLUMNS + offs_n[None, :]
    x, y = tl.load(x_ptr + offs), tl.load(y_ptr + offs)
    size = ROWS * COLUMNS
    tl.store(out_ptr + offs, x * 0.1 + y)
    tl.store(out_ptr + size + offs, x / (tl.abs(y) + 1) - scale)
    tl.store(out_ptr + 2 * size + offs, tl.exp2(tl.minimum(x, y).to(tl.float32)) + offs_m[:, None])
    tl.store(
        out_ptr + 3 * size + offs, tl.where(x > y, tl.log2(tl.abs(x).to(tl.float32)), float("-inf"))
    )
    best, where = tl.max(x, 1, return_indices=True)
    total = tl.sum(y.to(tl.float32), 0)
    tl.store(out_ptr + 4 * size + offs, best[:, None] + where[:, None] + total[None, :])
    tl.store(out_ptr + 5 * size + offs, tl.maximum(x, y).to(tl.float16).to(tl.float32) * 3)
    tl.store(
        out_ptr + 6 * size + offs, tl.sqrt(tl.abs(x).to(tl.float32)) * tl.min(y, 1, keep_dims=True)
    )


@triton.jit
def _primitives_kernel(x_ptr, factor_ptr, out_ptr, MODE: tl.constexpr, SIZE: tl.constexpr):
    offs = tl.arange(0, SIZE)
    square = offs[:, None] * SIZE + offs[None, :]
    x = tl.load(x_ptr + square)
    factor = tl.load(factor_ptr + offs)
    seen = primitives.in_band(offs[:, None], offs[None, :], SIZE - 3, 9, True, True)
    scores = manipulate(x, factor[None, :], None, tl.min(x, 1)[:, None], MODE, "every")
    scores = tl.where(seen, scores, float("-inf"))
    row_max = tl.full([SIZE], float("-inf"), tl.float32)
    weights, rescale, row_max, row_sum = softmax_step(
        scores, row_max, tl.zeros([SIZE], tl.float32), 0.3, False
    )
    tl.store(out_ptr + square, weights)
    tl.store(out_ptr + SIZE * SIZE + offs, rescale + row_sum)


@triton.jit
def _ranges_kernel(out_ptr, keys, rows, window, CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr):
    block = tl.program_id(0)
    first = block * 16
    a, b, c, d = key_tiles(first, first + 15, 5, keys, window, CAUSAL, HAS_WINDOW, 32)
    e, f = row_blocks(first, 5, keys, 7, rows, window, CAUSAL, HAS_WINDOW, 16, 32)
    out = out_ptr + block * 8 + tl.num_programs(0) % 2
    tl.store(out, a)
    tl.store(out + 1, b)
    tl.store(out + 2, c)
    tl.store(out + 3, d)
    tl.store(out + 4, e)
    tl.store(out + 5, f)


@interpreted
def test_integers() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-(2**31), 2**31, (64,), generator=generator).to(torch.int32)
    y = torch.randint(1, 50, (64,), generator=generator).to(torch.int32)
    y[::2] *= -1
    results = [torch.zeros(8 * 64, dtype=torch.int32) for _ in range(2)]
    _integers_kernel[(1,)](x, y, results[0], 57, 123456789, SIZE=64)
    emulated(_integers_kernel)[(1,)](x, y, results[1], 57, 123456789, SIZE=64)
    assert torch.equal(*results)


@interpreted
@pytest.mark.parametrize("dtypes", ["float32 float32", "float16 float32", "float16 float16"])
def test_floats(dtypes: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(16, 32, generator=generator).to(getattr(torch, d)) for d in dtypes.split())
    results = [torch.zeros(7, 16, 32) for _ in range(2)]
    _floats_kernel[(1,)](x, y, results[0], 0.7, ROWS=16, COLUMNS=32)
    emulate(_floats_kernel, 1, x, y, results[1], 0.7, ROWS=16, COLUMNS=32)
    torch.testing.assert_close(results[1], results[0], rtol=1e-6, atol=1e-6)


@interpreted
@pytest.mark.parametrize("mode", ["multiplicative", "min_shift", "log_additive"])
def test_primitives(mode: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x, factor = torch.randn(32, 32, generator=generator), torch.rand(32, generator=generator)
    factor[::3] = 1.0
    factor[5] = 0.0
    results = [torch.zeros(32 * 32 + 32) for _ in range(2)]
    _primitives_kernel[(1,)](x, factor, results[0], MODE=mode, SIZE=32)
    emulate(_primitives_kernel, 1, x, factor, results[1], MODE=mode, SIZE=32)
    torch.testing.assert_close(results[1], results[0], rtol=1e-6, atol=1e-6)


@interpreted
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("has_window", [False, True])
def test_ranges(causal: bool, has_window: bool) -> None:
    results = [torch.zeros(7, 8, dtype=torch.int32) for _ in range(2)]
    _ranges_kernel[(7,)](results[0], 75, 90, 20, CAUSAL=causal, HAS_WINDOW=has_window)
    emulate(_ranges_kernel, 7, results[1], 75, 90, 20, CAUSAL=causal, HAS_WINDOW=has_window)
    assert torch.equal(*results)


def test_bfloat16_is_rounded_after_each_operation() -> None:
    x = torch.linspace(0.1, 3, 64).to(torch.bfloat16)
    out = torch.zeros(64, dtype=torch.bfloat16)

    emulate(_bfloat16_kernel, 1, x, out)

    assert torch.equal(out, (x * x).to(torch.bfloat16) + torch.tensor(0.3, dtype=torch.bfloat16))


@gluon.jit
def _bfloat16_kernel(x_ptr, out_ptr):
    offs = gl.arange(0, 64)
    x = gl.load(x_ptr + offs)
    gl.static_assert(x.dtype == x_ptr.dtype.element_ty)
    gl.store(out_ptr + offs, x * x + 0.3)


@gluon.jit
def _largest(a, a_index, b, b_index):
    first = (a > b) | ((a == b) & (a_index < b_index))
    return gl.where(first, a, b), gl.where(first, a_index, b_index)


@gluon.jit
def _reduce_kernel(x_ptr, out_ptr):
    layout: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [4, 1], [1, 0])
    offs_m = gl.arange(0, 16, layout=gl.SliceLayout(1, layout))[:, None]
    offs_n = gl.arange(0, 32, layout=gl.SliceLayout(0, layout))[None, :]
    x = gl.load(x_ptr + offs_m * 32 + offs_n)
    best, index = gl.reduce((x, offs_n + offs_m * 0), 1, _largest)
    out = out_ptr + gl.arange(0, 16, layout=gl.SliceLayout(1, layout))
    gl.store(out, best)
    gl.store(out + 16, index.to(gl.float32))


def test_reduce_with_a_function() -> None:
    x = torch.randn(16, 32, generator=torch.Generator().manual_seed(0))
    x[3, 7] = x[3, 20] = 9.0
    out = torch.zeros(2, 16)
    emulate(_reduce_kernel, 1, x, out)
    assert torch.equal(out[0], x.amax(1)) and torch.equal(out[1], x.argmax(1).float())


@gluon.jit
def _misuse_kernel(x_ptr, CASE: gl.constexpr):
    offs = gl.arange(0, 8)
    x = gl.load(x_ptr + offs)
    if CASE == "load beyond":
        gl.load(x_ptr + 1 + offs)
    elif CASE == "store before":
        gl.store(x_ptr - 1 + offs, x)
    elif CASE == "rank":
        x = x + x[:, None]
    elif CASE == "condition":
        if x > 0:
            pass
    elif CASE == "hint":
        gl.multiple_of(gl.program_id(0) + 3, 2)
    elif CASE == "assume":
        gl.assume(gl.program_id(0) > 0)
    elif CASE == "assert":
        gl.static_assert(CASE == "", "no")
    elif CASE == "gather":
        gl.gather(x, offs, 0)
    elif CASE == "dot":
        tl.dot(x, x)
    elif CASE == "philox":
        tl.philox(0, offs, offs, offs, offs)
    elif CASE == "method":
        x.cumsum(0)
    elif CASE == "constant":
        _constant(gl.program_id(0))
    elif CASE == "arange":
        gl.arange(0, 6)
    elif CASE == "exponential":
        gl.exp2(x.to(gl.float16))
    elif CASE == "mask":
        gl.load(x_ptr + offs, mask=offs)


@gluon.jit
def _constant(SIZE: gl.constexpr):
    return SIZE


MISUSES = {
    "load beyond": (BoundsError, "A load from x_ptr must stay in its 8 elements.*1 to 8"),
    "store before": (BoundsError, "A store to x_ptr must stay in its 8 elements.*-1 to 6"),
    "rank": (OperandError, r"\[8\] and \[8, 1\] do not broadcast"),
    "condition": (OperandError, r"condition must be a scalar, got shape \[8\]"),
    "hint": (EmulationError, r"multiple_of\(3, 2\) does not hold"),
    "assume": (EmulationError, "assume"),
    "assert": (EmulationError, "static_assert failed: no"),
    "gather": (UnsupportedError, "no .*gather"),
    "dot": (UnsupportedError, "no .*dot"),
    "philox": (UnsupportedError, "no .*philox"),
    "method": (UnsupportedError, "no method cumsum"),
    "constant": (OperandError, "SIZE of _constant must be a constant"),
    "arange": (OperandError, "power of two"),
    "exponential": (OperandError, "exp2 needs float32 or float64, got fp16"),
    "mask": (OperandError, "must be int1, got int32"),
}


@pytest.mark.parametrize("case", MISUSES)
def test_misuse(case: str) -> None:
    error, message = MISUSES[case]
    memory = torch.zeros(16)  # neighbours belong to the same storage
    with pytest.raises(error, match=message):
        emulate(_misuse_kernel, 1, memory[4:12], case)


def test_masked_lanes_are_poison() -> None:
    x, out = torch.zeros(4), torch.zeros(8)
    emulate(_masked_kernel, 1, x, out, 4)
    assert torch.equal(out.isnan(), torch.arange(8) >= 4)


@gluon.jit
def _masked_kernel(x_ptr, out_ptr, count):
    offs = gl.arange(0, 8)
    gl.store(out_ptr + offs, gl.load(x_ptr + offs, mask=offs < count))


def test_scalars() -> None:
    largest = scalar(2**31 - 1)
    assert int(largest + 1) == -(2**31)
    assert int(largest.to(tl.int64) + 1) == 2**31
    assert scalar(2**31).dtype == tl.int64
    assert int(scalar(-7) // 2) == -3 and int(scalar(-7) % 2) == -1
    assert (scalar(1) * 0.5).dtype == tl.float32 and (scalar(1) / 2).dtype == tl.float32
