"""Tensors and scalars of emulated Gluon kernels, held in torch tensors.

What dtype an operation has is asked of Triton itself. Layouts are ignored: compiling checks them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
import triton.language as tl
from triton.experimental.gluon.language import AutoLayout
from triton.language.semantic import TritonSemantic

from gluon_emulator.errors import OperandError, UnsupportedError

TORCH = {
    tl.int1: torch.bool,
    tl.int8: torch.int8,
    tl.int16: torch.int16,
    tl.int32: torch.int32,
    tl.int64: torch.int64,
    tl.uint8: torch.uint8,
    tl.float16: torch.float16,
    tl.bfloat16: torch.bfloat16,
    tl.float32: torch.float32,
    tl.float64: torch.float64,
}
TRITON = {dtype: name for name, dtype in TORCH.items()}
_RULES = object.__new__(TritonSemantic)


@functools.cache
def torch_dtype(dtype: tl.dtype) -> torch.dtype:
    """The torch dtype that holds ``dtype``."""
    if dtype not in TORCH:
        raise UnsupportedError(f"The emulator has no dtype {dtype}.")
    return TORCH[dtype]


@functools.cache
def _common(a: tl.dtype, a_scalar: bool, b: tl.dtype, b_scalar: bool, divides: bool) -> tl.dtype:
    return _RULES.computation_type_impl(a, a_scalar, b, b_scalar, divides)


def poison(dtype: torch.dtype) -> float | int | bool:
    """What stands where nothing was written: it spoils every result that uses it."""
    if dtype.is_floating_point:
        return math.nan
    return True if dtype == torch.bool else torch.iinfo(dtype).max


class Tensor:
    """A tensor or a scalar known at run time only; immutable."""

    __slots__ = ("data", "dtype")

    def __init__(self, data: torch.Tensor, dtype: tl.dtype | None = None) -> None:
        self.data = data
        self.dtype = TRITON[data.dtype] if dtype is None else dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Its extents; () for a scalar."""
        return tuple(self.data.shape)

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.data.numel()

    @property
    def type(self) -> Any:
        """The part of a Triton type that kernels ask for."""
        return SimpleNamespace(
            scalar=self.dtype,
            element_ty=self.dtype,
            shape=self.shape,
            layout=AutoLayout(),
            is_block=lambda: self.data.dim() > 0,
        )

    @property
    def T(self) -> Tensor:
        """Transpose of a matrix."""
        return Tensor(self.data.transpose(0, 1), self.dtype)

    def to(self, dtype: Any, fp_downcast_rounding: Any = None, bitcast: bool = False) -> Tensor:
        """Another dtype; floats go to integers towards zero."""
        if fp_downcast_rounding not in (None, "rtne"):
            raise UnsupportedError(f"to(fp_downcast_rounding={fp_downcast_rounding!r})")
        target = torch_dtype(dtype)
        if bitcast:
            return Tensor(self.data.view(target), dtype)
        return Tensor(self.data.to(target), dtype)

    cast = to

    def __getitem__(self, index: Any) -> Tensor:
        return Tensor(self.data[checked_index(index, self.data.dim())], self.dtype)

    def __bool__(self) -> bool:
        if self.data.dim() > 0:
            raise OperandError(f"A condition must be a scalar, got shape {list(self.shape)}.")
        return bool(self.data)

    def __index__(self) -> int:
        if self.data.dim() > 0 or self.data.is_floating_point():
            raise OperandError(f"An integer scalar is needed, got {self!r}.")
        return int(self.data)

    __int__ = __index__
    __hash__ = object.__hash__

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise UnsupportedError(f"The emulator has no method {name} of tensors.")

    def __repr__(self) -> str:
        value = f", {self.data.item()}" if self.data.dim() == 0 else ""
        return f"Tensor({list(self.shape)}, {self.dtype}{value})"

    def __neg__(self) -> Tensor:
        return Tensor(-self.data, self.dtype)

    def __invert__(self) -> Tensor:
        return Tensor(~self.data, self.dtype)

    def __abs__(self) -> Tensor:
        return Tensor(self.data.abs(), self.dtype)


def checked_index(index: Any, rank: int) -> Any:
    """Only None and ``:`` are allowed, one ``:`` for each axis."""
    parts = index if isinstance(index, tuple) else (index,)
    kept = [part for part in parts if part is not None]
    if any(part != slice(None) for part in kept) or len(kept) != rank:
        raise OperandError(f"A tensor of {rank} axes is indexed with None and :, got {index!r}.")
    return index


