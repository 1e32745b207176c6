"""The paper's own numbers, to stand in a column of their own: percent, on its 6B model.

Source: AtMan (NeurIPS 2023), Table 1: (a) SQuAD, (b) OpenImages, (c) other models on the latter.
"""

from __future__ import annotations

NOTE = "the paper's, on its 6B model"

_METRICS = ("mAP", "mAP_IQ", "mAR", "mAR_IQ")


def _column(*numbers: float) -> dict[str, float]:
    return dict(zip(_METRICS, numbers, strict=True))


SQUAD = {
    "integrated_gradients": _column(49.5, 49.5, 87.1, 98.6),
    "input_x_gradient": _column(51.7, 61.4, 91.8, 100.0),
    "chefer": _column(72.7, 77.5, 96.6, 100.0),
    "atman": _column(73.7, 81.8, 93.4, 100.0),
}
"""Method -> metric -> percent."""

OPEN_IMAGES = {
    "grad_cam": _column(55.2, 54.3, 4.2, 3.8),
    "input_x_gradient": _column(59.1, 59.0, 10.8, 10.2),
    "integrated_gradients": _column(60.5, 60.6, 10.7, 10.0),
    "chefer": _column(58.3, 57.8, 11.7, 11.1),
    "atman": _column(65.5, 70.2, 15.7, 19.7),
}
"""The same of pictures."""

OTHER_MODELS = {
    "13B": _column(64.8, 65.6, 14.6, 16.7),
    "30B": _column(63.6, 65.1, 13.6, 15.6),
    "BLIP": _column(64.6, 66.1, 26.4, 28.4),
}
"""AtMan on OpenImages with other models."""
