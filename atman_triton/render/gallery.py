"""Pictures and sounds in the figure: as they are, and under the colours of what they contribute.

Legend: places and sizes are in inches, from the left and the top of the gallery.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes

from . import heat, layout, wording
from .palette import LIGHT, WHITE, hexadecimal, mix
from .shown import Shown

if TYPE_CHECKING:
    from ..explanation import Explanation

Box = Callable[[float, float, float, float], Axes]
"""Makes axes of left, top, width and height."""

DOTS = 200  # of a picture an inch
_COLUMNS = 4
_TALL = 3.1
_LOW = 2.4  # of several pictures
_WIDE = 4.1
_GAP = 0.3
_TITLE = 0.26
_SCALE = 0.4  # a colour bar with its numbers
_PARTS = 400  # of a sound
_SOUND = 0.9


@dataclass(frozen=True)
class Panel:
    """One picture of the gallery.

    Args:
        shown: What is drawn over it; None for the picture as it is.
        image: Which picture.
        title: What stands above it.
        left: Where it starts.
        top: The same, below its title.
        width: How wide it is.
        height: How tall.
        scaled: Whether a colour bar stands below it.
    """

    shown: Shown | None
    image: int
    title: str
    left: float
    top: float
    width: float
    height: float
    scaled: bool


def arranged(
    explanation: Explanation, shown: Sequence[Shown], width: float
) -> tuple[list[Panel], float]:
    """Every picture under all that is shown over it, and how tall the whole is.

    One picture stands beside itself; of several there is a row for each thing shown.
    """
    count = len(explanation.pictures)
    if not shown:
        return [], 0.0
    layers = [None, *shown]
    columns = min(_COLUMNS, count if count > 1 else len(layers))
    cell = min(_WIDE, (width - _GAP * (columns - 1)) / columns)
    items = [(each, image) for each in layers for image in range(count)]
    per_row = [items[k : k + columns] for k in range(0, len(items), columns)]
    if count > 1:
        own = [[(each, image) for image in range(count)] for each in layers]
        per_row = [row[k : k + columns] for row in own for k in range(0, count, columns)]
    panels: list[Panel] = []
    top = 0.0
    for row in per_row:
        tallest, left, scaled = 0.0, 0.0, False
        for each, image in row:
            shape = explanation.pictures[image]
            size = min(cell / shape.width, (_TALL if count == 1 else _LOW) / shape.height)
            wide, tall = shape.width * size, shape.height * size
            bar = each is not None and image == 0
            title = _title(explanation, each, image)
            panels.append(Panel(each, image, title, left, top + _TITLE, wide, tall, bar))
            tallest, scaled = max(tallest, tall), scaled or bar
            left += wide + _GAP
        top += _TITLE + tallest + _SCALE * scaled + 0.16
    return panels, top


def _title(explanation: Explanation, shown: Shown | None, image: int) -> str:
    if shown is None:
        return wording.image_name(explanation, image)
    return shown.title if image == 0 else ""


def draw(
    explanation: Explanation,
    panels: Sequence[Panel],
    box: Box,
    smooth: bool,
    write: Callable[[Axes, str, bool], None],
) -> None:
    """Draw the gallery.

    Args:
        box: Makes axes at a place of the gallery.
        smooth: Whether colours run over into each other.
        write: Gives axes a title, which is a target's or not.
    """
    for panel in panels:
        picture = explanation.pictures[panel.image]
        axes = box(panel.left, panel.top, panel.width, panel.height)
        size = heat.fitted(picture, panel.width * DOTS, panel.height * DOTS)
        image = picture.image
        if panel.shown is None:
            pixels = np.asarray(heat.resized(image, size))
        else:
            strength = layout.strengths(panel.shown.values)
            level = heat.heat(explanation, strength, panel.image, size, smooth=smooth)
            pixels = heat.overlay(image, size, level, (LIGHT.oppose, LIGHT.support))
        axes.imshow(pixels, extent=(0, picture.width, picture.height, 0), aspect="auto")
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set(color=hexadecimal(LIGHT.line), linewidth=0.8)
        write(axes, panel.title, panel.shown is not None)
        if panel.scaled and panel.shown is not None:
            bar = box(panel.left, panel.top + panel.height + 0.09, panel.width, 0.09)
            _draw_scale(bar, explanation, panel.shown.values)


def _draw_scale(axes: Axes, explanation: Explanation, values: list[float]) -> None:
    """The colours from the strongest opposition to the strongest support, with their numbers."""
    measure, digits = wording.scale(explanation), wording.decimals(values)
    peak = max((abs(value) for value in values if math.isfinite(value)), default=0.0)
    low = -1.0 if measure.signed else 0.0
    strength = np.linspace(low, 1, 256)
    axes.imshow([[_colour(level) for level in strength]], extent=(low, 1, 0, 1), aspect="auto")
    axes.set_yticks([])
    places = [low, 0.0, 1.0] if measure.signed else [0.0, 1.0]
    labels = [measure.number(peak * place, digits) if place else "0" for place in places]
    labels[-1] += measure.suffix
    axes.set_xticks(places, labels, fontsize=7.5, color=hexadecimal(LIGHT.faint))
    ends = axes.get_xticklabels()
    ends[0].set_horizontalalignment("left")
    ends[-1].set_horizontalalignment("right")
    axes.tick_params(length=0, pad=3)
    axes.spines[:].set_visible(False)


def _colour(strength: float) -> list[float]:
    colour = mix(WHITE, LIGHT.support if strength > 0 else LIGHT.oppose, abs(strength))
    return [channel / 255 for channel in colour]


SOUND = _SOUND + 0.42 + _SCALE
"""How tall a sound is, with its seconds and its colour bar."""


def draw_sound(explanation: Explanation, values: list[float], box: Box, width: float) -> None:
    """The loudness over time, over the colours of what each stretch contributes."""
    sound = explanation.sound
    assert sound is not None
    axes = box(0, 0, width, _SOUND)
    _draw_scale(box(0, _SOUND + 0.42, width / 3, 0.09), explanation, values)
    strength = heat.timeline(explanation, layout.strengths(values), _PARTS)
    axes.imshow(
        [[_colour(float(np.clip(level, -1, 1))) for level in strength]],
        extent=(0, sound.seconds, -1.05, 1.05),
        aspect="auto",
        interpolation="nearest",
    )
    loud = np.maximum(0.01, sound.envelope)
    edges = np.linspace(0, sound.seconds, len(loud) + 1)
    axes.stairs(loud, edges, baseline=-loud, fill=True, color=hexadecimal(LIGHT.ink), alpha=0.85)
    axes.set_xlim(0, sound.seconds)
    axes.set_ylim(-1.05, 1.05)
    axes.set_yticks([])
    axes.tick_params(labelsize=8, colors=hexadecimal(LIGHT.faint), length=2)
    axes.set_xlabel("seconds", fontsize=8, color=hexadecimal(LIGHT.faint), loc="right", labelpad=1)
    axes.spines[:].set(color=hexadecimal(LIGHT.line), linewidth=0.8)
