"""Perturbation explanations, steering and training with per-key attention factors (AtMan)."""

from ._version import __version__
from .attention import attention
from .explain import Explainer
from .explanation import Explanation, load
from .integration import UnsupportedModelError, manipulate

__all__ = [
    "Explainer",
    "Explanation",
    "UnsupportedModelError",
    "__version__",
    "attention",
    "load",
    "manipulate",
]
