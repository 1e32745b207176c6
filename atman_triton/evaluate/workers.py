"""Several processes on one machine that share the examples, and end with the one that asked."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path

import torch

from ..loading import Failed, load_model
from .journal import Journal
from .run import Plan, evaluate

PAUSE = 1.0  # seconds between two looks at what is done

KEPT = {"MALLOC_MMAP_THRESHOLD_": str(32 * 2**20), "MALLOC_TRIM_THRESHOLD_": str(4 * 2**30)}
"""What glibc is told in every process: to keep memory that was freed. Else tensors of a few MB are
given back and taken anew, page by page, all the time: a tenth of the time on pictures."""


@dataclass(frozen=True)
class Job:
    """What one process does.

    Args:
        process: Its number.
        plan: Its part of the work.
        journal: The folder of all processes' files.
        facts: See ``journal.run_facts``.
        model, device, dtype, demo: See ``loading.load_model``.
        threads: Of torch.
    """

    process: int
    plan: Plan
    journal: Path
    facts: Mapping[str, str]
    model: str | None
    device: str
    dtype: str
    demo: str
    threads: int


def work(jobs: Sequence[Job], look: Callable[[], None]) -> None:
    """Run every job in a process of its own until all are done.

    Args:
        jobs: At least one.
        look: Called about once a second.
    Raises: Failed: what the first process says that fails; the others are ended.
    """
    context = multiprocessing.get_context("spawn")
    running = []
    try:
        for job in jobs:
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_work, args=(job, theirs), daemon=True)
            with _environment(KEPT):  # read where a process begins
                process.start()
            theirs.close()
            running.append((process, ours))
        alive = list(running)
        while alive:
            wait([process.sentinel for process, _ in alive], PAUSE)
            look()
            ended = [process.exitcode for process, _ in alive]  # once: they end at any time
            for code, (_, said) in zip(ended, alive, strict=True):
                if code:  # neither running nor done
                    raise Failed(_last_words(code, said))
            alive = [each for code, each in zip(ended, alive, strict=True) if code is None]
    finally:
        for process, said in running:
            process.terminate()
            process.join()
            said.close()


@contextmanager
def _environment(defaults: Mapping[str, str]) -> Iterator[None]:
    """Variables of the environment for what is started inside, unless they are set already."""
    added = {name: value for name, value in defaults.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


def _last_words(code: int, said: Connection) -> str:
    try:
        return str(said.recv())
    except EOFError:
        return f"a process ended with exit code {code}; run again to go on from there."


def _work(job: Job, said: Connection) -> None:
    """One process."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(job.threads)
    try:
        model, processor = load_model(job.model, job.device, job.dtype, job.demo)
        journal = Journal(job.journal, job.plan.digests, job.facts, job.process)
        evaluate(model, processor, job.plan, journal)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:  # noqa: BLE001 - which the parent raises
        said.send(str(error) or type(error).__name__)
        sys.exit(1)


def _end_with_parent() -> None:
    """So that nobody goes on writing after the run was killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
