"""The numbers of an explanation as the page's script reads them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..pieces import Neighbour
from . import layout, wording

if TYPE_CHECKING:
    from ..explanation import Explanation

INFINITY = 1e30  # stands for an infinite number of nats
STEPS = 50_000  # of a packed row from 0 to its largest magnitude


NEIGHBOURS = 64  # of a unit on the page, the most manipulated ones


def neighbour_spans(explanations: Sequence[Explanation]) -> list[layout.Span]:
    """Where tokens stand that were suppressed along with some unit, each place once."""
    found = {
        (near.start, near.stop)
        for explanation in explanations
        for unit in explanation.units
        for near in _shown(unit.neighbours)
        if near.start is not None and near.stop is not None
    }
    return sorted(found)


def neighbour_tokens(explanations: Sequence[Explanation]) -> list[int]:
    """Tokens of pictures and sounds that were suppressed along with some unit, each once."""
    known = {token for explanation in explanations for token in wording.drawn_tokens(explanation)}
    found = {
        near.token
        for explanation in explanations
        for unit in explanation.units
        for near in _shown(unit.neighbours)
        if near.start is None
    }
    return sorted(found & known)


def pieces_of(
    explanations: Sequence[Explanation], pieces: list[list[list[int]]], tokens: list[int]
) -> list[list[int]]:
    """Of each token, the pieces of the page that are units of it alone."""
    found: dict[int, list[int]] = {token: [] for token in tokens}
    for index, piece in enumerate(pieces):
        for explanation, units in zip(explanations, piece, strict=True):
            for unit in units:
                positions = explanation.units[unit].tokens
                if len(positions) == 1 and positions[0] in found:
                    found[positions[0]].append(index)
    return list(found.values())


def _shown(neighbours: Sequence[Neighbour]) -> list[Neighbour]:
    return wording.by_weight(neighbours)[:NEIGHBOURS]


def numbers(
    explanation: Explanation, place: layout.Placed, near: Sequence[layout.Span | int]
) -> dict[str, Any]:
    """Text, spans and values: ``rows[0]`` is what is seen at first, then a row per target token.

    What is seen at first is read (postprocessed, reduced, scaled), target tokens' scores are as
    measured: the script reads them as is said under ``post``, ``reduction`` and ``scaled``. Parts
    of targets are given by their tokens. Neighbours refer to places in ``near``, which are spans of
    the text, and tokens that have none.

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
    data |= {
        "scale": _scale(replace(explanation, contrast=False)),
        "post": explanation.postprocessing,
        "scaled": explanation.normalize,
        "reduction": explanation.reduction,
        "noun": wording.noun(explanation).whole,
        "word": wording.base_word(explanation),
    }
    drawn = {
        index: wording.place_name(explanation, index)
        for index, unit in enumerate(explanation.units)
        if layout.drawn(unit)
    }
    if drawn:
        data["drawn"] = drawn
    if explanation.contrast:
        data["contrast"] = _scale(explanation)
        data["names"] = [wording.name_of(answer) for answer in explanation.answers]
    if len(explanation.parts) > len(explanation.target_stops):
        data["parts"] = [
            {"text": layout.visible(part.text), "rows": part.rows, "branch": part.branch}
            for part in explanation.parts
        ]
    if explanation.documents:
        data["documents"] = [layout.visible(document.id) for document in explanation.documents]
        data["document"] = [unit.document for unit in explanation.units]
    if any(unit.neighbours for unit in explanation.units):
        names = wording.drawn_tokens(explanation)
        places: dict[Any, int] = {where: index for index, where in enumerate(near)}
        data["neighbours"] = [
            {
                "count": len(unit.neighbours),
                "shown": [
                    [
                        places.get(_where(each), -1),
                        wording.neighbour_text(explanation, each, names),
                        float(f"{each.factor:.4g}"),
                        float(f"{each.similarity:.4g}"),
                    ]
                    for each in _shown(unit.neighbours)
                ],
            }
            for unit in explanation.units
        ]
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
        "rows": [seen, *packed],
    }


def _where(neighbour: Neighbour) -> Any:
    return neighbour.token if neighbour.start is None else (neighbour.start, neighbour.stop)


def _scale(explanation: Explanation) -> dict[str, Any]:
    return asdict(wording.scale(explanation)) | {"titles": wording.titles(explanation)}


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
