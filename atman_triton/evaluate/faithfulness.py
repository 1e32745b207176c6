"""Whether relevance is true of the model: what its answer loses as units are removed.

Units are taken out of the model's input (``Case.without``: text is deleted, patches are painted),
so that the measure is not AtMan's own perturbation; only ``hidden_gap`` hides them from attention.
Only units of the region are ever removed: the question and the answer stay.

Insertion is removal seen from the other end: when the most relevant units are put in first, what
is still missing are the least relevant ones. So one curve that removes the most relevant units
first and one that removes the least relevant first serve all measures, and the shares at which they
are looked at are the same from both ends.

Legend: R units of the region, S shares, M tokens of the target.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from ..baselines.case import Case
from . import metrics
from .metrics import UNDEFINED, Numbers, as_array

SHARES = (0.0, 0.01, 0.05, 0.1, 0.2, 0.5, 0.8, 0.9, 0.95, 0.99, 1.0)
"""Of the region, removed: those of DeYoung et al. 2020, from both ends."""

PICTURE_SHARES = (0.0, 0.1, 0.2, 0.5, 0.8, 0.9, 1.0)
"""The same of a picture, of which every variant is drawn and read anew: fewer."""

TOP = 5
"""Units that ``top5_drop`` removes."""

ABLATIONS = 24
"""Random halves of the region that ``lds`` removes, the same of all methods."""

_TENTH = 0.1  # that ``removal_gap`` removes from either end


@dataclass(frozen=True)
class Faithfulness:
    """What removal says of one method's relevance.

    Args:
        values: ``VALUES``, each a number; NaN where it is not defined.
        curve: ``most`` and ``least``, by which units are removed first: mean log-probability of the
            target's tokens (nats per token) at every share; ``shares_of`` says at which.
        notes: What was not as usual, in words.
    """

    values: dict[str, float]
    curve: dict[str, list[float]]
    notes: list[str] = field(default_factory=list)


VALUES: dict[str, str] = {
    "removal_gap": "nats per token: log p without the worst tenth less that without the best tenth",
    "deletion": "probability, mean height of its curve as the most relevant units go first "
    "(Petsiuk et al. 2018, RISE); low is good",
    "insertion": "probability, mean height of its curve as the most relevant units come first "
    "(Petsiuk et al. 2018, RISE)",
    "gap_area": "nats per token: mean height of the curve that removes the least relevant first "
    "less that of the most relevant first (LeRF − MoRF, Samek et al. 2017)",
    "comprehensiveness": "probability lost without the best 0, 1, 5, 10, 20, 50%, on average "
    "(DeYoung et al. 2020, ERASER, Eq. 1 and 3)",
    "sufficiency": "probability lost with nothing but them (ERASER, Eq. 2 and 3); low is good",
    "top5_drop": "nats per token: log p less that without the five best units",
    "hidden_gap": "removal_gap with units hidden from attention instead",
    "lds": "rank correlation of the summed relevance of what stays with log p, over random halves "
    "(Ilyas et al. 2022; Park et al. 2023, TRAK: linear datamodeling score)",
}
"""What each number is. *Probability* is exp of the mean log-probability of the target's tokens,
their geometric mean, so that answers of different lengths compare; large is good but where said."""


def shares_of(curve: Sequence[float]) -> tuple[float, ...]:
    """At which shares of the region a curve was looked at: ``SHARES`` or ``PICTURE_SHARES``.

    Raises: ValueError: if neither has as many.
    """
    for shares in (SHARES, PICTURE_SHARES):
        if len(curve) == len(shares):
            return shares
    raise ValueError(
        f"curve must have {len(SHARES)} points, or {len(PICTURE_SHARES)} of a picture, "
        f"got {len(curve)}."
    )


class Faithful:
    """One example, whose units are removed in the orders of several methods.

    What was removed once is never run again, whoever asks.

    Args:
        case: Of one target.
        region: ``R`` indices into ``case.units`` of what may be removed, all in the prompt.
        seed: The example's name: it seeds the order of equal relevance, shared by all methods, and
            the random ablations.
    Raises: ValueError: if the case has several targets, or the region is empty, repeats a unit or
        holds one that does not stand in the prompt.
    """

    def __init__(self, case: Case, region: Sequence[int], seed: str) -> None:
        if len(case.targets) != 1:
            raise ValueError(f"case must have one target, got {len(case.targets)}.")
        self.case, self.region = case, [int(unit) for unit in region]
        if not self.region:
            raise ValueError("region must hold at least one unit, got none.")
        if len(set(self.region)) < len(self.region):
            raise ValueError("region must hold every unit once, got one twice.")
        if strange := sorted(set(self.region) - set(case.removable)):
            raise ValueError(f"region must hold units of the prompt, got {strange[0]}.")
        pictured = any(case.units[unit].image is not None for unit in self.region)
        self.shares = PICTURE_SHARES if pictured else SHARES
        size = len(self.region)
        self.counts = [_count(share, size) for share in self.shares]
        """``S``, how many units each share is."""
        self._tenth = max(1, round(_TENTH * size))
        rng = random.Random(f"faithfulness-{seed}")
        self.permutation = rng.sample(range(size), size)
        """``R``, the order of equal relevance."""
        self.ablations = _halves(size, rng)
        """Sets of indices into the region."""
        whole = float(case.base_logprobs.double().mean())
        self._removed = {frozenset[int](): whole}
        self._hidden = {frozenset[int](): whole}

    def measure(self, relevances: Mapping[str, Numbers]) -> dict[str, Faithfulness]:
        """What removal says of several methods, all of their variants in one go.

        Args:
            relevances: By method, ``[R]``: the relevance of each unit of ``region``, in its order.
                NaN counts as the lowest.
        Raises: ValueError: if one has another length.
        """
        values = {name: self._checked(name, each) for name, each in relevances.items()}
        orders = {name: self.order(each) for name, each in values.items()}
        if not orders:
            return {}
        self._run(
            self._removed,
            self.case.without,
            [*self.ablations, *(each for order in orders.values() for each in self._sets(order))],
        )
        ends = [end for order in orders.values() for end in self._ends(order)]
        self._run(self._hidden, self.case.hidden, ends)
        return {name: self._found(values[name], orders[name]) for name in values}

    def order(self, relevance: Numbers) -> list[int]:
        """``R`` indices into the region, the most relevant first, NaN last."""
        values = as_array(relevance).tolist()
        return sorted(self.permutation, key=lambda unit: _place(values[unit]))

    def _checked(self, name: str, relevance: Numbers) -> np.ndarray:
        values = as_array(relevance)
        if values.shape != (len(self.region),):
            raise ValueError(
                f"relevances[{name!r}] must have shape [{len(self.region)}], one number for each "
                f"unit of the region, got {list(values.shape)}."
            )
        return values

    # --- what is run ------------------------------------------------------------------------------

    def _ends(self, order: Sequence[int]) -> tuple[frozenset[int], frozenset[int]]:
        """The best and the worst tenth."""
        return frozenset(order[: self._tenth]), frozenset(order[-self._tenth :])

    def _sets(self, order: Sequence[int]) -> list[frozenset[int]]:
        """All that is removed for one order: the most, then the least relevant; the rest."""
        size = len(order)
        most = [frozenset(order[:count]) for count in self.counts]
        least = [frozenset(order[size - count :]) for count in self.counts]
        return [*most, *least, *self._ends(order), frozenset(order[:TOP])]

    def _run(
        self,
        known: dict[frozenset[int], float],
        remove: Callable[[Sequence[Collection[int]]], Tensor],
        wanted: Iterable[frozenset[int]],
    ) -> None:
        """Note the mean log-probability without some sets of the region's units."""
        missing = [each for each in dict.fromkeys(wanted) if each not in known]
        if missing:
            units = [frozenset(self.region[index] for index in each) for each in missing]
            found = remove(units).double().mean(1).tolist()
            known.update(zip(missing, found, strict=True))

    # --- what it says -----------------------------------------------------------------------------

    def _found(self, relevance: np.ndarray, order: Sequence[int]) -> Faithfulness:
        removed, hidden = self._removed, self._hidden
        whole = removed[frozenset()]
        sets, points = self._sets(order), len(self.shares)
        most = [removed[each] for each in sets[:points]]
        least = [removed[each] for each in sets[points : 2 * points]]
        best, worst = self._ends(order)
        notes = _unusual(relevance)
        values = {
            "removal_gap": removed[worst] - removed[best],
            "deletion": self._area("deletion", _probabilities(most), notes),
            "insertion": self._area("insertion", _probabilities(least), notes),
            "gap_area": self._area("gap_area", least, notes) - self._area("gap_area", most, notes),
            "comprehensiveness": self._lost(most),
            "sufficiency": self._lost(least[::-1]),
            "top5_drop": whole - removed[frozenset(order[:TOP])],
            "hidden_gap": hidden[worst] - hidden[best],
            "lds": self._lds(relevance, notes),
        }
        return Faithfulness(values, {"most": most, "least": least}, list(dict.fromkeys(notes)))

    def _area(self, name: str, heights: Sequence[float], notes: list[str]) -> float:
        """Of a curve over the shares that were really removed, which rounding moves a little."""
        size = len(self.region)
        points = {count / size: height for count, height in zip(self.counts, heights, strict=True)}
        found = metrics.area(list(points), list(points.values()))
        if found.note:
            notes.append(f"{name}: {found.note}")
        return found.value

    def _lost(self, heights: Sequence[float]) -> float:
        """Probability lost on average over the shares up to a half."""
        bins = sum(share <= 0.5 for share in self.shares)
        whole = self._removed[frozenset()]
        return _probabilities([whole])[0] - float(np.mean(_probabilities(heights[:bins])))

    def _lds(self, relevance: np.ndarray, notes: list[str]) -> float:
        if np.isinf(relevance).any():
            notes.append("lds: infinite relevance has no sum")
            return UNDEFINED
        known = np.nan_to_num(relevance, nan=0.0)
        # exact sums of what is scaled by a power of two: rounding must not order what is equal
        known = np.ldexp(known, -int(np.frexp(np.abs(known).max())[1])).tolist()
        everything = range(len(known))
        stays = [
            math.fsum(known[i] for i in everything if i not in gone) for gone in self.ablations
        ]
        found = metrics.rank_correlation(stays, [self._removed[each] for each in self.ablations])
        if found.note:
            notes.append(f"lds: {found.note}")
        return found.value


