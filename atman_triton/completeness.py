"""Whether the scores of a gradient method add up to what suppressing everything does.

Legend: K targets, T target tokens, U units.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Completeness:
    """Sums of scores, and the rises of the loss that they must equal.

    Args:
        sums: ``[T]`` float64, nats: the scores of each target token, summed over units.
        rises: ``[T]`` float64, nats: its loss with all units suppressed that have a score for it,
            minus its loss with none.
        branches: ``[T]``: which target each token belongs to.
        targets: ``K``.
    """

    sums: Tensor
    rises: Tensor
    branches: Tensor
    targets: int

    @property
    def errors(self) -> Tensor:
        """``[K]`` float64: of each target, how far its tokens' sums are off, relative to the rises.

        That is Σ|sum - rise| / Σ|rise| over its tokens; infinite where nothing rises but sums do.
        """
        off = self._added((self.sums - self.rises).abs())
        return _share(off, self._added(self.rises.abs()))

    @property
    def error(self) -> float:
        """The same over the tokens of all targets."""
        return float(_share((self.sums - self.rises).abs().sum(), self.rises.abs().sum()))

    def __str__(self) -> str:
        return self.described(" nats", "loss rises")

    def described(self, suffix: str, change: str) -> str:
        """The sums and the rises in words.

        Args:
            suffix: The unit behind a number.
            change: What suppression does, as in ``loss rises``.
        """
        percent = 100 * self.error
        error = f"{percent:.0f}%" if percent >= 10 else f"{percent:.2g}%"
        error = error if math.isfinite(percent) else "all of it"
        total, rise = float(self.sums.sum()), float(self.rises.sum())
        return (
            f"the scores sum to {total:.3g}{suffix}; with all units suppressed the {change} by "
            f"{rise:.3g} (error {error})"
        )

    def _added(self, values: Tensor) -> Tensor:
        total = torch.zeros(self.targets, dtype=values.dtype)
        return total.index_add_(0, self.branches, values)


def _share(part: Tensor, whole: Tensor) -> Tensor:
    """0 of nothing is 0."""
    return torch.where(part == 0, 0.0, part / whole)
