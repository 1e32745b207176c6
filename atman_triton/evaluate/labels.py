"""Where the label of an example stands among the units of an explanation.

Legend: U units of an explanation, R of them that are rated, H and W rows and columns of a grid.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..chat import Span
from ..explanation import Explanation
from ..images.pointing import coverage
from ..pieces import Box, Unit
from .examples import Example

RASTER = 12
"""Cells along each side where the units of a picture form no grid; the paper's masks have 12×12."""

_COVERED = 0.5  # of a patch, for it to bear the label
_SAME = 1e-6  # pixels, and shares of a patch


class Labelled(NamedTuple):
    """The units that are rated, and which of them bear the label.

    Args:
        units: ``R`` indices into ``Explanation.units``, ascending.
        values: ``[R]`` float32, 1 for a unit that bears the label and 0 for another.
        notes: What could not be done as usual.
    """

    units: list[int]
    values: Tensor
    notes: list[str]


def rated(explanation: Explanation, example: Example) -> list[int]:
    """Units whose relevance is compared with the label: ``R`` indices, ascending.

    Of text, units of the prompt that overlap the example's region with more than whitespace. A
    unit that reaches out of the region, as a sentence may where the context does not end like one,
    counts as a whole; with ``explain_only=example.region`` there is none. Of a picture, units
    that have a place on it.

    Args:
        explanation: Of the example's prompt.
        example: A text with a region, or a picture with a mask.
    Raises: ValueError: if there is no such unit.
    """
    if example.is_picture:
        found = [i for i, unit in enumerate(explanation.units) if unit.image == 0 and unit.boxes]
        what = "no unit has a place on the picture"
    else:
        region = _region(example)
        found = [
            i
            for i, unit in enumerate(explanation.units)
            if _overlaps(explanation.text, unit, region)
        ]
        what = f"no unit stands in the region {region[0]}:{region[1]}"
    if not found:
        raise ValueError(
            f"explanation must be one of the prompt of {example.id!r} with units there, but {what}."
        )
    return found


def labelled(explanation: Explanation, example: Example) -> Labelled:
    """The rated units and their labels.

    Of text, a unit bears the label if it overlaps one of the example's label spans with more than
    whitespace. Of a picture, if at least half of its area lies on the mask; where that is true of
    none, the unit that the mask covers most, and all that it covers equally.

    Raises: ValueError: if no unit is rated, or a box reaches out of the mask.
    """
    units = rated(explanation, example)
    own = [explanation.units[index] for index in units]
    if example.mask is None:
        text = explanation.text
        bears = [any(_overlaps(text, unit, span) for span in example.labels) for unit in own]
        values = torch.tensor(bears, dtype=torch.float32)
        notes = [] if any(bears) else ["no label: no rated unit overlaps the label"]
        return Labelled(units, values, notes)
    shares = coverage(own, torch.from_numpy(example.mask))
    most = float(shares.max())
    if most >= _COVERED - _SAME:
        return Labelled(units, (shares >= _COVERED - _SAME).float(), [])
    if most <= _SAME:
        return Labelled(units, torch.zeros(len(units)), ["no label: the mask covers no unit"])
    best = (shares >= most - _SAME).float()
    count = int(best.sum())
    which = "the most covered is" if count == 1 else f"the {count} that are covered equally are"
    return Labelled(units, best, [f"no unit is covered by half: {which} the label"])


def label(explanation: Explanation, example: Example) -> Tensor:
    """``[R]`` float32, the ``values`` of :func:`labelled`."""
    return labelled(explanation, example).values


def grid(explanation: Explanation, example: Example, values: Tensor) -> Tensor:
    """Values of the rated units as a picture.

    Where the units are the cells of a grid, each once, a value each in that grid's rows and
    columns: 12×12 for the patches of the shipped model. Where they overlap, or are of several
    sizes, as those of models that read a picture twice, the mean at every cell of 12×12, units
    weighted by the area of the cell that they cover.

    Args:
        explanation: Of a picture.
        example: The same.
        values: ``[R]``, of the units of :func:`rated`; NaN counts as absent.
    Returns: ``[H, W]`` float32, from the top left; NaN where there is no value.
    Raises: ValueError: if the example is no picture, or there is another number of values.
    """
    if example.mask is None:
        raise ValueError(f"example must be a picture, but {example.id!r} has no mask.")
    units = [explanation.units[index] for index in rated(explanation, example)]
    if values.shape != (len(units),):
        raise ValueError(
            f"values must have shape [{len(units)}], one for each rated unit, got "
            f"{list(values.shape)}."
        )
    values = values.detach().float().cpu()
    cells = _cells(tuple(unit.boxes for unit in units))
    if cells is None:
        return _raster(units, values, *example.mask.shape)
    rows, columns = torch.tensor(cells).T
    found = torch.full((1 + int(rows.max()), 1 + int(columns.max())), torch.nan)
    found[rows, columns] = values
    return found


def _region(example: Example) -> Span:
    if example.region is None:
        raise ValueError(f"example must have a region or a mask, but {example.id!r} has neither.")
    return example.region


def _overlaps(text: str, unit: Unit, span: Span) -> bool:
    """Whether a unit and a passage share a character that is no whitespace."""
    if unit.start is None or unit.stop is None:
        return False
    return bool(text[max(unit.start, span[0]) : min(unit.stop, span[1])].strip())


@lru_cache(maxsize=8)  # asked for every reading of every method
def _cells(boxes: tuple[tuple[Box, ...], ...]) -> list[tuple[int, int]] | None:
    """The row and column of every unit; None if they do not form a grid."""
    if any(len(own) != 1 for own in boxes):
        return None
    single = [own[0] for own in boxes]
    lefts, tops = _edges([box[0] for box in single]), _edges([box[1] for box in single])
    cells = [(_place(tops, box[1]), _place(lefts, box[0])) for box in single]
    whole = len(set(cells)) == len(cells) == len(lefts) * len(tops)
    apart = all(
        (column + 1 == len(lefts) or box[0] + box[2] <= lefts[column + 1] + _SAME)
        and (row + 1 == len(tops) or box[1] + box[3] <= tops[row + 1] + _SAME)
        for (row, column), box in zip(cells, single, strict=True)
    )
    return cells if whole and apart else None


def _edges(starts: list[float]) -> list[float]:
    """Different ones, ascending."""
    found: list[float] = []
    for start in sorted(starts):
        if not found or start > found[-1] + _SAME:
            found.append(start)
    return found


def _place(edges: list[float], start: float) -> int:
    return min(range(len(edges)), key=lambda index: abs(edges[index] - start))


def _raster(units: list[Unit], values: Tensor, height: int, width: int) -> Tensor:
    """The mean of the units that cover each cell of 12×12, weighted by the area that they cover."""
    total = torch.zeros(RASTER, RASTER, dtype=torch.float64)
    weight = torch.zeros_like(total)
    for unit, value in zip(units, values.double(), strict=True):
        for left, top, wide, high in unit.boxes:
            if not torch.isnan(value):
                rows = _shared(top, high, height / RASTER)
                area = rows[:, None] * _shared(left, wide, width / RASTER)
                total += value * area
                weight += area
    return torch.where(weight > 0, total / weight, torch.nan).float()


def _shared(start: float, length: float, step: float) -> Tensor:
    """How much of each cell along an edge a stretch covers, ``[12]`` pixels."""
    first = torch.arange(RASTER, dtype=torch.float64) * step
    stop = torch.clamp(first + step, max=start + length)
    return (stop - torch.clamp(first, min=start)).clamp(min=0)
