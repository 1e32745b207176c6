"""Cases of the backward pass: a problem, its gradients on any backend, and the tolerance rule.

Everything goes through the public op, so that what is tested is what users differentiate. Legend:
B batch, Hq/Hk heads, Tq/Tk tokens, Tp prefix tokens, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from kernel_cases import DEVICE, Case, make_inputs, worse
from torch import Tensor

import atman_triton as atman
from atman_triton.testing import LaunchCount, assert_close_to_oracle, count_launches

BACKEND = "triton"
FORWARD, SHARED_PREFIX = "_attention_fwd_kernel", "_shared_prefix_fwd_kernel"
ROWS, DQ = "_attention_bwd_rows_kernel", "_attention_bwd_dq_kernel"
DKV, DBIAS = "_attention_bwd_dkv_kernel", "_attention_bwd_bias_kernel"
PER_KEY = ("key", "value", "prefix_key", "prefix_value", "key_factor")
WANTS = {"factor": ("key_factor",), "query": ("query",), "keys": PER_KEY[:4]}


@dataclass(frozen=True)
class BackwardCase(Case):
    """A case whose first ``prefix`` keys are shared, and what is differentiated by what."""

    prefix: int = 0
    place: str = "all"  # keys that have a factor: all | own
    dropout: float = 0.0
    wants: str = "all"  # all | factor | query | keys
    loss: str = "both"  # of out | lse | both
    cotangent: str = "plain"  # in memory: plain | strided | expanded

    def __str__(self):
        parts = [super().__str__()]
        if self.prefix:
            parts += [f"Tp{self.prefix}"] + [self.place] * (self.factors != "none")
        parts += [f"drop{self.dropout:g}"] * (self.dropout > 0)
        parts += [f"d_{self.wants}", self.loss]
        parts += [self.cotangent] * (self.cotangent != "plain")
        return "-".join(parts)


@dataclass
class Problem:
    """Arguments of the op by name, and the gradients of its results, from which all others follow.

    A cotangent of ``None`` means that the loss does not depend on that result.
    """

    tensors: dict[str, Tensor]
    options: dict
    out_grad: Tensor | None
    lse_grad: Tensor | None
    wanted: tuple[str, ...]

    def each(self, change: Callable[[Tensor], Tensor]) -> Problem:
        """The same with every tensor changed."""

        def changed(part: dict) -> dict:
            return {k: change(v) if isinstance(v, Tensor) else v for k, v in part.items()}

        grads = (None if g is None else change(g) for g in (self.out_grad, self.lse_grad))
        return Problem(changed(self.tensors), changed(self.options), *grads, self.wanted)

    def double(self) -> Problem:
        """The same in float64."""
        return self.each(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)

    def cotangents(self) -> tuple[Tensor, Tensor]:
        """Those of output and log-sum-exp, of a problem that has both."""
        assert self.out_grad is not None and self.lse_grad is not None
        return self.out_grad, self.lse_grad


def make_problem(case: BackwardCase, seed: int = 0) -> Problem:
    """The inputs of ``case``, random cotangents, and every tensor that it differentiates."""
    (query, key, value, factor), options = make_inputs(case, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    tensors = {"query": query, "key": key[:, :, case.prefix :], "value": value[:, :, case.prefix :]}
    if case.prefix:
        tensors["prefix_key"] = key[:1, :, : case.prefix]
        tensors["prefix_value"] = value[:1, :, : case.prefix]
    if factor is not None:
        tensors["key_factor"] = factor[..., case.prefix * (case.place == "own") :]
    for name in ("sinks", "position_bias"):
        if name in options:
            tensors[name] = options.pop(name)
    if case.dropout:
        options |= {"dropout": case.dropout, "dropout_seed": 1234 + seed}

    (batch, heads, rows, _), width = query.shape, value.shape[-1]
    shape = {"strided": (batch, rows, heads, width), "expanded": (width,)}
    out_grad = torch.randn(
        shape.get(case.cotangent, (batch, heads, rows, width)), generator=generator
    )
    if case.cotangent == "strided":
        out_grad = out_grad.transpose(1, 2)
    out_grad = out_grad.to(case.dtype).to(DEVICE).expand(batch, heads, rows, width)
    lse_grad = torch.randn(batch, heads, rows, generator=generator).to(DEVICE)
    wanted = tuple(tensors) if case.wants == "all" else WANTS[case.wants]
    return Problem(
        tensors,
        options,
        out_grad if case.loss != "lse" else None,
        lse_grad if case.loss != "out" else None,
        tuple(name for name in wanted if name in tensors),
    )


def call(
    tensors: dict[str, Tensor], options: dict, backend: str, return_lse: bool = True
) -> tuple[Tensor, ...]:
    """Output and, if asked for, log-sum-exp of the op with a problem's arguments."""
    prefix = (tensors["prefix_key"], tensors["prefix_value"]) if "prefix_key" in tensors else None
    results = atman.attention(
        tensors["query"],
        tensors["key"],
        tensors["value"],
        tensors.get("key_factor"),
        sinks=tensors.get("sinks"),
        position_bias=tensors.get("position_bias"),
        prefix=prefix,
        return_lse=return_lse,
        backend=backend,
        **options,
    )
    return results if isinstance(results, tuple) else (results,)


