"""Seeded pictures of coloured shapes, with the exact mask of each.

One to four objects on a grey ground with grey strokes and dots, never overlapping. Everything is
drawn four times as large and averaged down; an object's mask is where it covers at least half of
a pixel.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

SIZE = 96  # side of a picture, in pixels
MAX_OBJECTS = 4
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (215, 40, 40),
    "green": (40, 160, 60),
    "blue": (45, 85, 215),
    "yellow": (235, 205, 40),
    "purple": (125, 45, 165),
    "pink": (245, 130, 190),
}

_OVERSAMPLING = 4
_SHEET = (SIZE * _OVERSAMPLING, SIZE * _OVERSAMPLING)
_GAP = 6.0  # pixels between the circles around two objects
_MARGIN = 2.0  # pixels between an object and the edge
# Side of the square with the object's area, in pixels, by number of objects.
_SIDES = {1: (20.0, 36.0), 2: (20.0, 32.0), 3: (18.0, 26.0), 4: (18.0, 22.0)}
_TRIES = 30  # to find a place for an object beside those before it
_TILT = 20.0  # degrees of rotation either way
_JITTER = 14  # of a colour channel, either way
_CLUTTER = (2, 8)  # grey strokes and dots behind the objects
_ALIKE = (0.97, 1.03)  # of balanced sides: areas then differ by 13%, and by what pixels round

Point = tuple[float, float]


def _regular(points: int, radii: Sequence[float] = (1.0,)) -> list[Point]:
    """Corners at equal angles from the top, at these distances in turn."""
    angles = [2 * math.pi * index / points for index in range(points)]
    return [
        (radii[index % len(radii)] * math.sin(angle), -radii[index % len(radii)] * math.cos(angle))
        for index, angle in enumerate(angles)
    ]


# A quarter of a cross, turned four times.
_CROSS = [corner * 1j**turn for turn in range(4) for corner in (-1 - 3j, 1 - 3j, 1 - 1j)]
# Outlines around the origin, of any size; the second is a hole.
_OUTLINES: dict[str, tuple[list[Point], ...]] = {
    "circle": (_regular(48),),
    "square": ([(-1.0, -1.0), (1.0, -1.0), (1.0, 1.0), (-1.0, 1.0)],),
    "triangle": (_regular(3),),
    "star": (_regular(10, (1.0, 0.45)),),
    "cross": ([(corner.real, corner.imag) for corner in _CROSS],),
    "ring": (_regular(48), _regular(48, (0.55,))),
}
KINDS: tuple[str, ...] = tuple(_OUTLINES)


def _area(outline: Sequence[Point]) -> float:
    """Shoelace formula."""
    pairs = zip(outline, [*outline[1:], outline[0]], strict=True)
    return abs(sum(a * d - b * c for (a, b), (c, d) in pairs)) / 2


# The unit of each outline that gives it area 1, and how far from its centre it then reaches.
_UNIT = {k: (_area(o[0]) - sum(map(_area, o[1:]))) ** -0.5 for k, o in _OUTLINES.items()}
_REACH = {k: _UNIT[k] * max(math.hypot(*p) for p in o[0]) for k, o in _OUTLINES.items()}


@dataclass(frozen=True, eq=False)
class Shape:
    """One object of a picture.

    Attributes:
        colour: one of ``COLOURS``.
        kind: one of ``KINDS``.
        mask: ``[96, 96]`` bool, true where the object covers at least half of a pixel.
        box: left, top, right and bottom edge of the mask, in pixels; right and bottom lie outside.
    """

    colour: str
    kind: str
    mask: np.ndarray
    box: tuple[int, int, int, int]

    @property
    def name(self) -> str:
        """Such as ``"red circle"``."""
        return f"{self.colour} {self.kind}"

    @property
    def area(self) -> int:
        """Pixels of the mask."""
        return int(self.mask.sum())


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture of 96 × 96 pixels, RGB, and its objects."""

    image: Image.Image
    objects: tuple[Shape, ...]


def make_picture(
    seed: int | str | random.Random, objects: int | None = None, *, balanced: bool = False
) -> Picture:
    """Draw a picture of objects of which no two have the same name.

    Args:
        seed: a seed, or the generator to draw from.
        objects: 1 to 4; drawn if absent.
        balanced: make all areas alike: the largest is at most 1.2 times the smallest.
    Raises: ValueError: if ``objects`` is out of range.
    """
    rng = _generator(seed)
    count = rng.randint(1, MAX_OBJECTS) if objects is None else objects
    if not 1 <= count <= MAX_OBJECTS:
        raise ValueError(f"objects must be from 1 to {MAX_OBJECTS}, got {objects}.")
    names = rng.sample(list(itertools.product(COLOURS, KINDS)), count)
    return _draw(rng, names, balanced)


