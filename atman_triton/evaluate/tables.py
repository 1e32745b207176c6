"""Averages over examples, each with the interval that it may lie in, as rows of a table."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from .bootstrap import Interval, Statistic, bootstrap, interquartile_mean, mean
from .readings import READINGS
from .results import Result
from .settings import Setting

_ALIGNED: dict[str, tuple[str, Statistic]] = {
    "mAP": ("precision", mean),
    "mAP_IQ": ("precision", interquartile_mean),
    "mAR": ("recall", mean),
    "mAR_IQ": ("recall", interquartile_mean),
    "pointing": ("pointing", mean),
    "variation": ("variation", mean),
    "outside": ("outside", mean),
}
_FAITHFUL = (
    *("removal_gap", "deletion", "insertion", "gap_area", "comprehensiveness", "sufficiency"),
    *("top5_drop", "hidden_gap", "lds", "stability"),
)
COLUMNS = (*_ALIGNED, *_FAITHFUL, "forwards", "seconds")
"""What rows have values of. Those of ``_FAITHFUL`` are of the reading ``signed mean`` in all."""

LOWER_IS_BETTER = ("variation", "outside", "deletion", "sufficiency", "forwards", "seconds")

_POINTED = ("precision", "recall", "pointing")
"""What is 0 where a method finds nothing relevant."""

_PAPER_CALLS = {"exact multiplicative": "atman", "released": "atman"}
"""What the paper measured of AtMan stands beside its formula and beside its released code."""


@dataclass(frozen=True)
class Row:
    """One method in one reading, over the examples that are reported.

    Args:
        method: Name of the setting.
        kind: ``atman`` or ``baseline``.
        reading: One of ``READINGS``.
        chosen: Whether this is the reading with the highest mAP on the examples to choose by.
        count: Examples.
        values: By name of ``COLUMNS``, as far as it was measured: alignment as fractions, gaps in
            nats per token, forwards in passes over the prompt. 95% intervals.
        paper: The paper's own numbers, fractions, by ``mAP``, ``mAP_IQ``, ``mAR``, ``mAR_IQ``.
        notes: What was not as usual, and in how many examples.
    """

    method: str
    kind: str
    reading: str
    chosen: bool
    count: int
    values: dict[str, Interval]
    paper: dict[str, float]
    notes: tuple[str, ...] = ()


def summarise(
    results: Sequence[Result],
    settings: Sequence[Setting],
    paper: Mapping[str, Mapping[str, float]],
    *,
    grouped: bool = False,
) -> list[Row]:
    """A row for every method and reading, methods in the order of the settings.

    Args:
        results: Of both splits.
        settings: Of which there are results.
        paper: What the paper reports, in percent; see ``paper``.
        grouped: Draw examples of one group together where intervals are estimated.
    Raises: ValueError: if there are no examples to report.
    """
    found: list[Row] = []
    for setting in settings:
        own = [result for result in results if result.method == setting.name]
        reported = [result for result in own if result.split == "report"]
        if not reported:
            raise ValueError(f"there are no examples of {setting.name} to report, only to choose.")
        chosen = choose_reading([result for result in own if result.split == "choose"])
        groups = [result.group for result in reported] if grouped else None
        shared = _shared(reported, groups)
        theirs = paper.get(_PAPER_CALLS.get(setting.name, setting.name), {})
        found += [
            Row(
                method=setting.name,
                kind=setting.kind,
                reading=reading,
                chosen=reading == chosen,
                count=len(reported),
                values=_aligned(reported, reading, groups) | shared,
                paper={name: percent / 100 for name, percent in theirs.items()},
                notes=_notes(reported),
            )
            for reading in READINGS
        ]
    return found


def choose_reading(results: Sequence[Result]) -> str:
    """The reading with the highest mean precision; the first of several that rounding parts.

    Raises: ValueError: if there are no results.
    """
    if not results:
        raise ValueError("there are no examples to choose a reading by.")

    def precision(reading: str) -> float:
        return round(fmean(_pointed(one.alignment[reading]["precision"]) for one in results), 9)

    return max(READINGS, key=precision)


def chosen(rows: Iterable[Row]) -> list[Row]:
    """One row a method, the highest mAP first."""
    return sorted((row for row in rows if row.chosen), key=_by_precision)


def marks(rows: Sequence[Row], column: str) -> dict[str, str]:
    """Which methods are ``best`` and ``second`` in a column, as the paper's tables mark them."""
    sign = 1 if column in LOWER_IS_BETTER else -1
    values = {row.method: sign * row.values[column].value for row in rows if column in row.values}
    ranked = sorted({value for value in values.values() if not math.isnan(value)})[:2]
    places = dict(zip(ranked, ("best", "second"), strict=False))
    return {method: places[value] for method, value in values.items() if value in places}


def value_of(result: Result, column: str, reading: str) -> float:
    """What a row averages, of one example; NaN where it has none.

    Args:
        column: Of alignment, in the reading, or of faithfulness.
    """
    if column not in _ALIGNED:
        return result.faithfulness.get(column, math.nan)
    metric = _ALIGNED[column][0]
    value = result.alignment[reading].get(metric, math.nan)
    return _pointed(value) if metric in _POINTED else value


def _by_precision(row: Row) -> float:
    value = row.values["mAP"].value
    return math.inf if math.isnan(value) else -value


def _aligned(
    results: Sequence[Result], reading: str, groups: Sequence[str] | None
) -> dict[str, Interval]:
    """What depends on the reading."""
    found = {}
    for column, (metric, statistic) in _ALIGNED.items():
        values = [one.alignment[reading].get(metric) for one in results]
        if metric in _POINTED:
            values = [None if value is None else _pointed(value) for value in values]
        if (interval := _interval(values, statistic, groups)) is not None:
            found[column] = interval
    return found


def _shared(results: Sequence[Result], groups: Sequence[str] | None) -> dict[str, Interval]:
    """What does not."""
    found = {}
    for column in _FAITHFUL:
        values = [one.faithfulness.get(column) for one in results]
        if (interval := _interval(values, mean, groups)) is not None:
            found[column] = interval
    for column in ("forwards", "seconds"):
        found[column] = bootstrap([getattr(one, column) for one in results], groups=groups)
    return found


def _pointed(value: float) -> float:
    """Nothing relevant at all is a miss: leaving such examples out would be a favour."""
    return 0.0 if math.isnan(value) else value


def _interval(
    values: Sequence[float | None], statistic: Statistic, groups: Sequence[str] | None
) -> Interval | None:
    """Of those examples that have it; None if none has."""
    there = [index for index, value in enumerate(values) if value is not None]
    if not there:
        return None
    known = [value for value in values if value is not None]
    own = None if groups is None else [groups[index] for index in there]
    return bootstrap(known, statistic, groups=own)


def _notes(results: Sequence[Result]) -> tuple[str, ...]:
    """Each kind of note once, with the number of examples; numbers in notes count as alike."""
    counted: Counter[str] = Counter()
    for result in results:
        counted.update(dict.fromkeys(re.sub(r"\d+", "N", note) for note in result.notes).keys())
    return tuple(
        f"{count} example{'s' if count > 1 else ''}: {note}"
        for note, count in counted.most_common()
    )
