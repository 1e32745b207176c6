"""One wide picture of a table: precision and removal gap of the methods, beside the paper's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from ..bootstrap import Interval
from ..paper import NOTE
from .collected import FAITHFUL, Collected, NothingToDraw, left_out, picked
from .style import INK, SIZE, family_colour, family_of, framed, look, plain

_METHODS = 28
_PANELS = {"mAP": "mAP, %", "removal_gap": FAITHFUL["removal_gap"]}
_ATMAN, _OTHERS = family_colour("atman"), "#E69F00"


def summary(collected: Collected, data: str = "") -> Figure:
    """Bars with intervals, AtMan's and the others' in two colours, the paper's numbers as marks.

    Args:
        collected: Results, and the paper's numbers.
        data: On which data the paper measured it.
    Raises: NothingToDraw: if no method has a precision or a removal gap.
    """
    panels = {measure: collected.intervals(measure) for measure in _PANELS}
    panels = {measure: own for measure, own in panels.items() if own}
    if not panels:
        raise NothingToDraw("no result has a mAP or a removal gap")
    first = next(iter(panels.values()))
    known = [name for name in collected.methods if any(name in own for own in panels.values())]
    methods = picked(known, _METHODS)
    methods.sort(key=lambda name: first[name].value if name in first else -np.inf)
    counts = [own[name].count for own in panels.values() for name in methods if name in own]
    marked = "mAP" in panels and any("mAP" in collected.paper.get(name, {}) for name in methods)
    handles: list[Any] = [
        Patch(color=_ATMAN, label="AtMan"),
        Patch(color=_OTHERS, label="other methods"),
    ]
    if marked:
        handles.append(_mark_in_legend(f"{NOTE}, {data}" if data else NOTE))
    figure, _ = framed(
        0.55 + 0.225 * len(methods),
        "How well methods find what an answer rests on",
        collected.caption(
            counts,
            "Bars: mean and 95% bootstrap interval, mAP in the reading of scores chosen for each "
            "method on other examples",
            "Removal gap: how much less likely the answer gets by removing the tenth that is most "
            "relevant to it, rather than the least relevant tenth",
            left_out(collected.methods, methods),
        ),
        handles=handles,
    )
    axes_of: Any = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (measure, own) in zip(axes_of, panels.items(), strict=True):
        _bars(axes, methods, own, 100.0 if measure == "mAP" else 1.0)
        axes.set_xlabel(_PANELS[measure], fontsize=SIZE)
        if measure == "mAP" and marked:
            _marks(axes, methods, collected.paper)
    axes_of[0].set_ylim(-0.7, len(methods) - 0.3)
    axes_of[0].set_yticks(range(len(methods)), [look(name).label for name in methods])
    return figure


def _bars(axes: Any, methods: Sequence[str], own: Mapping[str, Interval], scale: float) -> None:
    for place, name in enumerate(methods):
        if name not in own:
            continue
        value, low, high = (scale * each for each in own[name][:3])
        axes.barh(
            place,
            value,
            0.72,
            color=_ATMAN if family_of(name) == "atman" else _OTHERS,
            xerr=np.array([[value - low], [high - value]]),
            error_kw={"ecolor": INK, "elinewidth": 1.0},
        )
    axes.axvline(0, color=INK, linewidth=0.8)
    plain(axes, "x")


def _marks(axes: Any, methods: Sequence[str], paper: Mapping[str, Mapping[str, float]]) -> None:
    pairs = [
        (100 * paper[name]["mAP"], place)
        for place, name in enumerate(methods)
        if "mAP" in paper.get(name, {})
    ]
    axes.scatter(
        [value for value, _ in pairs],
        [place for _, place in pairs],
        s=42,
        marker="D",
        facecolors="white",
        edgecolors="black",
        linewidths=1.5,
        zorder=5,
        label=NOTE,
    )


def _mark_in_legend(label: str) -> Line2D:
    return Line2D(
        [],
        [],
        linestyle="",
        marker="D",
        markerfacecolor="white",
        markeredgecolor="black",
        markeredgewidth=1.5,
        label=label,
    )
