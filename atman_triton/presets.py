"""Settings that belong together, under one name."""

from __future__ import annotations

from dataclasses import dataclass

from .granularity import Named
from .methods import Method
from .reduction import Postprocessing
from .suppression import Rule


@dataclass(frozen=True)
class Preset:
    """What ``Explainer`` and ``explain`` take where nothing else is said.

    Args:
        mode: How scores are manipulated.
        factor: What a suppressed token's scores are manipulated with.
        method: Which perturbations are run.
        threshold: κ of correlated suppression, once it is asked for.
        correlated: Whether it is, without being asked for.
        rule: What similar tokens are suppressed with.
        postprocessing: What is done to every score before the reduction over target tokens.
        granularity: What one unit is.
    """

    mode: str
    factor: float
    method: Method
    threshold: float = 0.6
    correlated: bool = False
    rule: Rule = "released"
    postprocessing: Postprocessing = "none"
    granularity: Named = "token"


PRESETS = {
    # chosen by `python -m bench.budget`: no gap larger, and none for fewer forward passes
    "default": Preset(mode="min_shift", factor=0.1, method="direct"),
    # as in the paper
    "paper": Preset(mode="multiplicative", factor=0.1, method="exact", threshold=0.7, rule="paper"),
    # as the authors' released code does, made causal
    "released": Preset(
        mode="min_shift", factor=0.1, method="exact", correlated=True, postprocessing="square"
    ),
    # as their later product does
    "aleph_alpha": Preset(mode="log_additive", factor=0.1, method="exact", granularity="auto"),
}
