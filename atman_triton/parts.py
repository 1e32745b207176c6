"""What target tokens are read in: whole answers, sentences, words or tokens of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from .chat import Span
from .granularity import divided_text
from .pieces import Target, TargetPart
from .placing import owners

TargetGranularity = Literal["complete", "token", "word", "sentence"]
TARGET_GRANULARITIES: tuple[str, ...] = get_args(TargetGranularity)


def target_parts(
    text: str,
    targets: Sequence[Target],
    prompt_stop: int,
    target_stops: Sequence[int],
    granularity: TargetGranularity,
) -> list[TargetPart]:
    """Disjoint parts of the targets that hold every scored token, in order.

    A token that stands in two words belongs as ``placing.owners`` says; one without a place in the
    text belongs to the part before it, at the start to the first.

    Args:
        text: The prompt, then the targets.
        targets: The scored tokens.
        prompt_stop: Character where the first target starts.
        target_stops: Characters where they end.
        granularity: How large a part is.
    """
    parts = []
    start = prompt_stop
    for branch, stop in enumerate(target_stops):
        rows = [row for row, target in enumerate(targets) if target.branch == branch]
        for group in _groups(text, [targets[row] for row in rows], (start, stop), granularity):
            parts.append(_part(text, targets, [rows[index] for index in group], branch))
        start = stop
    return parts


def _groups(
    text: str, targets: Sequence[Target], span: Span, granularity: TargetGranularity
) -> list[list[int]]:
    """Indices of the tokens of each part."""
    if granularity == "token":
        return [[index] for index in range(len(targets))]
    if granularity == "complete":
        return [[*range(len(targets))]]
    start, stop = span
    pieces = [(start + a, start + b) for a, b in divided_text(text[start:stop], granularity)]
    spans = [None if t.start is None or t.stop is None else (t.start, t.stop) for t in targets]
    groups: list[list[int]] = []
    last: int | None = None
    for index, owner in enumerate(owners(text, spans, pieces)):
        if groups and (owner is None or last is None or owner == last):
            groups[-1].append(index)
        else:
            groups.append([index])
        last = last if owner is None else owner
    return groups


def _part(text: str, targets: Sequence[Target], rows: list[int], branch: int) -> TargetPart:
    own = [targets[row] for row in rows]
    start = min((target.start for target in own if target.start is not None), default=None)
    stop = max((target.stop for target in own if target.stop is not None), default=None)
    words = "".join(target.text for target in own) if start is None else text[start:stop]
    return TargetPart(words, tuple(rows), start, stop, branch)
