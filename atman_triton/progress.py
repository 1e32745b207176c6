"""A progress bar on stderr for work that is counted in tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text


class _Rate(ProgressColumn):
    """Tokens per second, once it is known."""

    def render(self, task: Task) -> Text:
        """Render the column of one task."""
        return Text("" if task.speed is None else f"{task.speed:,.0f} tokens/s")


@contextmanager
def token_progress(title: str, total: int, shown: bool) -> Iterator[Callable[[int], None]]:
    """Yield a function that is told how many more tokens are done; it draws only on a terminal.

    Args:
        title: What is being done.
        total: Tokens in all.
        shown: False for no bar.
    """
    console = Console(stderr=True)
    if not (shown and console.is_terminal):
        yield lambda tokens: None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:,.0f} of {task.total:,.0f} tokens"),
        _Rate(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(title, total=total)
        yield lambda tokens: progress.advance(task, tokens)
