"""Rows of a table in files and on the terminal."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table

from .paper import NOTE
from .statistics import Statistics
from .tables import COLUMNS, Row, chosen, marks

PERCENT = ("mAP", "mAP_IQ", "mAR", "mAR_IQ", "pointing", "outside")
"""Columns that people read as percent; files hold fractions."""

HEADINGS = {
    "mAP": "mAP",
    "mAP_IQ": "mAP IQ",
    "mAR": "mAR",
    "mAR_IQ": "mAR IQ",
    "pointing": "pointing",
    "variation": "variation",
    "outside": "outside",
    "removal_gap": "removal gap",
    "gap_area": "gap area",
    "lds": "LDS",
    "stability": "stability",
    "forwards": "forwards",
    "seconds": "seconds",
}
"""What people are shown; ``table.csv`` has all columns."""

NARROW = 100
"""Characters below which how each method is read has no room beside the names of methods."""

WIDE = 190
"""Characters in which a terminal shows all of them, with their intervals."""

_NARROW = ("mAP", "mAR", "removal_gap", "lds", "forwards")
_COSTS = ("forwards", "seconds")  # of which nothing is the best
_PAPER = ("mAP", "mAP_IQ", "mAR", "mAR_IQ")
_MARKED = {"best": ("**", "**"), "second": ("<u>", "</u>")}
_STYLES = {"best": "bold", "second": "underline"}


def write_csv(rows: Sequence[Row], path: Path, facts: Mapping[str, str]) -> None:
    """All rows, those of other readings included, with intervals and how they were measured.

    Args:
        facts: See ``journal.run_facts``.
    """
    ends = ("", "_low", "_high", "_count")
    header = ["method", "kind", "reading", "chosen", "examples"]
    header += [f"{name}{end}" for name in COLUMNS for end in ends]
    header += [f"paper_{name}" for name in _PAPER] + ["notes", *facts]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        for row in rows:
            cells = [row.method, row.kind, row.reading, str(row.chosen).lower(), str(row.count)]
            for name in COLUMNS:
                found = row.values.get(name)
                three = [exact(number) for number in found[:3]] if found else ["", "", ""]
                cells += [*three, str(found.count) if found else ""]
            cells += [exact(row.paper[name]) if name in row.paper else "" for name in _PAPER]
            writer.writerow([*cells, "; ".join(row.notes), *facts.values()])


def write_statistics(statistics: Statistics, path: Path) -> None:
    """What the data is made of, a line for every quantity."""
    rows = statistics.rows()
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else ["quantity"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def write_markdown(
    rows: Sequence[Row], path: Path, facts: Mapping[str, str], title: str, more: str = ""
) -> None:
    """The chosen rows as a table for a README.

    Args:
        more: What stands below.
    """
    own = chosen(rows)
    columns = shown(own)
    placed = {name: marks(own, name) for name in columns if name not in _COSTS}
    with_paper = any(row.paper for row in own)
    head = ["method", "read as", *(HEADINGS[name] for name in columns)]
    head += [f"{NOTE}: {' / '.join(HEADINGS[name] for name in _PAPER)}"] if with_paper else []
    lines = [f"| {' | '.join(head)} |", f"|{'|'.join(['---', '---', *(len(head) - 2) * ['--:']])}|"]
    for row in own:
        cells = [row.method, row.reading]
        for name in columns:
            before, after = _MARKED.get(placed.get(name, {}).get(row.method, ""), ("", ""))
            cells.append(_cell(row, name, before, after))
        cells += [paper_cell(row)] if with_paper else []
        lines.append(f"| {' | '.join(cells)} |")
    parts = [f"# {title}", "", legend(own, facts), "", *lines, ""]
    path.write_text("\n".join(parts + ([more] if more else [])), "utf-8")


def terminal_table(rows: Sequence[Row], title: str, width: int) -> Table:
    """The chosen rows, for a terminal.

    Args:
        width: Of the terminal, in characters: a narrow one has room for fewer columns.
    """
    own = chosen(rows)
    columns = [name for name in shown(own) if width >= WIDE or name in _NARROW]
    placed = {name: marks(own, name) for name in columns if name not in _COSTS}
    with_paper = any(row.paper for row in own)
    note = f"paper: mAP, {NOTE}" if with_paper else None
    table = Table(title=title, caption=note, box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("method", overflow="fold")
    if width >= NARROW:
        table.add_column("read as", no_wrap=True)
    for name in columns:
        table.add_column(HEADINGS[name], justify="right", no_wrap=True)
    if with_paper:
        table.add_column("paper", justify="right", no_wrap=True)
    for row in own:
        cells = [row.method, row.reading] if width >= NARROW else [row.method]
        for name in columns:
            style = _STYLES.get(placed.get(name, {}).get(row.method, ""))
            cell = _cell(row, name, bare=width < WIDE)
            cells.append(f"[{style}]{cell}[/]" if style else cell)
        cells += [f"{100 * row.paper['mAP']:.1f}" if row.paper else ""] if with_paper else []
        table.add_row(*cells)
    return table


def shown(rows: Sequence[Row]) -> list[str]:
    """Columns for people, those that were measured of some row."""
    return [name for name in HEADINGS if any(name in row.values for row in rows)]


def legend(rows: Sequence[Row], facts: Mapping[str, str]) -> str:
    """What the numbers are, and what they were measured with."""
    count = max(row.count for row in rows)
    version = " at ".join(filter(None, (facts["atman_triton"], facts["commit"])))
    return (
        f"{count} examples, others chose how each method is read. Alignment in percent, gaps in "
        "nats per token, forwards in passes over the prompt; ± half of the 95% interval; (of n): "
        "defined in n examples; **best**, <u>second</u>. "
        f"{facts['model']} ({facts['dtype']}), {facts['device']}, atman_triton {version}, torch "
        f"{facts['torch']}, transformers {facts['transformers']}, {facts['date']}."
    )


def paper_cell(row: Row) -> str:
    """The paper's four numbers, percent."""
    return " / ".join(f"{100 * row.paper[name]:.1f}" for name in _PAPER) if row.paper else ""


def _cell(row: Row, name: str, before: str = "", after: str = "", *, bare: bool = False) -> str:
    """A value and, unless it stands bare, half of its interval, as people read it."""
    found = row.values.get(name)
    if found is None or math.isnan(found.value):
        return "–"
    scale, digits = (100, 1) if name in PERCENT else (1, 1 if name == "forwards" else 3)
    value = f"{before}{scale * found.value:.{digits}f}{after}"
    if name not in _COSTS and not bare and not math.isnan(found.low):
        value = f"{value} ± {scale * (found.high - found.low) / 2:.{digits}f}"
    # what leaves out hard examples must not look better for it
    fewer = found.count < row.count and name != "stability"
    return f"{value} (of {found.count})" if fewer else value


def exact(number: float) -> str:
    """A number for a file; nothing for NaN."""
    return "" if math.isnan(number) else repr(number)
