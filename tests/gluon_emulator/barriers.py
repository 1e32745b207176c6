"""Emulated mbarriers.

A phase completes when every arrival and every promised byte has come. Gluon lowers an arrival to a
barrier of the partition's threads and one thread that arrives, so that partitions are what counts.
It lowers expect() to one thread alone, which says nothing of the partition's other warps.
"""

from __future__ import annotations

from typing import Any

import triton.language as tl

from gluon_emulator.errors import BarrierError, OperandError
from gluon_emulator.machine import Agent, Clock, join, machine, place
from gluon_emulator.shared import SharedMemory, allocate_shared_memory


class Barrier:
    """One mbarrier."""

    def __init__(self, label: str, count: int) -> None:
        partition = machine().current
        self.label = label
        self.count = count
        self.agent: Agent = ("barrier", machine().number())
        self.phase = 0  # completed phases
        self.pending = count
        self.bytes = 0  # promised and not landed
        self.promised = 0  # by expect(), in this phase
        self.issued = 0  # by copies, in this phase
        self.arriving: tuple[Clock, Clock] = ({}, {})
        self.passed: tuple[Clock, Clock] = ({}, {})
        self.initialised = (partition.agent, partition.tick())
        self.valid = True
        self.waiting: dict[str, int] = {}  # partitions, and the phase that each waits for

    def __str__(self) -> str:
        return (
            f"{self.label} (phase {self.phase}, {self.pending} of {self.count} arrivals and "
            f"{self.bytes} bytes pending)"
        )

    def arrive(self, count: int, meets: bool = True) -> None:
        """The running partition arrives ``count`` times; all its threads if they meet first."""
        if not 0 < count <= self.pending:
            raise BarrierError(
                f"{place()} arrives {count} times at {self}: more than its phase awaits."
            )
        partition = machine().current
        self.pending -= count
        join(self.arriving[0], partition.clock if meets else partition.met)
        join(self.arriving[1], partition.fenced)
        self._complete()

    def expect(self, size: int) -> None:
        """Promise bytes and arrive."""
        self.bytes += size
        self.promised += size
        self.arrive(1, meets=machine().current.warps == 1)

    def promise(self, size: int, what: str) -> None:
        """A copy is issued that will signal this barrier."""
        self.issued += size
        if self.issued > self.promised:
            raise BarrierError(
                f"{what} in {place()} brings {size} bytes, {self.issued} in this phase, but "
                f"{self} was told to expect {self.promised}."
            )

    def landed(self, size: int) -> None:
        """A copy is complete."""
        self.bytes -= size
        self._complete()

    def _complete(self) -> None:
        if self.pending or self.bytes:
            return
        self.phase += 1
        for passed, arriving in zip(self.passed, self.arriving, strict=True):
            join(passed, arriving)
            arriving.clear()
        self.passed[0][self.agent] = self.phase
        self.pending = self.count
        self.promised = self.issued = 0
        for partition, awaited in self.waiting.items():
            if awaited < self.phase - 1:
                raise BarrierError(
                    f"{self} completes phase {self.phase - 1} while {partition} may still wait for "
                    f"phase {awaited}: it would miss that phase and wait for another."
                )


def barrier_of(memory: SharedMemory, what: str) -> Barrier:
    """The barrier at an address; ``what`` for messages."""
    if not isinstance(memory, SharedMemory) or memory.numel != 1 or memory.dtype != tl.int64:
        raise OperandError(f"An mbarrier is one int64 of shared memory, got {memory!r}.")
    barrier = memory.allocation.barriers.get(memory.view.storage_offset())
    if barrier is None or not barrier.valid:
        state = "was not initialised" if barrier is None else "is invalidated"
        raise BarrierError(f"{place()}: {what} {memory.label}, which {state}.")
    agent, time = barrier.initialised
    if machine().current.clock.get(agent, 0) < time:
        raise BarrierError(f"{place()}: nothing orders {what} {memory.label} after its init.")
    return barrier


def allocate_mbarrier(batch: int | None = None, two_ctas: bool = False) -> SharedMemory:
    """Shared memory for one barrier, or a batch."""
    return allocate_shared_memory(tl.int64, [1] if batch is None else [batch, 1])


def init(mbarrier: SharedMemory, count: int) -> None:
    """Make a barrier that ``count`` arrivals complete."""
    if not isinstance(count, int) or count < 1:
        raise BarrierError(f"The count of {mbarrier.label} must be a positive constant.")
    if mbarrier.numel != 1:
        raise OperandError(f"An mbarrier is one int64 of shared memory, got {mbarrier!r}.")
    barriers, key = mbarrier.allocation.barriers, mbarrier.view.storage_offset()
    if key in barriers and barriers[key].valid:
        raise BarrierError(f"{place()}: {mbarrier.label} is initialised twice.")
    barriers[key] = Barrier(mbarrier.label, count)


def invalidate(mbarrier: SharedMemory) -> None:
    """End a barrier."""
    barrier = barrier_of(mbarrier, "invalidate of")
    if barrier.bytes:
        raise BarrierError(f"{place()} invalidates {barrier} while copies signal it.")
    barrier.valid = False


def expect(mbarrier: SharedMemory, bytes_per_cta: int | None = None, pred: Any = True) -> None:
    """Arrive, and let the phase wait for that many bytes."""
    machine().pause()
    if not isinstance(bytes_per_cta, int) or bytes_per_cta < 0:
        raise OperandError(f"expect() takes a constant number of bytes, got {bytes_per_cta!r}.")
    if pred:
        barrier_of(mbarrier, "expect of").expect(bytes_per_cta)


def arrive(mbarrier: SharedMemory, *, count: int = 1, pred: Any = True) -> None:
    """Arrive once all threads of the partition are here."""
    machine().pause()
    if pred:
        machine().current.meet()
        barrier_of(mbarrier, "arrive at").arrive(count)


def wait(mbarrier: SharedMemory, phase: Any, pred: Any = True, deps: Any = ()) -> None:
    """Until the phase of that parity is complete."""
    if not pred:
        machine().pause()
        return
    barrier = barrier_of(mbarrier, "wait for")
    parity, here = int(phase), place()
    if parity not in (0, 1):
        raise BarrierError(
            f"{here}: the phase of a wait for {barrier} must be 0 or 1, not {parity}."
        )
    partition = machine().current
    if barrier.phase & 1 == parity:
        barrier.waiting[partition.name] = barrier.phase
    machine().pause(
        lambda: barrier.phase & 1 != parity, lambda: f"in {here} for parity {parity} of {barrier}"
    )
    barrier.waiting.pop(partition.name, None)
    join(partition.clock, barrier.passed[0])
    join(partition.fenced, barrier.passed[1])
