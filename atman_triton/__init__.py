"""Perturbation explanations, steering and training with per-key attention factors (AtMan)."""

from ._version import __version__
from .attention import attention
from .backend_choice import BackendChoice, explain_backend
from .controls import ImageControl, TextControl, TokenControl
from .explain import Explainer
from .explanation import Explanation, load
from .granularity import Delimiter, Images, Seconds, Spans, Tiles, TokenSpans
from .integration import UnsupportedModelError, manipulate
from .live import LiveToken, generate_explained
from .steer import steer

__all__ = [
    "BackendChoice",
    "Delimiter",
    "Explainer",
    "Explanation",
    "ImageControl",
    "Images",
    "LiveToken",
    "Seconds",
    "Spans",
    "TextControl",
    "Tiles",
    "TokenControl",
    "TokenSpans",
    "UnsupportedModelError",
    "__version__",
    "attention",
    "explain_backend",
    "generate_explained",
    "load",
    "manipulate",
    "steer",
]
