"""The functions of ``triton.experimental.gluon.language`` and ``triton.language``, emulated."""

from __future__ import annotations

import builtins
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import triton.language as tl

from gluon_emulator.errors import EmulationError, OperandError
from gluon_emulator.machine import machine
from gluon_emulator.pointers import atomic_add, load, store
from gluon_emulator.reductions import argmax, argmin, max, min, reduce, sum
from gluon_emulator.shapes import (
    broadcast,
    broadcast_to,
    expand_dims,
    join,
    permute,
    reshape,
    split,
)
from gluon_emulator.shared import allocate_shared_memory
from gluon_emulator.values import (
    OPERATORS,
    Tensor,
    as_tensor,
    broadcast_shape,
    scalar,
    together,
    torch_dtype,
)


def runtime_range(*bounds: Any, **hints: Any) -> Iterator[Tensor]:
    """``range`` of a kernel: its numbers are int32 scalars, whatever its bounds."""
    for number in builtins.range(*(int(bound) for bound in bounds)):
        yield scalar(number)


def larger(first: Any, *others: Any) -> Any:
    """``max`` of a kernel."""
    runtime = any(isinstance(value, Tensor) for value in (first, *others))
    return functools.reduce(maximum if runtime else builtins.max, others, first)


def smaller(first: Any, *others: Any) -> Any:
    """``min`` of a kernel."""
    runtime = any(isinstance(value, Tensor) for value in (first, *others))
    return functools.reduce(minimum if runtime else builtins.min, others, first)


def static_range(*bounds: int) -> builtins.range:
    """A range of constants."""
    if any(isinstance(bound, Tensor) for bound in bounds):
        raise OperandError("static_range needs constants, got run-time values.")
    return builtins.range(*bounds)


def program_id(axis: int) -> Tensor:
    """Index of the program."""
    return scalar(machine().program[axis])


def num_programs(axis: int) -> Tensor:
    """Number of programs."""
    return scalar(machine().grid[axis])


def num_warps() -> int:
    """Warps of the partition."""
    return machine().current.warps


def num_ctas() -> int:
    """Clusters are not emulated."""
    return 1


def barrier(*, cluster: bool = False) -> None:
    """The threads of the partition meet."""
    machine().current.meet()
    machine().pause()


def full(shape: Sequence[int], value: Any, dtype: Any, layout: Any = None) -> Tensor:
    """A tensor of one value."""
    sizes = tuple(int(size) for size in shape)
    filler = as_tensor(value).data.to(torch_dtype(dtype))
    return Tensor(filler.expand(sizes).clone(), dtype)


def zeros(shape: Sequence[int], dtype: Any, layout: Any = None) -> Tensor:
    """A tensor of zeros."""
    return full(shape, 0, dtype)


def full_like(
    input: Tensor, value: Any, shape: Any = None, dtype: Any = None, layout: Any = None
) -> Tensor:
    """A tensor of one value with another's shape and dtype."""
    return full(shape or as_tensor(input).shape, value, dtype or input.dtype)


def zeros_like(input: Tensor, shape: Any = None, dtype: Any = None, layout: Any = None) -> Tensor:
    """A tensor of zeros with another's shape and dtype."""
    return full_like(input, 0, shape, dtype)


def arange(start: int, end: int, layout: Any = None) -> Tensor:
    """The int32 numbers from ``start`` up to ``end``."""
    size = end - start
    if size < 1 or size & (size - 1):
        raise OperandError(f"arange needs a power of two of numbers, got {size}.")
    return Tensor(torch.arange(start, end, dtype=torch.int32))


def convert_layout(value: Tensor, layout: Any, assert_trivial: bool = False) -> Tensor:
    """The tensor: layouts are not emulated."""
    return as_tensor(value)


def to_tensor(value: Any) -> Tensor:
    """A number as a run-time scalar."""
    return as_tensor(value)


def cast(input: Any, dtype: Any, fp_downcast_rounding: Any = None, bitcast: bool = False) -> Tensor:
    """Another dtype."""
    return as_tensor(input).to(dtype, fp_downcast_rounding, bitcast)


def where(condition: Any, x: Any, y: Any) -> Tensor:
    """``x`` where the condition holds, else ``y``."""
    chosen = as_tensor(condition)
    a, b, dtype = together(x, y)
    broadcast_shape(chosen.shape, broadcast_shape(tuple(a.shape), tuple(b.shape)))
    return Tensor(torch.where(chosen.data.to(torch.bool), a, b), dtype)


def _extremum(
    floats: Callable[..., torch.Tensor], integers: Callable[..., torch.Tensor]
) -> Callable[..., Tensor]:
    def operation(x: Any, y: Any, propagate_nan: Any = tl.PropagateNan.NONE) -> Tensor:
        a, b, dtype = together(x, y)
        quiet = dtype.is_floating() and propagate_nan != tl.PropagateNan.ALL
        return Tensor((floats if quiet else integers)(a, b), dtype)

    return operation