def make_redundant_picture(seed: int | str | random.Random, *, other: bool = False) -> Picture:
    """Draw the same object twice, of balanced areas: each alone is enough to name it.

    Args:
        seed: a seed, or the generator to draw from.
        other: draw a third object of another colour and kind, which comes last.
    """
    rng = _generator(seed)
    colours, kinds = rng.sample(list(COLOURS), 2), rng.sample(list(KINDS), 2)
    names = [(colours[0], kinds[0])] * 2
    return _draw(rng, [*names, (colours[1], kinds[1])] if other else names, balanced=True)


def _generator(seed: int | str | random.Random) -> random.Random:
    return seed if isinstance(seed, random.Random) else random.Random(seed)


class _Place(NamedTuple):
    """Where an object stands, in pixels: its centre, and the side of a square of its area."""

    x: float
    y: float
    side: float


def _draw(rng: random.Random, names: Sequence[tuple[str, str]], balanced: bool) -> Picture:
    """Draw these colours and kinds at free places."""
    kinds = [kind for _, kind in names]
    places = _places(rng, kinds, balanced)
    covers = [_cover(rng, *each) for each in zip(kinds, places, strict=True)]
    masks = [cover >= 0.5 for cover in covers]
    canvas = _ground(rng)
    for (colour, _), cover in zip(names, covers, strict=True):
        paint = [channel + rng.uniform(-_JITTER, _JITTER) for channel in COLOURS[colour]]
        canvas += cover[..., None] * (np.array(paint) - canvas)
    pixels = canvas.round().clip(0, 255).astype(np.uint8)
    shapes = [Shape(*name, mask, _box(mask)) for name, mask in zip(names, masks, strict=True)]
    return Picture(Image.fromarray(pixels), tuple(shapes))


def _places(rng: random.Random, kinds: Sequence[str], balanced: bool) -> list[_Place]:
    """Draw a place for each object so that the circles around them stay apart."""
    low, high = _SIDES[len(kinds)]
    while True:
        common = rng.uniform(low, high)
        placed: list[tuple[_Place, float]] = []
        for kind in kinds:
            side = common * rng.uniform(*_ALIKE) if balanced else rng.uniform(low, high)
            radius = side * _REACH[kind]
            for _ in range(_TRIES):
                x, y = (rng.uniform(_MARGIN + radius, SIZE - _MARGIN - radius) for _ in range(2))
                apart = (math.dist((x, y), p[:2]) - radius - other for p, other in placed)
                if min(apart, default=_GAP) >= _GAP:
                    placed.append((_Place(x, y, side), radius))
                    break
        if len(placed) == len(kinds):
            return [place for place, _ in placed]


def _cover(rng: random.Random, kind: str, place: _Place) -> np.ndarray:
    """Share of each pixel that an object covers, at a random tilt."""
    angle = math.radians(rng.uniform(-_TILT, _TILT))
    unit = place.side * _UNIT[kind] * _OVERSAMPLING
    cos, sin = math.cos(angle) * unit, math.sin(angle) * unit
    x, y = place.x * _OVERSAMPLING, place.y * _OVERSAMPLING
    sheet = Image.new("L", _SHEET)
    pen = ImageDraw.Draw(sheet)
    for fill, outline in zip((255, 0), _OUTLINES[kind], strict=False):
        pen.polygon([(x + a * cos - b * sin, y + a * sin + b * cos) for a, b in outline], fill)
    return np.asarray(sheet.reduce(_OVERSAMPLING), np.float64) / 255


def _ground(rng: random.Random) -> np.ndarray:
    """A grey ground that changes evenly across the picture, with grey clutter on it."""
    first, last = rng.uniform(150, 245), rng.uniform(150, 245)
    angle = rng.uniform(0, 2 * math.pi)
    steps = (np.arange(SIZE) + 0.5) / SIZE - 0.5
    slope = (math.sin(angle) * steps[:, None] + math.cos(angle) * steps) / math.sqrt(2) + 0.5
    grey = first + (last - first) * slope
    for _ in range(rng.randint(*_CLUTTER)):
        sheet = Image.new("L", _SHEET)
        pen = ImageDraw.Draw(sheet)
        x, y = (rng.uniform(0, SIZE * _OVERSAMPLING) for _ in range(2))
        reach = rng.uniform(2, 12) * _OVERSAMPLING
        turn = rng.uniform(0, 2 * math.pi)
        if rng.random() < 0.5:
            end = (x + reach * math.cos(turn), y + reach * math.sin(turn))
            pen.line([(x, y), end], 255, round(rng.uniform(1, 2) * _OVERSAMPLING))
        else:
            radius = reach / 5
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), 255)
        cover = np.asarray(sheet.reduce(_OVERSAMPLING), np.float64) / 255
        grey += cover * (rng.uniform(60, 130) - grey)
    return np.repeat(grey[..., None], 3, 2)


def _box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Left, top, right and bottom edge of a mask."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
