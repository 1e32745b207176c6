"""How much better or worse methods are than one of them, on the same examples.

Two methods' own intervals may overlap although one is better on nearly every example: what makes an
example hard for both cancels here.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .bootstrap import Interval, bootstrap_difference
from .results import Result
from .tables import Row, chosen, value_of
from .written import HEADINGS, PERCENT, exact

COMPARED = ("mAP", "mAR", "pointing", "removal_gap", "gap_area", "lds")
"""Of ``tables.COLUMNS``, those whose differences are shown; all are better the larger they are."""


@dataclass(frozen=True)
class Difference:
    """One method less another, each in its chosen reading.

    Args:
        method, against: Names of settings.
        values: By name of ``COMPARED``, as far as both have it: 95% intervals of the difference.
    """

    method: str
    against: str
    values: dict[str, Interval]


def differences(
    results: Sequence[Result], rows: Sequence[Row], *, grouped: bool = False
) -> list[Difference]:
    """Of every method from the first, in the order of the table.

    Args:
        results: Of both splits.
        rows: Of ``tables.summarise``: they say which reading was chosen.
        grouped: As of ``tables.summarise``.
    """
    reported: dict[str, dict[str, Result]] = {}
    for result in results:
        if result.split == "report":
            reported.setdefault(result.method, {})[result.example] = result
    readings = {row.method: row.reading for row in rows if row.chosen}
    first = rows[0].method
    found = []
    for row in chosen(rows):
        if row.method == first:
            continue
        own, other = reported[row.method], reported[first]
        shared = [example for example in own if example in other]
        groups = [own[example].group for example in shared] if grouped else None
        values = {}
        for column in COMPARED:
            a = [value_of(own[each], column, row.reading) for each in shared]
            b = [value_of(other[each], column, readings[first]) for each in shared]
            if any(not math.isnan(value) for value in a) and any(
                not math.isnan(value) for value in b
            ):
                values[column] = bootstrap_difference(a, b, groups=groups)
        found.append(Difference(row.method, first, values))
    return found


def write_differences(found: Sequence[Difference], path: Path, facts: Mapping[str, str]) -> None:
    """A line for every method and column; alignment as fractions.

    Args:
        facts: See ``journal.run_facts``.
    """
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(
            ["method", "less", "column", "difference", "low", "high", "examples", *facts]
        )
        for each in found:
            for column, interval in each.values.items():
                numbers = [exact(number) for number in interval[:3]]
                cells = [each.method, each.against, column, *numbers, interval.count]
                writer.writerow([*cells, *facts.values()])


def differences_markdown(found: Sequence[Difference]) -> str:
    """A section for people: bold where the interval does not hold 0. Empty if there is nothing."""
    columns = [name for name in COMPARED if any(name in each.values for each in found)]
    if not columns:
        return ""
    lines = [
        f"## Less {found[0].against}, on the same examples",
        "",
        "Differences with their 95% intervals, each method in its chosen reading. Above 0 is "
        f"better than {found[0].against}; **bold** where 0 is not in the interval.",
        "",
        f"| method | {' | '.join(HEADINGS[name] for name in columns)} |",
        f"|---|{len(columns) * '--:|'}",
    ]
    for each in found:
        cells = [_cell(each.values.get(name), name) for name in columns]
        lines.append(f"| {each.method} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _cell(interval: Interval | None, name: str) -> str:
    if interval is None or math.isnan(interval.value):
        return "–"
    scale, digits = (100, 1) if name in PERCENT else (1, 2)
    value, low, high = (_signed(scale * number, digits) for number in interval[:3])
    if math.isnan(interval.low):
        return value
    nothing = float(f"{scale * interval.value:.{digits}f}") == 0  # as it is shown
    mark = "" if nothing or interval.low <= 0 <= interval.high else "**"
    return f"{mark}{value}{mark} [{low}, {high}]"


def _signed(number: float, digits: int) -> str:
    """With its sign, but for what rounds to 0."""
    text = f"{number:+.{digits}f}".replace("-", "−")
    return text[1:] if not float(f"{number:.{digits}f}") else text
