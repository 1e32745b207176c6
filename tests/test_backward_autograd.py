"""The gradients as torch uses them: compiled, checkpointed, used twice, kept, or asked for again.

Legend: B batch, Hq/Hk heads, Tq/Tk tokens, Tp prefix tokens, D head dim.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import atman_triton as atman
from atman_triton.testing import count_launches

pytest.importorskip("triton", reason="the fused kernels need triton")

from backward_cases import (
    BACKEND,
    FORWARD,
    BackwardCase,
    Problem,
    call,
    check_problem,
    gradients,
    make_problem,
)
from kernel_cases import DEVICE, MODES

SMALL = BackwardCase(tokens=(20, 40), dims=(16, 16), heads=(2, 1))
FEATURES = {
    "plain": replace(SMALL, factors="none"),
    "factor": replace(SMALL, factors="per_head"),
    "window": replace(SMALL, band="window", softcap=2.0, mask="left"),
    "bias": replace(SMALL, band="offset", sinks=True, bias="shared", mask="rows"),
    "alibi": replace(SMALL, band="full", bias="alibi", dropout=0.3),
    "prefix": replace(SMALL, prefix=25, dropout=0.3, sinks=True),
    "own": replace(SMALL, prefix=25, place="own", bias="dense"),
    "shared keys": replace(SMALL, layout="shared_keys"),
}


def leaves_of(problem: Problem) -> dict[str, Tensor]:
    """Fresh leaves that want gradients."""
    return {name: t.detach().clone().requires_grad_() for name, t in problem.tensors.items()}


def backward(results: tuple[Tensor, ...], problem: Problem) -> None:
    torch.autograd.backward(results, problem.cotangents())


def same_gradients(leaves: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The same kernels on the same numbers: bit for bit."""
    for name, leaf in leaves.items():
        assert torch.equal(leaf.grad, expected[name]), name
        assert leaf.grad.abs().max() > 0, name


@pytest.mark.parametrize(
    ("case", "mode"), list(zip(FEATURES.values(), itertools.cycle(MODES))), ids=FEATURES
)
def test_compiles_whole_forward_and_backward(case, mode):
    """Each feature in one mode: a mode is a word among the arguments of the same operator."""
    problem = make_problem(replace(case, mode=mode))

    def run(leaves: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return call(leaves, problem.options, BACKEND)

    torch._dynamo.reset()
    leaves = leaves_of(problem)
    with count_launches() as launches:
        backward(torch.compile(run, fullgraph=True, backend="aot_eager")(leaves), problem)
    assert launches.attention == 1
    same_gradients(leaves, gradients(problem))


def test_compiles_once_for_all_lengths():
    torch._dynamo.reset()

    def run(leaves: dict[str, Tensor], options: dict) -> tuple[Tensor, ...]:
        return call(leaves, options, BACKEND)

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend=counter)
    compilations = []
    for tokens in ((20, 40), (33, 90)):
        problem = make_problem(replace(SMALL, mode="min_shift", tokens=tokens, prefix=25))
        leaves = leaves_of(problem)
        backward(compiled(leaves, problem.options), problem)
        same_gradients(leaves, gradients(problem))
        compilations.append(counter.frame_count)
    assert compilations[0] == compilations[-1] > 0


@pytest.mark.parametrize(("compiled", "prefix"), [(False, 0), (False, 25), (True, 25)])
def test_a_seed_that_nobody_gave_is_drawn_once_per_call(compiled, prefix):
    """Forward and backward drop the same, the next call drops others, and a manual seed repeats."""
    problem = make_problem(replace(SMALL, mode="min_shift", prefix=prefix))
    options = problem.options | {"dropout": 0.4}

    def run(leaves: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return call(leaves, options, BACKEND)

    if compiled:
        torch._dynamo.reset()
        run = torch.compile(run, fullgraph=True, backend="aot_eager")
    found = []
    torch.manual_seed(5)
    for again in (False, False, True):
        if again:
            torch.manual_seed(5)
        leaves = leaves_of(problem)
        out, lse = run(leaves)
        backward((out, lse), problem)
        # of the values, out is linear, so the gradients that belong to it tell its mask
        values = [leaves["value"], *([leaves["prefix_value"]] if prefix else [])]
        products = [torch.vdot(v.detach().flatten(), v.grad.flatten()) for v in values]
        expected = (out * problem.cotangents()[0]).sum()
        torch.testing.assert_close(sum(products), expected, rtol=1e-4, atol=1e-4)
        found.append([leaf.grad for leaf in leaves.values()])
    first, second, third = found
    assert not any(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first, third, strict=True))


