"""Pointers of emulated Gluon kernels, and what is read and written through them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton.language as tl

from gluon_emulator.errors import BoundsError, OperandError, UnsupportedError
from gluon_emulator.values import (
    TRITON,
    Addresses,
    Tensor,
    as_tensor,
    broadcast_shape,
    checked_index,
    poison,
)


def extent(shape: Sequence[int], strides: Sequence[int]) -> int:
    """Elements from the first to the last one."""
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


class Pointer(Addresses):
    """Addresses of elements of a tensor that the kernel was given."""

    __slots__ = ("argument", "dtype", "element", "flat", "high", "low", "offsets")

    def __init__(self, argument: str, tensor: torch.Tensor) -> None:
        self.argument = argument
        self.element = TRITON[tensor.dtype]
        self.dtype = tl.pointer_type(self.element)
        self.low = tensor.storage_offset()
        self.high = self.low + extent(tensor.shape, tensor.stride())
        length = tensor.untyped_storage().nbytes() // tensor.element_size()
        self.flat = tensor.detach().as_strided((length,), (1,), 0)
        self.offsets = torch.tensor(self.low, dtype=torch.int64)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the addresses."""
        return tuple(self.offsets.shape)

    def _at(self, offsets: torch.Tensor) -> Pointer:
        copy = object.__new__(Pointer)
        for name in ("argument", "dtype", "element", "flat", "high", "low"):
            setattr(copy, name, getattr(self, name))
        copy.offsets = offsets
        return copy

    def moved(self, distance: Tensor) -> Pointer:
        """The addresses ``distance`` elements further."""
        if distance.data.is_floating_point():
            raise OperandError(f"Pointers are moved by integers, got {distance.dtype}.")
        broadcast_shape(self.shape, distance.shape)
        return self._at(self.offsets + distance.data.to(torch.int64))

    def __add__(self, other: Any) -> Pointer:
        return self.moved(as_tensor(other))

    __radd__ = __add__

    def __sub__(self, other: Any) -> Pointer:
        return self.moved(-as_tensor(other).to(tl.int64))

    def __getitem__(self, index: Any) -> Pointer:
        return self._at(self.offsets[checked_index(index, self.offsets.dim())])

    def checked(self, mask: Any, action: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Indices into ``flat`` and the mask of a load or store, both of the addresses' shape."""
        offsets, lanes = self.offsets, None
        if mask is not None:
            lanes = as_tensor(mask).data
            if lanes.dtype != torch.bool:
                raise OperandError(f"A mask must be int1, got {as_tensor(mask).dtype}.")
            if broadcast_shape(offsets.shape, lanes.shape) != tuple(offsets.shape):
                raise OperandError(
                    f"A mask must fit the pointers' shape {list(self.shape)}, "
                    f"got {list(lanes.shape)}."
                )
            lanes = lanes.expand(offsets.shape)
            used = offsets[lanes]
        else:
            used = offsets.reshape(-1)
        if used.numel():
            low, high = int(used.min()) - self.low, int(used.max()) - self.low
            if low < 0 or high >= self.high - self.low:
                raise BoundsError(
                    f"{action} {self.argument} must stay in its {self.high - self.low} elements, "
                    f"got offsets {low} to {high}."
                )
        return offsets, lanes


def load(pointer: Pointer, mask: Any = None, other: Any = None, **hints: Any) -> Tensor:
    """Read from memory; lanes that the mask excludes are ``other``, or poison."""
    _check_hints(hints)
    if not isinstance(pointer, Pointer):
        raise OperandError(f"load needs pointers, got {type(pointer).__name__}.")
    offsets, lanes = pointer.checked(mask, "A load from")
    if lanes is None:
        return Tensor(pointer.flat[offsets], pointer.element)
    dtype = pointer.flat.dtype
    filler = poison(dtype) if other is None else as_tensor(other).data.to(dtype)
    result = torch.empty(offsets.shape, dtype=dtype).copy_(torch.as_tensor(filler, dtype=dtype))
    result[lanes] = pointer.flat[offsets[lanes]]
    return Tensor(result, pointer.element)


def store(pointer: Pointer, value: Any, mask: Any = None, **hints: Any) -> None:
    """Write to memory the lanes that the mask includes."""
    _check_hints(hints)
    if not isinstance(pointer, Pointer):
        raise OperandError(f"store needs pointers, got {type(pointer).__name__}.")
    offsets, lanes = pointer.checked(mask, "A store to")
    data = as_tensor(value).data.to(pointer.flat.dtype)
    if broadcast_shape(offsets.shape, data.shape) != tuple(offsets.shape):
        raise OperandError(f"A store to {list(offsets.shape)} addresses got {list(data.shape)}.")
    data = data.expand(offsets.shape)
    if lanes is None:
        pointer.flat[offsets] = data
    else:
        pointer.flat[offsets[lanes]] = data[lanes]


def _check_hints(hints: dict[str, Any]) -> None:
    unknown = set(hints) - {"cache_modifier", "eviction_policy", "volatile"}
    if unknown:
        raise UnsupportedError(f"The emulator has no option {', '.join(sorted(unknown))}.")


def atomic_add(pointer: Pointer, val: Any, mask: Any = None, sem: Any = None, scope: Any = None):
    """Add, and return what was there."""
    old = load(pointer, mask)
    offsets, _ = pointer.checked(mask, "An atomic_add to")
    if offsets.unique().numel() != offsets.numel():
        raise UnsupportedError("atomic_add of several values to one address.")
    store(pointer, old + val, mask)
    return old
