"""Perturbation explanations, steering and training with per-key attention factors (AtMan)."""

from .attention import attention

__all__ = ["attention"]
