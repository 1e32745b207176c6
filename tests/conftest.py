"""Shared test set-up: without a GPU the kernels run under Triton's interpreter."""

import importlib.util
import os

import torch

if not torch.cuda.is_available():
    # Read by triton when a kernel is defined, so it must precede every import of our kernels.
    os.environ.setdefault("TRITON_INTERPRET", "1")
    if importlib.util.find_spec("triton") is not None:
        from interpreter import quicken

        quicken()

torch.set_num_threads(1)
