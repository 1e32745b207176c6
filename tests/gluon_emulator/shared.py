"""Shared memory of emulated Gluon kernels, with a record of who may still use which bytes.

An access is checked against every earlier one that overlaps it: a partition's clock must lie behind
that access, and TMA and wgmma need a fence between what threads wrote and their own access.
"""

from __future__ import annotations

import linecache
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gluon_emulator.errors import BoundsError, FenceError, OperandError, RaceError, UnsupportedError
from gluon_emulator.machine import Agent, machine, place
from gluon_emulator.values import Tensor, poison, torch_dtype


class Region:
    """The bytes of a view of an allocation."""

    def __init__(self, view: torch.Tensor) -> None:
        size = view.element_size()
        self.shape = (*view.shape, size)
        self.strides = (*(stride * size for stride in view.stride()), 1)
        self.start = view.storage_offset() * size
        span = 1 + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))
        self.stop = self.start + span
        self.dense = span == view.numel() * size
        self._bytes: set[int] | None = None

    def within(self, flags: torch.Tensor) -> torch.Tensor:
        """The flags of these bytes, one a byte of the allocation."""
        return flags.as_strided(self.shape, self.strides, self.start)

    @property
    def bytes(self) -> set[int]:
        """Their addresses."""
        if self._bytes is None:
            addresses = torch.arange(self.stop)
            self._bytes = set(self.within(addresses).reshape(-1).tolist())
        return self._bytes

    def overlaps(self, other: Region) -> bool:
        """Whether they share a byte."""
        if self is other:
            return True
        if self.stop <= other.start or other.stop <= self.start:
            return False
        return (self.dense and other.dense) or not self.bytes.isdisjoint(other.bytes)

    def covers(self, other: Region) -> bool:
        """Whether all bytes of the other are among its own."""
        if self is other:
            return True
        if other.start < self.start or self.stop < other.stop:
            return False
        return self.dense or self.bytes.issuperset(other.bytes)


@dataclass(eq=False, slots=True)
class Access:
    """A use of a region that lasts until ``time`` of ``agent``."""

    region: Region
    writes: bool
    asynchronous: bool  # by TMA or wgmma, which see what threads wrote after a fence only
    agent: Agent
    time: int
    what: str
    partition: str
    place: str

    def __str__(self) -> str:
        return f"{self.what} by {self.partition} in {self.place}"


class Allocation:
    """One ``allocate_shared_memory``."""

    def __init__(self, name: str, dtype: Any, shape: Sequence[int]) -> None:
        self.name = name
        self.dtype = dtype
        target = torch_dtype(dtype)
        self.data = torch.full(tuple(shape), poison(target), dtype=target)
        self.written = torch.zeros(self.data.numel() * self.data.element_size(), dtype=torch.bool)
        self.known: set[Region] = set()  # regions without an unwritten byte
        self.accesses: list[Access] = []
        self.barriers: dict[int, Any] = {}
        self._regions: dict[Any, Region] = {}

    def region(self, view: torch.Tensor) -> Region:
        """The region of a view, one object for each."""
        key = (view.storage_offset(), view.shape, view.stride(), view.dtype)
        if key not in self._regions:
            self._regions[key] = Region(view)
        return self._regions[key]


class SharedMemory:
    """A view of an allocation: Gluon's ``shared_memory_descriptor``."""

    def __init__(self, allocation: Allocation, view: torch.Tensor, dtype: Any, label: str) -> None:
        self.allocation = allocation
        self.view = view
        self.dtype = dtype
        self.label = label

    @property
    def shape(self) -> tuple[int, ...]:
        """Its extents."""
        return tuple(self.view.shape)

    @property
    def rank(self) -> int:
        """Number of axes."""
        return self.view.dim()

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.view.numel()

    def __repr__(self) -> str:
        return f"{self.label} {list(self.shape)} of {self.dtype}"

    def _part(self, view: torch.Tensor, label: str) -> SharedMemory:
        return SharedMemory(self.allocation, view, self.dtype, label)

    def index(self, index: Any) -> SharedMemory:
        """One entry along the first axis."""
        i = int(index)
        if self.rank < 2:
            raise OperandError(f"index() needs two axes or more, got {self!r}.")
        if not 0 <= i < self.shape[0]:
            raise BoundsError(f"index of {self.label} must be below {self.shape[0]}, got {i}.")
        return self._part(self.view[i], f"{self.label}[{i}]")

    def slice(self, start: int, length: int, dim: int = 0) -> SharedMemory:
        """Part of an axis; its bounds are constants."""
        if not all(isinstance(number, int) for number in (start, length, dim)):
            raise OperandError("slice() takes constants, got run-time values.")
        if start < 0 or start + length > self.shape[dim]:
            raise BoundsError(
                f"slice of {self.label} must stay in {self.shape[dim]}, "
                f"got {start} to {start + length}."
            )
        label = f"{self.label}.slice({start}, {length}, {dim})"
        return self._part(self.view.narrow(dim, start, length), label)

    def permute(self, order: Sequence[int]) -> SharedMemory:
        """Other order of axes."""
        return self._part(self.view.permute(tuple(order)), self.label)

    def reshape(self, shape: Sequence[int]) -> SharedMemory:
        """Other shape of the same bytes."""
        try:
            return self._part(self.view.view(tuple(shape)), self.label)
        except RuntimeError as error:
            raise OperandError(f"{self!r} cannot be reshaped to {list(shape)}.") from error

    def _reinterpret(self, dtype: Any, shape: Sequence[int], layout: Any) -> SharedMemory:
        if not self.view.is_contiguous():
            raise UnsupportedError(f"_reinterpret of {self.label}, which is not contiguous.")
        view = self.view.reshape(-1).view(torch_dtype(dtype))[: torch.Size(shape).numel()]
        return SharedMemory(self.allocation, view.view(tuple(shape)), dtype, self.label)

    def _keep_alive(self) -> None:
        pass

    def load(self, layout: Any = None) -> Tensor:
        """Read by the partition's threads."""
        use(self, "a load", writes=False)
        machine().pause()
        return Tensor(self.view.clone(), self.dtype)

    def store(self, value: Tensor) -> None:
        """Written by the partition's threads."""
        if not isinstance(value, Tensor):
            raise OperandError(f"store() needs a tensor, got {type(value).__name__}.")
        if value.shape != self.shape or value.dtype != self.dtype:
            raise OperandError(
                f"store() to {self!r} needs its shape and dtype, "
                f"got {list(value.shape)} of {value.dtype}."
            )
        machine().pause()
        use(self, "a store", writes=True)
        self.view.copy_(value.data)

    def __getattr__(self, name: str) -> Any:
        raise UnsupportedError(f"The emulator has no shared_memory_descriptor.{name}.")


