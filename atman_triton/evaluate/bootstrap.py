"""How sure an average over examples is: percentile intervals of resampled examples.

Examples that have something in common, such as a paragraph, can be drawn together. A draw is kept
as counts, how often it holds each example, so that no draw is ever sorted. The same number of
examples and the same seed give the same draws: methods that were measured on the same examples are
compared on the same draws of them.

Legend: N examples, G groups of them, B draws.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from .metrics import UNDEFINED, Numbers, as_array

Statistic = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Of values ``[N]`` and counts ``[B, N]``, each at least once above 0: ``[B]``."""

_CELLS = 2_000_000  # of counts at a time


class Interval(NamedTuple):
    """A statistic of some examples and how far it may be off.

    Attributes:
        value: Of the examples themselves; NaN if there are none.
        low, high: Ends of the interval; NaN if fewer than two examples, or groups, were drawn from.
        count: How many examples took part.
        note: What was not as usual, in words; empty if nothing.
    """

    value: float
    low: float
    high: float
    count: int
    note: str = ""


def mean(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """``[B]``, the mean of every draw."""
    return _weighted(values, counts) / counts.sum(1)


def interquartile_mean(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """``[B]``, as ``metrics.interquartile_mean`` of every draw."""
    order = np.argsort(values, kind="stable")
    passed = np.cumsum(counts[:, order], 1) / counts.sum(1, keepdims=True)
    inner = np.clip(passed, 0.25, 0.75)
    weights = np.diff(inner, axis=1, prepend=0.25) / 0.5
    return _weighted(values[order], weights)


def share(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """``[B]``, which share of every draw is above 0."""
    return mean((values > 0).astype(np.float64), counts)


def bootstrap(
    values: Numbers,
    statistic: Statistic = mean,
    repeats: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    groups: Sequence[Hashable] | None = None,
) -> Interval:
    """A statistic of some examples, and the interval that holds ``level`` of its draws.

    Args:
        values: ``[N]``; NaN is left out.
        statistic: ``mean``, ``interquartile_mean``, ``share``, or another function like them.
        repeats: ``B``, at least 1.
        level: Above 0 and below 1.
        seed: Of the draws, from 0.
        groups: ``[N]``; examples of one group are drawn together. None: each for itself.
    Raises: ValueError: if an argument is out of range or of another length than ``values``.
    Source: Efron and Tibshirani 1993, chapter 13; of groups, Davison and Hinkley 1997, 3.8.
    """
    return _interval([as_array(values)], statistic, repeats, level, seed, groups)


def bootstrap_difference(
    a: Numbers,
    b: Numbers,
    statistic: Statistic = mean,
    repeats: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    groups: Sequence[Hashable] | None = None,
) -> Interval:
    """By how much a statistic is larger of ``a`` than of ``b``, both of the same examples.

    Every draw takes the same examples of both, so that what makes an example hard for both does
    not count. Of the ``interquartile_mean`` it is the difference of the two, not that of the
    differences.

    Args:
        a, b: ``[N]``, of the same examples in the same order; a pair that holds NaN is left out.
        statistic, repeats, level, seed, groups: as of ``bootstrap``.
    Raises: ValueError: as ``bootstrap`` does.
    """
    return _interval([as_array(a), as_array(b)], statistic, repeats, level, seed, groups)


def _interval(
    sides: Sequence[np.ndarray],
    statistic: Statistic,
    repeats: int,
    level: float,
    seed: int,
    groups: Sequence[Hashable] | None,
) -> Interval:
    """Of one list of values, or of the difference of two."""
    size = _checked(sides, repeats, level, groups)
    known = ~np.logical_or.reduce([np.isnan(side) for side in sides])
    left = [side[known] for side in sides]
    count = int(known.sum())
    notes = [] if count == size else [f"{size - count} NaN left out"]
    if not count:
        return Interval(UNDEFINED, UNDEFINED, UNDEFINED, 0, "; ".join([*notes, "no values"]))

    def difference(counts: np.ndarray) -> np.ndarray:
        found = [statistic(side, counts) for side in left]
        with np.errstate(invalid="ignore"):  # the difference of two infinities is NaN
            return found[0] - found[1] if len(found) == 2 else found[0]

    value = float(difference(np.ones((1, count)))[0])
    members = np.arange(count) if groups is None else _numbered(groups, known)
    drawn_from = int(members.max()) + 1
    if drawn_from < 2:
        notes.append("one value" if groups is None else "one group")
        return Interval(value, UNDEFINED, UNDEFINED, count, "; ".join(notes))
    draws = _draws(drawn_from, count, repeats, seed)
    found = np.concatenate([difference(counts[:, members]) for counts in draws])
    ends = [(1 - level) / 2, (1 + level) / 2]
    low, high = np.quantile(found, ends, method="inverted_cdf").tolist()
    return Interval(value, low, high, count, "; ".join(notes))


def _checked(
    sides: Sequence[np.ndarray], repeats: int, level: float, groups: Sequence[Hashable] | None
) -> int:
    """``N``.

    Raises: ValueError: naming an argument that is wrong.
    """
    for side in sides:
        if side.ndim != 1:
            raise ValueError(f"values must be a list of numbers, got shape {list(side.shape)}.")
    size = len(sides[0])
    if len(sides) == 2 and len(sides[1]) != size:
        raise ValueError(f"a and b must have the same length, got {size} and {len(sides[1])}.")
    if groups is not None and len(groups) != size:
        raise ValueError(
            f"groups must have one entry for each of {size} values, got {len(groups)}."
        )
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}.")
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level}.")
    return size


def _numbered(groups: Sequence[Hashable], known: np.ndarray) -> np.ndarray:
    """The group of every known value, groups counted from 0 in the order in which they come."""
    numbers: dict[Hashable, int] = {}
    kept = [group for group, there in zip(groups, known, strict=True) if there]
    return np.array([numbers.setdefault(group, len(numbers)) for group in kept])


def _draws(size: int, columns: int, repeats: int, seed: int) -> Iterator[np.ndarray]:
    """``B`` draws of ``size`` from ``size``, as counts ``[b, size]`` of as many as memory is for.

    Args:
        columns: How many values they will be spread over.
    """
    rows = max(1, _CELLS // max(size, columns))
    for start in range(0, repeats, rows):
        yield _counts(size, min(rows, repeats - start), seed, start)


@lru_cache(maxsize=4)
def _counts(size: int, rows: int, seed: int, start: int) -> np.ndarray:
    """``[rows, size]`` float64: how often each of ``size`` is drawn, ``size`` times in all."""
    drawn = np.random.default_rng([seed, start]).integers(0, size, (rows, size))
    drawn += np.arange(rows)[:, None] * size
    counts = np.bincount(drawn.ravel(), minlength=rows * size).reshape(rows, size).astype(float)
    counts.setflags(write=False)
    return counts


def _weighted(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """``[B]``, Σ of weights times values, in which an infinite value of weight 0 is nothing."""
    if np.isfinite(values).all():
        return weights @ values
    with np.errstate(invalid="ignore"):
        return np.where(weights > 0, weights * values, 0.0).sum(1)
