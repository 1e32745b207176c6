"""The names of the baselines, what each is, and where it lives."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from .case import Case, Output


@dataclass(frozen=True)
class Options:
    """Settings of a baseline; each takes those that its ``Method`` names.

    Args:
        budget: The most forward passes that a sampling method may spend; None is what
            ``sampling`` says.
        steps: Steps of a path.
        layer: A decoder layer, counted from 0; -1 is the last.
        seed: Of what is drawn.
        output: What of a target token is differentiated.
        superpixels: Along each side of a picture, what a sampling method takes away together; 0:
            every unit by itself.
    """

    budget: int | None = None
    steps: int = 32
    layer: int = -1
    seed: int = 0
    output: Output = "logit"
    superpixels: int = 6


Rate = Callable[[Case, Options], Tensor]
"""Scores of a case, ``[U, M]`` float64; NaN where ``Case.measured`` is false."""


_SAMPLING = ("budget", "superpixels", "seed")


@dataclass(frozen=True)
class Method:
    """A baseline.

    Args:
        module: Where it lives, in this package.
        function: Its ``Rate``.
        source: Who came up with it.
        options: Which of ``Options`` it takes.
        of: What its scores are made of.
    """

    module: str
    function: str
    source: str
    options: tuple[str, ...] = ()
    of: str = "gradients"

    def load(self) -> Rate:
        """The function, and with it the libraries that it needs."""
        return getattr(importlib.import_module(f"{__package__}.{self.module}"), self.function)


BASELINES: dict[str, Method] = {
    "input_x_gradient": Method(
        "gradient", "input_x_gradient", "Shrikumar et al. 2016", ("output",)
    ),
    "integrated_gradients": Method(
        "gradient", "integrated_gradients", "Sundararajan et al. 2017", ("steps", "output")
    ),
    "grad_cam": Method("gradient", "grad_cam", "Selvaraju et al. 2017", ("layer", "output")),
    "attn_lrp": Method("attn_lrp", "attn_lrp", "Achtibat et al. 2024", ("output",)),
    "chefer": Method(
        "attention",
        "chefer",
        "Chefer et al. 2021",
        ("output",),
        "attention weights, their gradients",
    ),
    "rollout": Method("attention", "rollout", "Abnar and Zuidema 2020", (), "attention weights"),
    "last_attention": Method(
        "attention", "last_attention", "Jain and Wallace 2019", (), "attention weights"
    ),
    "leave_one_out": Method("ablation", "leave_one_out", "Li et al. 2016", (), "removed units"),
    "occlusion": Method(
        "ablation", "occlusion", "Zeiler and Fergus 2014", (), "embeddings replaced by their mean"
    ),
    "lime": Method("sampling", "lime", "Ribeiro et al. 2016", _SAMPLING, "removed units"),
    "kernel_shap": Method(
        "sampling", "kernel_shap", "Lundberg and Lee 2017", _SAMPLING, "removed units"
    ),
    "context_cite": Method(
        "sampling", "context_cite", "Cohen-Wang et al. 2024", _SAMPLING, "removed units"
    ),
    "random": Method("ablation", "random", "the floor of every comparison", ("seed",), "chance"),
}