def use(
    memory: SharedMemory,
    what: str,
    *,
    writes: bool,
    agent: Agent | None = None,
    time: int = 0,
) -> None:
    """Check and record an access by the running partition, or by ``agent`` that it started.

    ``certain`` is false for a TMA copy, which may be waited for.
    """
    partition = machine().current
    allocation = memory.allocation
    region = allocation.region(memory.view)
    asynchronous = agent is not None
    clock, fenced = partition.clock, partition.fenced
    kept = []
    for access in allocation.accesses:
        if not (writes or access.writes) or not region.overlaps(access.region):
            kept.append(access)
            continue
        if clock.get(access.agent, 0) < access.time:
            _race(memory, what, writes, access)
        if asynchronous and not access.asynchronous and fenced.get(access.agent, 0) < access.time:
            # within one function the compiler puts the fence between a load and a copy
            if access.writes or access.agent != partition.agent:
                raise FenceError(
                    f"{what} uses {memory.label} in {place()} after {access}, "
                    "without fence_async_shared() between."
                )
        if not (writes and region.covers(access.region)):
            kept.append(access)
    if agent is None:
        agent, time = partition.agent, partition.tick()
    if not writes:
        kept = [a for a in kept if a.writes or a.agent != agent or a.region is not region]
        _check_written(memory, what, region)
    elif region not in allocation.known:
        region.within(allocation.written).fill_(True)
        allocation.known.add(region)
    kept.append(Access(region, writes, asynchronous, agent, time, what, partition.name, place()))
    allocation.accesses = kept


def _check_written(memory: SharedMemory, what: str, region: Region) -> None:
    allocation = memory.allocation
    if region in allocation.known:
        return
    if not bool(region.within(allocation.written).all()):
        raise RaceError(f"{what} reads {memory.label} in {place()}, which was never written.")
    allocation.known.add(region)


def _race(memory: SharedMemory, what: str, writes: bool, earlier: Access) -> None:
    if not writes and earlier.asynchronous:
        raise RaceError(f"{what} reads {memory.label} in {place()} before the wait for {earlier}.")
    verb = "overwrites" if writes else "reads"
    raise RaceError(
        f"{what} {verb} {memory.label} in {place()}, but nothing orders it after {earlier}, "
        f"which {'writes' if earlier.writes else 'reads'} it."
    )


def variable_name() -> str:
    """Name that the kernel gives what it is about to allocate, else the place."""
    frame = sys._getframe(1)
    while frame is not None and "__emulated__" not in frame.f_globals:
        frame = frame.f_back
    if frame is not None:
        code = frame.f_code
        for back in range(4):  # the statement may have begun some lines above
            line = linecache.getline(code.co_filename, frame.f_lineno - back).strip()
            name = line.split("=")[0].split(":")[0].strip()
            if "=" in line and name.isidentifier():
                return name
    return f"memory of {place()}"


def allocate_shared_memory(
    element_ty: Any, shape: Sequence[int], layout: Any = None, value: Tensor | None = None
) -> SharedMemory:
    """New shared memory, poisoned unless ``value`` is given."""
    allocation = Allocation(variable_name(), element_ty, [int(size) for size in shape])
    memory = SharedMemory(allocation, allocation.data, element_ty, allocation.name)
    if value is not None:
        memory.store(value)
    return memory
