"""Fig. 11 to 14: how average precision and recall are distributed over examples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from .collected import ALIGNED, Collected, NothingToDraw, left_out, picked
from .style import FAINT, INK, SIZE, SMALL, framed, look, plain

_HISTOGRAMS = 8
_BINS = 20
_MEASURES = ("mAP", "mAR")


def boxes(collected: Collected) -> Figure:
    """A box for each method: average precision on the left, recall on the right.

    Raises: NothingToDraw: if there are no labels.
    Source: AtMan, Fig. 11 and 13.
    """
    methods = _labelled(collected, collected.methods)
    means = {name: np.mean(list(collected.values(name, "mAP").values())) for name in methods}
    methods.sort(key=lambda name: means[name])
    counts = [len(collected.values(name, "mAP")) for name in methods]
    figure, _ = framed(
        0.75 + 0.24 * len(methods),
        "Average precision and recall of every method (after Fig. 11 and 13 of the paper)",
        collected.caption(
            counts,
            "Box: quartiles, line: median, whiskers: 5% to 95% of the examples, diamond: mean",
            "Every method in the reading chosen for it on other examples",
        ),
    )
    panels: Any = figure.subplots(1, 2, sharey=True)
    for axes, measure in zip(panels, _MEASURES, strict=True):
        for place, name in enumerate(methods):
            values = list(collected.values(name, measure).values())
            if values:
                _box(axes, place, 100 * np.array(values), look(name).colour)
        axes.set_xlim(-2, 102)
        axes.set_xlabel(f"{ALIGNED[measure][1]}, %", fontsize=SIZE)
        plain(axes, "x")
    panels[0].set_ylim(-0.7, len(methods) - 0.3)
    panels[0].set_yticks(range(len(methods)), [look(name).label for name in methods])
    return figure


def histograms(collected: Collected) -> Figure:
    """Histograms of some methods: average precision on the left, recall on the right.

    Raises: NothingToDraw: if there are no labels.
    Source: AtMan, Fig. 12 and 14.
    """
    known = _labelled(collected, collected.methods)
    methods = picked(known, _HISTOGRAMS)
    counts = [len(collected.values(name, "mAP")) for name in methods]
    figure, _ = framed(
        0.5 + 0.72 * len(methods),
        "Histograms of average precision and recall (after Fig. 12 and 14 of the paper)",
        collected.caption(counts, "Dashed: the mean", left_out(collected.methods, methods)),
    )
    panels: Any = figure.subplots(len(methods), 2, sharex=True, sharey="col", squeeze=False)
    edges = np.linspace(0, 100, _BINS + 1)
    for row, name in zip(panels, methods, strict=True):
        for axes, measure in zip(row, _MEASURES, strict=True):
            values = 100 * np.array(list(collected.values(name, measure).values()))
            shares = 100 * np.histogram(values, edges)[0] / max(len(values), 1)
            axes.bar(edges[:-1], shares, np.diff(edges), align="edge", color=look(name).colour)
            if len(values):
                axes.axvline(values.mean(), color=INK, linestyle="--", linewidth=1)
            axes.set_xlim(0, 100)
            plain(axes, "y")
            axes.tick_params(labelsize=SMALL)
        row[0].set_title(look(name).label, loc="left", fontsize=SIZE, pad=2, color=INK)
    for axes, measure in zip(panels[-1], _MEASURES, strict=True):
        axes.set_xlabel(f"{ALIGNED[measure][1]}, %", fontsize=SIZE)
    figure.supylabel("share of examples, %", fontsize=SIZE, color=FAINT)
    return figure


def _labelled(collected: Collected, methods: Sequence[str]) -> list[str]:
    found = [name for name in methods if collected.values(name, "mAP")]
    if not found:
        raise NothingToDraw("no result has a mAP")
    return found


def _box(axes: Any, place: int, values: Any, colour: str) -> None:
    low, first, middle, third, high = np.quantile(values, (0.05, 0.25, 0.5, 0.75, 0.95))
    axes.plot([low, high], [place, place], color=colour, linewidth=1.2, zorder=2)
    axes.barh(
        place, third - first, 0.62, left=first, color=colour, alpha=0.45, edgecolor=colour, zorder=2
    )
    axes.plot([middle, middle], [place - 0.31, place + 0.31], color=INK, linewidth=1.6, zorder=3)
    axes.plot(
        values.mean(), place, "D", color="white", markeredgecolor=INK, markersize=4.5, zorder=4
    )
