"""What an explanation is made of: suppressed units, scored target tokens, what was left out.

``token`` and ``tokens`` count tokens of the model input from 0; ``start`` and ``stop`` count
characters of ``Explanation.text`` from 0, ``stop`` exclusive.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

__all__ = [
    "EFFECTS",
    "FINEST",
    "LEVELS",
    "Area",
    "Box",
    "Document",
    "Effect",
    "LeftOut",
    "Level",
    "Neighbour",
    "Target",
    "TargetPart",
    "Unit",
]

Part = Literal["prompt", "target"]
Effect = Literal["total", "direct", "path", "gradient", "baseline"]
Level = Literal[
    "token",
    "word",
    "sentence",
    "paragraph",
    "chunk",
    "delimited",
    "span",
    "turn",
    "document",
    "patch",
    "tile",
    "image",
    "frame",
    "seconds",
]
EFFECTS: tuple[str, ...] = get_args(Effect)
LEVELS: tuple[str, ...] = get_args(Level)
FINEST: tuple[Level, ...] = ("token", "patch", "frame")
"""Levels of one token: of text, of a picture, of a sound."""

Box = tuple[float, float, float, float]
"""Left, top, width, height in pixels of the picture as it was given."""


class Area(NamedTuple):
    """What of a picture a token stands for.

    Args:
        image: Which of the pictures, from 0.
        box: Where; None for a token without a place of its own, such as one that ends a row.
        view: ``grid`` where a picture is read once; where it is read twice, ``overview`` and
            ``crop``; else what a token without a box is for.
    """

    image: int
    box: Box | None
    view: str = "grid"


@dataclass(frozen=True)
class Neighbour:
    """A token suppressed along with a unit, because its input embedding is like one of the unit's.

    Args:
        token: Its position in the model input.
        factor: What its attention scores were manipulated with; 1 leaves alone.
        similarity: The largest cosine of its input embedding with one of the unit's tokens.
        start: First character in ``Explanation.text``; None where it has no place there.
        stop: One past its last character; None together with ``start``.
        branch: Of a token of a target, which of the explained targets; None in the prompt.
    """

    token: int
    factor: float
    similarity: float
    start: int | None = None
    stop: int | None = None
    branch: int | None = None


@dataclass(frozen=True)
class Document:
    """A source that the prompt holds, as retrieval gives it.

    Args:
        id: Its name; unique in an explanation.
        start: First character in ``Explanation.text``.
        stop: One past its last character.
    """

    id: str
    start: int
    stop: int


@dataclass(frozen=True)
class Unit:
    """A piece of the input that was suppressed as one: a token, a word, a sentence, a patch.

    Args:
        text: The piece as text; for a token that holds part of a character, what it decodes to.
        tokens: Its positions in the model input.
        start: First character in ``Explanation.text``; None where the piece has no place there.
        stop: One past its last character; None together with ``start``.
        part: Whether it belongs to the prompt or to a target.
        branch: Of a piece of a target, which of the explained targets, from 0; ``Explanation``
            takes None for 0 where there is only one. None for a piece of the prompt.
        effect: What its scores are. ``total``: it was suppressed in every row of every layer, so
            that what other tokens took over from it weakens too (AtMan's quantity). ``direct``:
            only in the rows of the target, all else kept as it is with nothing suppressed.
            ``path``: its share in suppressing all units together, from gradients on the way there.
            ``gradient``: a first-order estimate from the gradient with nothing suppressed.
            ``baseline``: what another method than AtMan gives, see ``baselines``; the result's
            ``method`` names it, and only some of them count in nats.
        level: How large a piece it is.
        document: Which of ``Explanation.documents`` it stands in; None outside of them.
        neighbours: Tokens outside of it that were suppressed along with it (paper, 3.3); empty
            without ``similarity``.
        image: Of a piece of a picture, which of ``Explanation.pictures``.
        boxes: Where it stands there: one box for a patch, a tile or a whole picture, none for
            tokens without a place of their own.
        seconds: Of a piece of a sound, from when to when.
    """

    text: str
    tokens: tuple[int, ...]
    start: int | None
    stop: int | None
    part: Part
    branch: int | None = None
    effect: Effect = "total"
    level: Level = "token"
    document: int | None = None
    neighbours: tuple[Neighbour, ...] = ()
    image: int | None = None
    boxes: tuple[Box, ...] = ()
    seconds: tuple[float, float] | None = None


@dataclass(frozen=True)
class Target:
    """A token whose log-probability was scored.

    Args:
        text: The token as text.
        token: Its position in the model input (the last one is scored, but never fed to the model).
        token_id: Its index in the vocabulary.
        start: First character in ``Explanation.text``; None where the token has no place there.
        stop: One past its last character; None together with ``start``.
        branch: Which of the explained targets it belongs to, from 0.
    """

    text: str
    token: int
    token_id: int
    start: int | None
    stop: int | None
    branch: int = 0


@dataclass(frozen=True)
class TargetPart:
    """Neighbouring target tokens that are read as one: an answer, a sentence or a word of it.

    Args:
        text: The part as text.
        rows: Indices into ``Explanation.targets``, ascending; no token is in two parts.
        start: First character in ``Explanation.text``; None where it has no place there.
        stop: One past its last character; None together with ``start``.
        branch: Which of the explained targets it belongs to, from 0.
    """

    text: str
    rows: tuple[int, ...]
    start: int | None
    stop: int | None
    branch: int = 0


@dataclass(frozen=True)
class LeftOut:
    """A piece of the input that the model read but that is no unit.

    Args:
        text: The piece as text, for example ``<s>``.
        tokens: Its positions in the model input.
        reason: Why it was left out, for example ``special token``.
        branch: Of a piece of a target, which of the explained targets; None for all of them.
    """

    text: str
    tokens: tuple[int, ...]
    reason: str
    branch: int | None = None
