"""Helpers for testing attention kernels: the tolerance rule and a launch counter.

Used by this project's tests and examples, and open to anyone who checks an attention of their own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

ATTENTION_KERNELS = (
    "_attention_fwd_kernel",
    "_shared_prefix_fwd_kernel",
    "_packed_fwd_kernel",
)
"""One of them is launched once per call of the fused attention."""

BACKWARD_KERNELS = {
    "_attention_bwd_rows_kernel": "δ of each row (in float32 once per segment of keys), and "
    "in ``min_shift`` the gradient of its minimum, once per segment that has factors",
    "_attention_bwd_dq_kernel": "once per segment of keys: two with a shared prefix",
    "_attention_bwd_dkv_kernel": "once per segment",
    "_attention_bwd_bias_kernel": "once per segment, for a position bias with a row dimension",
}
"""What a backward pass launches; none is launched for gradients that nobody needs."""


def assert_close_to_oracle(
    actual: Tensor, eager: Tensor, oracle: Tensor, factor: float = 2.0, name: str = "output"
) -> None:
    """Check a kernel against float64, allowing it ``factor`` times the error of plain PyTorch.

    ``error(actual) <= factor * error(eager) + rounding``, errors being the largest absolute
    difference from the oracle, and ``rounding = 2 * max|(oracle + 0.3) - 0.3 - oracle|`` with the
    two sums in the dtype of ``actual``: what no implementation can avoid. Of few numbers that term
    and eager's error may vanish by luck, so it is at least two roundings of float32, in which sums
    are held, of the largest number (a base-2 softmax turns its logits once and back once). Both
    errors are printed.

    Args:
        actual: what is tested.
        eager: the same computed by plain PyTorch in the dtype of ``actual``'s inputs.
        oracle: the same in float64. Infinities must agree exactly in all three; NaN never passes.
    Raises: AssertionError: if the rule is broken, a shape differs, or a value is NaN.
    Source: the tolerance rule of FlashAttention's tests.
    """
    if not actual.shape == eager.shape == oracle.shape:
        shapes = [list(t.shape) for t in (actual, eager, oracle)]
        raise AssertionError(f"{name}: shapes of actual, eager and oracle differ: {shapes}.")
    if oracle.dtype != torch.float64:
        raise AssertionError(f"{name}: the oracle must be float64, got {oracle.dtype}.")
    for label, tensor in (("actual", actual), ("eager", eager), ("oracle", oracle)):
        if tensor.isnan().any():
            raise AssertionError(f"{name}: {label} holds {int(tensor.isnan().sum())} NaN.")
    oracle = oracle.to(actual.device)
    finite = oracle.isfinite()
    exact = torch.where(finite, 0.0, oracle)
    if not torch.equal(torch.where(finite, 0.0, actual.double()), exact):
        raise AssertionError(f"{name}: actual and oracle are infinite in different places.")
    reference = oracle[finite]
    if reference.numel() == 0:
        return
    error = (actual[finite].double() - reference).abs().max().item()
    eager_error = (eager.to(actual.device)[finite].double() - reference).abs().max().item()
    rounded = (reference.to(actual.dtype) + 0.3) - 0.3
    twice = 2 * torch.finfo(torch.float32).eps * reference.abs().max().item()
    rounding = max(2 * (rounded.double() - reference).abs().max().item(), twice)
    allowed = factor * eager_error + rounding
    text = (
        f"{name}: error {error:.3e}, eager {eager_error:.3e}, "
        f"allowed {factor:g} * eager + {rounding:.1e} = {allowed:.3e}"
    )
    print(text)
    if not error <= allowed:
        raise AssertionError(text)


class LaunchCount(Counter[str]):
    """How often each Triton kernel was launched, by name; filled while the context is open."""

    @property
    def attention(self) -> int:
        """Calls of the fused attention, by whichever kernel."""
        return sum(self[name] for name in ATTENTION_KERNELS)


class _CountingKernel:
    """Stands in for a jit kernel: counts ``kernel[grid](...)`` and passes everything on.

    Further launches that go on with the partial results of the first count as ``name.merge`` and
    ``name.deferred``.
    """

    def __init__(self, kernel: Any, name: str, count: LaunchCount) -> None:
        self._kernel = kernel
        self._name = name
        self._count = count

    def __getitem__(self, grid: Any) -> Any:
        launch = self._kernel[grid]

        def counted(*args: Any, **kwargs: Any) -> Any:
            result = launch(*args, **kwargs)
            stage = getattr(kwargs.get("SPEC"), "stage", None)
            follows = stage in ("merge", "deferred")
            self._count[f"{self._name}.{stage}" if follows else self._name] += 1
            return result

        return counted

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self._kernel, attribute)


@contextmanager
def count_launches() -> Iterator[LaunchCount]:
    """Count real launches of the project's Triton kernels, also under the interpreter.

    Counts in every thread of the process; contexts may be nested. Example::

        with count_launches() as launches:
            model(**inputs)
        assert launches.attention == layers

    Raises: LookupError: if a kernel that should be counted no longer exists.
    """
    # these need triton, which is optional
    from .kernels import backward, forward, packed_launch, prepass, shared_prefix

    count = LaunchCount()
    places = [
        *zip((forward, shared_prefix, packed_launch), ATTENTION_KERNELS, strict=True),
        *((backward, name) for name in BACKWARD_KERNELS),
        (prepass, "_factor_tiles_kernel"),
        (prepass, "_key_range_kernel"),
    ]
    for module, name in places:
        if not hasattr(getattr(module, name, None), "__getitem__"):
            raise LookupError(f"{module.__name__} has no kernel {name}; count_launches is stale.")
    originals = [getattr(module, name) for module, name in places]
    for (module, name), kernel in zip(places, originals, strict=True):
        setattr(module, name, _CountingKernel(kernel, name, count))
    try:
        yield count
    finally:
        for (module, name), kernel in zip(places, originals, strict=True):
            setattr(module, name, kernel)
