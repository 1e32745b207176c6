"""Gradients of a block of attention that is computed once more in the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def recomputed(
    run: Callable[..., tuple[Tensor, ...]], *tensors: Tensor | None
) -> tuple[Tensor, ...]:
    """``run(*tensors)``, of which autograd keeps nothing but the arguments.

    What ``run`` takes from elsewhere must not change before the backward pass. A change of
    ``tensors`` in place is noticed, as autograd does it. The gradients can be differentiated again.
    While compiling it is a plain call, since there the compiler chooses what to keep.

    Args:
        run: a function without side effects that returns a tuple of tensors.
    """
    given = [tensor for tensor in tensors if tensor is not None]
    differentiates = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given)
    if not differentiates or torch.compiler.is_compiling():
        return run(*tensors)
    return _Recomputed.apply(run, *tensors)  # pyright: ignore[reportReturnType]


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, run: Callable[..., tuple[Tensor, ...]], *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        ctx.run = run
        ctx.save_for_backward(*tensors)
        return run(*tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        again = torch.is_grad_enabled()  # the gradients are to be differentiated too
        needed = ctx.needs_input_grad[1:]
        with torch.enable_grad():
            # one tensor may have been given twice, and each place has a gradient of its own
            tensors = [
                tensor.view_as(tensor) if needs else tensor
                for tensor, needs in zip(ctx.saved_tensors, needed, strict=True)
            ]
            outputs = ctx.run(*tensors)
        pairs = zip(outputs, gradients, strict=True)
        outputs, gradients = zip(*(pair for pair in pairs if pair[0].requires_grad), strict=True)
        wanted = [tensor for tensor, needs in zip(tensors, needed, strict=True) if needs]
        found = iter(
            torch.autograd.grad(outputs, wanted, gradients, create_graph=again, allow_unused=True)
        )
        return (None, *(next(found) if needs else None for needs in needed))
