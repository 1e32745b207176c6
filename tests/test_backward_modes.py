"""Gradients where a mode is delicate: ties for the minimum, factors of 0 and 1, hidden keys.

Legend: B batch, Hq/Hk heads, Tq/Tk tokens, Tp prefix tokens, D head dim, m the factor, s the score,
c the row's minimum.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the fused kernels need triton")

from backward_cases import (
    BACKEND,
    BackwardCase,
    Problem,
    call,
    check_nearly,
    check_problem,
    gradients,
    make_problem,
)
from kernel_cases import DEVICE, MODES, pairwise, poison

__all__ = ["poison"]  # an autouse fixture

SMALL = BackwardCase(tokens=(40, 130), dims=(32, 32), heads=(2, 1))
PREFIXES = pytest.mark.parametrize("prefix", [0, 70])


def scores(problem: Problem) -> Tensor:
    """Raw scores ``[B, Hq, Tq, Tp + Tk]`` in float64, but for the scale."""
    tensors = problem.double().tensors
    key = tensors["key"].expand(len(tensors["query"]), -1, -1, -1)
    if "prefix_key" in tensors:
        key = torch.cat([tensors["prefix_key"].expand(len(key), -1, -1, -1), key], 2)
    group = tensors["query"].shape[1] // key.shape[1]
    return tensors["query"] @ key.repeat_interleave(group, 1).transpose(-1, -2)


@pairwise(
    dtype=[torch.float32, torch.float16], band=["full", "causal", "window_full"], prefix=[0, 70]
)
def test_a_tie_for_the_minimum_goes_to_the_first_key(dtype, band, prefix):
    """As the oracle's does, of scores that every dtype and order of sums gives alike."""
    case = replace(SMALL, mode="min_shift", dtype=dtype, band=band, prefix=prefix, dims=(16, 16))
    problem = make_problem(case)
    generator = torch.Generator().manual_seed(0)
    for name in {"query", "key", "prefix_key"}.intersection(problem.tensors):
        whole = torch.randint(-1, 2, problem.tensors[name].shape, generator=generator)
        problem.tensors[name] = whole.to(dtype).to(DEVICE)
    problem.tensors["key_factor"] = (problem.tensors["key_factor"] * 4).round() / 4
    problem.options["scale"] = 0.25
    found = scores(problem).cpu()
    lowest = found == found.amin(-1, keepdim=True)
    assert (lowest.sum(-1) > 1).float().mean() > 0.25
    assert torch.equal(found.min(-1).indices, lowest.int().argmax(-1))  # the first, as promised
    check_problem(problem, judge=problem.each(Tensor.cpu))


def put_below(problem: Problem, *places: tuple[str, int]) -> None:
    """Give the keys at ``places`` one score below all others, the same for every query."""
    tensors = problem.tensors
    tensors["query"] = tensors["query"].clone()
    tensors["query"][..., 0] = 1.5  # so that no row finds such a key its largest instead
    for name, index in places:
        tensors[name] = tensors[name].clone()
        tensors[name][:, :, index] = 0.0
        tensors[name][:, :, index, 0] = -20.0


@PREFIXES
def test_keys_that_tie_have_one_gradient_in_sum(prefix):
    """Whichever of two equal keys is taken for the minimum."""
    case = replace(SMALL, mode="min_shift", prefix=prefix, band="full", batch=1)
    problem = make_problem(case)
    places = (("prefix_key", 3), ("key", 50)) if prefix else (("key", 3), ("key", 100))
    put_below(problem, *places)
    assert (scores(problem).argmin(-1) == 3).float().mean() > 0.9

    def sums(found: dict) -> dict:
        found = {name: gradient.clone() for name, gradient in found.items()}
        (name, index), (other, place) = places
        found[name][:, :, index] += found[other][:, :, place]
        found[other][:, :, place] = 0
        return found

    check_problem(problem, view=sums)


