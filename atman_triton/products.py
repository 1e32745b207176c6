"""Products of ``nn.Linear`` by oneDNN, on processors of which MKL leaves half of the units idle.

PyTorch has MKL compute them in float32, and MKL takes instructions of 256 bits on AMD's processors,
also on those that have 512. oneDNN, which comes with PyTorch as well, takes all of them: a large
product takes half of the time on an EPYC, an explanation three quarters (``bench.products``).
"""

from __future__ import annotations

import platform
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

BLOCKS = (1024, 128)
"""Rows that oneDNN is given at a time; calls with fewer stay MKL's."""

_entered = threading.local()


@contextmanager
def fast_products(model: nn.Module | None = None) -> Iterator[None]:
    """Have oneDNN compute what it computes faster, in this thread; the model is not touched.

    The numbers are those of MKL but for the order of a sum. Nothing changes for what needs a
    gradient, for other dtypes and devices, under autocast, on other processors, or where oneDNN is
    switched off (``torch.backends.mkldnn.enabled = False``).

    Args:
        model: Nothing is done for one whose first weight oneDNN does not take: to see every call
            of a function of PyTorch takes the host's time, for which a GPU would wait.
    """
    if getattr(_entered, "yes", False) or not helps() or not _may_serve(model):
        yield
        return
    _entered.yes = True
    try:
        with _OneDNN():
            yield
    finally:
        _entered.yes = False


@lru_cache(maxsize=1)
def helps() -> bool:
    """Whether this processor is one that MKL takes for less than it is."""
    return (
        torch.backends.cpu.get_cpu_capability() == "AVX512"
        and torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and "AuthenticAMD" in _processor()
    )


def _may_serve(model: nn.Module | None) -> bool:
    """Whether a model's first weight, which stands for all, is one of those that are served."""
    first = None if model is None else next(model.parameters(), None)
    return first is None or _is_plain(first)


def _processor() -> str:
    """What the system says of the processor."""
    known = Path("/proc/cpuinfo")
    return known.read_text() if known.exists() else platform.processor()


class _OneDNN(TorchFunctionMode):
    """Sees every call of a function of PyTorch, and answers those that oneDNN is better at."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is F.linear and not kwargs and _serves(*args):
            return _product(*args)
        return func(*args, **(kwargs or {}))


def _serves(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Whether a product is one of plain float32 matrices without a gradient."""
    tensors = [rows, weight] if bias is None else [rows, weight, bias]
    return (
        all(_is_plain(tensor) for tensor in tensors)
        and weight.dim() == 2
        and rows.dim() >= 2
        and rows.numel() >= BLOCKS[-1] * weight.shape[1] > 0
        and rows.shape[-1] == weight.shape[1]
        and (bias is None or bias.shape == weight.shape[:1])
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.enabled
        and not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))
    )


def _is_plain(tensor: Tensor) -> bool:
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.dtype == torch.float32
        and tensor.device.type == "cpu"
        and tensor.layout == torch.strided
    )


def _product(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """In blocks of two sizes: oneDNN makes a program for every size and keeps it, a MB or two each.

    What is left over is MKL's.
    """
    flat = rows.reshape(-1, rows.shape[-1])
    output = rows.new_empty(len(flat), len(weight))
    start = 0
    for size in BLOCKS:
        while len(flat) - start >= size:
            block = slice(start, start + size)
            output[block] = _block(flat[block], weight, bias)
            start += size
    if start < len(flat):
        output[start:] = F.linear(flat[start:], weight, bias)
    return output.view(*rows.shape[:-1], len(weight))


def _block(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise.default(rows, weight, bias, "none", [], "")
