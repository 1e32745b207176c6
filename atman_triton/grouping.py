"""Neighbouring tokens as units: grouped by the pieces of the text that they stand in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

from .chat import Span
from .granularity import AUTOMATIC, Granularity, TokenSpans, divided_text, level_of
from .pieces import Level, Unit
from .placing import owners


def units_of(
    tokens: list[Unit], text: str, regions: Sequence[Span], granularity: Granularity
) -> list[Unit]:
    """Neighbouring tokens of one piece as one unit.

    Args:
        tokens: In text order.
        text: What their characters refer to.
        regions: Spans of the text that are divided, each by itself.
        granularity: How; not ``auto``.
    """
    if granularity == "token":
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

    The finer one of equals. Only where the coarsest gives more than that, neighbours are joined.
    """
    levels = AUTOMATIC if is_text else AUTOMATIC[:1]
    prompt = [token for token in tokens if token.part == "prompt"]
    target = [token for token in tokens if token.part == "target"]
    found = {level: units_of(prompt, text, regions, level) for level in levels}
    level = min(levels, key=lambda each: abs(len(found[each]) - wanted))
    units = found[level]
    if level == levels[-1] and len(units) > wanted:
        units = _levelled(units, text, regions, wanted)
    return level, units + units_of(target, text, regions, level)


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
    return replace(first, text=words, tokens=positions, start=start, stop=stop, level=level)


def placed(piece: Any) -> Any:
    """A unit or target token without any character has no place in the text."""
    return replace(piece, start=None, stop=None) if piece.start == piece.stop else piece


def _span(unit: Unit) -> Span | None:
    return None if unit.start is None or unit.stop is None else (unit.start, unit.stop)
