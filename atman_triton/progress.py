"""A progress bar on stderr for work that is counted in tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text


class _Rate(ProgressColumn):
    """Tokens per second, once it is known."""

    def render(self, task: Task) -> Text:
        """Render the column of one task."""
        return Text("" if task.speed is None else f"{task.speed:,.0f} tokens/s")


class TokenProgress:
    """A bar whose length grows as more work is announced; without a bar it does nothing."""

    def __init__(self, bar: Progress | None, title: str) -> None:
        self._bar = bar
        self._total = 0
        self._task = None if bar is None else bar.add_task(title, total=0)

    def expect(self, tokens: int) -> None:
        """So many more tokens will be run."""
        self._total += tokens
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, total=self._total)

    def advance(self, tokens: int) -> None:
        """So many more tokens are done."""
        if self._bar is not None and self._task is not None:
            self._bar.advance(self._task, tokens)


@contextmanager
def token_progress(title: str, shown: bool) -> Iterator[TokenProgress]:
    """Yield a progress bar counted in tokens; it is drawn only on a terminal.

    Args:
        title: What is being done.
        shown: False for no bar.
    """
    console = Console(stderr=True)
    if not (shown and console.is_terminal):
        yield TokenProgress(None, title)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:,.0f} of {task.total:,.0f} tokens"),
        _Rate(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        yield TokenProgress(progress, title)
