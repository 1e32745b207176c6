"""From scores to relevance: what is done to each score, how scores are reduced and scaled.

Legend: T target tokens, U units, G groups of target tokens (whole targets, or parts of them).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Reduction = Literal["mean", "sum"]
Postprocessing = Literal["none", "absolute", "square"]
Quantity = Literal["logprob", "logit", "output"]


def postprocessed(values: Tensor, how: Postprocessing) -> Tensor:
    """Every value as it is, its magnitude, or its square; NaN stays NaN."""
    return {"none": values, "absolute": values.abs(), "square": values.square()}[how]


def reduced(scores: Tensor, groups: Sequence[int], count: int, reduction: Reduction) -> Tensor:
    """``[G, U]`` float64: the scores of each group of rows, averaged or summed.

    Args:
        scores: ``[T, U]``; NaN counts as absent, and where all are, the result is NaN.
        groups: ``[T]``, the group of each row.
        count: ``G``.
        reduction: ``mean`` (Eq. 3) or ``sum`` (Eq. 2).
    Source: AtMan, Eq. 2 and 3.
    """
    measured = ~scores.isnan()
    index = torch.tensor(groups)
    total = torch.zeros((count, scores.shape[1]), dtype=torch.float64)
    total.index_add_(0, index, scores.double().where(measured, 0.0))
    seen = torch.zeros_like(total).index_add_(0, index, measured.double())
    result = total / seen if reduction == "mean" else total
    return result.where(seen > 0, torch.nan)


def normalized(values: Tensor) -> Tensor:
    """Each row moved and scaled so that its smallest value is 0 and its largest 1.

    NaN stays NaN. Where all are alike, all are 0. Infinities become 0 or 1, and the finite values
    are scaled among themselves.
    """
    finite = values.isfinite()
    low = values.where(finite, torch.inf).amin(-1, keepdim=True)
    high = values.where(finite, -torch.inf).amax(-1, keepdim=True)
    # Halves, as the distance of two large numbers may be infinite.
    size = high / 2 - low / 2
    scaled = ((values / 2 - low / 2) / size).where(size > 0, 0.0).clamp(0, 1)
    ends = values.sign().clamp(0, 1)
    return scaled.where(finite, ends).where(~values.isnan(), torch.nan)