maximum = _extremum(torch.fmax, torch.maximum)
minimum = _extremum(torch.fmin, torch.minimum)


def cdiv(x: Any, div: Any) -> Any:
    """Division of integers, rounded up."""
    return (x + (div - 1)) // div


def fma(x: Any, y: Any, z: Any) -> Tensor:
    """``x * y + z``, rounded once."""
    a, b, _ = together(x, y)
    wide, c, dtype = together(Tensor(a), z)
    exact = wide.double() * b.double() + c.double()
    return Tensor(exact.to(torch_dtype(dtype)), dtype)


def _elementwise(name: str, function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., Any]:
    def operation(x: Any) -> Tensor:
        value = as_tensor(x)
        if name != "abs" and value.dtype not in (tl.float32, tl.float64):
            raise OperandError(f"{name} needs float32 or float64, got {value.dtype}.")
        return Tensor(function(value.data), value.dtype)

    operation.__name__ = name
    return operation


ELEMENTWISE = {
    name: _elementwise(name, getattr(torch, name))
    for name in "exp exp2 log log2 sqrt rsqrt sin cos erf floor ceil abs".split()
} | {"sqrt_rn": _elementwise("sqrt_rn", torch.sqrt)}


def fdiv(x: Any, y: Any, ieee_rounding: bool = False) -> Tensor:
    """Quotient of floats."""
    return OPERATORS["truediv"](x, y)


def div_rn(x: Any, y: Any) -> Tensor:
    """Quotient of floats."""
    return OPERATORS["truediv"](x, y)


def static_assert(condition: Any, message: str = "") -> None:
    """A condition on constants."""
    if not condition:
        raise EmulationError(f"static_assert failed: {message}")


def device_assert(condition: Any, message: str = "", mask: Any = None) -> None:
    """A condition on every element."""
    if not bool(as_tensor(condition).data.all()):
        raise EmulationError(f"device_assert failed: {message}")


def assume(condition: Any) -> None:
    """What the compiler may rely on, checked."""
    if not bool(as_tensor(condition).data.all()):
        raise EmulationError("assume() is told something that does not hold.")


def multiple_of(input: Any, values: Any) -> Any:
    """A hint, checked for scalars."""
    if isinstance(input, Tensor) and not input.shape and isinstance(values, int):
        if int(input) % values:
            raise EmulationError(f"multiple_of({int(input)}, {values}) does not hold.")
    return input


def hint(input: Any, values: Any) -> Any:
    """A hint that is not checked."""
    return input


def ignore(*arguments: Any, **options: Any) -> None:
    """Prints nothing."""


def warp_specialize(
    functions_and_args: Sequence[tuple[Callable[..., Any], Any]],
    worker_num_warps: Sequence[int],
    worker_num_regs: Sequence[int] | None = None,
) -> Any:
    """Run the functions beside one another, the first one in the default partition."""
    for count in (worker_num_warps, worker_num_regs):
        if count is not None and len(count) != len(functions_and_args) - 1:
            raise OperandError(
                f"warp_specialize needs {len(functions_and_args) - 1} numbers of warps and "
                f"registers, got {len(count)}."
            )
    return machine().specialize(list(functions_and_args), list(worker_num_warps))


FUNCTIONS: dict[str, Any] = ELEMENTWISE | {
    "range": runtime_range,
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": OPERATORS["mul"],
    "max_contiguous": hint,
    "max_constancy": hint,
    "static_print": ignore,
    "device_print": ignore,
    "debug_barrier": barrier,
    "thread_barrier": barrier,
    "allocate_shared_memory": allocate_shared_memory,
    "tensor": Tensor,
    "tuple": builtins.tuple,
    "set_auto_layout": convert_layout,
}
for _function in (
    static_range, program_id, num_programs, num_warps, num_ctas, barrier, full, zeros, full_like,
    zeros_like, arange, convert_layout, to_tensor, cast, expand_dims, broadcast, broadcast_to,
    reshape, permute, join, split, where, cdiv, fma, fdiv, div_rn, argmax, argmin, sum, reduce,
    load, store, atomic_add, static_assert, device_assert, assume, multiple_of, warp_specialize,
):  # fmt: skip
    FUNCTIONS[_function.__name__] = _function
FUNCTIONS |= {"max": max, "min": min, "maximum": maximum, "minimum": minimum}

for _name in (
    "expand_dims broadcast_to reshape permute sum max min argmax argmin reduce cdiv exp exp2 log "
    "log2 sqrt rsqrt sin cos abs split"
).split():
    setattr(Tensor, _name, FUNCTIONS[_name])
