"""Tokens as units: grouped by the pieces of the text, picture or sound that they stand in."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

from .chat import Span
from .granularity import (
    AUTOMATIC,
    Granularity,
    ImageGranularity,
    Seconds,
    Tiles,
    TokenSpans,
    divided_text,
    level_of,
)
from .pieces import Box, Level, Unit
from .placing import owners


def units_of(
    tokens: list[Unit],
    text: str,
    regions: Sequence[Span],
    granularity: Granularity,
    images: ImageGranularity = "patch",
    sizes: Sequence[tuple[int, int]] = (),
) -> list[Unit]:
    """Tokens of one piece as one unit.

    Args:
        tokens: In the order in which the model reads them.
        text: What their characters refer to.
        regions: Spans of the text that are divided, each by itself.
        granularity: How text and sound are divided; not ``auto``.
        images: How pictures are; ``TokenSpans`` divide them too.
        sizes: Width and height of each picture.
    """
    if isinstance(granularity, TokenSpans):
        return _of_text(tokens, text, regions, granularity)
    pictures = [token for token in tokens if token.image is not None]
    sounds = [token for token in tokens if token.seconds is not None]
    words = [token for token in tokens if token.image is None and token.seconds is None]
    units = _of_text(words, text, regions, granularity)
    units += tiled(pictures, images, sizes) if isinstance(images, Tiles) else pictures
    units += _stretches(sounds, granularity) if isinstance(granularity, Seconds) else sounds
    return sorted(units, key=lambda unit: (-1 if unit.branch is None else unit.branch, unit.tokens))


def tiled(tokens: list[Unit], tiles: Tiles, sizes: Sequence[tuple[int, int]]) -> list[Unit]:
    """Image tokens by the cell of a grid over their picture in which their centre lies.

    Tokens without a place are in no cell, but in that of a grid which has only one.
    """
    columns, rows = tiles.shape
    cells: dict[tuple[int, int, int], list[Unit]] = {}
    for token in tokens:
        image = token.image
        assert image is not None
        width, height = sizes[image]
        if (columns, rows) == (1, 1):
            cells.setdefault((image, 0, 0), []).append(token)
        for left, top, wide, high in token.boxes if (columns, rows) != (1, 1) else ():
            column = _cell((left + wide / 2) / width, columns)
            row = _cell((top + high / 2) / height, rows)
            cells.setdefault((image, row, column), []).append(token)
    units = []
    for (image, row, column), held in sorted(cells.items()):
        width, height = sizes[image]
        box = (column * width / columns, row * height / rows, width / columns, height / rows)
        whole = (columns, rows) == (1, 1)
        text = f"image {image + 1}" if whole else f"tile {_at(box)}"
        positions = tuple(sorted(position for token in held for position in token.tokens))
        units.append(
            replace(
                held[0],
                text=text,
                tokens=positions,
                level="image" if whole else "tile",
                boxes=(box,),
            )
        )
    return units


def _cell(share: float, cells: int) -> int:
    """Which of equal cells holds a share of the length: on an edge the later one, however the share
    was rounded."""
    return min(int(round(share * cells, 9)), cells - 1)


def patch_text(box: Box | None, view: str) -> str:
    """What a unit of one image token is called."""
    return f"{view} token" if box is None else f"patch {_at(box)}"


def seconds_text(start: float, stop: float) -> str:
    """What a unit of a sound is called."""
    return f"{start:.2f}–{stop:.2f} s"


def _at(box: Box) -> str:
    left, top, width, height = (f"{value:.4g}" for value in box)
    return f"at {left},{top}, {width}×{height}"


def _stretches(tokens: list[Unit], granularity: Seconds) -> list[Unit]:
    """Frames of a sound by the stretch in which their middle lies."""
    groups = groupby(tokens, key=lambda token: int(_middle(token) / granularity.length))
    units = []
    for _, group in groups:
        held = list(group)
        spans = [token.seconds for token in held if token.seconds is not None]
        start, stop = min(a for a, _ in spans), max(b for _, b in spans)
        positions = tuple(position for token in held for position in token.tokens)
        units.append(
            replace(
                held[0],
                text=seconds_text(start, stop),
                tokens=positions,
                level="seconds",
                seconds=(start, stop),
            )
        )
    return units


def _middle(token: Unit) -> float:
    assert token.seconds is not None
    return sum(token.seconds) / 2


def _of_text(
    tokens: list[Unit], text: str, regions: Sequence[Span], granularity: Granularity
) -> list[Unit]:
    """Neighbouring tokens of one piece of the text as one unit."""
    if granularity == "token" or isinstance(granularity, Seconds):
        return tokens
    if isinstance(granularity, TokenSpans):
        belongs = [
            next((k for k, (a, b) in enumerate(granularity.spans) if a <= t.tokens[0] < b), None)
            for t in tokens
        ]
    else:
        pieces = [
            (start + a, start + b)
            for start, stop in regions
            for a, b in divided_text(text[start:stop], granularity)
        ]
        belongs = owners(text, [_span(token) for token in tokens], pieces)

    def piece(item: tuple[int, tuple[Unit, int | None]]) -> tuple[Any, ...]:
        rank, (token, owner) = item
        # Position minus rank is constant as long as no token between them is left out.
        return token.part, token.branch, token.document, owner, token.tokens[0] - rank

    groups = groupby(enumerate(zip(tokens, belongs, strict=True)), key=piece)
    level = level_of(granularity)
    return [joined([token for _, (token, _) in group], text, level) for _, group in groups]


def automatic(
    tokens: list[Unit], text: str, regions: Sequence[Span], wanted: int, *, is_text: bool
) -> tuple[Granularity, list[Unit]]:
    """The level that gives the number of units of the prompt closest to ``wanted``, and the units.

    The finer one of equals. Only where the coarsest gives more than that, neighbours are joined. A
    sound is divided into as many equal stretches, or frames if there are no more.
    """
    if any(token.seconds is not None for token in tokens):
        level = _stretch(tokens, wanted)
        return level, units_of(tokens, text, regions, level)
    levels = AUTOMATIC if is_text else AUTOMATIC[:1]
    prompt = [token for token in tokens if token.part == "prompt" and token.image is None]
    target = [token for token in tokens if token.part == "target"]
    found = {level: units_of(prompt, text, regions, level) for level in levels}
    level = min(levels, key=lambda each: abs(len(found[each]) - wanted))
    units = found[level]
    if level == levels[-1] and len(units) > wanted:
        units = _levelled(units, text, regions, wanted)
    return level, units + units_of(target, text, regions, level)


def _stretch(tokens: list[Unit], wanted: int) -> Granularity:
    """The length that divides a sound into at most so many stretches."""
    heard = [token.seconds for token in tokens if token.seconds is not None]
    frames = math.ceil(len(heard) / wanted)
    start, stop = heard[0]
    return "token" if frames == 1 else Seconds(round(frames * (stop - start), 6))


def _levelled(units: list[Unit], text: str, regions: Sequence[Span], wanted: int) -> list[Unit]:
    """Neighbours joined, with about as many tokens in each; never across a border."""
    total = sum(len(unit.tokens) for unit in units)
    read, keys = 0, []
    inside = owners(text, [_span(unit) for unit in units], regions)
    for unit, region in zip(units, inside, strict=True):
        middle = read + len(unit.tokens) / 2
        keys.append((unit.document, region, int(wanted * middle / total), unit.tokens[0] - read))
        read += len(unit.tokens)
    groups = groupby(zip(keys, units, strict=True), key=lambda item: item[0])
    pieces = [[unit for _, unit in group] for _, group in groups]
    return [piece[0] if len(piece) == 1 else joined(piece, text, "chunk") for piece in pieces]


def chunked(tokens: list[Unit], text: str, sizes: Sequence[int]) -> list[Unit]:
    """Pieces of the largest size that gives several; tokens if none does."""
    for size in sizes:
        if len(tokens) > size:
            runs = groupby(
                enumerate(tokens),
                key=lambda item: (item[1].part, item[1].document, item[1].tokens[0] - item[0]),
            )
            parts = []
            for _, run in runs:
                parts += _cut([token for _, token in run], size)
            return [joined(part, text, "chunk") for part in parts]
    return [placed(token) for token in tokens]


def _cut(tokens: list[Unit], size: int) -> list[list[Unit]]:
    """Pieces of so many tokens, or a few more where one would end amid a character."""
    parts, first = [], 0
    while first < len(tokens):
        stop = first + size
        while stop < len(tokens) and _share(tokens[stop - 1], tokens[stop]):
            stop += 1
        parts.append(tokens[first:stop])
        first = stop
    return parts


def _share(first: Unit, second: Unit) -> bool:
    """Whether two neighbours hold parts of one character."""
    before, after = _span(first), _span(second)
    return before is not None and after is not None and after[0] < before[1]


def joined(tokens: list[Unit], text: str, level: Level) -> Unit:
    """One unit of neighbours."""
    first = tokens[0]
    spans = [span for token in tokens if (span := _span(token)) is not None and span[0] < span[1]]
    positions = tuple(position for token in tokens for position in token.tokens)
    start = min((start for start, _ in spans), default=None)
    stop = max((stop for _, stop in spans), default=None)
    words = text[start:stop] if spans else "".join(token.text for token in tokens)
    image, boxes = first.image, tuple(box for token in tokens for box in token.boxes)
    if any(token.image != image for token in tokens):
        image, boxes = None, ()
    seconds = [token.seconds for token in tokens if token.seconds is not None]
    return replace(
        first,
        text=words,
        tokens=positions,
        start=start,
        stop=stop,
        level=level,
        image=image,
        boxes=boxes,
        seconds=(seconds[0][0], seconds[-1][1]) if seconds else None,
    )


def placed(piece: Any) -> Any:
    """A unit or target token without any character has no place in the text."""
    return replace(piece, start=None, stop=None) if piece.start == piece.stop else piece


def _span(unit: Unit) -> Span | None:
    return None if unit.start is None or unit.stop is None else (unit.start, unit.stop)
