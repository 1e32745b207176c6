"""Which perturbations an explanation runs: all of them, few, or cheaper ones.

======================  ==================================================================
``exact``               every unit's total effect: the paper's quantity
``direct``              every unit's direct effect, for the price of the target's tokens
``hybrid``              direct effects, then total ones of the units that promise most
``hierarchical``        total effects of the tokens in the best pieces; the rest stay pieces
``path``                shares in suppressing everything at once, from gradients on the way
``score_gradient``      the same from the gradient at the start alone: a poor estimate
======================  ==================================================================

Legend: U units, K targets, M scored tokens of all targets.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from .gradients import Attribution
from .perturbations import Effect as Measured
from .perturbations import Near, Record
from .perturbations import Unit as Perturbation
from .pieces import FINEST, Effect, Neighbour, Unit
from .units import Layout, TokenPlace, coarsest, divided

Method = Literal["exact", "direct", "hybrid", "hierarchical", "path", "score_gradient"]
METHODS: tuple[str, ...] = get_args(Method)
GRADIENT_METHODS = ("path", "score_gradient")

DEFAULT_BUDGET = {"hybrid": 0.2, "hierarchical": 0.25}
"""Exact runs of a method, as a share of those that ``exact`` would need."""

DEFAULT_STEPS = 8
"""Parts of the line of ``path``, in each of which it takes a gradient."""


class Measures(Protocol):
    """A prompt and its targets, of which any units can be suppressed; see ``engine.Engine``."""

    record: Record
    base_logprobs: Tensor
    rows: Sequence[range]

    @property
    def shares_prefix(self) -> bool:
        """Whether there are direct effects."""
        ...

    def perturb(self, units: Sequence[Perturbation], effect: Measured = "total") -> Tensor:
        """``[U, M]`` of all scored tokens, each unit suppressed in turn; NaN where it is late."""
        ...

    def neighbours(self, unit: Perturbation) -> list[Near]:
        """What is suppressed along with a unit."""
        ...

    def attribute(self, units: Sequence[Perturbation], steps: int | None) -> Attribution:
        """Scores from gradients on the line to suppressing all units together."""
        ...


@dataclass(frozen=True)
class Outcome:
    """Scored units, in text order.

    Args:
        units: ``U``, each with the effect that was measured.
        suppressed_logprobs: ``[M, U]`` float32, nats.
        coarse: What larger units gave, from which these were chosen.
        together_logprobs: ``[M]`` float32, nats, of gradient methods: all units suppressed.
    """

    units: list[Unit]
    suppressed_logprobs: Tensor
    coarse: Outcome | None = None
    together_logprobs: Tensor | None = None


def perturbation(unit: Unit) -> Perturbation:
    """What the engine suppresses for a unit."""
    return Perturbation(unit.tokens, unit.branch)


def measure(
    method: Method,
    engine: Measures,
    layout: Layout,
    budget: float | int | None,
    reduction: str,
    steps: int = DEFAULT_STEPS,
) -> Outcome:
    """Run what the method asks for.

    Args:
        engine: The prompt and its targets, base run done.
        layout: The units.
        budget: The most exact runs, a share of what ``exact`` needs or a count; None is the
            method's default.
        reduction: How scores go over target tokens where units are ranked.
        steps: Of ``path``, how many parts the line has.
    Raises: ValueError: if the budget is too small to begin with.
    """
    if method == "hybrid":
        return _hybrid(engine, layout, _runs(method, budget, len(layout.units)), reduction)
    if method == "hierarchical":
        return _hierarchical(engine, layout, _runs(method, budget, len(layout.tokens)), reduction)
    if method == "path":
        return _gradients(engine, layout.units, "path", steps)
    if method == "score_gradient":
        return _gradients(engine, layout.units, "gradient", None)
    return _all(engine, layout.units, "direct" if method == "direct" else "total")


def with_neighbours(
    outcome: Outcome, engine: Measures, places: Mapping[tuple[int | None, int], TokenPlace]
) -> Outcome:
    """The same units, each with the tokens that were suppressed along with it.

    Args:
        places: Where each token stands, by what the engine calls it: target (None in its prompt)
            and position.
    """
    known: dict[Near, Neighbour] = {}  # the same for many units where words come again

    def neighbour(near: Near) -> Neighbour:
        if near not in known:
            place = places[near.branch, near.position]
            start, stop = place.span or (None, None)
            known[near] = Neighbour(
                near.position, near.factor, near.similarity, start, stop, place.branch
            )
        return known[near]

    units = [
        replace(unit, neighbours=tuple(map(neighbour, engine.neighbours(perturbation(unit)))))
        for unit in outcome.units
    ]
    coarse = outcome.coarse and with_neighbours(outcome.coarse, engine, places)
    return replace(outcome, units=units, coarse=coarse)


def _all(engine: Measures, units: Sequence[Unit], effect: Literal["total", "direct"]) -> Outcome:
    found = engine.perturb([perturbation(unit) for unit in units], effect)
    return Outcome([replace(unit, effect=effect) for unit in units], found.T.contiguous())


def _gradients(
    engine: Measures, units: Sequence[Unit], effect: Effect, steps: int | None
) -> Outcome:
    found = engine.attribute([perturbation(unit) for unit in units], steps)
    logprobs = engine.base_logprobs[:, None] - found.scores.T
    own = [replace(unit, effect=effect) for unit in units]
    return Outcome(own, logprobs.contiguous(), together_logprobs=found.together)


def _hybrid(engine: Measures, layout: Layout, runs: int, reduction: str) -> Outcome:
    """Direct first; the units that stand first in some target's ranking are run exactly."""
    direct = _all(engine, layout.units, "direct")
    promise = _relevances(engine, direct, reduction)  # [K, U]
    order = promise.nan_to_num(-math.inf).argsort(dim=1, descending=True, stable=True)
    places = torch.empty_like(order)
    places.scatter_(1, order, torch.arange(order.shape[1]).expand_as(order))
    best = places.amin(0)  # its best rank in any target
    chosen = sorted(range(len(layout.units)), key=lambda u: (int(best[u]), u))[:runs]
    exact = _all(engine, [layout.units[u] for u in chosen], "total")
    units, scores = list(direct.units), direct.suppressed_logprobs.clone()
    for column, u in enumerate(chosen):
        units[u] = exact.units[column]
        scores[:, u] = exact.suppressed_logprobs[:, column]
    return Outcome(units, scores)


