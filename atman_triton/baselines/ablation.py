"""Baselines that take something away and look, one unit at a time.

Legend: U units, M scored tokens, T of one target, S tokens that are read.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .case import Case
from .methods import Options


def random(case: Case, options: Options) -> Tensor:
    """``[U, M]``: numbers that mean nothing, evenly in [0, 1)."""
    drawn = torch.Generator().manual_seed(options.seed)
    numbers = torch.rand(len(case.units), len(case.base_logprobs), generator=drawn)
    return numbers.double().masked_fill(~case.measured, torch.nan)
