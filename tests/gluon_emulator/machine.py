"""The machine that emulated Gluon kernels run on: partitions, their scheduler and what they know.

Partitions are threads of which one runs at a time. A seed draws where they are switched and when
copies complete. What a partition knows is a vector clock: for each agent (a partition, its matrix
products, its stores, a barrier) the last event that is certain to lie behind it. Barriers hand
clocks on, so that a race is found whether or not the schedule lets it do harm.
"""

from __future__ import annotations

import contextlib
import random
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gluon_emulator.errors import DeadlockError, EmulationError, UnfinishedError, UnsupportedError

Agent = tuple[str, int]
Clock = dict[Agent, int]


class _StoppedError(BaseException):
    """Unwinds a partition after another one failed."""


def join(clock: Clock, other: Clock) -> None:
    """Add to ``clock`` what ``other`` knows."""
    for agent, time in other.items():
        if clock.get(agent, 0) < time:
            clock[agent] = time


def place() -> str:
    """Function, file and line of the kernel's code that is being run."""
    frame = sys._getframe(1)
    while frame is not None and "__emulated__" not in frame.f_globals:
        frame = frame.f_back
    if frame is None:
        return "the launch"
    code = frame.f_code
    return f"{code.co_name} ({Path(code.co_filename).name}:{frame.f_lineno})"


@dataclass(eq=False)
class Partition:
    """Warps that run one function; number 0 is the default partition and what surrounds it."""

    index: int
    name: str
    warps: int
    clock: Clock = field(default_factory=dict)
    fenced: Clock = field(default_factory=dict)  # what a proxy fence has shown to TMA and wgmma
    met: Clock = field(default_factory=dict)  # what all its threads had done when they last met
    products: list[Any] = field(default_factory=list)  # unfinished warpgroup_mma, oldest first
    issued_products: int = 0
    stores: list[Any] = field(default_factory=list)  # unfinished TMA stores, oldest first
    issued_stores: int = 0
    baton: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    ready: Callable[[], bool] | None = None  # None: not waiting
    waits_for: Callable[[], str] | None = None
    done: bool = False

    @property
    def agent(self) -> Agent:
        """Its threads."""
        return ("partition", self.index)

    def tick(self) -> int:
        """The time of a new event of its threads, which it knows of."""
        time = self.clock.get(self.agent, 0) + 1
        self.clock[self.agent] = time
        return time

    def meet(self) -> None:
        """A barrier of its threads."""
        self.met = dict(self.clock)

    def check_finished(self) -> None:
        """Nothing that it started may still use shared memory."""
        if self.products:
            product = self.products[-1]
            raise UnfinishedError(
                f"{self.name} ends with {len(self.products)} unfinished warpgroup_mma, the last "
                f"from {product.place}; warpgroup_mma_wait is missing."
            )
        if self.stores:
            raise UnfinishedError(
                f"{self.name} ends with {len(self.stores)} unfinished TMA stores, the last from "
                f"{self.stores[-1].place}; tma.store_wait is missing."
            )


