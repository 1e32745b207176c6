"""Fig. 17 and 18: with and without suppressing similar units together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from matplotlib.figure import Figure

from ..examples import Example
from .collected import ALIGNED, Collected, NothingToDraw, sentences
from .gallery import draw_pictures, draw_texts, heated, pictures_height, text_height
from .heats import SCALE, STRIPS
from .style import INK, SIZE, SMALL, WIDTH, framed, look, plain

_PICTURES = 4
_TEXTS = 4
_PAIRS = 3
_LEFT, _RIGHT = 2.7, 0.4
_MEASURES = ("mAP", "mAR")


def pairs(methods: Iterable[str]) -> list[tuple[str, str]]:
    """Methods of which there is the same without similarity, each behind that one."""
    names = list(methods)
    found = []
    for name in names:
        words = name.split()
        alone = " ".join(w for w in words if not w.startswith(("similarity=", "rule=")))
        if any(w.startswith("similarity=") for w in words) and alone in names:
            found.append((alone, name))
    return found


def suppression(collected: Collected, examples: Sequence[Example]) -> Figure:
    """Bars of precision and recall, and heat maps, of methods with and without similarity.

    Raises: NothingToDraw: if there is no such pair, or it has neither labels nor heat maps.
    Source: AtMan, Fig. 17 and 18.
    """
    kept = heated(collected.results, examples)
    there = [*collected.methods, *(name for own in kept.values() for name in own)]
    found = pairs(dict.fromkeys(there))[:_PAIRS]
    if not found:
        raise NothingToDraw("no method was run both with and without similarity")
    methods = list(dict.fromkeys(name for pair in found for name in pair))
    rated = [name for name in methods if name in collected.methods]
    labelled = [name for name in rated if collected.values(name, "mAP")]
    known = {example.id: example for example in examples}
    whole = [known[each] for each, own in kept.items() if set(methods) <= set(own)]
    is_picture = any(example.is_picture for example in whole)
    shown = [each for each in whole if each.is_picture == is_picture]
    shown = shown[: _PICTURES if is_picture else _TEXTS]
    if not labelled and not shown:
        raise NothingToDraw("methods with and without similarity have no labels and no heat maps")
    bars = 0.85 + 0.27 * len(labelled) if labelled else 0.0
    if is_picture and shown:
        heats = pictures_height(len(shown), len(methods))
    else:
        heats = sum(text_height(example, kept, methods) for example in shown)
    counts = [len(collected.values(name, "mAP")) for name in labelled]
    about = "hollow: units as similar as κ or more are suppressed together with each unit"
    more = [f"{SCALE}; the first {len(shown)} examples"] if shown else []
    more += [STRIPS] if shown and not is_picture else []
    figure, top = framed(
        bars + heats,
        "With and without correlated suppression (after Fig. 17 and 18 of the paper)",
        collected.caption(counts, "Mean and 95% bootstrap interval", about, *more)
        if labelled
        else sentences(collected.title, about, *more),
        free=True,
    )
    if labelled:
        _bars(figure, top, bars, collected, labelled)
    if shown and is_picture:
        draw_pictures(figure, top - bars, shown, kept, methods)
    elif shown:
        draw_texts(figure, top - bars, shown, kept, methods)
    return figure


def _bars(
    figure: Figure, top: float, tall: float, collected: Collected, methods: Sequence[str]
) -> None:
    whole = figure.get_figheight()
    wide = (WIDTH - _LEFT - _RIGHT) / len(_MEASURES)
    for index, measure in enumerate(_MEASURES):
        left = _LEFT + index * wide
        axes = figure.add_axes(
            (left / WIDTH, (top - tall + 0.55) / whole, (wide - 0.2) / WIDTH, (tall - 0.6) / whole)
        )
        for place, name in enumerate(methods):
            interval = collected.interval(name, measure)
            if interval is None:
                continue
            shown = look(name)
            value, low, high = (100 * each for each in interval[:3])
            axes.barh(
                place,
                value,
                0.68,
                color=shown.face,
                edgecolor=shown.colour,
                linewidth=1.2,
                xerr=np.array([[value - low], [high - value]]),
                error_kw={"ecolor": INK, "elinewidth": 0.9},
            )
        axes.set_ylim(len(methods) - 0.4, -0.6)
        names = [look(name).label for name in methods] if not index else []
        axes.set_yticks(range(len(methods)) if not index else [], names)
        axes.set_xlabel(f"{ALIGNED[measure][1]}, %", fontsize=SIZE, labelpad=1)
        axes.set_xlim(left=0)
        plain(axes, "x")
        axes.tick_params(labelsize=SMALL)