@pytest.mark.parametrize(
    ("mode", "prefix", "use_reentrant"), [("multiplicative", 0, True), ("min_shift", 25, False)]
)
def test_checkpointing_changes_no_gradient(mode, prefix, use_reentrant):
    """Recomputed with the same drawn seed, with two layers that draw one each."""
    problem = make_problem(replace(SMALL, mode=mode, prefix=prefix, sinks=True))
    options = problem.options | {"dropout": 0.3}
    names = list(problem.tensors)

    def layer(*tensors: Tensor) -> Tensor:
        return call(dict(zip(names, tensors, strict=True)), options, BACKEND)[0]

    grads = []
    for wrapped in (False, True):
        leaves = leaves_of(problem)
        torch.manual_seed(3)
        hidden = leaves["query"]
        with count_launches() as launches:
            for _ in range(2):
                tensors = [hidden, *list(leaves.values())[1:]]
                hidden = (
                    checkpoint(layer, *tensors, use_reentrant=use_reentrant)
                    if wrapped
                    else layer(*tensors)
                )
            hidden.backward(problem.out_grad)
        assert launches.attention == (4 if wrapped else 2) or BACKEND != "triton"
        grads.append({name: leaf.grad for name, leaf in leaves.items()})
    for name in names:
        assert torch.equal(grads[0][name], grads[1][name]), name
        assert grads[0][name].abs().max() > 0, name


