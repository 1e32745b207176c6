"""Shared test set-up: without a GPU the kernels run under Triton's interpreter."""

import importlib.util
import os

import torch
from hopper_gated import hopper_gate_first
from hypothesis.internal.conjecture import providers
from hypothesis.internal.constants_ast import Constants

__all__ = ["hopper_gate_first"]  # an autouse fixture

if not torch.cuda.is_available():
    # Read by triton when a kernel is defined, so it must precede every import of our kernels.
    os.environ.setdefault("TRITON_INTERPRET", "1")
    if importlib.util.find_spec("triton") is not None:
        from interpreter import quicken

        quicken()

torch.set_num_threads(1)

# hypothesis also draws constants of whichever of our modules a worker has imported so far, so that
# derandomized tests would see other draws in other runs.
if hasattr(providers, "_get_local_constants"):
    providers._get_local_constants = Constants
