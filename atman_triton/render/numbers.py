"""The numbers of an explanation as the page's script reads them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
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
    owners = torch.tensor(
        [-1 if unit.branch is None else unit.branch for unit in explanation.units]
    )
    own = [
        ((owners < 0) | (owners == branch)).nonzero()[:, 0]
        for branch in range(len(explanation.target_stops))
    ]
    packed = [
        _packed(row[own[target.branch]])
        for row, target in zip(scores, explanation.targets, strict=True)
    ]
    return data | {
        "stops": [explanation.prompt_stop, *explanation.target_stops],
        "owner": owners.tolist(),
        "branch": [target.branch for target in explanation.targets],
        "reduction": explanation.reduction,
        "rows": [seen, *packed],
    }


def _row(values: list[float]) -> list[float | None]:
    return [
        None if math.isnan(value) else float(f"{max(-INFINITY, min(INFINITY, value)):.5g}")
        for value in values
    ]


def _packed(values: Tensor) -> dict[str, Any]:
    """Whole numbers of steps; infinities are the strings ``+`` and ``-``, NaN is None."""
    finite = values.isfinite()
    peak = float(values[finite].abs().max()) if bool(finite.any()) else 0.0
    step = float(f"{peak / STEPS:.7g}") or 1.0
    steps: list[Any] = (values.double() / step).where(finite, 0.0).round().long().tolist()
    for index in (~finite).nonzero()[:, 0].tolist():
        value = float(values[index])
        steps[index] = None if math.isnan(value) else "+" if value > 0 else "-"
    return {"step": step, "steps": steps}
