"""Ways to read one relevance per unit out of an explanation's scores."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from ..explanation import Explanation
from ..reduction import Postprocessing, Reduction

READINGS: dict[str, tuple[Postprocessing, Reduction]] = {
    "signed mean": ("none", "mean"),
    "signed sum": ("none", "sum"),
    "absolute mean": ("absolute", "mean"),
    "absolute sum": ("absolute", "sum"),
    "squared mean": ("square", "mean"),
    "squared sum": ("square", "sum"),
}
"""By name: what is done to every score, and how scores go over target tokens.

``squared sum`` is how the authors' released evaluation reads them.
"""


def read(explanation: Explanation, reading: str) -> Tensor:
    """``[U]`` float32: the relevance of every unit; NaN where none was measured.

    Raises: KeyError: if there is no such reading.
    """
    postprocessing, reduction = READINGS[reading]
    return replace(
        explanation, postprocessing=postprocessing, reduction=reduction, coarse=None
    ).relevance
