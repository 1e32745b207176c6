"""Emulated TMA and warpgroup MMA of Hopper; see gluon_barriers.py for the mbarriers.

Everything asynchronous happens as late as the program allows: products and stores when they are
waited for, copies when the schedule draws them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl
from gluon_barriers import Barrier, barrier_of
from gluon_machine import (
    AccumulatorError,
    Agent,
    BarrierError,
    BoundsError,
    OperandError,
    Partition,
    UnsupportedError,
    join,
    machine,
    place,
)
from gluon_shared import SharedMemory, use
from gluon_values import TRITON, Tensor, as_tensor, extent, poison, scalar
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor


class Descriptor:
    """A host TensorDescriptor as a kernel sees it."""

    def __init__(self, argument: str, host: TensorDescriptor) -> None:
        base = host.base.detach()
        self.argument = argument
        self.sizes = tuple(int(size) for size in host.shape)
        self.block_shape = [int(size) for size in host.block_shape]
        self.dtype = TRITON[base.dtype]
        self.layout = host.layout
        self.fill = poison(base.dtype) if host.padding == "nan" else 0
        strides = tuple(int(stride) for stride in host.strides)
        last = base.storage_offset() + extent(self.sizes, strides)
        if last * base.element_size() > base.untyped_storage().nbytes():
            raise BoundsError(
                f"{argument} must lie in its tensor, got shape {list(self.sizes)} and strides "
                f"{list(strides)} for a tensor of shape {list(base.shape)}."
            )
        self.data = base.as_strided(self.sizes, strides, base.storage_offset())
        self.shape = tuple(scalar(size) for size in self.sizes)
        self.strides = tuple(scalar(stride).to(tl.int64) for stride in strides)
        self.block_type = tl.block_type(self.dtype, self.block_shape)
        self.nbytes = self.data.element_size() * torch.Size(self.block_shape).numel()
        self.nbytes_per_cta = self.nbytes

    def check(self, coord: Sequence[Any], memory: SharedMemory) -> list[int]:
        """The coordinates as integers, once shape and dtype agree with the shared memory."""
        if len(coord) != len(self.sizes):
            raise OperandError(
                f"{self.argument} needs {len(self.sizes)} coordinates, got {len(coord)}."
            )
        if memory.dtype != self.dtype or list(memory.shape) != self.block_shape:
            raise OperandError(
                f"{self.argument} moves blocks {self.block_shape} of {self.dtype}, got {memory!r}."
            )
        start = [int(c) for c in coord]
        if start[-1] * self.data.element_size() % 16:
            raise OperandError(
                f"The last coordinate of {self.argument} must be a multiple of 16 bytes, "
                f"got element {start[-1]}."
            )
        return start

    def window(self, start: Sequence[int]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        """What lies inside: its place in the block and in the tensor."""
        inside, outside = [], []
        for first, block, size in zip(start, self.block_shape, self.sizes, strict=True):
            low, high = max(first, 0), min(first + block, size)
            high = max(low, high)
            inside.append(slice(low - first, high - first) if high > low else slice(0, 0))
            outside.append(slice(low, high) if high > low else slice(0, 0))
        return tuple(inside), tuple(outside)


@dataclass(eq=False)
class Copy:
    """A TMA copy to shared memory in flight."""

    descriptor: Descriptor
    start: list[int]
    memory: SharedMemory
    barrier: Barrier
    agent: Agent
    time: int
    place: str

    @property
    def what(self) -> str:
        """For messages."""
        return f"the TMA copy of {self.descriptor.argument} to {self.memory.label}"

    def complete(self) -> None:
        """The bytes land and the barrier learns of them."""
        inside, outside = self.descriptor.window(self.start)
        self.memory.view.fill_(self.descriptor.fill)
        self.memory.view[inside] = self.descriptor.data[outside]
        self.barrier.landed(self.descriptor.nbytes)


def async_copy_global_to_shared(
    tensor_desc: Descriptor,
    coord: Sequence[Any],
    barrier: SharedMemory,
    result: SharedMemory,
    pred: Any = True,
    multicast: bool = False,
) -> None:
    """Start a copy of a block; ``barrier`` is told of its bytes."""
    if multicast:
        raise UnsupportedError("async_copy_global_to_shared(multicast=True)")
    program = machine()
    program.pause()
    start = tensor_desc.check(coord, result)
    if not pred:
        return
    target = barrier_of(barrier, "a TMA copy to")
    copy = Copy(tensor_desc, start, result, target, target.agent, target.phase + 1, place())
    target.promise(tensor_desc.nbytes, copy.what)
    use(result, copy.what, writes=True, agent=target.agent, time=target.phase + 1)
    result.view.fill_(poison(result.view.dtype))
    program.issue(copy)


@dataclass(eq=False)
class Store:
    """A TMA store whose source has not been read yet."""

    descriptor: Descriptor
    start: list[int]
    memory: SharedMemory
    place: str

    def complete(self) -> None:
        """Read the source and write what lies inside the tensor."""
        inside, outside = self.descriptor.window(self.start)
        self.descriptor.data[outside] = self.memory.view[inside]


def async_copy_shared_to_global(
    tensor_desc: Descriptor, coord: Sequence[Any], src: SharedMemory
) -> None:
    """Start a store of a block; its source is read when it is waited for."""
    machine().pause()
    partition = machine().current
    start = tensor_desc.check(coord, src)
    partition.issued_stores += 1
    agent = ("store", partition.index)
    what = f"the TMA store of {src.label} to {tensor_desc.argument}"
    use(src, what, writes=False, agent=agent, time=partition.issued_stores)
    partition.stores.append(Store(tensor_desc, start, src, place()))


def store_wait(pendings: int) -> None:
    """Until all but the ``pendings`` youngest stores of this partition have read their source."""
    partition = machine().current
    while len(partition.stores) > pendings:
        partition.stores.pop(0).complete()
    partition.clock["store", partition.index] = partition.issued_stores - len(partition.stores)
    machine().pause()


class Accumulator:
    """The result of an asynchronous product, of use in waits and further products only."""

    def __init__(self, shape: tuple[int, ...], value: Tensor | None, origin: str) -> None:
        self.shape = shape
        self.value = value
        self.place = origin

    def refuse(self, *_: Any) -> Any:
        """Say what is missing."""
        raise AccumulatorError(
            f"The result of warpgroup_mma from {self.place} is used in {place()} before "
            "warpgroup_mma_wait completes and returns it."
        )

    def __getattr__(self, name: str) -> Any:
        return self.refuse()

    __hash__ = object.__hash__


for _name in (
    "add radd sub rsub mul rmul truediv rtruediv floordiv mod neg lt le gt ge eq ne getitem bool "
    "index and rand or ror xor rxor invert abs"
).split():
    setattr(Accumulator, f"__{_name}__", Accumulator.refuse)


@dataclass(eq=False)
class Product:
    """An unfinished ``accumulator + a @ b``."""

    a: Tensor | SharedMemory
    b: SharedMemory
    accumulator: Tensor | Accumulator
    use_acc: bool
    result: Accumulator
    place: str

    def complete(self) -> None:
        """Read the operands and multiply."""
        left = self.a.view if isinstance(self.a, SharedMemory) else self.a.data
        product = left.to(torch.float32) @ self.b.view.to(torch.float32)
        if self.use_acc:
            start = self.accumulator
            value = start.value if isinstance(start, Accumulator) else start
            product = value.data + product
        self.result.value = Tensor(product, tl.float32)


def warpgroup_mma_init(value: Tensor) -> Accumulator:
    """A tensor as an accumulator."""
    if not isinstance(value, Tensor):
        raise OperandError(f"warpgroup_mma_init needs a tensor, got {type(value).__name__}.")
    return Accumulator(value.shape, value, place())


def _check_product(a: Any, b: Any, acc: Any, partition: Partition) -> None:
    if not isinstance(b, SharedMemory):
        raise OperandError(f"warpgroup_mma needs b in shared memory, got {type(b).__name__}.")
    if not isinstance(a, SharedMemory | Tensor):
        as_tensor(a)
        raise OperandError(f"warpgroup_mma needs a tensor a, got {type(a).__name__}.")
    if a.dtype != b.dtype or a.dtype not in (tl.float16, tl.bfloat16):
        raise UnsupportedError(f"warpgroup_mma of {a.dtype} and {b.dtype}.")
    if isinstance(acc, Tensor) and acc.dtype != tl.float32:
        raise UnsupportedError(f"warpgroup_mma into {acc.dtype}.")
    fits = len(a.shape) == len(b.shape) == 2 and a.shape[1] == b.shape[0]
    if not fits or tuple(acc.shape) != (a.shape[0], b.shape[1]):
        raise OperandError(
            f"warpgroup_mma needs [M, K], [K, N] and [M, N], "
            f"got {list(a.shape)}, {list(b.shape)} and {list(acc.shape)}."
        )
    if partition.warps % 4 or a.shape[0] % 64:
        raise OperandError(
            f"warpgroup_mma needs groups of 4 warps and 64 rows each, got {partition.warps} warps "
            f"and {a.shape[0]} rows."
        )


def warpgroup_mma(
    a: Tensor | SharedMemory,
    b: SharedMemory,
    acc: Tensor | Accumulator,
    *,
    use_acc: Any = True,
    precision: Any = None,
    max_num_imprecise_acc: Any = None,
    is_async: bool = False,
) -> Tensor | Accumulator:
    """``acc + a @ b`` in float32, or ``a @ b`` unless ``use_acc``."""
    machine().pause()
    partition = machine().current
    _check_product(a, b, acc, partition)
    partition.issued_products += 1
    agent = ("product", partition.index)
    for name, operand in (("a", a), ("b", b)):
        if isinstance(operand, SharedMemory):
            what = f"warpgroup_mma (operand {name})"
            use(operand, what, writes=False, agent=agent, time=partition.issued_products)
    result = Accumulator((a.shape[0], b.shape[1]), None, place())
    partition.products.append(Product(a, b, acc, bool(use_acc), result, result.place))
    return result if is_async else warpgroup_mma_wait(0, deps=[result])


def warpgroup_mma_wait(num_outstanding: int = 0, deps: Sequence[Any] | None = None) -> Any:
    """Until all but the youngest products are done; the ``deps``, as tensors if they are done."""
    if deps is None:
        raise OperandError("warpgroup_mma_wait deps must be given.")
    machine().pause()
    partition = machine().current
    while len(partition.products) > num_outstanding:
        partition.products.pop(0).complete()
    partition.clock["product", partition.index] = partition.issued_products - len(
        partition.products
    )
    results = [
        dep.value if isinstance(dep, Accumulator) and dep.value is not None else dep for dep in deps
    ]
    return results[0] if len(results) == 1 else tuple(results)


def fence_async_shared(cluster: bool = False) -> None:
    """What this partition knows to be written becomes visible to TMA and wgmma."""
    partition = machine().current
    join(partition.fenced, partition.clock)


__all__ = [
    "Accumulator",
    "BarrierError",
    "Descriptor",
    "async_copy_global_to_shared",
    "async_copy_shared_to_global",
    "fence_async_shared",
    "store_wait",
    "warpgroup_mma",
    "warpgroup_mma_init",
    "warpgroup_mma_wait",
]
