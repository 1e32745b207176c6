"""What is explained: which tokens of the input are units, which are targets, what is left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from .explanation import LeftOut, Target, Unit
from .tokens import Span, Tokens

NOT_ASKED_FOR = "not in explain_only"


@dataclass(frozen=True)
class Layout:
    """A prompt and its target as the model reads them.

    Args:
        input_ids: Prompt and target without its last token: what the model is fed.
        target_ids: The tokens that are scored, the last ``len(target_ids)`` predictions.
        text: Prompt text followed by target text.
        prompt_stop: Character of ``text`` where the target starts.
        units: What is suppressed, one at a time.
        targets: What is scored.
        left_out: What the model reads besides the units.
    """

    input_ids: list[int]
    target_ids: list[int]
    text: str
    prompt_stop: int
    units: list[Unit]
    targets: list[Target]
    left_out: list[LeftOut]


def lay_out(prompt: Tokens, target: Tokens, explain_only: Sequence[int] | None = None) -> Layout:
    """Every token of the user's own in front of the last target token is a unit.

    Args:
        prompt: The prompt's tokens.
        target: The target's tokens, spans counted from the target's start.
        explain_only: Indices of the units to keep, counted without this argument; None keeps all.
    Raises:
        TypeError: if ``explain_only`` holds anything but integers.
        ValueError: if it is empty or out of range, or if no token can be a unit.
    """
    spans = prompt.spans + [_moved(span, len(prompt.text)) for span in target.spans]
    names, reasons = prompt.names + target.names, prompt.reasons + target.reasons
    ids = prompt.ids + target.ids
    text = prompt.text + target.text

    fed = range(len(ids) - 1)
    candidates = [token for token in fed if reasons[token] is None]
    if not candidates:
        raise ValueError("prompt has nothing to explain: all of its tokens are special tokens.")
    chosen = _chosen(candidates, explain_only)
    units = []
    for token in chosen:
        start, stop = spans[token] or (None, None)
        part: Literal["prompt", "target"] = "prompt" if token < len(prompt) else "target"
        units.append(Unit(names[token], (token,), start, stop, part))
    targets = []
    for token in range(len(prompt), len(ids)):
        start, stop = spans[token] or (None, None)
        targets.append(Target(names[token], token, ids[token], start, stop))

    kept = set(chosen)
    why = {token: reasons[token] or NOT_ASKED_FOR for token in fed if token not in kept}
    return Layout(
        input_ids=ids[:-1],
        target_ids=target.ids,
        text=text,
        prompt_stop=len(prompt.text),
        units=units,
        targets=targets,
        left_out=_left_out(why, text, spans, names),
    )


def _moved(span: Span | None, by: int) -> Span | None:
    return None if span is None else (span[0] + by, span[1] + by)


def _chosen(candidates: list[int], explain_only: Sequence[int] | None) -> list[int]:
    """The candidates that ``explain_only`` names, in text order."""
    if explain_only is None:
        return candidates
    indices = list(explain_only)
    if not indices:
        raise ValueError("explain_only must name at least one unit, or be None for all.")
    for index in indices:
        if isinstance(index, bool) or not isinstance(index, int):
            raise TypeError(f"explain_only must hold unit indices, got {index!r}.")
        if not 0 <= index < len(candidates):
            raise ValueError(
                f"explain_only holds unit index {index}, but this input has {len(candidates)} "
                f"units, 0 to {len(candidates) - 1}."
            )
    return [candidates[index] for index in sorted(set(indices))]


def _left_out(
    why: dict[int, str], text: str, spans: list[Span | None], names: list[str]
) -> list[LeftOut]:
    """Neighbouring tokens with one reason make one piece."""
    left_out = []
    # Token minus rank is constant along a run of neighbours.
    runs = groupby(enumerate(why), key=lambda item: (item[1] - item[0], why[item[1]]))
    for (_, reason), run in runs:
        tokens = tuple(token for _, token in run)
        placed = [span for token in tokens if (span := spans[token]) is not None]
        if len(placed) == len(tokens):
            piece = text[placed[0][0] : placed[-1][1]]
        else:
            piece = "".join(names[token] for token in tokens)
        left_out.append(LeftOut(piece, tokens, reason))
    return left_out
