"""Examples out of a stream of candidates, and a count of those that were left out and why."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Generic, NamedTuple, TypeVar

from rich.console import Console
from rich.progress import Progress

Kept = TypeVar("Kept")


class Skipped(NamedTuple):
    """A candidate that is left out.

    Args:
        reason: Why, so that it can follow a colon; the same words for all that share it.
    """

    reason: str


class Gathered(NamedTuple, Generic[Kept]):
    """What was kept, in order, and in words what was not."""

    kept: Sequence[Kept]
    notes: list[str]


def gather(
    name: str,
    candidates: Iterable[Kept | Skipped],
    limit: int | None,
    *,
    patience: int | None = None,
    progress: bool = False,
) -> Gathered[Kept]:
    """Take candidates in their order until there are enough.

    What is taken of a larger ``limit`` begins with what is taken of a smaller one.

    Args:
        name: Of the data set.
        candidates: What could be taken, or why not; no more of them are drawn than needed.
        limit: The most to take, at least 1; None takes all.
        patience: Stop when so many in a row were left out; None never does.
        progress: Show a progress bar on stderr, if that is a terminal.
    Raises: ValueError: if ``limit`` is no count, or nothing was left to take.
    """
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise ValueError(f"limit must be an int of at least 1 or None, got {limit!r}.")
    kept: list[Kept] = []
    skipped: Counter[str] = Counter()
    in_a_row = seen = 0
    console = Console(stderr=True)
    with Progress(console=console, disable=not (progress and console.is_terminal)) as bar:
        row = bar.add_task(f"Reading {name}", total=limit)
        for candidate in candidates:
            seen += 1
            if isinstance(candidate, Skipped):
                skipped[candidate.reason] += 1
                in_a_row += 1
            else:
                kept.append(candidate)
                in_a_row = 0
                bar.advance(row)
            if len(kept) == limit or in_a_row == patience:
                break
    reasons = [f"{count}: {reason}" for reason, count in skipped.most_common()]
    if not kept:
        raise ValueError(
            f"{name} gave no example: {seen} looked at, left out "
            + ("; ".join(reasons) if reasons else "none")
            + "."
        )
    notes = [f"{name}: {len(kept)} examples of {seen} that were looked at"]
    notes += [f"{name}: left out {reason}" for reason in reasons]
    if limit is not None and len(kept) < limit:
        why = f"{patience} in a row were left out" if in_a_row == patience else "there are no more"
        notes.append(f"{name}: fewer than the {limit} asked for, as {why}")
    return Gathered(kept, notes)


def shuffled(candidates: Iterable[Kept], name: Callable[[Kept], str], seed: int) -> list[Kept]:
    """Candidates in an order by their names alone, the same on every machine.

    Leaving some out does not change the order of the others.

    Args:
        candidates: What is to be ordered.
        name: Of a candidate, unique.
        seed: Another one gives another order.
    """

    def place(candidate: Kept) -> bytes:
        return hashlib.sha256(f"{seed}:{name(candidate)}".encode()).digest()

    return sorted(candidates, key=place)
