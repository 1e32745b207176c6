"""Which perturbations an explanation runs: all of them, few, or cheaper ones.

======================  =================================================================
``exact``               every unit's total effect: the paper's quantity
``direct``              every unit's direct effect, for the price of the target's tokens
``hybrid``              direct effects, then total ones of the units that promise most
``hierarchical``        total effects of large pieces, then of what the best are made of
======================  =================================================================

Legend: U units, K targets, M scored tokens of all targets.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from .engine import Engine
from .engine import Unit as Perturbation
from .pieces import Effect, Unit
from .units import Layout, coarsest, divided

Method = Literal["exact", "direct", "hybrid", "hierarchical"]
METHODS: tuple[str, ...] = get_args(Method)

DEFAULT_BUDGET = {"hybrid": 0.2, "hierarchical": 0.25}
"""Exact runs of a method, as a share of those that ``exact`` would need."""


@dataclass(frozen=True)
class Outcome:
    """Scored units, in text order.

    Args:
        units: ``U``, each with the effect that was measured.
        suppressed_logprobs: ``[M, U]`` float32, nats.
        coarse: What larger units gave, from which these were chosen.
    """

    units: list[Unit]
    suppressed_logprobs: Tensor
    coarse: Outcome | None = None


def measure(
    method: Method, engine: Engine, layout: Layout, budget: float | int | None, reduction: str
) -> Outcome:
    """Run what the method asks for.

    Args:
        engine: The prompt and its targets, base run done.
        layout: The units.
        budget: The most exact runs, a share of what ``exact`` needs or a count; None is the
            method's default.
        reduction: How scores go over target tokens where units are ranked.
    Raises: ValueError: if the budget is too small to begin with.
    """
    if method == "hybrid":
        return _hybrid(engine, layout, _runs(method, budget, len(layout.units)), reduction)
    if method == "hierarchical":
        return _hierarchical(engine, layout, _runs(method, budget, len(layout.tokens)), reduction)
    return _all(engine, layout.units, "direct" if method == "direct" else "total")


def _all(engine: Engine, units: Sequence[Unit], effect: Effect) -> Outcome:
    perturbations = [Perturbation(unit.tokens, unit.branch) for unit in units]
    found = engine.perturb(perturbations, effect)
    return Outcome([replace(unit, effect=effect) for unit in units], found.T.contiguous())


def _hybrid(engine: Engine, layout: Layout, runs: int, reduction: str) -> Outcome:
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


def _hierarchical(engine: Engine, layout: Layout, runs: int, reduction: str) -> Outcome:
    """Divide the best unit, over and over, as long as there are runs left for its parts."""
    units = coarsest(layout)
    if len(units) > runs:
        raise ValueError(
            f"budget must allow at least {len(units)} runs, one for each of the largest pieces of "
            f"this input, got {runs}; raise it, or take method='direct'."
        )
    first = outcome = _all(engine, units, "total")
    left = runs - len(units)
    while (best := _next(engine, outcome, layout, left, reduction)) is not None:
        place, parts = best
        left -= len(parts)
        outcome = _refined(outcome, place, _all(engine, parts, "total"))
    return outcome if outcome is first else replace(outcome, coarse=first)


def _next(
    engine: Engine, outcome: Outcome, layout: Layout, left: int, reduction: str
) -> tuple[int, list[Unit]] | None:
    """The best unit that can be divided with the runs that are left, and its parts."""
    relevance = _relevances(engine, outcome, reduction).nan_to_num(-math.inf).amax(0)
    for place in relevance.argsort(descending=True, stable=True).tolist():
        unit = outcome.units[place]
        if unit.level == "token":
            continue
        parts = divided(unit, layout)
        if 1 < len(parts) <= left:
            return place, parts
    return None


def _refined(outcome: Outcome, place: int, parts: Outcome) -> Outcome:
    """One unit replaced by its parts."""
    columns = outcome.suppressed_logprobs
    return Outcome(
        [*outcome.units[:place], *parts.units, *outcome.units[place + 1 :]],
        torch.cat([columns[:, :place], parts.suppressed_logprobs, columns[:, place + 1 :]], 1),
    )


def _relevances(engine: Engine, outcome: Outcome, reduction: str) -> Tensor:
    """``[K, U]`` scores over each target's tokens; NaN where nothing was measured."""
    scores = (engine.base_logprobs[:, None] - outcome.suppressed_logprobs).double()
    reduce: Callable[..., Tensor] = torch.nanmean if reduction == "mean" else torch.nansum
    return torch.stack([reduce(scores[list(rows)], 0) for rows in engine.rows])


def _runs(method: Method, budget: float | int | None, units: int) -> int:
    """The budget as a number of runs."""
    budget = DEFAULT_BUDGET[method] if budget is None else budget
    return min(units, budget) if isinstance(budget, int) else math.ceil(budget * units)
