"""Where the cells of what a vision tower reads stand on a picture.

Everything is told in pixels of the original picture, whatever the processor resized it to: that a
picture is stretched then changes nothing, padding reaches over its edges, and a crop is a part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil
from typing import NamedTuple

Box = tuple[float, float, float, float]  # left, top, width, height
Span = tuple[float, float]  # start, stop

_ROUNDING = 1e-9  # of a picture's length


class Cell(NamedTuple):
    """What one image token stands for.

    Args:
        box: Its part of the picture; None if it has none.
        view: What it belongs to, see ``ImageToken``.
    """

    box: Box | None
    view: str


CLASS = Cell(None, "class")
NEWLINE = Cell(None, "newline")
PADDING = Cell(None, "padding")


@dataclass(frozen=True)
class Axis:
    """One direction of what a model is shown of a picture.

    Args:
        start: Where it begins on the picture; negative in padding.
        step: Width of one shown pixel on the picture.
        pixels: How many are shown.
    """

    start: float
    step: float
    pixels: int

    @classmethod
    def whole(cls, length: int) -> Axis:
        """A picture's own pixels."""
        return cls(0.0, 1.0, length)

    def resized(self, pixels: int) -> Axis:
        """The same part of the picture, shown in another number of pixels."""
        return Axis(self.start, self.step * self.pixels / pixels, pixels)

    def window(self, first: int, pixels: int) -> Axis:
        """Pixels from ``first`` on; what lies outside is padding."""
        return Axis(self.start + first * self.step, self.step, pixels)

    def padded(self, pixels: int) -> Axis:
        """With padding on both sides, the odd pixel of it behind."""
        return self.window(-((pixels - self.pixels) // 2), pixels)

    def centred(self, pixels: int) -> Axis:
        """The middle, padded where that is larger, the odd pixel of it in front."""
        return self.window((self.pixels - pixels) // 2, pixels)

    def tiles(self, pixels: int) -> list[Axis]:
        """Cut into windows of so many pixels."""
        return [self.window(first, pixels) for first in range(0, self.pixels, pixels)]

    def patches(self, pixels: int) -> list[Span]:
        """Cut into patches of so many pixels; what is left behind the last one is never read."""
        edges = [self.start + k * pixels * self.step for k in range(self.pixels // pixels + 1)]
        return list(pairwise(edges))


def resampled(spans: Sequence[Span], count: int) -> list[Span]:
    """As many equal parts of a row of spans, which may have gaps between them."""

    def place(at: float, index: int) -> float:
        start, stop = spans[index]
        return start + (at - index) * (stop - start)

    edges = [k * len(spans) / count for k in range(count + 1)]
    last = len(spans) - 1
    return [
        (place(a, min(int(a), last)), place(b, min(ceil(b), len(spans)) - 1))
        for a, b in pairwise(edges)
    ]


def rows_of(
    columns: Sequence[Span], rows: Sequence[Span], size: tuple[int, int], view: str
) -> list[list[Cell]]:
    """The cells of a grid, row by row, clipped to a picture.

    Args:
        columns: From left to right, on the picture.
        rows: From top to bottom.
        size: Width and height of the picture.
        view: What the grid shows.
    """
    across = [_clipped(span, size[0]) for span in columns]
    down = [_clipped(span, size[1]) for span in rows]
    return [
        [Cell((x[0], y[0], x[1] - x[0], y[1] - y[0]), view) if x and y else PADDING for x in across]
        for y in down
    ]


def cells_of(
    columns: Sequence[Span], rows: Sequence[Span], size: tuple[int, int], view: str
) -> list[Cell]:
    """The cells of :func:`rows_of` one row after the other."""
    return [cell for row in rows_of(columns, rows, size, view) for cell in row]


def _clipped(span: Span, length: int) -> Span | None:
    start, stop = max(span[0], 0.0), min(span[1], float(length))
    return (start, stop) if stop - start > _ROUNDING * length else None
