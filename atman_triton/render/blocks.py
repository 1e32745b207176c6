"""Pictures and sounds in a terminal: blocks of cells under the colours of what they contribute."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise, zip_longest
from typing import TYPE_CHECKING

from rich.cells import cell_len
from rich.style import Style
from rich.text import Text

from . import heat, layout, wording
from .palette import GREY, OPPOSE, SUPPORT, hexadecimal, mix
from .shown import Shown

if TYPE_CHECKING:
    from ..explanation import Explanation

RAMP = " .:-=+*#%@"
"""From nothing to the strongest support, where there is no colour."""
AGAINST = "o"
"""Opposition there, from ``NOTABLE`` on."""
WEAK = 0.08  # of the strongest: below it nothing is coloured
NOTABLE = 0.35  # of the strongest: what is marked without colour

_WIDE = 48  # columns of a picture
TALL = 24  # rows
_LEAST = 18  # columns of pictures that stand side by side
_GAP = 2
_SOUND = 72  # columns of a sound
_LOUD = "▁▂▃▄▅▆▇█"
_MARK = 10  # columns between marks of time, at least
_FAINT = Style(dim=True)


def pictures(
    explanation: Explanation,
    shown: list[Shown],
    width: int,
    coloured: bool,
    tall: int = TALL,
) -> list[Text]:
    """Every picture under all that is shown over it, side by side where there is room.

    Args:
        width: Columns to use.
        coloured: Whether colours say what a place contributes, over the picture in grey; without
            them characters do, in a frame.
        tall: Rows of a picture, at most.
    """
    count = len(explanation.pictures)
    items = [(each, image) for each in shown for image in range(count)]
    side = max(1, min(len(items), (width + _GAP) // (_LEAST + _GAP)))
    columns = min(_WIDE, (width - _GAP * (side - 1)) // side)
    draw = _coloured if coloured else _framed
    lines = []
    for row in (items[k : k + side] for k in range(0, len(items), side)):
        blocks = []
        for each, image in row:
            block = draw(explanation, layout.strengths(each.values), image, columns, tall)
            blocks.append([_title(explanation, each, image, len(shown), columns), *block])
        lines += _beside(blocks)
        lines.append(Text())
    return lines


def _title(explanation: Explanation, shown: Shown, image: int, count: int, columns: int) -> Text:
    names = [shown.title] * (count > 1)
    names += [wording.image_name(explanation, image)] * (len(explanation.pictures) > 1)
    title = Text(", ".join(names), "bold")
    title.truncate(columns, overflow="ellipsis")
    return title


def _beside(blocks: list[list[Text]]) -> list[Text]:
    """Blocks next to each other, each as wide as its widest line; titles only where there are."""
    if not any(block[0] for block in blocks):
        blocks = [block[1:] for block in blocks]
    wide = [max(line.cell_len for line in block) for block in blocks]
    lines = []
    for row in zip_longest(*blocks, fillvalue=Text()):
        line = Text()
        for part, size in zip(row, wide, strict=True):
            line.append_text(part)
            line.append(" " * (size - part.cell_len + _GAP))
        line.rstrip()
        lines.append(line)
    return lines


def _coloured(
    explanation: Explanation, strength: list[float], image: int, columns: int, tall: int
) -> list[Text]:
    """Two pixels in every cell, one above the other."""
    picture = explanation.pictures[image]
    width, height = heat.fitted(picture, columns, 2 * tall)
    size = (width, 2 * math.ceil(height / 2))
    level = heat.heat(explanation, strength, image, size)
    pixels = heat.overlay(picture.image, size, level, (OPPOSE, SUPPORT))
    lines = []
    for above, below in zip(pixels[::2].tolist(), pixels[1::2].tolist(), strict=True):
        line = Text()
        for top, bottom in zip(above, below, strict=True):
            colours = (hexadecimal(tuple(top)), hexadecimal(tuple(bottom)))
            line.append("▀", Style(color=colours[0], bgcolor=colours[1]))
        lines.append(line)
    return lines


def _framed(
    explanation: Explanation, strength: list[float], image: int, columns: int, tall: int
) -> list[Text]:
    """A character for every cell, which is about twice as high as wide."""
    picture = explanation.pictures[image]
    width, height = heat.fitted(picture, columns - 2, 2 * tall)
    size = (width, max(1, round(height / 2)))
    level = heat.heat(explanation, strength, image, size)
    edge = "─" * width
    rows = ["".join(map(_character, row)) for row in level.tolist()]
    return [Text(line) for line in (f"┌{edge}┐", *(f"│{row}│" for row in rows), f"└{edge}┘")]


def _character(strength: float) -> str:
    if strength <= -NOTABLE:
        return AGAINST
    return RAMP[round(min(1.0, max(0.0, strength)) * (len(RAMP) - 1))]


def sound(explanation: Explanation, values: list[float], width: int, coloured: bool) -> list[Text]:
    """The loudness over time, under colours or over characters, and marks of time."""
    heard = explanation.sound
    assert heard is not None
    columns = min(_SOUND, width)
    level = heat.timeline(explanation, layout.strengths(values), columns).tolist()
    loud = [_LOUD[round(peak * (len(_LOUD) - 1))] for peak in _peaks(heard.envelope, columns)]
    line = Text()
    for block, strength in zip(loud, level, strict=True):
        line.append(block, highlight(strength) if coloured else Style())
    lines = [line]
    if not coloured:
        lines.append(Text("".join(map(_character, level)).rstrip()))
    return [*lines, Text(_times(heard.seconds, columns), _FAINT), Text()]


def _peaks(envelope: Sequence[float], columns: int) -> list[float]:
    """The loudest part in each of equal stretches."""
    parts = len(envelope)
    edges = [k * parts / columns for k in range(columns + 1)]
    return [
        max(envelope[math.floor(start) : max(math.floor(start) + 1, math.ceil(stop))])
        for start, stop in pairwise(edges)
    ]


def highlight(strength: float) -> Style:
    """Black on the colour of a strength; nothing where it is weak."""
    if abs(strength) < WEAK:
        return Style()
    colour = mix(GREY, SUPPORT if strength > 0 else OPPOSE, min(1.0, abs(strength)) ** 0.5)
    return Style(color="#000000", bgcolor=hexadecimal(colour))


def _times(seconds: float, columns: int) -> str:
    """Marks of time where it is at each of them: ``0     0.5     1 s``."""
    step = heat.step(seconds * _MARK / columns)
    line = ""
    for mark in range(int(seconds / step * (1 + 1e-9)) + 1):
        label = f"{mark * step:.6g}"
        place = round(mark * step / seconds * columns)
        if place + cell_len(label) + 2 > columns:
            break
        line = line.ljust(place) + label
    return line + " s"
