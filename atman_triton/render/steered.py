"""A plain and a steered continuation in a terminal, side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from . import layout
from .palette import OPPOSE_INK, SUPPORT_INK
from .terminal import FAINT

if TYPE_CHECKING:
    from ..steered import Steered

_BAR = 10
_STILL = 0.005  # a change of probability below which nothing is coloured


def show_steered(result: Steered, what: list[str], console: Console | None = None) -> None:
    """Print two continuations side by side, then the next-token probabilities.

    Args:
        result: What to show.
        what: What each control does, in words.
        console: Where to print; None for standard output.
    """
    console = console or Console(highlight=False, markup=False, emoji=False)
    for line in what:
        console.print(Text(line, FAINT))
    console.print()
    texts = Table(box=SIMPLE_HEAD, expand=True, show_edge=False, pad_edge=False)
    for name in ("Plain", "Steered"):
        texts.add_column(Text(name), ratio=1, overflow="fold")
    plain, steered = (_shown(text) for text in (result.plain, result.steered))
    texts.add_row(Text(plain), Text(steered, "" if plain == steered else "bold"))
    console.print(texts)
    console.print()
    if plain == steered:
        console.print(Text("The continuation is the same.", FAINT))
        console.print()
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    place = (
        f"Next token behind {layout.visible(result.behind)!r}" if result.behind else "Next token"
    )
    table.add_column(Text(place), overflow="fold")
    for name in ("plain", "steered", "change"):
        table.add_column(Text(name), justify="right", no_wrap=True)
    table.add_column(Text(""), no_wrap=True)
    for token in result.next_tokens:
        change = token.steered - token.plain
        ink = SUPPORT_INK if change > 0 else OPPOSE_INK
        style = "" if abs(change) < _STILL else f"rgb({ink[0]},{ink[1]},{ink[2]})"
        table.add_row(
            Text(layout.visible(token.text)),
            Text(f"{token.plain:.3f}"),
            Text(f"{token.steered:.3f}"),
            Text(f"{change:+.3f}", style),
            Text("█" * round(_BAR * token.steered), style),
        )
    console.print(table)


def _shown(text: str) -> str:
    """A continuation without the space that it begins with."""
    return text.removeprefix(" ") or "(nothing: the text ended at once)"
