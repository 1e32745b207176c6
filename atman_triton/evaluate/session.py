"""A whole run: model and data loaded, the work shared among processes, all results gathered."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..loading import Failed, load_model
from ..table import import_extra
from .data import GROUPED, load
from .examples import Example
from .journal import Journal, run_facts
from .results import Result
from .run import Plan, evaluate
from .settings import Setting
from .waiting import waiting
from .workers import PAUSE, Job, work

_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""What launchers set: torchrun, which accelerate uses, and three kinds of MPI."""

_SOURCE = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Place:
    """Which of the processes this is that a launcher such as ``accelerate`` started.

    Args:
        process: Its number.
        processes: How many there are.
        local: Its number on this machine.
        beside: How many there are on this machine, itself among them.
    """

    process: int = 0
    processes: int = 1
    local: int = 0
    beside: int = 1


@dataclass(frozen=True)
class Session:
    """What is run, as it was asked for.

    Args:
        data: One of ``data.DATASETS``.
        model: Folder or hub id; None for the shipped one.
        demo: Which shipped one.
        device, dtype: Of the model.
        folder: Of the results.
        settings: The methods.
        options: Of ``data.load``: ``limit``, ``path``, ``images``, ``seed``.
        stability, gallery: See ``run.Plan``.
        processes: To start on this machine, where no launcher did.
        quiet: No progress.
    """

    data: str
    model: str | None
    demo: str
    device: str
    dtype: str
    folder: Path
    settings: Sequence[Setting]
    options: dict[str, Any]
    stability: int
    gallery: int
    processes: int
    quiet: bool


@dataclass(frozen=True)
class Gathered:
    """What a run gave.

    Args:
        results: Of all examples and methods.
        examples: In order.
        facts: See ``journal.run_facts``.
        notes: What is to be said of the data.
    """

    results: list[Result]
    examples: Sequence[Example]
    facts: dict[str, str]
    notes: list[str]


@contextmanager
def launched(device: str) -> Iterator[Place]:
    """The place among processes that a launcher started; one of one without it.

    Args:
        device: What the model runs on.
    Raises: Failed: if the launcher is one that accelerate does not know.
    """
    count = max(int(os.environ.get(name, "1")) for name in _SIZES)
    if count < 2:
        yield Place()
        return
    # Without GPUs it takes itself for one of one, unless it is told that there are none.
    state = import_extra("accelerate", "eval").PartialState(cpu=not device.startswith("cuda"))
    if state.num_processes != count:
        raise Failed(
            f"{count} processes were launched, but accelerate finds {state.num_processes}; launch "
            "them with accelerate launch --multi_gpu or torchrun."
        )
    beside = int(os.environ.get("LOCAL_WORLD_SIZE", str(count)))
    try:
        yield Place(state.process_index, state.num_processes, state.local_process_index, beside)
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def run(asked: Session, place: Place) -> Gathered | None:
    """Measure what is missing and gather everything; None where another process gathers.

    Raises:
        BadUsage, Failed: if the model cannot be loaded, or a process fails.
        Mixed, Busy: if the folder cannot be written to; see ``journal``.
        MethodFailed: naming the method and the example that it fails on.
    """
    device = _own_device(asked.device, place.local)
    first = place.process == 0
    model, processor = load_model(asked.model, device, asked.dtype, asked.demo)
    loaded = load(
        asked.data,
        model=model,
        processor=processor,
        progress=first and not asked.quiet,
        **asked.options,
    )
    together = asked.data in GROUPED
    plan = Plan.of(loaded.examples, asked.settings, asked.stability, asked.gallery, together)
    cores = os.cpu_count() or 1
    processes = max(asked.processes, place.beside)
    if processes > 1:
        torch.set_num_threads(max(1, cores // processes))
    chip = device_name(torch.device(device), processes)
    facts = run_facts(model, asked.data, chip, commit())
    folder = asked.folder / "journal"
    own = place.process if asked.processes == 1 else None  # of several, each has its own file
    with closing(Journal(folder, plan.digests, facts, own)) as journal:
        _measure(asked, place, plan, journal, model, processor)
        results = plan.results(journal.read())
    return Gathered(results, loaded.examples, facts, loaded.notes) if first else None


def _measure(
    asked: Session, place: Place, plan: Plan, journal: Journal, model: Any, processor: Any
) -> None:
    """Measure what the journal does not have, and wait for the others where this gathers."""
    first = place.process == 0

    def done() -> int:
        missing = plan.missing(journal.read())
        return plan.total - sum(len(settings) for settings in missing.values())

    title = f"{len(plan.digests)} examples × {len(asked.settings)} methods"
    with waiting(title, plan.total, done(), quiet=asked.quiet or not first) as update:
        if asked.processes == 1:
            counter = _Counter(done, update)
            evaluate(model, processor, plan.part(place.process, place.processes), journal, counter)
        else:
            del model, processor  # every process has its own
            jobs = [
                Job(
                    process=number,
                    plan=plan.part(number, asked.processes),
                    journal=journal.folder,
                    facts=journal.facts,
                    model=asked.model,
                    device=_own_device(asked.device, number),
                    dtype=asked.dtype,
                    demo=asked.demo,
                    threads=torch.get_num_threads(),
                )
                for number in range(asked.processes)
            ]
            work([job for job in jobs if job.plan.missing(journal.read())], lambda: update(done()))
        while first and (there := done()) < plan.total:  # of a launcher's other processes
            update(there)
            time.sleep(PAUSE)


class _Counter:
    """Tells what is done: all that is noted, and of the example that is not, what was measured."""

    def __init__(self, done: Any, update: Any) -> None:
        self._done, self._update = done, update
        self._noted, self._since = done(), 0

    def __call__(self, count: int) -> None:
        noted = self._done()
        self._since = self._since + count if noted == self._noted else count
        self._noted = noted
        self._update(noted + self._since)


def launched_alone() -> bool:
    """Whether ``accelerate launch --cpu`` was asked for several processes, and started one."""
    names = ("WORLD_SIZE", "ACCELERATE_USE_CPU", "MASTER_ADDR")
    size, cpu, address = (os.environ.get(name) for name in names)
    return size is None and cpu == "True" and address is not None


def _own_device(device: str, process: int) -> str:
    """Of several GPUs, one for each process in turn, unless one is named."""
    if device != "cuda" or not torch.cuda.is_available():
        return device
    return f"cuda:{process % torch.cuda.device_count()}"


def device_name(device: torch.device, processes: int) -> str:
    """The chip, and how it is used."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return f"{name}, {processes} processes" if processes > 1 else name
    name = platform.processor() or platform.machine()
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:  # not Linux
        found = None
    name = found[1].strip() if found else name
    several = f"{processes} processes of " if processes > 1 else ""
    threads = torch.get_num_threads()
    return f"{name}, {several}{threads} thread{'s' if threads > 1 else ''}"


def commit() -> str:
    """The checkout's commit, with a ``+`` where tracked files differ; empty if it is none."""

    def git(*words: str) -> str | None:
        done = subprocess.run(["git", *words], cwd=_SOURCE, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else None

    try:
        # An installed package may lie in somebody else's checkout, which does not know this file.
        if git("ls-files", "--error-unmatch", "_version.py") is None:
            return ""
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "../atman_triton")
        return (git("rev-parse", "--short=10", "HEAD") or "") + ("+" if changed else "")
    except FileNotFoundError:  # no git
        return ""