def _probabilities(logprobs: Sequence[float]) -> list[float]:
    """Of log-probabilities."""
    return np.exp(logprobs).tolist()


def _count(share: float, size: int) -> int:
    """How many units a share is: all but none and all leave one and take one, if there are two."""
    count = round(share * size)
    return min(max(count, 1), size - 1) if 0 < share < 1 and size > 1 else count


def _halves(size: int, rng: random.Random) -> list[frozenset[int]]:
    """``ABLATIONS`` sets of half of the units, no two alike; fewer if there are no more."""
    half, found = size // 2, list[frozenset[int]]()
    while len(found) < min(ABLATIONS, math.comb(size, half)):
        drawn = frozenset(rng.sample(range(size), half))
        found += [] if drawn in found else [drawn]
    return found


def _place(value: float) -> tuple[bool, float]:
    """Where a relevance stands: the largest first, NaN last."""
    return (True, 0.0) if math.isnan(value) else (False, -value)


def _unusual(relevance: np.ndarray) -> list[str]:
    """What of some relevance makes its order less than it seems."""
    notes: list[str] = []
    size, known = len(relevance), relevance[~np.isnan(relevance)]
    if size == 1:
        notes.append("one unit")
    elif size < TOP:
        notes.append(f"top5_drop: {size} units")
    if missing := size - len(known):
        notes.append(f"{missing} NaN count as the lowest")
    _, times = np.unique(known, return_counts=True)
    tied = int(times[times > 1].sum()) + (missing if missing > 1 else 0)
    if tied > size / 10:
        notes.append(f"{tied} of {size} tied, in a drawn order")
    return notes