def gradients(problem: Problem, backend: str = BACKEND) -> dict[str, Tensor]:
    """The gradient of each wanted tensor; zeros where the loss does not depend on it."""
    leaves = {
        name: tensor.detach().requires_grad_(name in problem.wanted)
        for name, tensor in problem.tensors.items()
    }
    results = call(leaves, problem.options, backend, return_lse=problem.lse_grad is not None)
    pairs = [
        (result, grad)
        for result, grad in zip(results, (problem.out_grad, problem.lse_grad), strict=False)
        if grad is not None
    ]
    inputs = [leaves[name] for name in problem.wanted]
    found = torch.autograd.grad(
        [result for result, _ in pairs], inputs, [grad for _, grad in pairs], allow_unused=True
    )
    return {
        name: torch.zeros_like(leaf) if grad is None else grad
        for name, leaf, grad in zip(problem.wanted, inputs, found, strict=True)
    }


def check_launches(problem: Problem, launches: LaunchCount) -> None:
    """One pass forward, and backward once per segment of keys what a wanted gradient needs."""
    wanted, tensors = set(problem.wanted), problem.tensors
    shared, own = "prefix_key" in tensors, tensors["key"].shape[2]
    bias, factor = tensors.get("position_bias"), tensors.get("key_factor")
    segments = 2 if shared else 1
    assert launches.attention == launches[SHARED_PREFIX if shared else FORWARD] == 1
    # δ from the output, in float32 from the keys; min_shift sums what factors pass to the minimum
    float32 = tensors["query"].dtype == torch.float32
    rows = segments if float32 else 1
    if factor is not None and problem.options["mode"] == "min_shift":
        rows += 2 if shared and factor.shape[-1] > own else 1
    assert launches[ROWS] == rows
    assert launches[DQ] == segments * ("query" in wanted)
    bias_of_rows = bias is not None and bias.shape[2] > 1
    assert launches[DBIAS] == segments * ("position_bias" in wanted and bias_of_rows)
    if wanted.isdisjoint(PER_KEY) and ("position_bias" not in wanted or bias_of_rows):
        assert launches[DKV] == 0
    elif shared and wanted.issubset(PER_KEY):
        # in a segment of which nothing is wanted it need not be
        assert 1 <= launches[DKV] <= segments
    else:
        assert launches[DKV] == segments


def sink_terms(problem: Problem) -> Tensor:
    """What each row adds to the gradient of its head's sink, in float64: ``[B, Hq, Tq]``."""
    double = problem.double()
    with torch.no_grad():
        out, lse = call(double.tensors, double.options, "reference")
    total = torch.zeros_like(lse) if double.lse_grad is None else double.lse_grad
    if double.out_grad is not None:
        total = total - (out * double.out_grad).sum(-1)
    return (double.tensors["sinks"][:, None] - lse).exp() * total


def without_noise(actual: Tensor, exact: Tensor, terms: Tensor) -> Tensor:
    """A head's sum over rows, less what two roundings of each term explain.

    A few sums of many terms that cancel: the error of plain PyTorch in them is small by luck only.
    """
    noise = 2 * torch.finfo(torch.float32).eps * terms.abs().sum((0, 2)).to(actual.device)
    error = actual.double() - exact.to(actual.device)
    return (actual.double() - error.clamp(-noise, noise)).to(actual.dtype)


def turned(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same attention, or its gradients, with every head's numbers in reverse order."""
    heads = ("query", "key", "prefix_key")
    return {name: t.flip(-1) if name in heads else t for name, t in tensors.items()}


def check_problem(
    problem: Problem, judge: Problem | None = None, view: Callable[[dict], dict] = dict
) -> dict[str, Tensor]:
    """Launches, dtypes and the tolerance rule for each gradient; returns the gradients.

    Args:
        judge: the problem as plain PyTorch and the oracle solve it, where it is put in another way.
        view: what is compared of the gradients, where not all of them are determined.
    """
    with count_launches() as launches:
        actual = gradients(problem)
    if BACKEND == "triton":
        check_launches(problem, launches)
    judge = problem if judge is None else judge
    eager = view(gradients(judge, "reference"))
    other = view(turned(gradients(replace(judge, tensors=turned(judge.tensors)), "reference")))
    exact = view(gradients(judge.double(), "reference"))
    for name, gradient in view(actual).items():
        assert gradient.dtype == problem.tensors[name].dtype, name
        eager[name] = worse(eager[name], other[name], exact[name])
        if name == "sinks":
            # in the dtype of the output, whose rounding is in δ
            gradient = gradient.to(problem.tensors["query"].dtype)
            gradient = without_noise(gradient, exact[name], sink_terms(judge))
        assert_close_to_oracle(
            gradient, eager[name], exact[name], factor=3.0, name=f"gradient of {name}"
        )
    return actual


def check_nearly(problem: Problem, tolerance: float) -> dict[str, Tensor]:
    """Every gradient within ``tolerance`` of the oracle, relative to its largest number or 1.

    For small problems in float32 in which what is wrong would be wrong by far more. Returns the
    gradients.
    """
    exact = gradients(problem.double(), "reference")
    actual = gradients(problem)
    for name, gradient in actual.items():
        allowed = tolerance * max(1.0, exact[name].abs().max().item())
        assert gradient.isfinite().all(), name
        assert (gradient - exact[name]).abs().max() <= allowed, name
    return actual


def check(case: BackwardCase, seed: int = 0) -> dict[str, Tensor]:
    """:func:`check_problem` of ``case``."""
    return check_problem(make_problem(case, seed))
