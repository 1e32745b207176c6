"""What an explanation is made of: suppressed units, scored target tokens, what was left out.

``token`` and ``tokens`` count tokens of the model input from 0; ``start`` and ``stop`` count
characters of ``Explanation.text`` from 0, ``stop`` exclusive.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

__all__ = [
    "EFFECTS",
    "LEVELS",
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
Effect = Literal["total", "direct", "path", "gradient"]
Level = Literal[
    "token", "word", "sentence", "paragraph", "chunk", "delimited", "span", "turn", "document"
]
EFFECTS: tuple[str, ...] = get_args(Effect)
LEVELS: tuple[str, ...] = get_args(Level)


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
    """A piece of the input that was suppressed as one: a token, a word, a sentence.

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
        level: How large a piece it is.
        document: Which of ``Explanation.documents`` it stands in; None outside of them.
        neighbours: Tokens outside of it that were suppressed along with it (paper, 3.3); empty
            without ``similarity``.
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


def check_pieces(name: str, pieces: Sequence[Any], kind: type, length: int) -> None:
    """Raise TypeError or ValueError unless all are of one kind and span characters of the text."""
    if not pieces:
        raise ValueError(f"{name} must hold at least one {kind.__name__}, got none.")
    for index, piece in enumerate(pieces):
        if not isinstance(piece, kind):
            raise TypeError(
                f"{name}[{index}] must be a {kind.__name__}, got {type(piece).__name__}."
            )
        start, stop = piece.start, piece.stop
        if start is None and stop is None:
            continue
        if start is None or stop is None or not 0 <= start <= stop <= length:
            raise ValueError(
                f"{name}[{index}] must span characters within [0, {length}], got {start}:{stop}."
            )


def check_names(units: Sequence[Unit], method: str) -> None:
    """Raise ValueError unless parts, effects and levels are known and effects fit the method."""
    effects = {
        "exact": ("total",),
        "direct": ("direct",),
        "path": ("path",),
        "score_gradient": ("gradient",),
    }.get(method, ("total", "direct"))
    for index, unit in enumerate(units):
        if unit.part not in ("prompt", "target"):
            raise ValueError(
                f"units[{index}].part must be 'prompt' or 'target', got {unit.part!r}."
            )
        if unit.effect not in EFFECTS:
            raise ValueError(
                f"units[{index}].effect must be one of {', '.join(EFFECTS)}, got {unit.effect!r}."
            )
        if unit.effect not in effects:
            raise ValueError(
                f"units[{index}].effect must be {' or '.join(map(repr, effects))} where method is "
                f"{method!r}, got {unit.effect!r}."
            )
        if unit.level not in LEVELS:
            raise ValueError(
                f"units[{index}].level must be one of {', '.join(LEVELS)}, got {unit.level!r}."
            )


def check_branches(
    units: Sequence[Unit], targets: Sequence[Target], prompt_stop: int, stops: Sequence[int]
) -> None:
    """Raise ValueError unless every piece belongs to a target that exists, and stands in it.

    Args:
        units: All units.
        targets: All target tokens.
        prompt_stop: Character where the prompt ends.
        stops: Character where each target ends.
    """
    count = len(stops)
    order = [target.branch for target in targets]
    if order != sorted(order) or set(order) != set(range(count)):
        raise ValueError(
            f"targets must belong to targets 0 to {count - 1} in order, at least one token each, "
            f"got branches {_short(order)}."
        )
    for index, unit in enumerate(units):
        if unit.part == "prompt" and unit.branch is not None:
            raise ValueError(
                f"units[{index}].branch must be None for a piece of the prompt, got {unit.branch}."
            )
        if unit.part == "target" and unit.branch not in range(count):
            raise ValueError(
                f"units[{index}].branch must lie in [0, {count - 1}], got {unit.branch}."
            )
    if count == 1:
        return
    _check_places("units", units, prompt_stop, stops)
    _check_places("targets", targets, prompt_stop, stops)


def _check_places(name: str, pieces: Sequence[Any], prompt_stop: int, stops: Sequence[int]) -> None:
    starts = [prompt_stop, *stops]
    for index, piece in enumerate(pieces):
        branch = piece.branch
        low, high = (0, prompt_stop) if branch is None else (starts[branch], stops[branch])
        if piece.start is not None and not low <= piece.start <= piece.stop <= high:
            whose = "the prompt" if branch is None else f"target {branch}"
            raise ValueError(
                f"{name}[{index}] must span characters of {whose}, within [{low}, {high}], "
                f"got {piece.start}:{piece.stop}."
            )


def _short(values: Sequence[int]) -> str:
    shown = ", ".join(map(str, values[:12]))
    return f"[{shown}, ...]" if len(values) > 12 else f"[{shown}]"
