"""Values of units laid over what they are pieces of: a picture's pixels, a sound's time.

Every unit covers its boxes evenly, and where several lie over each other (an overview and a crop of
it), their values are added. Softened, a value runs over into what lies beside it, up to half a
typical box away: what it spreads over keeps its sign and its sum, and the middle of a box of that
size keeps its value.

Legend: N boxes, H rows and W columns of the picture as it is shown.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..pieces import Box
from .palette import Colour

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..explanation import Explanation
    from ..pictures import Picture

Array = NDArray[np.float64]

_DIMMED = (0.62, 0.98)  # what black and white of a picture become under colours
_OPAQUE = 0.9  # of the strongest colour; the picture still shows through


def heat(
    explanation: Explanation,
    values: Iterable[float],
    image: int,
    size: tuple[int, int],
    *,
    smooth: bool = False,
) -> Array:
    """The value of every pixel of a picture.

    Args:
        explanation: Whose units.
        values: Of each unit, finite; NaN is absent.
        image: Which of the pictures.
        size: Width and height of the picture as it is shown.
        smooth: Whether values are softened, or keep to the exact edges of their boxes.
    Returns: ``[H, W]``; a pixel that a box covers in part has that part of its value.
    """
    boxes, level = [], []
    for unit, value in zip(explanation.units, values, strict=True):
        if unit.image == image and not math.isnan(value):
            boxes += unit.boxes
            level += [value] * len(unit.boxes)
    picture = explanation.pictures[image]
    return spread(boxes, level, (picture.width, picture.height), size, smooth=smooth)


def spread(
    boxes: Sequence[Box],
    level: Sequence[float],
    whole: tuple[float, float],
    size: tuple[int, int],
    *,
    smooth: bool = False,
) -> Array:
    """The value of every pixel of a picture that boxes cover.

    Args:
        boxes: N of ``(left, top, width, height)`` in the picture's own pixels.
        level: The value of each, finite.
        whole: Width and height of the picture itself.
        size: Width and height of the picture as it is shown.
        smooth: See ``heat``.
    Returns: ``[H, W]``; a pixel that a box covers in part has that part of its value.
    """
    width, height = size
    if not boxes:
        return np.zeros((height, width))
    left, top, wide, high = np.array(boxes, dtype=np.float64).T
    across = _covered(left, wide, whole[0], width, smooth)
    down = _covered(top, high, whole[1], height, smooth)
    return (down.T * np.array(level)) @ across


def timeline(explanation: Explanation, values: Iterable[float], parts: int) -> Array:
    """``[parts]``: the value of every one of equal parts of the sound, which is there."""
    assert explanation.sound is not None
    pairs = zip(explanation.units, values, strict=True)
    heard = [(unit.seconds, value) for unit, value in pairs if unit.seconds is not None]
    heard = [(seconds, value) for seconds, value in heard if not math.isnan(value)]
    if not heard:
        return np.zeros(parts)
    start, stop = np.array([seconds for seconds, _ in heard], dtype=np.float64).T
    level = np.array([value for _, value in heard])
    return level @ _covered(start, stop - start, explanation.sound.seconds, parts, smooth=False)


def _covered(start: Array, length: Array, whole: float, pixels: int, smooth: bool) -> Array:
    """``[N, pixels]``: how much of each of equal parts of ``[0, whole]`` every stretch covers."""
    half = float(np.median(length)) / 2 if smooth else 0.0
    edges = np.linspace(0, whole, pixels + 1)

    def between(start: Array, stop: Array) -> Array:
        """``[N, pixels + 1]``: how much of the stretch lies in front of each edge."""
        return _ramp(edges - start[:, None], half) - _ramp(edges - stop[:, None], half)

    stop = start + length
    covered = between(start, stop)
    if half:  # what would run over the border comes back
        covered += between(-stop, -start) + between(2 * whole - stop, 2 * whole - start)
    return np.maximum(0.0, np.diff(covered, axis=1)) * pixels / whole


def _ramp(at: Array, half: float) -> Array:
    """The integral of a step at 0 that a triangle of half that width softens."""
    if not half:
        return np.maximum(0.0, at)
    near = np.clip(at, -half, half)
    rising = (near + half) ** 3 / (6 * half**2)
    risen = near + (half - near) ** 3 / (6 * half**2)
    return np.where(near < 0, rising, risen) + np.maximum(0.0, at - half)


def fitted(picture: Picture, width: float, height: float) -> tuple[int, int]:
    """The largest size of the picture's shape within so many columns and rows, at least 1×1."""
    scale = min(width / picture.width, height / picture.height)
    return max(1, round(picture.width * scale)), max(1, round(picture.height * scale))


def step(least: float) -> float:
    """The smallest of 1, 2 and 5 times a power of ten that is so large."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(power * each for each in (1, 2, 5, 10) if power * each >= least * (1 - 1e-9))


def overlay(
    image: Image, size: tuple[int, int], strength: Array, colours: Sequence[Colour]
) -> NDArray[np.uint8]:
    """``[H, W, 3]``: a picture without its own colours, under those of its relevance.

    Args:
        image: The picture.
        size: Width and height in which it is shown.
        strength: ``[H, W]``; beyond [-1, 1] it is cut off.
        colours: Of opposition and of support.
    """
    grey = np.asarray(resized(image, size).convert("L"), dtype=np.float64)[..., None] / 255
    low, high = _DIMMED
    paper = 255 * (low + (high - low) * grey)
    oppose, support = (np.array(colour, dtype=np.float64) for colour in colours)
    level = np.clip(strength, -1, 1)[..., None]
    front = np.where(level > 0, support, oppose) * (0.85 + 0.15 * grey)
    mixed = paper + (front - paper) * _OPAQUE * np.abs(level)
    return np.rint(mixed).astype(np.uint8)


def resized(image: Image, size: tuple[int, int]) -> Image:
    """The picture in another size; the pixels of one that is enlarged much stay squares."""
    from PIL.Image import Resampling

    enlarged = size[0] >= 3 * image.width
    return image.resize(size, Resampling.NEAREST if enlarged else Resampling.LANCZOS)
