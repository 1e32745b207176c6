"""Quality against cost: which methods nothing cheaper or as cheap beats."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ..bootstrap import Interval
from .collected import FAITHFUL, FLOOR, Collected, NothingToDraw
from .placing import Line, place_labels
from .style import FAINT, SIZE, SMALL, WIDTH, family_legend, framed, look, plain

_HIGH = 3.8  # inches of a panel with its labels
_LEFT, _RIGHT, _BELOW = 0.65, 0.15, 0.44
_PANELS = {"mAP": "mAP, %", "removal_gap": FAITHFUL["removal_gap"]}


@dataclass(frozen=True)
class Point:
    """A method: its mean cost in forwards and its quality."""

    method: str
    forwards: float
    quality: Interval


def pareto(collected: Collected) -> Figure:
    """Every method, in two panels: mAP and removal gap; a staircase through the best of each cost.

    Raises: NothingToDraw: if fewer than two methods with a cost have either measure.
    """
    panels = {measure: points(collected, measure) for measure in _PANELS}
    panels = {m: own for m, own in panels.items() if len(_costly(own)) > 1}
    if not panels:
        raise NothingToDraw("fewer than two methods with a cost have a mAP or a removal gap")
    height = _HIGH * len(panels)
    counts = [point.quality.count for own in panels.values() for point in own]
    families = family_legend([each for each in collected.methods if each != FLOOR])
    figure, top = framed(
        height,
        "Quality against cost",
        collected.caption(
            counts,
            "Cost: mean forwards of the whole input, a backward counting as two",
            "Whiskers: 95% bootstrap interval; grey line: the best of all that cost no more; "
            "hollow: similar units suppressed together",
        ),
        handles=[
            Line2D([], [], color=colour, marker="o", linestyle="", label=name)
            for name, colour in families.items()
        ],
        free=True,
    )
    whole = figure.get_figheight()
    for index, (measure, own) in enumerate(panels.items()):
        axes = figure.add_axes(
            (
                _LEFT / WIDTH,
                (top - (index + 1) * _HIGH + _BELOW) / whole,
                1 - (_LEFT + _RIGHT) / WIDTH,
                (_HIGH - _BELOW - 0.1) / whole,
            )
        )
        _panel(axes, measure, own)
    return figure


def points(collected: Collected, measure: str) -> list[Point]:
    """Of every method that has the measure, in percent if it needs a label."""
    found = []
    for name in collected.methods:
        interval = collected.interval(name, measure)
        forwards = list(collected.values(name, "forwards").values())
        if interval is not None and forwards:
            scale = 100.0 if measure == "mAP" else 1.0
            value, low, high = (scale * each for each in interval[:3])
            quality = Interval(value, low, high, interval.count, interval.note)
            found.append(Point(name, float(np.mean(forwards)), quality))
    return found


def front(points: Sequence[Point]) -> list[Point]:
    """Those of which none is as cheap and better, or cheaper and as good; the cheapest first."""
    best: list[Point] = []
    for point in sorted(points, key=lambda each: (each.forwards, -each.quality.value)):
        if not best or point.quality.value > best[-1].quality.value:
            best.append(point)
    return best


def _costly(points: Sequence[Point]) -> list[Point]:
    """Those that have a place on the axis; chance is what the others are held against."""
    return [point for point in points if point.forwards > 0 and point.method != FLOOR]


def _panel(axes: Any, measure: str, own: Sequence[Point]) -> None:
    costly = _costly(own)
    axes.set_xscale("log")
    least, most = min(p.forwards for p in costly), max(p.forwards for p in costly)
    axes.set_xlim(least / 1.6, most * 1.9)
    ends = [end for p in costly for end in p.quality[:3] if math.isfinite(end)]
    room = 0.09 * (max(ends) - min(ends) or 1.0)
    axes.set_ylim(min(ends) - room, max(ends) + room)
    stairs = front(costly)
    axes.step(
        [*(p.forwards for p in stairs), axes.get_xlim()[1]],
        [*(p.quality.value for p in stairs), stairs[-1].quality.value],
        where="post",
        color="0.6",
        linewidth=2.2,
        alpha=0.6,
        zorder=1,
    )
    for point in own:
        if point in costly:
            _mark(axes, point)
        else:
            _floor(axes, point)
    _ticks(axes, least, most)
    axes.set_xlabel("cost, forwards of the whole input", fontsize=SIZE, labelpad=1)
    axes.set_ylabel(_PANELS[measure], fontsize=SIZE)
    plain(axes)
    on = {point.method for point in stairs}
    place_labels(
        axes,
        [
            (
                p.forwards,
                p.quality.value,
                look(p.method).label,
                p.method in on,
                look(p.method).colour,
            )
            for p in sorted(costly, key=lambda p: (p.method not in on, -p.quality.value))
        ],
        SMALL,
        lines=[
            *_whiskers(costly),
            *_levels(stairs, axes.get_xlim()[1]),
            *_levels_of_chance(axes, own),
        ],
    )


def _levels_of_chance(axes: Any, points: Sequence[Point]) -> list[Line]:
    left, right = axes.get_xlim()
    values = [point.quality.value for point in points if point.method == FLOOR]
    return [(left, value, right, value) for value in values]


def _whiskers(points: Sequence[Point]) -> list[Line]:
    ends = [(p.forwards, p.quality.low, p.forwards, p.quality.high) for p in points]
    return [line for line in ends if all(map(math.isfinite, line))]


def _levels(stairs: Sequence[Point], last: float) -> list[Line]:
    """The stairs' level parts."""
    stops = [*(point.forwards for point in stairs[1:]), last]
    return [
        (point.forwards, point.quality.value, stop, point.quality.value)
        for point, stop in zip(stairs, stops, strict=True)
    ]


def _mark(axes: Any, point: Point) -> None:
    shown, value = look(point.method), point.quality.value
    axes.errorbar(
        point.forwards,
        value,
        [[value - point.quality.low], [point.quality.high - value]],
        color=shown.colour,
        marker=shown.mark,
        markerfacecolor=shown.face,
        markersize=6.5,
        elinewidth=1,
        linestyle="",
        zorder=3,
    )


def _floor(axes: Any, point: Point) -> None:
    """A line, or where it would lie far below the others, how far."""
    value = point.quality.value
    name = look(point.method).label
    low, high = axes.get_ylim()
    inside = low <= value <= high
    if inside:
        axes.axhline(value, color=look(point.method).colour, linestyle=":", zorder=1)
    axes.annotate(
        name if inside else f"{name}: {value:.2g}, {'below' if value < low else 'above'}",
        (0.995, value if inside else float(value > high)),
        xytext=(0, -10 if value > high else 3),
        xycoords=("axes fraction", "data" if inside else "axes fraction"),
        textcoords="offset points",
        ha="right",
        fontsize=SMALL,
        color=FAINT,
    )


def _ticks(axes: Any, least: float, most: float) -> None:
    ticks = [b * 10.0**e for e in range(-2, 7) for b in (1, 2, 5)]
    ticks = [tick for tick in ticks if least / 1.6 <= tick <= most * 1.9]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
