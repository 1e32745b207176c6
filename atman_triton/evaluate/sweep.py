"""One method over a grid of two of its options, such as the factor and κ."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from .bootstrap import Interval
from .settings import Setting, read_option, setting
from .tables import Row, chosen

MEASURED = ("mAP", "removal_gap")
"""What a sweep is about; see ``tables.COLUMNS``."""


@dataclass(frozen=True)
class Cell:
    """One point of the grid.

    Args:
        options: Its place: value by option, as it is written, in the order of the sweep.
        reading: In which it stands best on the examples to choose by.
        values: By ``MEASURED`` and ``forwards``.
    """

    options: dict[str, str]
    reading: str
    values: dict[str, Interval]


@dataclass(frozen=True)
class Sweep:
    """A grid.

    Args:
        method: What is swept, by the name of its setting.
        axes: Values by option, as they are written.
        settings: By the values of a point, in the order of the axes.
    """

    method: str
    axes: dict[str, list[str]]
    settings: dict[tuple[str, ...], Setting]


def parse_sweep(text: str, base: Setting) -> Sweep:
    """A grid as it is written on the command line: ``factor=0,0.1;similarity=none,0.5``.

    Args:
        text: One or two options with their values.
        base: The method; its other options hold everywhere.
    Raises: ValueError: naming what cannot be read.
    """
    axes: dict[str, list[str]] = {}
    for part in text.split(";"):
        option, equals, values = part.strip().partition("=")
        several = [value.strip() for value in values.split(",") if value.strip()]
        if not equals or not several:
            raise ValueError(f"sweep must be like factor=0,0.1;similarity=none,0.5, got {part!r}.")
        if option in axes:
            raise ValueError(f"sweep: {option} is given twice.")
        if len(set(several)) < len(several):
            raise ValueError(f"sweep: {option} has a value twice, got {values!r}.")
        axes[option] = several
    if len(axes) > 2:
        raise ValueError(f"sweep takes one or two options, got {', '.join(axes)}.")
    settings = {}
    for point in product(*axes.values()):
        read = {
            name: read_option(base.method, name, value)
            for name, value in zip(axes, point, strict=True)
        }
        try:
            settings[point] = setting(base.method, base.options | read)
        except ValueError as error:
            raise ValueError(f"sweep: {', '.join(point)}: {error}") from error
    return Sweep(base.name, axes, settings)


def cells(sweep: Sweep, rows: Sequence[Row]) -> list[Cell]:
    """The grid's numbers, from the rows of its settings."""
    best = {row.method: row for row in chosen(rows)}
    found = []
    for point, one in sweep.settings.items():
        row = best[one.name]
        values = {name: row.values[name] for name in (*MEASURED, "forwards")}
        options = dict(zip(sweep.axes, point, strict=True))
        found.append(Cell(options, row.reading, values))
    return found


def terminal_sweep(sweep: Sweep, found: Sequence[Cell], title: str) -> Table:
    """A line for every point, for a terminal: alignment in percent, gaps in nats per token."""
    table = Table(title=title, box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for name in (*sweep.axes, *MEASURED, "forwards"):
        table.add_column(name.replace("_", " "), justify="right", no_wrap=True)
    for cell in found:
        aligned, gap, forwards = (cell.values[name].value for name in (*MEASURED, "forwards"))
        numbers = f"{100 * aligned:.1f}", f"{gap:.3f}", f"{forwards:.1f}"
        table.add_row(*cell.options.values(), *numbers)
    return table


def write_sweep(sweep: Sweep, found: Sequence[Cell], path: Path, facts: Mapping[str, str]) -> None:
    """A line for every point, with intervals and how it was measured."""
    names = (*MEASURED, "forwards")
    header: list[Any] = ["method", *sweep.axes, "reading", "examples"]
    header += [f"{name}{end}" for name in names for end in ("", "_low", "_high")] + [*facts]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        for cell in found:
            count = max(interval.count for interval in cell.values.values())
            numbers = [repr(x) for name in names for x in cell.values[name][:3]]
            own = [sweep.method, *cell.options.values(), cell.reading, count]
            writer.writerow([*own, *numbers, *facts.values()])