def scalar(value: bool | int | float) -> Tensor:
    """A Python number as the run-time scalar that Triton makes of it."""
    if isinstance(value, bool):
        return Tensor(torch.tensor(value))
    if isinstance(value, int):
        narrow = -(2**31) <= value < 2**31
        return Tensor(torch.tensor(value, dtype=torch.int32 if narrow else torch.int64))
    if isinstance(value, float):
        return Tensor(torch.tensor(value, dtype=torch.float32))
    raise OperandError(f"A number or a tensor is needed, got {type(value).__name__}.")


def as_tensor(value: Any) -> Tensor:
    """A tensor; refuses accumulators that are not finished."""
    if isinstance(value, Tensor):
        return value
    if hasattr(value, "refuse"):
        value.refuse()
    return scalar(value)


def broadcast_shape(a: Sequence[int], b: Sequence[int]) -> tuple[int, ...]:
    """Gluon's rule: scalars fit everything, other ranks must agree."""
    if not a or not b:
        return tuple(a or b)
    if len(a) != len(b) or any(m != n and 1 not in (m, n) for m, n in zip(a, b, strict=True)):
        raise OperandError(f"Shapes {list(a)} and {list(b)} do not broadcast.")
    return tuple(max(m, n) for m, n in zip(a, b, strict=True))


def together(a: Any, b: Any, divides: bool = False) -> tuple[torch.Tensor, torch.Tensor, tl.dtype]:
    """Both operands in the dtype that Triton would compute in."""
    number_a, number_b = not hasattr(a, "dtype"), not hasattr(b, "dtype")
    left, right = as_tensor(a), as_tensor(b)
    dtype = _common(left.dtype, number_a, right.dtype, number_b, divides)
    broadcast_shape(left.data.shape, right.data.shape)
    target = torch_dtype(dtype)
    return left.data.to(target), right.data.to(target), dtype


class Addresses:
    """What defines its own arithmetic with tensors: pointers."""


def _arithmetic(name: str, function: Callable[..., torch.Tensor]) -> Callable[..., Any]:
    def operation(a: Any, b: Any) -> Any:
        if isinstance(b, Addresses):
            return NotImplemented
        x, y, dtype = together(a, b)
        if dtype == tl.int1:
            raise UnsupportedError(f"{name} of two int1; compare or convert them.")
        return Tensor(function(x, y), dtype)

    return operation


def _bitwise(name: str, function: Callable[..., torch.Tensor]) -> Callable[..., Any]:
    def operation(a: Any, b: Any) -> Tensor:
        x, y, dtype = together(a, b)
        if dtype.is_floating():
            raise OperandError(f"{name} needs integers, got {dtype}.")
        return Tensor(function(x, y), dtype)

    return operation


def _comparison(function: Callable[..., torch.Tensor]) -> Callable[..., Tensor]:
    def operation(a: Any, b: Any) -> Tensor:
        x, y, _ = together(a, b)
        return Tensor(function(x, y), tl.int1)

    return operation


def divide(a: Any, b: Any) -> Tensor:
    """``/``: integers become float32."""
    x, y, dtype = together(a, b, divides=True)
    if not dtype.is_floating():
        x, y, dtype = x.to(torch.float32), y.to(torch.float32), tl.float32
    return Tensor(x / y, dtype)


def floor_divide(a: Any, b: Any) -> Tensor:
    """``//`` of integers, towards zero as in C."""
    x, y, dtype = together(a, b, divides=True)
    if dtype.is_floating():
        raise OperandError(f"// needs integers, got {dtype}.")
    return Tensor(torch.div(x, y, rounding_mode="trunc"), dtype)


def remainder(a: Any, b: Any) -> Tensor:
    """``%`` with the sign of the dividend, as in C."""
    x, y, dtype = together(a, b, divides=True)
    return Tensor(torch.fmod(x, y), dtype)


OPERATORS: dict[str, Callable[..., Any]] = {
    "add": _arithmetic("+", torch.add),
    "sub": _arithmetic("-", torch.sub),
    "mul": _arithmetic("*", torch.mul),
    "truediv": divide,
    "floordiv": floor_divide,
    "mod": remainder,
    "and": _bitwise("&", torch.bitwise_and),
    "or": _bitwise("|", torch.bitwise_or),
    "xor": _bitwise("^", torch.bitwise_xor),
    "lshift": _bitwise("<<", torch.bitwise_left_shift),
    "rshift": _bitwise(">>", torch.bitwise_right_shift),
}
COMPARISONS = {
    "lt": torch.lt,
    "le": torch.le,
    "gt": torch.gt,
    "ge": torch.ge,
    "eq": torch.eq,
    "ne": torch.ne,
}


def _reflected(operation: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, other: operation(other, self)


for _name, _operation in OPERATORS.items():
    setattr(Tensor, f"__{_name}__", _operation)
    setattr(Tensor, f"__r{_name}__", _reflected(_operation))
for _name, _function in COMPARISONS.items():
    setattr(Tensor, f"__{_name}__", _comparison(_function))
