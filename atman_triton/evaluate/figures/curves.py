"""What the model still says of the target while more and more of the text or picture is removed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ..bootstrap import bootstrap
from ..faithfulness import shares_of
from ..results import Result
from .collected import Collected, NothingToDraw, left_out, picked
from .style import INK, SIZE, framed, look, plain

_METHODS = 7
_PANELS = {
    "most": "most relevant first: lower is better",
    "least": "least relevant first: higher is better",
}


def curves(collected: Collected) -> Figure:
    """Mean log-probability of the target against the share removed, a line for each method.

    Raises: NothingToDraw: if no result has curves.
    Source: Samek et al. 2017 (most and least relevant first).
    """
    whole = {
        name: {example: result for example, result in own.items() if _complete(result)}
        for name, own in collected.by_method.items()
    }
    whole = {name: own for name, own in whole.items() if own}
    if not whole:
        raise NothingToDraw("no result has removal curves")
    methods = picked(list(whole), _METHODS)
    figure, _ = framed(
        3.5,
        "Removing what a method calls relevant, and what it calls irrelevant",
        collected.caption(
            [len(whole[name]) for name in methods],
            "Mean and 95% bootstrap interval; removed from the input, not hidden from attention",
            left_out(collected.methods, methods),
        ),
        handles=[Line2D([], [], label=look(name).label, **_drawn(name)) for name in methods],
    )
    panels: Any = figure.subplots(1, 2, sharey=True)
    first = next(iter(whole[methods[0]].values()))
    shares = 100 * np.array(shares_of(first.curve["most"]))
    for axes, (order, title) in zip(panels, _PANELS.items(), strict=True):
        for name in methods:
            shown = look(name)
            groups = collected.groups(name, whole[name])
            means, low, high = mean_curve(list(whole[name].values()), order, groups)
            axes.fill_between(shares, low, high, color=shown.colour, alpha=0.08, linewidth=0)
            axes.plot(shares, means, label=shown.label, **_drawn(name))
        axes.set_title(title, fontsize=SIZE, loc="left", color=INK)
        axes.set_xlabel("share removed, %", fontsize=SIZE)
        plain(axes)
    panels[0].set_ylabel("log p of the target, nats per token", fontsize=SIZE)
    return figure


def mean_curve(
    results: Sequence[Result], order: str, groups: Sequence[str] | None = None
) -> tuple[list[float], list[float], list[float]]:
    """Mean, low and high end of its interval at every share, over results with whole curves."""
    points = zip(*(result.curve[order] for result in results), strict=True)
    intervals = [bootstrap(list(each), groups=groups) for each in points]
    return (
        [each.value for each in intervals],
        [each.low for each in intervals],
        [each.high for each in intervals],
    )


def _drawn(name: str) -> dict[str, Any]:
    shown = look(name)
    return {
        "color": shown.colour,
        "linestyle": shown.dash,
        "marker": shown.mark,
        "markerfacecolor": shown.face,
        "markersize": 4,
        "linewidth": 1.4,
    }


def _complete(result: Result) -> bool:
    own = [result.curve.get(order, []) for order in _PANELS]
    return all(each and all(map(math.isfinite, each)) for each in own)
