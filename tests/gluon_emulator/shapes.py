"""Functions of emulated Gluon that change shapes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from gluon_emulator.errors import OperandError
from gluon_emulator.pointers import Pointer
from gluon_emulator.values import Tensor, as_tensor, broadcast_shape, together


def expand_dims(input: Any, axis: int) -> Any:
    """An axis of size 1 more."""
    if isinstance(input, Pointer):
        rank = len(input.shape) + 1
        return input[tuple(None if i == axis % rank else slice(None) for i in range(rank))]
    return Tensor(as_tensor(input).data.unsqueeze(axis), input.dtype)


def broadcast(input: Any, other: Any) -> tuple[Tensor, Tensor]:
    """Both in their common shape."""
    a, b = as_tensor(input), as_tensor(other)
    shape = broadcast_shape(a.shape, b.shape)
    return Tensor(a.data.expand(shape), a.dtype), Tensor(b.data.expand(shape), b.dtype)


def broadcast_to(input: Any, *shape: Any) -> Tensor:
    """Axes of size 1 stretched."""
    a, sizes = as_tensor(input), _sizes(shape)
    if broadcast_shape(a.shape, sizes) != sizes:
        raise OperandError(f"Shape {list(a.shape)} does not broadcast to {list(sizes)}.")
    return Tensor(a.data.expand(sizes), a.dtype)


def _sizes(shape: Sequence[Any]) -> tuple[int, ...]:
    listed = shape[0] if len(shape) == 1 and isinstance(shape[0], list | tuple) else shape
    return tuple(int(size) for size in listed)


def reshape(input: Any, *shape: Any, can_reorder: bool = False) -> Tensor:
    """Another shape."""
    return Tensor(as_tensor(input).data.reshape(_sizes(shape)), input.dtype)


def permute(input: Any, *dims: Any) -> Tensor:
    """Other order of axes."""
    return Tensor(as_tensor(input).data.permute(_sizes(dims)), input.dtype)


def join(a: Any, b: Any) -> Tensor:
    """Both along a new last axis."""
    x, y, dtype = together(a, b)
    return Tensor(torch.stack(torch.broadcast_tensors(x, y), -1), dtype)


def split(a: Tensor) -> tuple[Tensor, Tensor]:
    """The halves of a last axis of size 2."""
    if as_tensor(a).shape[-1:] != (2,):
        raise OperandError(f"split needs a last axis of 2, got {list(a.shape)}.")
    return Tensor(a.data[..., 0], a.dtype), Tensor(a.data[..., 1], a.dtype)
