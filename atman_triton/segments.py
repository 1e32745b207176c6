"""Paragraphs and sentences of a text, as spans of characters.

Sentences are found by ICU's rules (Unicode Standard Annex 29), for any script.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import pairwise

from icu4py.breakers import SentenceBreaker

_BLANK_LINES = re.compile(r"\n[^\S\n]*(?:\n[^\S\n]*)+")
_LINE_END = re.compile(r"\n")


def paragraphs(text: str) -> list[tuple[int, int]]:
    """Spans that cover the text: between blank lines, or between line ends if it has none."""
    inside = len(text.rstrip())
    for border in (_BLANK_LINES, _LINE_END):
        cuts = [m.end() for m in border.finditer(text) if m.start() > 0 and m.end() < inside]
        if cuts:
            return list(pairwise([0, *cuts, len(text)]))
    return [(0, len(text))]


def sentences(text: str) -> list[tuple[int, int]]:
    """Spans that cover the text; a paragraph's end ends a sentence."""
    found = []
    for start, stop in paragraphs(text):
        # Lengths, not the library's own offsets: those count UTF-16 units.
        pieces = (str(piece) for piece in SentenceBreaker(text[start:stop], "und"))
        found += _joined(pieces, start)
    return found


def _joined(pieces: Iterable[str], start: int) -> list[tuple[int, int]]:
    """Spans of neighbouring pieces; one without any letter or digit goes to the one before."""
    spans: list[tuple[int, int]] = []
    for piece in pieces:
        stop = start + len(piece)
        if spans and not any(character.isalnum() for character in piece):
            spans[-1] = spans[-1][0], stop
        else:
            spans.append((start, stop))
        start = stop
    return spans