@pairwise(
    where=["manipulated", "plain", "removed", "padding", "future"], index=[20, 100], prefix=[0, 70]
)
def test_the_minimum_stands_at_a_key(where, index, prefix):
    """One key lies far below all others, and is the minimum of exactly the rows that see it."""
    problem = make_problem(replace(SMALL, mode="min_shift", prefix=prefix, band="full", batch=1))
    tensors, options = problem.tensors, problem.options
    name, own = ("prefix_key", index) if index < prefix else ("key", index - prefix)
    put_below(problem, (name, own))
    tensors["key_factor"][:, index] = {"manipulated": 0.3, "removed": 0.0}.get(where, 1.0)
    if where == "padding":
        options["mask"] = torch.arange(130, device=DEVICE)[None] != index
    if where == "future":
        options |= {"causal": True, "query_offset": index - 20}  # row 20 is the first to see it
    assert (scores(problem).argmin(-1) == index).float().mean() > 0.9
    # the one large sum of terms that cancel is right to rounding, of which eager has little by luck
    found = check_nearly(problem, 5e-6) if where == "padding" else check_problem(problem)
    if where == "padding":
        assert (found[name][:, :, own] == 0).all()
        assert (found["key_factor"][:, index] == 0).all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("factor", [0.0, 0.25, 1.0, 2.0])
def test_rows_that_see_one_key(mode, factor):
    """It is the row's minimum, and has the whole of the row's probability: only lse depends."""
    case = replace(SMALL, mode=mode, tokens=(40, 40), heads=(1, 1), batch=1)
    problem = make_problem(case)
    problem.options["window"] = 1  # each row sees the key at its own place
    problem.tensors["key_factor"] = torch.full((1, 40), factor, device=DEVICE)
    found = check_problem(problem)
    if mode == "min_shift" or (mode, factor) == ("log_additive", 0.0):
        # s - c is rounding of two products of the same numbers
        tiny = 32 * torch.finfo(torch.float32).eps * scores(problem).abs().max()
        assert (found["key_factor"].abs() <= tiny).all()


@PREFIXES
@pytest.mark.parametrize("factors", ["some", "per_head"])
def test_a_removed_key_has_the_gradient_of_bringing_it_back(factors, prefix):
    """In ``log_additive`` at m = 0, where ds/m would be 0/0; and rows of nothing but zeros."""
    case = replace(SMALL, mode="log_additive", factors=factors, prefix=prefix)
    problem = make_problem(case)
    factor = problem.tensors["key_factor"].clone()
    factor[..., ::2] = 0.0
    problem.tensors["key_factor"] = factor
    found = check_problem(problem)
    visible = found["key_factor"][..., : 130 - 40 : 2]
    assert visible.abs().min() > 0
    factor[1] = 0.0  # batch row 1 has no key left
    found = check_problem(problem)
    for name in ("query", "key", "value", "key_factor"):
        assert (found[name][1] == 0).all(), name
        assert (found[name][0] != 0).any(), name


def test_a_removed_key_of_a_huge_score_leaves_gradients_finite():
    problem = make_problem(replace(SMALL, mode="log_additive", heads=(1, 1), batch=1))
    problem.tensors["query"] = problem.tensors["query"].clone()
    problem.tensors["key"] = problem.tensors["key"].clone()
    problem.tensors["query"][..., 0] = 60.0
    problem.tensors["key"][:, :, 10, 0] = 60.0  # a score of more than 600
    problem.tensors["key_factor"][:, 10] = 0.0
    found = gradients(problem)
    assert all(gradient.isfinite().all() for gradient in found.values())
    exact = gradients(problem.double(), "reference")
    for name in ("query", "value"):
        torch.testing.assert_close(found[name].double(), exact[name], rtol=1e-4, atol=1e-4)


