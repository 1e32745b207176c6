"""Reductions of emulated Gluon kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton.language as tl

from gluon_emulator.errors import OperandError
from gluon_emulator.values import Tensor, as_tensor


def _widened(input: Any, bfloat16_only: bool) -> Tensor:
    value = as_tensor(input)
    if bfloat16_only and value.dtype != tl.bfloat16:
        return value
    if value.dtype.primitive_bitwidth >= 32:
        return value
    return value.to(tl.float32 if value.dtype.is_floating() else tl.int32)


def _arranged(input: Tensor, axis: int | None) -> tuple[torch.Tensor, int]:
    if axis is None:
        return input.data.reshape(-1), 0
    if not -input.data.dim() <= axis < input.data.dim():
        raise OperandError(f"axis must be below {input.data.dim()}, got {axis}.")
    return input.data, axis


def _kept(data: torch.Tensor, axis: int | None, rank: int, keep_dims: bool) -> torch.Tensor:
    if not keep_dims:
        return data
    return data.reshape((1,) * rank) if axis is None else data.unsqueeze(axis)


def _extreme_along(largest: bool) -> Callable[..., Any]:
    def operation(
        input: Any,
        axis: int | None = None,
        return_indices: bool = False,
        return_indices_tie_break_left: bool = True,
        keep_dims: bool = False,
    ) -> Any:
        value = _widened(input, bfloat16_only=return_indices)
        data, along = _arranged(value, axis)
        rank = value.data.dim()
        if data.is_floating_point():  # a NaN loses against numbers
            missing = data.isnan()
            data = data.masked_fill(missing, float("-inf") if largest else float("inf"))
            data = torch.where(missing.all(along, keepdim=True), torch.nan, data)
        best = data.amax(along) if largest else data.amin(along)
        result = Tensor(_kept(best, axis, rank, keep_dims), value.dtype)
        if not return_indices:
            return result
        ties = (data == best.unsqueeze(along)).to(torch.int32)
        first = Tensor(_kept(ties.argmax(along).to(torch.int32), axis, rank, keep_dims))
        return result, first

    return operation


max = _extreme_along(True)
min = _extreme_along(False)


def argmax(input: Any, axis: int, tie_break_left: bool = True, keep_dims: bool = False) -> Tensor:
    """Index of the first maximum."""
    return max(input, axis, return_indices=True, keep_dims=keep_dims)[1]


def argmin(input: Any, axis: int, tie_break_left: bool = True, keep_dims: bool = False) -> Tensor:
    """Index of the first minimum."""
    return min(input, axis, return_indices=True, keep_dims=keep_dims)[1]


def sum(input: Any, axis: int | None = None, keep_dims: bool = False, dtype: Any = None) -> Tensor:
    """Sum along an axis, or of everything."""
    value = as_tensor(input)
    if dtype is None and value.dtype.is_int() and value.dtype.primitive_bitwidth < 32:
        dtype = tl.int32
    value = value if dtype is None else value.to(dtype)
    data, along = _arranged(value, axis)
    total = data.sum(along, dtype=data.dtype)
    return Tensor(_kept(total, axis, value.data.dim(), keep_dims), value.dtype)


def reduce(input: Any, axis: int | None, combine_fn: Callable[..., Any], keep_dims: bool = False):
    """Combine pairs along an axis until one is left; a tuple is reduced together."""
    several = isinstance(input, tuple | list)
    values = [as_tensor(value) for value in (input if several else (input,))]
    rank = values[0].data.dim()
    parts = [_arranged(value, axis)[0] for value in values]
    along = 0 if axis is None else axis
    while parts[0].shape[along] > 1:
        halves = [part.chunk(2, along) for part in parts]
        left = [Tensor(half[0]) for half in halves]
        right = [Tensor(half[1]) for half in halves]
        combined = combine_fn(*left, *right)
        parts = [value.data for value in (combined if several else (combined,))]
    results = [Tensor(_kept(part.squeeze(along), axis, rank, keep_dims)) for part in parts]
    return tuple(results) if several else results[0]