class Schedule:
    """When copies complete and which partition goes on, drawn from a seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.copies = ("late", "early", "random")[seed % 3]
        self.switch = (0.0, 1.0, 0.2)[seed // 3 % 3]  # chance to look for another partition
        self.weights: dict[int, float] = {}

    def weight(self, partition: Partition) -> float:
        """How often it is taken; one that hardly ever is runs when the others wait."""
        if partition.index not in self.weights:
            self.weights[partition.index] = self.random.choice((0.01, 1.0, 1.0))
        return self.weights[partition.index]

    def choose(self, running: Partition, runnable: list[Partition]) -> Partition:
        """The partition that goes on."""
        if running in runnable and self.random.random() >= self.switch:
            return running
        return self.random.choices(runnable, [self.weight(p) for p in runnable])[0]


class Machine:
    """One program of a launch."""

    def __init__(self, program: tuple[int, ...], grid: tuple[int, ...], warps: int, seed: int):
        self.program = program
        self.grid = grid
        self.schedule = Schedule(seed)
        self.partitions = [Partition(0, "the default partition", warps)]
        self.current = self.partitions[0]
        self.copies: list[Any] = []  # in flight, each with complete()
        self.all_copies: list[Any] = []
        self.failure: BaseException | None = None
        self.numbered = 0

    def number(self) -> int:
        """A number that no other barrier has."""
        self.numbered += 1
        return self.numbered

    def issue(self, copy: Any) -> None:
        """A copy starts; it completes when the schedule says so."""
        self.copies.append(copy)
        self.all_copies.append(copy)
        if self.schedule.copies == "early":
            self._complete_one()

    def _complete_one(self) -> None:
        copy = self.copies.pop(self.schedule.random.randrange(len(self.copies)))
        copy.complete()

    def pause(
        self, ready: Callable[[], bool] | None = None, waits_for: Callable[[], str] | None = None
    ) -> None:
        """Let others run, and come back when ``ready``."""
        me = self.current
        me.ready, me.waits_for = ready, waits_for
        if self.copies and self.schedule.copies == "random" and self.schedule.random.random() < 0.3:
            self._complete_one()
        chosen = self._choose(me)
        if chosen is not me:
            self.current = chosen
            chosen.baton.release()
            me.baton.acquire()
            if self.failure is not None:
                raise _StoppedError
        me.ready = None

    def _choose(self, me: Partition) -> Partition:
        while True:
            live = [p for p in self.partitions if not p.done]
            runnable = [p for p in live if p.ready is None or p.ready()]
            if runnable:
                return self.schedule.choose(me, runnable)
            if not self.copies:
                waiting = "; ".join(f"{p.name} waits {p.waits_for()}" for p in live if p.waits_for)
                raise DeadlockError(f"All partitions wait and no copy is in flight: {waiting}.")
            self._complete_one()

    def specialize(
        self, functions: list[tuple[Callable[..., Any], tuple[Any, ...]]], warps: list[int]
    ) -> Any:
        """Run the first function here and the others beside it; the first one's result."""
        if len(self.partitions) > 1:
            raise UnsupportedError("A kernel may call warp_specialize once in the emulator.")
        parent = self.partitions[0]
        threads = []
        for index, ((function, arguments), count) in enumerate(
            zip(functions[1:], warps, strict=True), start=1
        ):
            name = f"partition {index} ({function.__name__})"
            worker = Partition(index, name, count, dict(parent.clock), dict(parent.fenced))
            worker.meet()
            self.partitions.append(worker)
            threads.append(
                threading.Thread(target=self._work, args=(worker, function, arguments), daemon=True)
            )
        default, arguments = functions[0]
        parent.name = f"partition 0 ({default.__name__})"
        workers = self.partitions[1:]
        for thread in threads:
            thread.start()
        result = None
        try:
            result = default(*arguments)
            self.pause(lambda: all(w.done for w in workers), lambda: "for the others to end")
        except _StoppedError:
            pass
        except BaseException as error:  # noqa: BLE001 - ends the others first
            self._fail(parent, error)
        for worker, thread in zip(workers, threads, strict=True):
            if not worker.done:
                worker.baton.release()
            thread.join()
        if self.failure is not None:
            raise self.failure
        self.current = parent
        for worker in workers:
            join(parent.clock, worker.clock)
            join(parent.fenced, worker.fenced)
        return result

    def _fail(self, partition: Partition, error: BaseException) -> None:
        if self.failure is None:
            error.add_note(f"in {partition.name} of program {self.program}")
            self.failure = error

    def _work(
        self, worker: Partition, function: Callable[..., Any], arguments: tuple[Any, ...]
    ) -> None:
        worker.baton.acquire()
        try:
            if self.failure is None:
                function(*arguments)
                worker.check_finished()
                worker.done = True
                self.current = self._choose(worker)
                self.current.baton.release()
        except _StoppedError:
            pass
        except BaseException as error:  # noqa: BLE001 - raised again in the launch
            self._fail(worker, error)
            self.partitions[0].baton.release()
        finally:
            worker.done = True

    def finish(self) -> None:
        """What must be so when the program ends."""
        last = self.partitions[0]
        last.check_finished()
        for copy in self.all_copies:
            if last.clock.get(copy.agent, 0) < copy.time:
                raise UnfinishedError(
                    f"The program ends and nothing has waited for {copy.what} from {copy.place}."
                )


_running: list[Machine] = []


def machine() -> Machine:
    """The program that is being run."""
    if not _running:
        raise EmulationError("Emulated functions run inside emulate() only.")
    return _running[-1]


@contextlib.contextmanager
def running(program: Machine) -> Iterator[Machine]:
    """Make ``program`` the one that emulated functions belong to."""
    _running.append(program)
    try:
        yield program
    finally:
        _running.pop()
