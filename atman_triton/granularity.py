"""How large a unit is: a level by name, pieces between delimiters, or spans that are given."""

from __future__ import annotations

import math
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


@dataclass(frozen=True)
class Tiles:
    """Units of a picture: the cells of a grid over it.

    A cell holds the image tokens whose centres lie in it, those of an overview and of crops alike;
    empty cells are no units. One cell, the whole picture, also holds tokens without a place.

    Args:
        columns: Cells from left to right.
        rows: Cells from top to bottom; None is as many as columns.
    Raises: TypeError, ValueError: if a number is no int, or below 1.
    """

    columns: int
    rows: int | None = None

    def __post_init__(self) -> None:
        if self.rows is None:
            object.__setattr__(self, "rows", self.columns)
        for name in ("columns", "rows"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} of Tiles must be an int, got {value!r}.")
            if value < 1:
                raise ValueError(f"{name} of Tiles must be at least 1, got {value}.")

    @property
    def shape(self) -> tuple[int, int]:
        """Columns and rows."""
        return self.columns, self.rows or self.columns


@dataclass(frozen=True)
class Seconds:
    """Units of a sound: stretches of so many seconds.

    Raises: TypeError, ValueError: if the length is no finite number above 0.
    """

    length: float

    def __post_init__(self) -> None:
        if isinstance(self.length, bool) or not isinstance(self.length, int | float):
            raise TypeError(f"Seconds must be given a number, got {self.length!r}.")
        if not (math.isfinite(self.length) and self.length > 0):
            raise ValueError(f"Seconds must be finite and above 0, got {self.length}.")


@dataclass(frozen=True, init=False)
class Images:
    """For ``explain_only``: the pictures of a prompt, all of them or some.

    Args:
        indices: Which, from 0; none stands for all.
    Raises: TypeError, ValueError: if an index is no int, or negative.
    """

    indices: tuple[int, ...]

    def __init__(self, *indices: int) -> None:
        for index in indices:
            if isinstance(index, bool) or not isinstance(index, int):
                raise TypeError(f"an index of Images must be an int, got {index!r}.")
            if index < 0:
                raise ValueError(f"an index of Images must be at least 0, got {index}.")
        object.__setattr__(self, "indices", indices)


Granularity = Named | Delimiter | Spans | TokenSpans | Seconds
ImageGranularity = Literal["patch"] | Tiles

_TILES = re.compile(r"([1-9]\d*)\s*[x×]\s*([1-9]\d*)")
_SECONDS = re.compile(r"(\d+(?:\.\d+)?)\s*s")


def tiles_of(given: Any) -> Tiles | None:
    """A grid given as ``Tiles``, as "6x6" or as "image", the whole picture; None if it is none."""
    if isinstance(given, Tiles):
        return given
    if given == "image":
        return Tiles(1)
    found = _TILES.fullmatch(given) if isinstance(given, str) else None
    return None if found is None else Tiles(int(found[1]), int(found[2]))


def checked_image_granularity(given: Any) -> ImageGranularity:
    """How large a unit of a picture is; None is one image token.

    Raises: ValueError: if it is not known.
    """
    tiles = tiles_of(given)
    if tiles is not None:
        return tiles
    if given is None or given == "patch":
        return "patch"
    raise ValueError(
        "image_granularity must be 'patch' (one image token), 'image' (the whole picture), a grid "
        f"such as '6x6', or Tiles, got {given!r}."
    )


def checked_granularity(given: Any, name: str = "granularity") -> Granularity:
    """A granularity that is known; a list of ``(start, stop)`` stands for ``Spans``.

    Args:
        given: What the user says.
        name: Of the argument, for messages.
    Raises:
        TypeError: if a list holds anything else.
        ValueError: if a name is unknown, or a list empty.
    """
    if isinstance(given, (Delimiter, Spans, TokenSpans, Seconds)):
        return given
    if isinstance(given, (list, tuple)):
        return Spans(given)
    if isinstance(given, str) and given in GRANULARITIES:
        return given  # pyright: ignore[reportReturnType]
    if given == "frame":  # one token of a sound
        return "token"
    if isinstance(given, str) and (found := _SECONDS.fullmatch(given)):
        return Seconds(float(found[1]))
    raise ValueError(
        f"{name} must be one of {', '.join(GRANULARITIES)}, a Delimiter, Spans, TokenSpans "
        f"or a list of (start, stop), of pictures a grid such as '6x6', 'image' or Tiles, of "
        f"sounds Seconds, got {given!r}."
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


def described(granularity: Granularity | ImageGranularity) -> str:
    """It as a str: names and delimiters as they are, spans by their kind."""
    if isinstance(granularity, (Delimiter, Tiles, Seconds)):
        return repr(granularity)
    return granularity if isinstance(granularity, str) else type(granularity).__name__


def level_of(granularity: Granularity) -> Level:
    """What ``Unit.level`` says of its units."""
    if isinstance(granularity, Delimiter):
        return "delimited"
    if isinstance(granularity, (Spans, TokenSpans)):
        return "span"
    if isinstance(granularity, Seconds):
        return "seconds"
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
