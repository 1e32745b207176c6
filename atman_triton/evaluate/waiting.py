"""How far a long run is, on stderr: a bar on a terminal, elsewhere a line a minute."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

SILENT = 60.0
"""Seconds between two lines."""

Update = Callable[[int], None]
"""Told how much is done."""


@contextmanager
def waiting(title: str, total: int, done: int, *, quiet: bool = False) -> Iterator[Update]:
    """Show progress until the end of the block.

    Args:
        title: What is counted.
        total: Of it, how much there is to do in all.
        done: How much was done before.
        quiet: Show nothing.
    """
    console = Console(stderr=True)
    if quiet:
        yield lambda now: None
    elif not console.is_terminal:
        yield _lines(title, total, done)
    else:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left:"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console, speed_estimate_period=600) as bar:
            task = bar.add_task(title, total=total, completed=done)
            yield lambda now: bar.update(task, completed=now)


def _lines(title: str, total: int, before: int) -> Update:
    started = said = time.monotonic()

    def update(done: int) -> None:
        nonlocal said
        now = time.monotonic()
        if now - said < SILENT or done <= before:
            return
        said = now
        left = timedelta(seconds=round((now - started) / (done - before) * (total - done)))
        print(f"{title}: {done} of {total}, {left} left", file=sys.stderr, flush=True)

    return update
