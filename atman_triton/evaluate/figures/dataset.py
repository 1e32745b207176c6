"""Fig. 9 and 15: what a data set is like."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .collected import NothingToDraw
from .style import INK, SIZE, SMALL, family_colour, framed, plain

_WIDE = 2  # panels beside each other
_HIGH = 2.3  # inches of one
_BARS = 24
_BINS = 30


def dataset(values: Mapping[str, Sequence[float]], title: str) -> Figure:
    """A histogram for each fact of the examples.

    Args:
        values: By what they count, of every example, paragraph or class; see
            ``statistics.Statistics.values``. Empty ones are left out, and NaN.
        title: Data set.
    Raises: NothingToDraw: if there are no values.
    Source: AtMan, Fig. 9 and 15.
    """
    known = {name: [each for each in own if math.isfinite(each)] for name, own in values.items()}
    known = {name: own for name, own in known.items() if own}
    if not known:
        raise NothingToDraw("there are no statistics of the data")
    rows = -(-len(known) // _WIDE)
    figure, _ = framed(
        _HIGH * rows + 0.15,
        "The data (after Fig. 9 and 15 of the paper)",
        f"{title}. Dashed: the mean.",
    )
    panels: Any = figure.subplots(rows, _WIDE, squeeze=False)
    for axes, (name, each) in zip(panels.flat, known.items(), strict=False):
        _histogram(axes, np.array(each, dtype=float))
        axes.set_title(name, loc="left", fontsize=SIZE, color=INK)
        axes.tick_params(labelsize=SMALL)
    for axes in list(panels.flat)[len(known) :]:
        axes.axis("off")
    return figure


def _histogram(axes: Any, numbers: Any) -> None:
    colour = family_colour("atman")
    whole = (numbers == numbers.round()).all()
    if whole and numbers.max() - numbers.min() < _BARS:
        places = np.arange(numbers.min(), numbers.max() + 1)
        counts = [(numbers == place).sum() for place in places]
        axes.bar(places, counts, 0.85, color=colour)
        if len(places) < 10:
            axes.set_xticks(places, [f"{place:g}" for place in places])
    else:
        counts, edges = np.histogram(numbers, _edges(numbers) if whole else _BINS)
        axes.bar(edges[:-1], counts, np.diff(edges), align="edge", color=colour)
    axes.axvline(numbers.mean(), color=INK, linestyle="--", linewidth=1)
    axes.set_ylabel("count", fontsize=SMALL)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    plain(axes, "y")


def _edges(numbers: Any) -> Any:
    """Of groups of as many whole numbers each, at most 30."""
    first, last = numbers.min(), numbers.max()
    wide = -(-(last - first + 1) // _BINS)
    return np.arange(first - 0.5, last + wide + 0.5, wide)
