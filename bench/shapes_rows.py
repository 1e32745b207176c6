"""Rows of ``bench.shapes``: one number each, with its interval and what it was measured with."""

from __future__ import annotations

import csv
import dataclasses
import math
import random
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from bench.rates import provenance, write

Z = 1.959964  # of a two-sided interval of 95%
_DRAWS = 2000


class Setting(NamedTuple):
    """How pictures are explained."""

    method: str
    mode: str = "min_shift"
    similarity: float | None = None
    units: str = "patch"

    @property
    def name(self) -> str:
        """``direct, min_shift, κ 0.6``, for instance."""
        kappa = "" if self.similarity is None else f", κ {self.similarity:g}"
        units = "" if self.units == "patch" else f", {self.units}"
        return f"{self.method}, {self.mode}{kappa}{units}"


@dataclasses.dataclass(frozen=True)
class Row:
    """One number.

    Attributes:
        part: ``pointing``, ``redundancy``, ``questions`` or ``cost``.
        kind: What was shown or asked.
        measure: What ``value`` is.
        count: Over how many pictures, targets or questions.
        low, high: An interval of 95%: Wilson's of rates, by bootstrap of means; of medians, the
            20% and 80% quantiles.
    """

    part: str
    kind: str
    method: str
    mode: str
    similarity: float | None
    units: str
    measure: str
    count: int
    value: float
    low: float
    high: float
    device: str
    torch: str
    transformers: str
    commit: str
    date: str


def row(
    part: str,
    kind: str,
    setting: Setting,
    measure: str,
    count: int,
    numbers: tuple[float, float, float],
) -> Row:
    """A row of a value with its interval."""
    value, low, high = (round(number, 4) for number in numbers)
    return Row(part, kind, *setting, measure, count, value, low, high, **provenance())


def rate(hits: Sequence[bool]) -> tuple[float, float, float]:
    """The share of hits and its Wilson interval."""
    n, p = len(hits), fmean(map(float, hits))
    middle = (p + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z / (1 + Z * Z / n) * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))
    return p, max(0.0, middle - half), min(1.0, middle + half)


def average(values: Sequence[float]) -> tuple[float, float, float]:
    """The mean and its interval by a seeded bootstrap."""
    rng = random.Random(0)
    means = sorted(fmean(rng.choices(values, k=len(values))) for _ in range(_DRAWS))
    return fmean(values), means[round(0.025 * (_DRAWS - 1))], means[round(0.975 * (_DRAWS - 1))]


def read(path: Path) -> list[Row]:
    """Rows of an earlier run; none without one."""
    if not path.exists():
        return []
    found = []
    with path.open(newline="") as file:
        for each in csv.DictReader(file):
            values: dict[str, Any] = dict(each)
            values |= {name: float(each[name]) for name in ("value", "low", "high")}
            values["count"] = int(each["count"])
            values["similarity"] = float(each["similarity"]) if each["similarity"] else None
            found.append(Row(**values))
    return found


def put(rows: Sequence[Row], path: Path) -> list[Row]:
    """Write rows in place of those of the same part; returns all that the file then holds."""
    fresh = {each.part for each in rows}
    kept = [each for each in read(path) if each.part not in fresh]
    order = ("pointing", "redundancy", "questions", "cost")
    whole = sorted([*kept, *rows], key=lambda each: order.index(each.part))
    write(whole, path)
    return whole
