"""Emulated TMA: copies land when the schedule draws it, stores read when they are waited for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from gluon_emulator.barriers import Barrier, barrier_of
from gluon_emulator.errors import BoundsError, FenceError, OperandError, UnsupportedError
from gluon_emulator.machine import Agent, join, machine, place
from gluon_emulator.pointers import extent
from gluon_emulator.shared import SharedMemory, use
from gluon_emulator.values import TRITON, poison, scalar


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
        same = memory.numel == torch.Size(self.block_shape).numel()
        if memory.dtype != self.dtype or not same or memory.shape[-1] != self.block_shape[-1]:
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

    def block(self, memory: SharedMemory) -> torch.Tensor:
        """Shared memory as a block: leading axes may be merged or missing."""
        return memory.view.view(self.block_shape)

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
        block = self.descriptor.block(self.memory)
        block.fill_(self.descriptor.fill)
        block[inside] = self.descriptor.data[outside]
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
    agent, time = target.initialised
    if program.current.fenced.get(agent, 0) < time:
        raise FenceError(
            f"The TMA copy of {tensor_desc.argument} in {place()} signals {target}, without "
            "fence_async_shared() after its init."
        )
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
        self.descriptor.data[outside] = self.descriptor.block(self.memory)[inside]


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


def fence_async_shared(cluster: bool = False) -> None:
    """What this partition knows to be written becomes visible to TMA and wgmma."""
    partition = machine().current
    join(partition.fenced, partition.clock)