@pairwise(mode=MODES, band=["full", "causal"], prefix=[0, 70])
def test_factors_of_one_are_plain_attention(mode, band, prefix):
    """Other gradients are those of no factors, and the factors' own is where a path begins."""
    problem = make_problem(replace(SMALL, mode=mode, band=band, prefix=prefix))
    problem.tensors["key_factor"] = torch.ones_like(problem.tensors["key_factor"])
    found = check_problem(problem)
    assert found["key_factor"].abs().max() > 0.1
    del problem.tensors["key_factor"]
    problem.wanted = tuple(problem.tensors)
    for name, plain in gradients(problem).items():
        if mode == "log_additive":  # scaled before, not within, the exponential
            tiny = 16 * torch.finfo(torch.float32).eps
            assert (found[name] - plain).abs().max() <= tiny * plain.abs().max()
        else:
            assert torch.equal(found[name], plain), name


@PREFIXES
@pytest.mark.parametrize("mode", MODES)
def test_a_hidden_key_has_no_gradient_and_its_factor_no_effect(mode, prefix):
    problem = make_problem(replace(SMALL, mode=mode, prefix=prefix, band="upper_left"))
    column = torch.arange(130, device=DEVICE)
    future, padding = column >= 40, column % 7 == 3  # of 40 queries; the band hides the future
    hidden = future | padding
    problem.options["mask"] = ~padding.expand(2, -1)
    before = gradients(problem)
    factor = problem.tensors["key_factor"]
    problem.tensors["key_factor"] = torch.where(hidden, factor * 7 + 1, factor)
    after = gradients(problem)
    own = hidden[prefix:]
    for name, gradient in after.items():
        assert torch.equal(gradient, before[name]), name
    assert (after["key_factor"][:, hidden] == 0).all()
    assert (after["key_factor"][:, ~hidden] != 0).any()
    for name, unseen in (("key", own), ("value", own), ("prefix_key", hidden[:prefix])):
        if name in after:
            assert (after[name][:, :, unseen] == 0).all(), name


@pairwise(mode=MODES, softcap=[None, 2.0], prefix=[0, 70])
def test_the_gradient_of_a_factor_is_a_quotient_of_differences(mode, softcap, prefix):
    """Independent of every backward pass: four points of the kernel's own forward pass."""
    case = replace(SMALL, mode=mode, softcap=softcap, prefix=prefix, tokens=(20, 90), sinks=True)
    problem = make_problem(replace(case, wants="factor"))
    problem.tensors["key_factor"] = problem.tensors["key_factor"].abs() + 0.25
    found = gradients(problem)["key_factor"]
    out_grad, lse_grad = problem.cotangents()

    def loss(batch: int, index: int, step: float) -> float:
        factor = problem.tensors["key_factor"].clone()
        factor[batch, index] += step
        tensors = problem.tensors | {"key_factor": factor}
        out, lse = call(tensors, problem.options, BACKEND)
        total = (out.double() * out_grad).sum() + (lse.double() * lse_grad).sum()
        return total.item()

    step = 0.04
    for batch, index in ((0, 30), (1, 71)):
        near = loss(batch, index, step) - loss(batch, index, -step)
        far = loss(batch, index, 2 * step) - loss(batch, index, -2 * step)
        quotient = (8 * near - far) / (12 * step)
        assert math.isclose(found[batch, index], quotient, rel_tol=2e-3, abs_tol=1e-3)
    assert found.abs().max() > 0.1


@pairwise(mode=MODES, sinks=[False, True], prefix=[0, 70])
def test_rows_that_see_nothing_pass_nothing_on(mode, sinks, prefix):
    problem = make_problem(replace(SMALL, mode=mode, sinks=sinks, prefix=prefix))
    problem.options["query_offset"] = -10  # rows 0..9 stand before every key
    problem.options["mask"] = torch.ones(2, 130, dtype=torch.bool, device=DEVICE)
    problem.options["mask"][0] = False  # batch row 0 is all padding
    found = check_problem(problem)
    assert (found["query"][0] == 0).all()
    assert (found["query"][1, :, :10] == 0).all()
    assert (found["query"][1, :, 10:] != 0).any(-1).all()
    assert (found["key_factor"][0] == 0).all()
