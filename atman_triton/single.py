"""Whole targets of an explanation: each as one part, and one of several on its own."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .pieces import TargetPart, Unit

if TYPE_CHECKING:
    from .explanation import Explanation


def whole_targets(explanation: Explanation) -> list[TargetPart]:
    """A part per target: all of its tokens."""
    e = explanation
    edges = [e.prompt_stop, *e.target_stops]
    parts = []
    for branch, text in enumerate(e.answers):
        start, stop = edges[branch : branch + 2]
        span = (start, stop) if start < stop else (None, None)
        rows = tuple(row for row, target in enumerate(e.targets) if target.branch == branch)
        parts.append(TargetPart(text, rows, *span, branch))
    return parts


def single(explanation: Explanation, index: int) -> Explanation:
    """The explanation of target ``index``, which exists, as if it alone had been explained.

    Raises: ValueError: if no unit belongs to it or to the prompt.
    """
    e = explanation
    start, stop = [e.prompt_stop, *e.target_stops][index : index + 2]
    rows = [row for row, target in enumerate(e.targets) if target.branch == index]
    columns = [c for c, unit in enumerate(e.units) if unit.branch in (None, index)]
    if not columns:
        raise ValueError(f"no unit belongs to target {index} or the prompt.")
    # Whether targets are counted on or each from the prompt's end, all end up at the latter.
    tokens = e.targets[rows[0]].token - e.targets[0].token
    characters = start - e.prompt_stop

    def moved(piece: Any) -> Any:
        changes: dict[str, Any] = {}
        if piece.branch is not None:
            changes["branch"] = 0
            if hasattr(piece, "tokens"):
                changes["tokens"] = tuple(token - tokens for token in piece.tokens)
            elif hasattr(piece, "token"):
                changes["token"] = piece.token - tokens
            else:
                changes["rows"] = tuple(row - rows[0] for row in piece.rows)
            if getattr(piece, "start", None) is not None:
                changes |= {"start": piece.start - characters, "stop": piece.stop - characters}
        if isinstance(piece, Unit) and piece.neighbours:
            changes["neighbours"] = tuple(own(piece.neighbours))
        return replace(piece, **changes) if changes else piece

    def own(pieces: Any) -> list[Any]:
        return [moved(piece) for piece in pieces if piece.branch in (None, index)]

    together = e.together_logprobs
    return replace(
        e,
        text=e.prompt + e.text[start:stop],
        units=own(e.units),
        targets=own(e.targets),
        base_logprobs=e.base_logprobs[rows],
        suppressed_logprobs=e.suppressed_logprobs[rows][:, columns],
        together_logprobs=None if together is None else together[rows],
        left_out=own(e.left_out),
        target_stops=[e.prompt_stop + stop - start],
        parts=own(e.parts),
        contrast=False,
        coarse=None if e.coarse is None else e.coarse.branch(index),
    )
