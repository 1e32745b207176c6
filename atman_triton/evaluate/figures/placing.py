"""Labels beside points, so that they lie neither over each other nor over a point."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextPath

from .style import INK

Box = tuple[float, float, float, float]
"""Left, bottom, right, top, in points."""

Label = tuple[float, float, str, bool, str]
"""x and y in data, text, whether it is set in bold, colour of its line."""

_GAP = 6.0  # points between a label and the middle of its point
_FAR = 150  # points, at most


Line = tuple[float, float, float, float]
"""x and y of both ends in data; upright or level."""


def place_labels(
    axes: Any, labels: Sequence[Label], size: float, lines: Sequence[Line] = ()
) -> list[Box]:
    """Write labels beside their points, the first ones nearest.

    Args:
        axes: Not to be laid out again afterwards: their place and limits are final.
        labels: What is written.
        size: Of letters, points.
        lines: What labels do not lie over, where there is room elsewhere.
    Returns: the box of each label, in points from the figure's lower left corner.
    Raises: ValueError: if a label finds no room within the axes.
    """
    figure = axes.get_figure()
    to_points = 72 / figure.dpi
    area = axes.get_window_extent()
    inside = (area.x0 * to_points, area.y0 * to_points, area.x1 * to_points, area.y1 * to_points)
    at = [
        tuple(each * to_points for each in axes.transData.transform((x, y))) for x, y, *_ in labels
    ]
    ends = [
        [*axes.transData.transform((left, bottom)), *axes.transData.transform((right, top))]
        for left, bottom, right, top in lines
    ]
    soft = [
        (a * to_points - 1, b * to_points - 1, c * to_points + 1, d * to_points + 1)
        for a, b, c, d in ends
    ]
    marks = [(x - 4, y - 4, x + 4, y + 4) for x, y in at]
    taken: list[Box] = []
    for (x, y), (data_x, data_y, text, bold, colour) in zip(at, labels, strict=True):
        wide, high = _extent(text, size, bold), size * 1.15
        box = _free(x, y, wide, high, inside, [*taken, *marks, *soft])
        box = box or _free(x, y, wide, high, inside, [*taken, *marks])
        if box is None:
            raise ValueError(f"label {text!r} finds no room; draw fewer points.")
        taken.append(box)
        far = math.hypot(*(_beyond(x, box[0], box[2]), _beyond(y, box[1], box[3]))) > 2 * _GAP
        axes.annotate(
            text,
            (data_x, data_y),
            xytext=(box[0] - x, box[1] - y + 0.22 * size),
            textcoords="offset points",
            fontsize=size,
            weight="bold" if bold else "normal",
            color=INK,
            parse_math=False,
            zorder=5,
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": colour,
                "linewidth": 0.6,
                "alpha": 0.8,
                "shrinkA": 0,
                "shrinkB": 4,
            }
            if far
            else None,
        )
    return taken


def overlap(first: Box, second: Box) -> bool:
    """Whether two boxes have a point in common that is not on their borders."""
    return (
        first[0] < second[2]
        and second[0] < first[2]
        and first[1] < second[3]
        and second[1] < first[3]
    )


def _free(
    x: float, y: float, wide: float, high: float, inside: Box, taken: Sequence[Box]
) -> Box | None:
    """The free box that is nearest to the point, beside it rather than above or below."""
    for left, bottom in _offsets(wide, high):
        box = (x + left, y + bottom, x + left + wide, y + bottom + high)
        within = (
            box[0] >= inside[0]
            and box[1] >= inside[1]
            and box[2] <= inside[2]
            and box[3] <= inside[3]
        )
        if within and not any(overlap(box, each) for each in taken):
            return box
    return None


@lru_cache(maxsize=512)
def _offsets(wide: float, high: float) -> list[tuple[float, float]]:
    """Left lower corners of boxes from their point, the nearest boxes first."""
    found = []
    for up in range(-_FAR, _FAR + 1, 3):
        bottom = up - high / 2
        beside = [_GAP + away for away in range(0, _FAR, 6)]
        lefts = [*beside, *(-wide - each for each in beside)]
        if abs(up) >= high / 2 + _GAP - 2:
            lefts += [-wide / 2, -wide / 4, -3 * wide / 4]
        for left in lefts:
            distance = math.hypot(
                _beyond(0, left, left + wide), 1.5 * _beyond(0, bottom, bottom + high)
            )
            found.append((distance + 0.2 * abs(up) + 0.01 * (left < 0), left, bottom))
    return [(left, bottom) for _, left, bottom in sorted(found)]


def _beyond(value: float, low: float, high: float) -> float:
    """How far outside of a range."""
    return max(low - value, value - high, 0.0)


@lru_cache(maxsize=512)
def _extent(text: str, size: float, bold: bool) -> float:
    """The width of a text in points."""
    font = FontProperties(family="DejaVu Sans", weight="bold" if bold else "normal")
    return float(TextPath((0, 0), text, size=size, prop=font).get_extents().x1) + 2
