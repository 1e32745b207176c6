"""Which perturbations run together, and from which token on.

A perturbation changes nothing before its first suppressed token, so it is run from there. Rows of
one batch run from the earliest start among them: what the others run before their own start is
wasted, like padding.

Legend: S input tokens, a row is one perturbation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

# Batches of up to this many inputs' worth of tokens waste less than _WASTE of what they run.
_FRUGAL_INPUTS = 8
_WASTE = Fraction(1, 10)
# What a batch may waste, as a share of its useful tokens: the first that keeps the whole below.
_LIMITS = (1.0, 0.5, 0.3, 0.2, 0.15, _WASTE)


@dataclass(frozen=True)
class Batch:
    """Rows that run together.

    Args:
        start: First input token that they run.
        rows: Indices of the perturbations.
    """

    start: int
    rows: tuple[int, ...]

    def tokens(self, length: int) -> int:
        """Tokens that the batch runs, of inputs of ``length`` tokens."""
        return len(self.rows) * (length - self.start)

    def split(self, length: int, tokens: int) -> list[Batch]:
        """The same rows in batches of at most ``tokens``, or of one row."""
        size = max(1, tokens // (length - self.start))
        parts = [self.rows[a : a + size] for a in range(0, len(self.rows), size)]
        return [Batch(self.start, part) for part in parts]


def plan_batches(
    starts: Sequence[int],
    length: int,
    *,
    tokens: int | None = None,
    rows: int | None = None,
) -> list[Batch]:
    """Batches of level size that waste little; every row is in exactly one.

    Args:
        starts: First changed token of each perturbation, in ``[0, S)``.
        length: ``S``.
        tokens: The most tokens of a batch, unless one row alone has more. Up to 8·S, less than a
            tenth of all tokens run is wasted.
        rows: The most rows of a batch.
    """
    order = sorted(range(len(starts)), key=lambda row: starts[row])
    if tokens is None:
        size = rows or max(1, len(order))
        cuts = [*range(0, len(order), size), len(order)]
        return [Batch(starts[order[a]], tuple(order[a:b])) for a, b in pairwise(cuts)]
    batches = _greedy(order, starts, length, tokens, rows, None)
    if tokens > _FRUGAL_INPUTS * length:
        return batches
    for limit in _LIMITS:
        run = sum(batch.tokens(length) for batch in batches)
        if wasted_tokens(batches, starts) < _WASTE * run:
            break
        batches = _greedy(order, starts, length, tokens, rows, limit)
    return batches


def wasted_tokens(batches: Sequence[Batch], starts: Sequence[int]) -> int:
    """Tokens run that stand before their row's own start."""
    return sum(starts[row] - batch.start for batch in batches for row in batch.rows)


def _greedy(
    order: Sequence[int],
    starts: Sequence[int],
    length: int,
    tokens: int,
    rows: int | None,
    limit: float | Fraction | None,
) -> list[Batch]:
    """Fill one batch after the other, earliest starts first."""
    cuts, first, useful = [0], 0, 0
    for place, row in enumerate(order):
        longest = length - starts[order[first]]
        count = place - first + 1
        own = length - starts[row]
        full = count > 1 and (
            count * longest > tokens
            or (rows is not None and count > rows)
            or (limit is not None and count * longest - (useful + own) > limit * (useful + own))
        )
        if full:
            cuts.append(place)
            first, useful = place, 0
        useful += own
    cuts.append(len(order))
    return [Batch(starts[order[a]], tuple(order[a:b])) for a, b in pairwise(cuts) if a < b]
