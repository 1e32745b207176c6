"""A.4: what several methods say of the same examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from ..examples import Example
from ..results import Result
from .collected import FLOOR, NothingToDraw, left_out, picked, sentences
from .heats import SCALE, STRIPS, height, in_strips, over_picture, picture
from .style import INK, SMALL, WIDTH, framed, look

_PICTURES = 4
_TEXTS = 4
_COLUMNS = 7  # methods beside a picture
_STRIPS = 8  # methods below a line of text
_HEADS = 0.45  # inches
_BETWEEN = 0.22
_LARGEST = 1.75

Heated = dict[str, dict[str, Result]]
"""By example and method, results that hold relevances of units."""


def gallery(results: Sequence[Result], examples: Sequence[Example], title: str) -> Figure:
    """Rows of examples; of pictures a column for each method, of text a strip for each.

    The first examples for which relevances are kept, whatever came out of them.

    Args:
        results: Of which those with a ``heat`` are drawn.
        examples: With the prompts.
        title: Data set and model.
    Raises: NothingToDraw: if no result keeps its relevances, or its example is not there.
    Source: AtMan, appendix A.4.
    """
    kept = heated(results, examples)
    methods = list(dict.fromkeys(name for own in kept.values() for name in own))
    if not methods:
        raise NothingToDraw("no result of these examples keeps its relevances (gallery=0)")
    known = {example.id: example for example in examples}
    pictures = [known[each] for each in kept if known[each].is_picture]
    texts = [known[each] for each in kept if not known[each].is_picture]
    shown = pictures[:_PICTURES] if pictures else texts[:_TEXTS]
    # Chance would fill every line with strips.
    names = picked(methods, _COLUMNS) if pictures else _without_chance(methods)
    what = "outlined: the labelled part" if pictures else "underlined: the labelled answer"
    first = f"{title}; the first {len(shown)} examples"
    rest = "" if pictures else STRIPS
    caption = sentences(first, f"{SCALE}; {what}", rest, left_out(methods, names))
    heading = "What methods find, example by example (after appendix A.4 of the paper)"
    return compared(heading, caption, shown, kept, names)


def _without_chance(methods: Sequence[str]) -> list[str]:
    return picked([name for name in methods if name != FLOOR] or methods, _STRIPS)


def heated(results: Sequence[Result], examples: Sequence[Example]) -> Heated:
    """Results with relevances, by example in the examples' order and by method."""
    found: Heated = {example.id: {} for example in examples}
    for result in results:
        if result.example in found and result.heat.get("units"):
            found[result.example][result.method] = result
    return {example: own for example, own in found.items() if own}


def compared(
    heading: str,
    caption: str,
    examples: Sequence[Example],
    kept: Mapping[str, Mapping[str, Result]],
    methods: Sequence[str],
) -> Figure:
    """A figure of examples, all pictures or all texts, under several methods."""
    if examples[0].is_picture:
        tall = pictures_height(len(examples), len(methods))
        figure, top = framed(tall, heading, caption, free=True)
        draw_pictures(figure, top, examples, kept, methods)
        return figure
    tall = sum(text_height(example, kept, methods) for example in examples)
    figure, top = framed(tall, heading, caption, free=True)
    draw_texts(figure, top, examples, kept, methods)
    return figure


def pictures_height(examples: int, methods: int) -> float:
    """Inches of so many pictures under each other, with so many methods beside each."""
    return _HEADS + examples * _row(methods)


def draw_pictures(
    figure: Figure,
    top: float,
    examples: Sequence[Example],
    kept: Mapping[str, Mapping[str, Result]],
    methods: Sequence[str],
) -> None:
    """Every example's picture and beside it each method's relevance.

    From ``top`` downwards, inches from the lower edge.
    """
    whole, row = figure.get_figheight(), _row(len(methods))
    grid = figure.add_gridspec(
        len(examples),
        1 + len(methods),
        left=0.01,
        right=0.01 + (1 + len(methods)) * (row - _BETWEEN) * 1.03 / WIDTH,
        top=(top - _HEADS) / whole,
        bottom=(top - _HEADS - len(examples) * row + _BETWEEN) / whole,
        wspace=0.05,
        hspace=_BETWEEN / (row - _BETWEEN),
    )
    panels: Any = grid.subplots(squeeze=False)
    for row, (line, example) in enumerate(zip(panels, examples, strict=True)):
        picture(line[0], example)
        line[0].set_title(_short(example.target), fontsize=SMALL, color=INK, parse_math=False)
        for axes, name in zip(line[1:], methods, strict=True):
            result = kept[example.id].get(name)
            if not row:
                axes.set_title(_broken(look(name).label), fontsize=SMALL, color=INK)
            if result is None:
                axes.text(0.5, 0.5, "no result", ha="center", fontsize=SMALL, color=INK)
                axes.axis("off")
            else:
                over_picture(axes, example, result)


def draw_texts(
    figure: Figure,
    top: float,
    examples: Sequence[Example],
    kept: Mapping[str, Mapping[str, Result]],
    methods: Sequence[str],
) -> None:
    """Every example's text over strips, from ``top`` downwards, inches from the lower edge."""
    for example in examples:
        in_strips(figure, top, example, _own(example, kept, methods))
        top -= text_height(example, kept, methods)


def text_height(
    example: Example, kept: Mapping[str, Mapping[str, Result]], methods: Sequence[str]
) -> float:
    """Inches of an example's text."""
    return height(example, _own(example, kept, methods))


def _own(
    example: Example, kept: Mapping[str, Mapping[str, Result]], methods: Sequence[str]
) -> dict[str, Result]:
    """Of those methods that have a result."""
    return {name: kept[example.id][name] for name in methods if name in kept[example.id]}


def _row(methods: int) -> float:
    """Inches of a row of pictures and what is between two."""
    return min(0.95 * WIDTH / (1 + methods), _LARGEST) + _BETWEEN


def _short(target: str) -> str:
    words = target.strip()
    return words if len(words) <= 16 else words[:15] + "…"


def _broken(label: str) -> str:
    """A label over several lines, so that labels of neighbours do not touch."""
    lines: list[str] = []
    for word in label.split(" "):
        if lines and len(lines[-1]) + len(word) < 15:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return "\n".join(lines)
