"""How much of an explanation's relevance stands on one part of a picture.

Legend: U units, H and W height and width of a picture in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..pieces import Unit


def share_inside(units: Sequence[Unit], values: Tensor, mask: Tensor, image: int = 0) -> float:
    """The share of the positive relevance on a picture that stands inside of a mask.

    A unit's relevance is spread evenly over its boxes; units without a place take no part.

    Args:
        units: Of an explanation, U.
        values: ``[U]``, the relevance of each.
        mask: ``[H, W]`` bool, at the size of the picture as it was given.
        image: Which picture.
    Returns: from 0 to 1; NaN where no unit of the picture has positive relevance.
    Raises: ValueError: if a box lies outside of the mask.
    """
    inside = whole = 0.0
    for unit, value in zip(units, values.tolist(), strict=True):
        if unit.image == image and unit.boxes and value > 0:
            inside += value * covered(unit, mask)
            whole += value
    return inside / whole if whole else float("nan")


def covered(unit: Unit, mask: Tensor) -> float:
    """Which share of a unit's boxes lies inside of a mask ``[H, W]``."""
    return float(coverage([unit], mask)[0])


def coverage(units: Sequence[Unit], mask: Tensor) -> Tensor:
    """Which share of the boxes of each unit lies inside of a mask.

    Args:
        units: U, each with a box at least.
        mask: ``[H, W]`` bool, at the size of the picture as it was given.
    Returns: ``[U]`` float64, from 0 to 1.
    Raises: ValueError: if a box lies outside of the mask.
    """
    height, width = mask.shape
    for unit in units:
        for left, top, wide, high in unit.boxes:
            if left + wide > width + 0.5 or top + high > height + 0.5:
                raise ValueError(
                    f"mask must have the size of the picture, but {unit.text} ends outside of "
                    f"{width}×{height} pixels."
                )
    boxes = torch.tensor([box for unit in units for box in unit.boxes], dtype=torch.float64)
    left, top, wide, high = boxes.T
    rows, columns = _overlap(top, high, height), _overlap(left, wide, width)
    owner = torch.tensor([index for index, unit in enumerate(units) for _ in unit.boxes])
    found = torch.zeros(2, len(units), dtype=torch.float64)
    found[0].index_add_(0, owner, (rows @ mask.double() * columns).sum(1))
    found[1].index_add_(0, owner, wide * high)
    return found[0] / found[1]


def _overlap(start: Tensor, length: Tensor, pixels: int) -> Tensor:
    """How much of each pixel along an edge some stretches cover, ``[boxes, pixels]`` 0 to 1."""
    first = torch.arange(pixels, dtype=torch.float64)
    stop = torch.clamp(first + 1, max=(start + length)[:, None])
    return (stop - torch.clamp(first, min=start[:, None])).clamp(min=0)
