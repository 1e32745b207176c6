"""Fig. 10: average precision by the number of questions that a paragraph has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from ..bootstrap import bootstrap
from .collected import Collected, NothingToDraw, left_out, picked, several
from .style import SIZE, SMALL, framed, look, plain

_METHODS = 7
_BINS = 8


def by_questions(collected: Collected) -> Figure:
    """A line for each of some methods, with 95% intervals.

    Raises: NothingToDraw: if there are no labels, or all paragraphs have as many questions.
    Source: AtMan, Fig. 10.
    """
    methods = picked(
        [name for name in collected.methods if collected.values(name, "mAP")], _METHODS
    )
    if not methods:
        raise NothingToDraw("no result has a mAP")
    questions = {
        example: int(result.facts["questions"])
        for name in methods
        for example, result in collected.by_method[name].items()
        if result.facts.get("questions") is not None
    }
    if not several(questions.values()):
        raise NothingToDraw("examples do not differ in their paragraph's number of questions")
    bins = binned(list(questions.values()))
    counts = [len(collected.values(name, "mAP")) for name in methods]
    figure, _ = framed(
        3.6,
        "Precision by number of questions per paragraph (after Fig. 10 of the paper)",
        collected.caption(
            counts,
            "Mean and 95% bootstrap interval; in brackets the examples of each group; methods of "
            "one group stand side by side",
            left_out(collected.methods, methods),
        ),
    )
    axes = figure.add_subplot()
    for index, name in enumerate(methods):
        places, means, low, high = _line(collected, name, questions, bins)
        beside = 0.09 * (index - (len(methods) - 1) / 2)
        shown = look(name)
        axes.errorbar(
            np.array(places) + beside,
            means,
            np.clip([np.subtract(means, low), np.subtract(high, means)], 0, None),
            color=shown.colour,
            marker=shown.mark,
            linestyle=shown.dash,
            markerfacecolor=shown.face,
            markersize=5,
            linewidth=1.3,
            elinewidth=0.9,
            label=shown.label,
        )
    of = [sum(low <= each <= high for each in questions.values()) for low, high in bins]
    axes.set_xticks(
        range(len(bins)),
        [f"{_range(*each)}\n({count})" for each, count in zip(bins, of, strict=True)],
    )
    axes.set_xlabel("questions of the example's paragraph", fontsize=SIZE)
    axes.set_ylabel("mAP, %", fontsize=SIZE)
    axes.set_ylim(bottom=0)
    plain(axes)
    axes.legend(
        fontsize=SMALL,
        frameon=False,
        loc="center left",
        bbox_to_anchor=(1.0, 0.5),
        labelspacing=0.9,
    )
    return figure


def binned(counts: Sequence[int]) -> list[tuple[int, int]]:
    """Groups of counts, first and last of each: one for each count, or at most 8 equally wide ones.

    Groups that hold nothing are left out.
    """
    present = sorted(set(counts))
    if len(present) <= _BINS:
        return [(each, each) for each in present]
    first, last = present[0], present[-1]
    width = -(-(last - first + 1) // _BINS)
    groups = [(start, start + width - 1) for start in range(first, last + 1, width)]
    return [(low, high) for low, high in groups if any(low <= each <= high for each in present)]


def _line(
    collected: Collected,
    method: str,
    questions: Mapping[str, int],
    bins: Sequence[tuple[int, int]],
) -> tuple[list[int], list[float], list[float], list[float]]:
    """Place, mean and interval, percent, of every group that has a value."""
    found = []
    for place, (low, high) in enumerate(bins):
        own = {
            example: 100 * value
            for example, value in collected.values(method, "mAP").items()
            if example in questions and low <= questions[example] <= high
        }
        if own:
            interval = bootstrap(list(own.values()), groups=collected.groups(method, own))
            found.append((place, interval.value, interval.low, interval.high))
    places, means, lows, highs = zip(*found, strict=True)
    return list(places), list(means), list(lows), list(highs)


def _range(low: int, high: int) -> str:
    return str(low) if low == high else f"{low}–{high}"
