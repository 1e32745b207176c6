"""Which piece of a text each token belongs to, and where a passage stands in it.

Legend: a span is ``(start, stop)`` in characters, ``stop`` exclusive.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

from .chat import Span

_SHOWN = 5  # how many places of a passage an error names


def owners(text: str, tokens: Sequence[Span | None], pieces: Sequence[Span]) -> list[int | None]:
    """Of each token, the index of the piece that it belongs to; None if it touches none.

    A token belongs to the piece that holds most of its characters other than whitespace, the first
    one of equals; a token of whitespace alone, to the one that holds most of that. Tokens that
    share a character stay together, with the first of them. One without any character belongs
    where the text goes on.

    Args:
        text: What the spans refer to.
        tokens: Of each token its span, ascending; None where it has no place.
        pieces: Disjoint spans, ascending; they need not cover the text.
    """
    starts = [start for start, _ in pieces]
    found: list[int | None] = []
    previous: tuple[Span, int | None] | None = None
    for span in tokens:
        if span is None:
            found.append(None)
            continue
        if previous is not None and span[0] < previous[0][1] and span[0] < span[1]:
            owner = previous[1]
        else:
            owner = _owner(_core(text, span), pieces, starts)
        found.append(owner)
        if span[0] < span[1]:
            previous = span, owner
    return found


def _core(text: str, span: Span) -> Span:
    """Its characters without whitespace around them, if anything is left then."""
    start, stop = span
    held = text[start:stop]
    if not held.strip():
        return span
    return start + len(held) - len(held.lstrip()), stop - len(held) + len(held.rstrip())


def _owner(core: Span, pieces: Sequence[Span], starts: Sequence[int]) -> int | None:
    start, stop = core
    place = max(0, bisect_right(starts, start) - 1)
    if start == stop:
        held = pieces and pieces[place][0] <= start < pieces[place][1]
        return place if held else None
    best, most = None, 0
    while place < len(pieces) and starts[place] < stop:
        shared = min(stop, pieces[place][1]) - max(start, starts[place])
        if shared > most:
            best, most = place, shared
        place += 1
    return best


def checked_span(name: str, value: Any) -> Span:
    """Two ints, the first one smaller.

    Raises:
        TypeError: if it is no pair of ints.
        ValueError: if it is negative or empty.
    """
    pair = tuple(value) if isinstance(value, (tuple, list)) else ()
    if len(pair) != 2 or any(isinstance(x, bool) or not isinstance(x, int) for x in pair):
        raise TypeError(f"{name} must be (start, stop), two ints, got {value!r}.")
    if not 0 <= pair[0] < pair[1]:
        raise ValueError(f"{name} must be (start, stop) with 0 <= start < stop, got {value!r}.")
    return pair[0], pair[1]


def passage(
    name: str, wanted: str | Span, text: str, within: Sequence[Span] | None, whose: str
) -> Span:
    """Where a passage stands.

    Args:
        name: Of the argument, for messages.
        wanted: The passage itself, which must occur once, or its span.
        text: What it stands in.
        within: Spans in one of which the passage must occur; None is the whole text. A span may
            lie anywhere.
        whose: What the text is, for messages: ``the prompt``.
    Raises: ValueError: if it does not occur once, or the span lies outside of the text.
    """
    if not isinstance(wanted, str):
        if wanted[1] > len(text):
            raise ValueError(
                f"{name} must lie within {whose}, which has {len(text)} characters, got {wanted}."
            )
        return wanted
    if not wanted:
        raise ValueError(f"{name} must not be an empty str.")
    places = [
        place
        for start, stop in ([(0, len(text))] if within is None else within)
        for place in _occurrences(wanted, text, start, stop)
    ]
    if not places:
        raise ValueError(
            f"{name} {wanted!r} does not occur in {whose}; it must be there character by "
            "character, or be given as (start, stop)."
        )
    if len(places) > 1:
        spans = ", ".join(str((at, at + len(wanted))) for at in places[:_SHOWN])
        more = ", ..." if len(places) > _SHOWN else ""
        raise ValueError(
            f"{name} {wanted!r} occurs {len(places)} times in {whose}; give the span of one: "
            f"{spans}{more}."
        )
    return places[0], places[0] + len(wanted)


def _occurrences(wanted: str, text: str, start: int, stop: int) -> list[int]:
    places = []
    place = text.find(wanted, start, stop)
    while place >= 0:
        places.append(place)
        place = text.find(wanted, place + 1, stop)
    return places