@pytest.mark.parametrize("mode", MODES)
def test_used_twice_in_one_graph(mode):
    """Two queries over the same keys, factors and sinks, the second of which is the first's result.

    Gradients of what is shared add up, and are those of the oracle for the same graph.
    """
    problem = make_problem(replace(SMALL, mode=mode, sinks=True, bias="alibi"))

    def run(leaves: dict[str, Tensor], backend: str, options: dict) -> Tensor:
        first, lse = call(leaves, options, backend)
        second, _ = call(leaves | {"query": first}, options, backend)
        by_out, by_lse = problem.cotangents()
        return (second * by_out).sum() + (lse * by_lse).sum() + first.sum()

    leaves = leaves_of(problem)
    run(leaves, BACKEND, problem.options).backward()
    double = problem.double()
    exact = leaves_of(double)
    run(exact, "reference", double.options).backward()
    for name, leaf in leaves.items():
        torch.testing.assert_close(leaf.grad.double(), exact[name].grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("mode", "prefix"), [("multiplicative", 0), ("min_shift", 25), ("log_additive", 25)]
)
def test_one_tensor_in_several_places(mode, prefix):
    """Keys that are queries and values too: each place's gradient is added, none lost."""
    case = replace(SMALL, mode=mode, tokens=(20, 20 + prefix), heads=(2, 2), prefix=prefix)
    problem = make_problem(case)
    apart = replace(
        problem,
        tensors=problem.tensors | dict.fromkeys(("key", "value"), problem.tensors["query"]),
    )
    expected = gradients(apart)
    leaf = apart.tensors["query"].detach().clone().requires_grad_()
    tensors = problem.tensors | {"query": leaf, "key": leaf, "value": leaf}
    backward(call(tensors, problem.options, BACKEND), problem)
    total = sum(expected[name] for name in ("query", "key", "value"))
    torch.testing.assert_close(leaf.grad, total, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prefix", [0, 25])
def test_a_kept_graph_gives_the_same_again(prefix):
    problem = make_problem(replace(SMALL, mode="min_shift", prefix=prefix, dropout=0.2))
    leaves = leaves_of(problem)
    results = call(leaves, problem.options, BACKEND)
    inputs = list(leaves.values())
    grads = problem.cotangents()
    first = torch.autograd.grad(results, inputs, grads, retain_graph=True)
    again = torch.autograd.grad(results, inputs, grads)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(results, inputs, grads)


def test_gradients_accumulate_in_leaves():
    problem = make_problem(replace(SMALL, mode="min_shift"))
    leaves = leaves_of(problem)
    for _ in range(2):
        backward(call(leaves, problem.options, BACKEND), problem)
    for name, gradient in gradients(problem).items():
        assert torch.equal(leaves[name].grad, 2 * gradient), name


def test_an_input_changed_in_place_is_noticed():
    """Before its gradient was computed, so that none is wrong in silence."""
    problem = make_problem(replace(SMALL, mode="min_shift"))
    leaves = leaves_of(problem)
    factor = leaves["key_factor"] * 1.0
    results = call(leaves | {"key_factor": factor}, problem.options, BACKEND)
    with torch.no_grad():
        factor.mul_(0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        backward(results, problem)


@pytest.mark.parametrize("prefix", [0, 25])
def test_a_sum_of_the_output(prefix):
    """Its gradient has one element, expanded: strides of 0."""
    problem = make_problem(replace(SMALL, mode="min_shift", prefix=prefix, loss="out"))
    leaves = leaves_of(problem)
    out, _ = call(leaves, problem.options, BACKEND)
    out.sum().backward()
    same_gradients(leaves, gradients(replace(problem, out_grad=torch.ones_like(out))))


@pytest.mark.parametrize("prefix", [0, 25])
def test_a_second_derivative_is_refused(prefix):
    problem = make_problem(replace(SMALL, mode="min_shift", prefix=prefix))
    leaves = leaves_of(problem)
    out, _ = call(leaves, problem.options, BACKEND)
    (slope,) = torch.autograd.grad(out.sum(), [leaves["query"]], create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivatives; use backend='torch'"):
        slope.square().sum().backward()


def test_a_factor_is_learned():
    """Steps along the gradient make a chosen output likely: the loss falls at each."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 1, 1, 12, 16, generator=generator).to(DEVICE)
    factor = torch.ones(1, 12, device=DEVICE, requires_grad=True)
    optimizer = torch.optim.SGD([factor], lr=0.2)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        with count_launches() as launches:
            out = atman.attention(query, key, value, factor, causal=True, backend=BACKEND)
            loss = (out[..., -1, :] - value[..., 3, :]).square().mean()
            loss.backward()
        assert launches[FORWARD] == (BACKEND == "triton")
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]


NAMES = ("query", "key", "value", "prefix_key", "prefix_value", "key_factor", "sinks")


def operator_arguments(problem: Problem, tensors: dict[str, Tensor]) -> tuple[tuple, tuple]:
    """Those of both operators: the tensors, in order, and what is not differentiated."""
    options = problem.options
    mask, offset = options.get("mask"), options.get("query_offset", 20)
    seed = torch.tensor([options["dropout_seed"]]) if "dropout" in options else None
    others = (
        mask if mask is not None and mask.dim() == 2 else None,
        mask if mask is not None and mask.dim() == 4 else None,
        offset if isinstance(offset, Tensor) else None,
        seed,
        0 if isinstance(offset, Tensor) else offset,
        options["mode"],
        options["causal"],
        0.25,
        options.get("window"),
        options["softcap"],
        options.get("dropout", 0.0),
    )
    return tuple(tensors.get(name) for name in (*NAMES, "position_bias")), others


PLAIN = ("test_schema", "test_faketensor")
DYNAMIC = ("window", "bias", "prefix")  # among them everything that an operator takes
FLAGS = ([True] * 8, [False, True] * 4, [True, False] * 4)


@pytest.mark.skipif(DEVICE != "cpu", reason="the operators' own test, once")
@pytest.mark.parametrize(
    ("name", "flags"), list(zip(FEATURES, itertools.cycle(FLAGS))), ids=FEATURES
)
def test_opcheck(name, flags):
    """Schema, fake tensors, registration with autograd, and compiling with dynamic shapes."""
    problem = make_problem(replace(FEATURES[name], mode="min_shift"))
    tensors, others = operator_arguments(problem, leaves_of(problem))
    forward = torch.ops.atman_triton.attention_fwd.default
    checks = (*PLAIN, "test_autograd_registration")
    checks += ("test_aot_dispatch_dynamic",) * (name in DYNAMIC)
    torch.library.opcheck(forward, (*tensors, *others, True, False), test_utils=checks)
    tensors, others = operator_arguments(problem, problem.tensors)
    out_grad, lse_grad = problem.cotangents()
    saved = forward(*tensors, *others, True, False)
    wanted = [flag and tensor is not None for flag, tensor in zip(flags, tensors, strict=True)]
    arguments = (out_grad, lse_grad, *saved, *tensors, *others, wanted)
    derivative = torch.ops.atman_triton.attention_bwd.default
    torch.library.opcheck(derivative, arguments, test_utils=PLAIN)


@pytest.mark.parametrize("shared", ["key", "value"])
def test_keys_or_values_of_one_batch_row(shared):
    """One of both may be shared, and its gradient is of its own shape, compiled too."""
    problem = make_problem(replace(SMALL, mode="min_shift"))
    problem.tensors[shared] = problem.tensors[shared][:1]
    found = check_problem(problem)
    torch._dynamo.reset()
    leaves = leaves_of(problem)
    run = torch.compile(call, fullgraph=True, backend="aot_eager")
    backward(run(leaves, problem.options, BACKEND), problem)
    same_gradients(leaves, found)
