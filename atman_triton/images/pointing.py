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
    height, width = mask.shape
    inside = whole = 0.0
    for left, top, wide, high in unit.boxes:
        if left + wide > width + 0.5 or top + high > height + 0.5:
            raise ValueError(
                f"mask must have the size of the picture, but {unit.text} ends outside of "
                f"{width}×{height} pixels."
            )
        rows, columns = _overlap(top, high, height), _overlap(left, wide, width)
        inside += float(rows @ mask.double() @ columns)
        whole += wide * high
    return inside / whole


def _overlap(start: float, length: float, pixels: int) -> Tensor:
    """How much of each pixel along an edge a stretch covers, ``[pixels]`` from 0 to 1."""
    first = torch.arange(pixels, dtype=torch.float64)
    return (torch.clamp(first + 1, max=start + length) - torch.clamp(first, min=start)).clamp(min=0)