def _hierarchical(engine: Measures, layout: Layout, runs: int, reduction: str) -> Outcome:
    """Choose by the pieces' direct effects, and spend the exact runs on tokens of the best.

    Exact runs of the pieces themselves would take half of a small budget. Only where a model
    cannot share a prefix, and so has no direct effects, are the pieces chosen by total ones.
    """
    effect = "direct" if engine.shares_prefix else "total"
    price = 0 if effect == "direct" else 1  # exact runs for the score of a piece
    units = coarsest(layout)
    tokens = sum(unit.level in FINEST for unit in units)
    left = runs - tokens - price * (len(units) - tokens)
    if left < 0:
        raise ValueError(
            f"budget must allow at least {runs - left} runs for this input, got {runs}; raise it, "
            "or take method='direct'."
        )
    first = found = _all(engine, units, effect)
    opened: list[Unit] = []
    while (best := _next(engine, found, layout, left, price, reduction)) is not None:
        place, parts = best
        if parts[0].level in FINEST:
            left -= len(parts)
            opened += parts
            found = _replaced(found, [place])
        else:
            left -= price * len(parts)
            found = _replaced(found, [place], _all(engine, parts, effect))
    order = _order(engine, found, reduction)
    direct = [place for place in order if found.units[place].effect == "direct"]
    again = [place for place in direct if found.units[place].level in FINEST]
    again += [place for place in direct if found.units[place].level not in FINEST][:left]
    exact = _all(engine, opened + [found.units[place] for place in again], "total")
    result = _replaced(found, again, exact)
    return result if len(units) == tokens else replace(result, coarse=first)


def _next(
    engine: Measures, found: Outcome, layout: Layout, left: int, price: int, reduction: str
) -> tuple[int, list[Unit]] | None:
    """The best piece that can be divided with the runs that are left, and its parts.

    Once the tokens of a piece are too many for the runs, smaller ones after it still get a chance,
    but nothing larger is looked into.
    """
    short = False
    for place in _order(engine, found, reduction) if left else []:
        unit = found.units[place]
        if unit.level in FINEST or (short and len(unit.tokens) > left):
            continue
        parts = divided(unit, layout)
        if len(parts) * (1 if parts[0].level in FINEST else price) <= left:
            return place, parts
        short = True
    return None


def _order(engine: Measures, outcome: Outcome, reduction: str) -> list[int]:
    """Places of the units, the one first that is best for some target."""
    relevance = _relevances(engine, outcome, reduction).nan_to_num(-math.inf).amax(0)
    return relevance.argsort(descending=True, stable=True).tolist()


def _replaced(outcome: Outcome, places: Sequence[int], by: Outcome | None = None) -> Outcome:
    """Without the units at some places, and with others instead, in text order."""
    gone = set(places)
    kept = [place for place in range(len(outcome.units)) if place not in gone]
    units = [outcome.units[place] for place in kept]
    scores = outcome.suppressed_logprobs[:, kept]
    if by is not None:
        units += by.units
        scores = torch.cat([scores, by.suppressed_logprobs], 1)

    def position(column: int) -> tuple[int, int]:
        unit = units[column]
        return (-1 if unit.branch is None else unit.branch, unit.tokens[0])

    order = sorted(range(len(units)), key=position)
    return Outcome([units[column] for column in order], scores[:, order])


def _relevances(engine: Measures, outcome: Outcome, reduction: str) -> Tensor:
    """``[K, U]`` scores over each target's tokens; NaN where nothing was measured."""
    scores = (engine.base_logprobs[:, None] - outcome.suppressed_logprobs).double()
    reduce: Callable[..., Tensor] = torch.nanmean if reduction == "mean" else torch.nansum
    return torch.stack([reduce(scores[list(rows)], 0) for rows in engine.rows])


def _runs(method: Method, budget: float | int | None, units: int) -> int:
    """The budget as a number of runs, at least 1."""
    budget = DEFAULT_BUDGET[method] if budget is None else budget
    return min(units, budget) if isinstance(budget, int) else max(1, math.floor(budget * units))
