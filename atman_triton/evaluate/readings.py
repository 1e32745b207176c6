"""Ways to read one relevance per unit out of an explanation's scores."""

from __future__ import annotations

from torch import Tensor

from ..explanation import Explanation
from ..reduction import Postprocessing, Reduction, postprocessed, reduced

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
    """``[U]`` float32: the relevance of every unit, which one target is explained by.

    NaN where none was measured.

    Raises:
        KeyError: if there is no such reading.
        ValueError: if several targets were explained.
    """
    if len(explanation.target_stops) > 1:
        raise ValueError(
            f"explanation must be of one target, got {len(explanation.target_stops)}; take "
            "explanation.branch(k)."
        )
    how, reduction = READINGS[reading]
    scores = postprocessed(explanation.scores.double(), how)
    return reduced(scores, [0] * len(scores), 1, reduction)[0].float()
