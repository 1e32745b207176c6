"""How large a unit is: a level by name, pieces between delimiters, or spans that are given."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, get_args

from .chat import Span
from .pieces import Level
from .placing import checked_span
from .segments import delimited, paragraphs, sentences, words

Named = Literal["token", "word", "sentence", "paragraph", "turn", "document", "auto"]
GRANULARITIES: tuple[str, ...] = get_args(Named)
AUTOMATIC: tuple[Named, ...] = ("token", "word", "sentence", "paragraph")
"""What ``auto`` chooses from, the finest first."""

MAX_UNITS = 30
"""About how many units ``auto`` aims at."""

_DIVIDE: dict[str, Callable[[str], list[Span]]] = {
    "word": words,
    "sentence": sentences,
    "paragraph": paragraphs,
}


@dataclass(frozen=True, init=False, repr=False)
class Delimiter:
    r"""Units that end with a delimiter, such as ``###`` between the examples of a prompt.

    A delimiter belongs to the unit in front of it, because units cover all that is explained; one
    with nothing in front of it, to the unit behind it. Several in a row end one unit. A token that
    stands on both sides of a border goes where most of it is. A regular expression may match no
    character at all: ``Delimiter(r"(?=\nQ:)", regex=True)`` begins a unit with every question.

    Args:
        delimiters: One or several; where they overlap, the one that begins first counts, then the
            longest.
        regex: Whether they are regular expressions.
    Raises:
        TypeError: if a delimiter is no str.
        ValueError: if there is none, one is empty, or is no regular expression.
    """

    delimiters: tuple[str, ...]
    regex: bool

    def __init__(self, *delimiters: str, regex: bool = False) -> None:
        if not delimiters:
            raise ValueError("Delimiter must be given at least one delimiter, got none.")
        for delimiter in delimiters:
            if not isinstance(delimiter, str):
                raise TypeError(f"a delimiter must be a str, got {delimiter!r}.")
            if not delimiter:
                raise ValueError("a delimiter must not be an empty str.")
        object.__setattr__(self, "delimiters", delimiters)
        object.__setattr__(self, "regex", bool(regex))
        self.patterns()

    def patterns(self) -> list[re.Pattern[str]]:
        """The delimiters as compiled expressions."""
        found = []
        for delimiter in self.delimiters:
            try:
                found.append(re.compile(delimiter if self.regex else re.escape(delimiter)))
            except re.error as error:
                raise ValueError(
                    f"delimiter {delimiter!r} is no regular expression: {error}."
                ) from error
        return found

    def __repr__(self) -> str:
        given = [repr(delimiter) for delimiter in self.delimiters]
        return f"Delimiter({', '.join(given + ['regex=True'] * self.regex)})"


@dataclass(frozen=True, init=False)
class Spans:
    """Units that are given as characters of the prompt.

    They count in the text that the model reads, ``Explanation.prompt``: of chat messages the
    rendered ones, of ``{documents}`` what was put there. A unit holds the tokens that touch its
    span with more than whitespace; a token that touches two goes to the one that holds most of it,
    the first of equals. What no span covers is left out.

    Args:
        spans: ``(start, stop)``, ``stop`` exclusive, in any order.
    Raises:
        TypeError: if one is no pair of ints.
        ValueError: if there is none, one is empty or negative, or two overlap.
    """

    spans: tuple[Span, ...]

    def __init__(self, spans: Iterable[Span]) -> None:
        object.__setattr__(self, "spans", _checked_spans(type(self).__name__, spans))


@dataclass(frozen=True, init=False)
class TokenSpans:
    """Units that are given as positions of the prompt's tokens.

    Positions count all tokens that the model reads, special ones too, as ``Unit.tokens`` does.
    What no span covers is left out.

    Args:
        spans: ``(start, stop)``, ``stop`` exclusive, in any order.
    Raises:
        TypeError: if one is no pair of ints.
        ValueError: if there is none, one is empty or negative, or two overlap.
    """

    spans: tuple[Span, ...]

    def __init__(self, spans: Iterable[Span]) -> None:
        object.__setattr__(self, "spans", _checked_spans(type(self).__name__, spans))


Granularity = Named | Delimiter | Spans | TokenSpans


def checked_granularity(given: Any, name: str = "granularity") -> Granularity:
    """A granularity that is known; a list of ``(start, stop)`` stands for ``Spans``.

    Args:
        given: What the user says.
        name: Of the argument, for messages.
    Raises:
        TypeError: if a list holds anything else.
        ValueError: if a name is unknown, or a list empty.
    """
    if isinstance(given, (Delimiter, Spans, TokenSpans)):
        return given
    if isinstance(given, (list, tuple)):
        return Spans(given)
    if isinstance(given, str) and given in GRANULARITIES:
        return given  # pyright: ignore[reportReturnType]
    raise ValueError(
        f"{name} must be one of {', '.join(GRANULARITIES)}, a Delimiter, Spans, TokenSpans "
        f"or a list of (start, stop), got {given!r}."
    )


def checked_max_units(given: Any, granularity: Granularity) -> int:
    """How many units ``auto`` aims at.

    Raises:
        TypeError: if it is no int.
        ValueError: if it is below 1, or given where nothing is automatic.
    """
    if given is None:
        return MAX_UNITS
    if isinstance(given, bool) or not isinstance(given, int):
        raise TypeError(f"max_units must be an int or None, got {given!r}.")
    if given < 1:
        raise ValueError(f"max_units must be at least 1, got {given}.")
    if granularity != "auto":
        raise ValueError(
            f"max_units is for granularity='auto', but granularity is {described(granularity)!r}."
        )
    return given


def described(granularity: Granularity) -> str:
    """It as a str: names and delimiters as they are, spans by their kind."""
    if isinstance(granularity, Delimiter):
        return repr(granularity)
    return granularity if isinstance(granularity, str) else type(granularity).__name__


def level_of(granularity: Granularity) -> Level:
    """What ``Unit.level`` says of its units."""
    if isinstance(granularity, Delimiter):
        return "delimited"
    if isinstance(granularity, (Spans, TokenSpans)):
        return "span"
    if granularity == "auto":
        raise ValueError("what is automatic has no level before it is chosen.")
    return granularity


def divided_text(text: str, granularity: Granularity) -> list[Span]:
    """Spans that cover the text, one for each unit of a granularity that divides text."""
    if isinstance(granularity, Delimiter):
        return delimited(text, granularity.patterns())
    if isinstance(granularity, str) and granularity in _DIVIDE:
        return _DIVIDE[granularity](text)
    return [(0, len(text))]


def _checked_spans(name: str, spans: Any) -> tuple[Span, ...]:
    if isinstance(spans, (str, bytes)) or not isinstance(spans, Iterable):
        raise TypeError(f"{name} must be given a list of (start, stop), got {spans!r}.")
    found = sorted(checked_span(f"a span of {name}", span) for span in spans)
    if not found:
        raise ValueError(f"{name} must be given at least one (start, stop), got none.")
    for first, second in pairwise(found):
        if second[0] < first[1]:
            raise ValueError(f"{name} must be disjoint, but {first} and {second} overlap.")
    return tuple(found)
