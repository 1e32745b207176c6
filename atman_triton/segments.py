"""Paragraphs, sentences and words of a text, and pieces between delimiters: spans of characters.

Words and sentences are found by ICU's rules (Unicode Standard Annex 29), for any script; where
words are written without spaces (Chinese, Japanese, Thai), by its dictionaries. The spans of a text
follow each other and cover it.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

from icu4py.breakers import SentenceBreaker, WordBreaker

Spans = list[tuple[int, int]]

_BLANK_LINES = re.compile(r"\n[^\S\n]*(?:\n[^\S\n]*)+")
_LINE_END = re.compile(r"\n")
_OPENING = ("Ps", "Pi")  # categories of what stands in front of its word: ( “
_SYMBOLS = ("So", "Sm")  # words of their own: emoji, + and =
_QUOTES = "\"'`"


def paragraphs(text: str) -> Spans:
    """Between blank lines, or between line ends if there are none."""
    inside = len(text.rstrip())
    for border in (_BLANK_LINES, _LINE_END):
        cuts = [m.end() for m in border.finditer(text) if m.start() > 0 and m.end() < inside]
        if cuts:
            return list(pairwise([0, *cuts, len(text)]))
    return [(0, len(text))]


def sentences(text: str) -> Spans:
    """Sentences, with the whitespace behind them; a paragraph's end ends a sentence."""
    found = []
    for start, stop in paragraphs(text):
        # Lengths, not the library's own offsets: those count UTF-16 units.
        pieces = (str(piece) for piece in SentenceBreaker(text[start:stop], "und"))
        found += _joined(pieces, start)
    return found


def words(text: str) -> Spans:
    """Words, with the whitespace and punctuation behind them.

    An opening bracket or quote, a currency sign and what the text starts with belong to the word
    after them. An emoji or a mathematical sign is a word.
    """
    spans: Spans = []
    opened: int | None = None  # where marks begin that wait for their word
    start = 0
    for piece in map(str, WordBreaker(text, "und")):
        stop = start + len(piece)
        if _is_word(piece):
            spans.append((start if opened is None else opened, stop))
            opened = None
        elif opened is None and (not spans or _opens(piece, text[start - 1 : start])):
            opened = start
        elif opened is None:
            spans[-1] = spans[-1][0], stop
        start = stop
    if opened is not None:  # no word came
        spans[-1:] = [(spans[-1][0] if spans else 0, start)]
    return spans or [(0, len(text))]


def delimited(text: str, patterns: Sequence[re.Pattern[str]]) -> Spans:
    """Pieces that end with a delimiter; one with nothing in front of it stays with what follows.

    Of several delimiters without a text between them, all end the same piece. Delimiters at the
    start of the text belong to the first piece.
    """
    cuts: list[int] = []
    begun, read = False, 0  # whether there is text since the last cut; where the last match ends
    for start, stop in _matches(text, patterns):
        if text[read:start].strip():
            cuts.append(stop)
            begun = True
        elif begun:
            cuts[-1] = max(cuts[-1], stop)
        read = max(read, stop)
    if cuts and not text[cuts[-1] :].strip():
        cuts.pop()
    return list(pairwise([0, *cuts, len(text)]))


def _matches(text: str, patterns: Sequence[re.Pattern[str]]) -> Iterator[tuple[int, int]]:
    """Where a delimiter stands, from left to right, the longest first of those that overlap."""
    found = sorted(
        {match.span() for pattern in patterns for match in pattern.finditer(text)},
        key=lambda span: (span[0], -span[1]),
    )
    reached = 0
    for start, stop in found:
        if start >= reached:
            yield start, stop
            reached = stop


def _is_word(piece: str) -> bool:
    return any(c.isalnum() or unicodedata.category(c) in _SYMBOLS for c in piece)


def _opens(piece: str, before: str) -> bool:
    """Whether a mark belongs to the word after it: ``(``, or ``$`` in ``$5``, not in ``5$``."""
    category = unicodedata.category(piece[0])
    if category == "Sc":
        return not before.isalnum()
    quote = piece[0] in _QUOTES and (not before or before.isspace() or _opens(before, ""))
    return category in _OPENING or quote


def _joined(pieces: Iterable[str], start: int) -> Spans:
    """Spans of neighbouring pieces; one without any letter or digit goes to the one before."""
    spans: Spans = []
    for piece in pieces:
        stop = start + len(piece)
        if spans and not any(character.isalnum() for character in piece):
            spans[-1] = spans[-1][0], stop
        else:
            spans.append((start, stop))
        start = stop
    return spans
