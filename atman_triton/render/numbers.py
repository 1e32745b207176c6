"""The numbers of an explanation as the page's script reads them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from torch import Tensor

from . import layout

if TYPE_CHECKING:
    from ..explanation import Explanation

INFINITY = 1e30  # stands for an infinite number of nats
STEPS = 50_000  # of a packed row from 0 to its largest magnitude


def numbers(explanation: Explanation, place: layout.Placed) -> dict[str, Any]:
    """Text, spans and values: ``rows[0]`` is what is seen at first, then a row per target token.

    Of several targets, whose table is large and mostly empty, a token's row holds whole numbers
    of steps for the prompt's units and those of its own target.
    """
    data: dict[str, Any] = {
        "text": place.text,
        "units": place.units,
        "targets": [layout.visible(target.text) for target in explanation.targets],
        "base": _row(explanation.base_logprobs.tolist()),
        "effect": explanation.effect,
    }
    if explanation.effect == "mixed":
        data["direct"] = [i for i, unit in enumerate(explanation.units) if unit.effect == "direct"]
    if any(unit.level != "token" for unit in explanation.units):
        data["levels"] = [unit.level for unit in explanation.units]
    seen, scores = _row(layout.in_sight(explanation)), explanation.scores
    if not layout.several(explanation):
        return data | {"rows": [seen, *(_row(row) for row in scores.tolist())]}
    owners = [-1 if unit.branch is None else unit.branch for unit in explanation.units]
    own = [
        [unit for unit, owner in enumerate(owners) if owner in (-1, branch)]
        for branch in range(len(explanation.target_stops))
    ]
    packed = _packed(scores, [own[target.branch] for target in explanation.targets])
    return data | {
        "stops": [explanation.prompt_stop, *explanation.target_stops],
        "owner": owners,
        "branch": [target.branch for target in explanation.targets],
        "reduction": explanation.reduction,
        "rows": [seen, *packed],
    }


def _row(values: list[float]) -> list[float | None]:
    return [
        None if math.isnan(value) else float(f"{max(-INFINITY, min(INFINITY, value)):.5g}")
        for value in values
    ]


def _packed(scores: Tensor, columns: list[list[int]]) -> list[dict[str, Any]]:
    """Every row's columns as whole numbers of steps; infinities are ``+`` and ``-``, NaN None."""
    known = scores.where(scores.isfinite(), 0.0)
    step = known.abs().amax(1) / STEPS
    step = step.where(step > 0, 1.0)
    steps = (known / step[:, None]).round().int()
    special = {2 * STEPS: None, 3 * STEPS: "+", -3 * STEPS: "-"}  # beyond what a step count can be
    steps[scores.isnan()] = 2 * STEPS
    steps[scores.isposinf()] = 3 * STEPS
    steps[scores.isneginf()] = -3 * STEPS
    return [
        {"step": float(f"{size:.7g}"), "steps": [special.get(row[unit], row[unit]) for unit in own]}
        for size, row, own in zip(step.tolist(), steps.tolist(), columns, strict=True)
    ]
