"""Exact properties of the gradients: what is shared, permuted, asked for alone, or not there.

Legend: B batch, Hq/Hk heads, Tq/Tk tokens, Tp prefix tokens, D head dim.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from atman_triton import attention
from atman_triton.testing import assert_close_to_oracle, count_launches

pytest.importorskip("triton", reason="the fused kernels need triton")

from backward_cases import (
    BACKEND,
    BackwardCase,
    Problem,
    call,
    check_launches,
    check_problem,
    gradients,
    make_problem,
)
from kernel_cases import DEVICE, MODES, pairwise, poison

__all__ = ["poison"]  # an autouse fixture

SMALL = BackwardCase(tokens=(40, 130), dims=(32, 32), heads=(2, 1))
FULL = replace(SMALL, sinks=True, bias="alibi", mask="rows", softcap=5.0, dropout=0.2)
PREFIXES = pytest.mark.parametrize("prefix", [0, 70])


def replaced(problem: Problem, **tensors: Tensor) -> Problem:
    """The same problem with other tensors."""
    return replace(problem, tensors=problem.tensors | tensors)


@pytest.mark.parametrize(
    ("mode", "bias", "prefix"),
    [("min_shift", "dense", 0), ("log_additive", "alibi", 70)],
)
def test_a_gradient_is_the_same_alone_as_among_others(mode, bias, prefix):
    """Bit for bit, and again when computed again; what nobody asks for is not computed."""
    problem = make_problem(replace(FULL, mode=mode, bias=bias, prefix=prefix))
    together = gradients(problem)
    assert len(together) == (8 if prefix else 6)
    for name in problem.wanted:
        alone = replace(problem, wanted=(name,))
        with count_launches() as launches:
            gradient = gradients(alone)[name]
        if BACKEND == "triton":
            check_launches(alone, launches)
        assert torch.equal(gradient, together[name]), name
        assert gradient.abs().max() > 0, name
    for name, gradient in gradients(problem).items():
        assert torch.equal(gradient, together[name]), name


@pytest.mark.parametrize("mode", MODES)
def test_losses_add_up(mode):
    """The gradient by both results is the sum of those by each."""
    problem = make_problem(replace(FULL, mode=mode))
    both = gradients(problem)
    parts = [gradients(replace(problem, **{g: None})) for g in ("out_grad", "lse_grad")]
    exact = gradients(problem.double(), "reference")
    for name, whole in both.items():
        total = parts[0][name] + parts[1][name]
        assert_close_to_oracle(total, whole, exact[name], factor=3.0, name=name)


@pytest.mark.parametrize(
    ("mode", "factors"), list(zip(MODES, ["per_head", "some", "per_head"], strict=True))
)
def test_permuting_batch_rows_permutes_gradients(mode, factors):
    case = replace(FULL, batch=3, mode=mode, bias="dense", factors=factors, dropout=0.0)
    problem = make_problem(case)
    order = torch.tensor([2, 0, 1], device=DEVICE)
    moved = problem.each(lambda t: t[order] if t.shape[:1] == (3,) else t)
    expected = gradients(problem)
    for name, gradient in gradients(moved).items():
        if name != "sinks":  # of which rows are summed, in another order
            assert torch.equal(gradient, expected[name][order]), name


@pairwise(mode=MODES, prefix=[64, 70], place=["all", "own"])
def test_a_prefix_has_the_gradients_of_its_copies_in_sum(mode, prefix, place):
    case = replace(FULL, mode=mode, prefix=prefix, place=place, factors="per_head", mask="left")
    problem = make_problem(replace(case, batch=3))
    tensors = dict(problem.tensors)
    for name in ("key", "value"):
        shared = tensors.pop(f"prefix_{name}").expand(3, -1, -1, -1)
        tensors[name] = torch.cat([shared, tensors[name]], 2)
    if place == "own":
        factor = tensors["key_factor"]
        ones = torch.ones(*factor.shape[:-1], prefix, device=DEVICE)
        tensors["key_factor"] = torch.cat([ones, factor], -1)
    wanted = tuple(name for name in problem.wanted if name in tensors)
    concatenated = gradients(replace(problem, tensors=tensors, wanted=wanted))
    for name in ("key", "value"):
        shared, own = concatenated[name].split([prefix, 130 - prefix], 2)
        concatenated[f"prefix_{name}"], concatenated[name] = shared.sum(0, keepdim=True), own
    if place == "own":
        concatenated["key_factor"] = concatenated["key_factor"][..., prefix:]
    exact = gradients(problem.double(), "reference")
    for name, gradient in gradients(problem).items():
        other = concatenated[name]
        assert_close_to_oracle(gradient, other, exact[name], factor=3.0, name=name)
        assert gradient.abs().max() > 0, name


@pytest.mark.parametrize(
    ("mode", "dtype"), list(zip(MODES, [torch.float32, torch.float16, torch.float32], strict=True))
)
def test_keys_of_one_batch_row_have_the_gradients_of_their_copies_in_sum(mode, dtype):
    case = replace(FULL, mode=mode, batch=3, dtype=dtype, layout="shared_keys")
    problem = make_problem(case)
    assert problem.tensors["key"].shape[0] == 1
    found = check_problem(problem)
    copies = {name: problem.tensors[name].repeat(3, 1, 1, 1) for name in ("key", "value")}
    apart = gradients(replaced(problem, **copies))
    exact = gradients(problem.double(), "reference")
    for name in ("key", "value"):
        total = apart[name].float().sum(0, keepdim=True).to(dtype)
        assert_close_to_oracle(found[name], total, exact[name], factor=3.0, name=name)
    for name in ("query", "key_factor", "sinks"):
        assert torch.equal(found[name], apart[name]), name


def test_a_factor_expanded_over_the_batch_sums_its_rows():
    problem = make_problem(replace(SMALL, batch=3, mode="min_shift"))
    row = problem.tensors["key_factor"][:1]
    apart = gradients(replaced(problem, key_factor=row.repeat(3, 1)))["key_factor"]
    leaf = row.clone().requires_grad_()
    out, lse = call(problem.tensors | {"key_factor": leaf.expand(3, -1)}, problem.options, BACKEND)
    torch.autograd.backward((out, lse), problem.cotangents())
    assert torch.equal(leaf.grad, apart.sum(0, keepdim=True))


@pytest.mark.parametrize(
    ("mode", "bias"), list(zip(MODES, ["alibi", "dense", "alibi"], strict=True))
)
def test_sinks_and_bias_in_another_dtype_than_queries(mode, bias):
    """Each gradient comes in the dtype of what it is the gradient of."""
    problem = make_problem(replace(FULL, mode=mode, dtype=torch.float16, bias=bias))
    wide = {name: problem.tensors[name].float() for name in ("sinks", "position_bias")}
    check_problem(replaced(problem, **wide))


@PREFIXES
@pytest.mark.parametrize("mode", MODES)
def test_a_bias_of_minus_infinity_hides_a_key(mode, prefix):
    """Its gradient is 0 there, and of such a key all gradients are, though ``min_shift`` sees it.

    So no NaN comes from infinity times zero.
    """
    problem = make_problem(replace(SMALL, mode=mode, bias="alibi", prefix=prefix))
    position_bias = problem.tensors["position_bias"].clone()
    position_bias[..., ::3] = -math.inf
    found = check_problem(replaced(problem, position_bias=position_bias))
    assert (found["position_bias"][..., ::3] == 0).all()
    assert (found["position_bias"][..., 1::3] != 0).any()


@pairwise(mode=MODES, scale=[-0.2, 0.0], prefix=[0, 70])
def test_negative_and_zero_scale(mode, scale, prefix):
    problem = make_problem(replace(SMALL, mode=mode, prefix=prefix, sinks=True))
    problem.options["scale"] = scale
    found = check_problem(problem)
    assert (found["query"] != 0).any() == (scale != 0)


@PREFIXES
def test_offset_in_memory_is_the_same_as_a_number(prefix):
    problem = make_problem(replace(SMALL, mode="min_shift", prefix=prefix))
    expected = gradients(replace(problem, options=problem.options | {"query_offset": 77}))
    offset = torch.tensor(77, device=DEVICE)
    found = gradients(replace(problem, options=problem.options | {"query_offset": offset}))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("empty", ["queries", "keys", "own keys", "batch"])
def test_of_nothing_gradients_are_zeros(mode, empty):
    problem = make_problem(replace(SMALL, mode=mode, prefix=70 if empty == "own keys" else 0))
    tensors = dict(problem.tensors)
    out_grad, lse_grad = problem.cotangents()
    if empty == "queries":
        tensors["query"] = tensors["query"][:, :, :0]
        out_grad, lse_grad = out_grad[:, :, :0], lse_grad[:, :, :0]
    elif empty == "batch":
        tensors = {name: tensor[:0] for name, tensor in tensors.items()}
        out_grad, lse_grad = out_grad[:0], lse_grad[:0]
    else:
        tensors |= {name: tensors[name][:, :, :0] for name in ("key", "value")}
        tensors["key_factor"] = tensors["key_factor"][:, : 70 if empty == "own keys" else 0]
    problem = Problem(tensors, problem.options, out_grad, lse_grad, problem.wanted)
    found = gradients(problem)
    exact = gradients(problem.double(), "reference")
    for name, gradient in found.items():
        assert gradient.shape == tensors[name].shape
        if empty != "own keys":
            assert (gradient == 0).all(), name
        elif gradient.numel():
            assert (gradient - exact[name]).abs().max() < 1e-4, name
            assert gradient.abs().max() > 0, name


def test_rows_far_apart_use_wide_offsets():
    """Rows 2^23 elements apart, from where offsets within a tile are computed in 64 bits."""
    case = BackwardCase(tokens=(3, 5), batch=1, dims=(16, 16), heads=(1, 1), mode="min_shift")
    problem = make_problem(case)
    far = torch.zeros(5 << 23, device=DEVICE).as_strided((1, 1, 5, 16), (0, 0, 1 << 23, 1))
    far.copy_(problem.tensors["key"])
    expected = gradients(problem)
    for name, gradient in gradients(replaced(problem, key=far)).items():
        assert torch.equal(gradient, expected[name]), name


@pytest.mark.parametrize(("mode", "prefix"), [("multiplicative", 0), ("min_shift", 70)])
def test_dropout_repeats_by_its_seed(mode, prefix):
    problem = make_problem(replace(SMALL, mode=mode, prefix=prefix, dropout=0.4))

    def seeded(seed: int | Tensor) -> dict[str, Tensor]:
        return gradients(replace(problem, options=problem.options | {"dropout_seed": seed}))

    for seed in (-3, (5 << 40) + 7):
        found, again = seeded(seed), seeded(torch.tensor([seed], device=DEVICE))
        assert all(torch.equal(found[name], again[name]) for name in found)
        check_problem(replace(problem, options=problem.options | {"dropout_seed": seed}))
        other = seeded(seed + (1 << 32))
        assert not any(torch.equal(found[name], other[name]) for name in found)


@PREFIXES
def test_dropout_does_not_reach_the_log_sum_exp(prefix):
    case = replace(SMALL, mode="min_shift", prefix=prefix, loss="lse")
    without = gradients(make_problem(case))
    found = gradients(make_problem(replace(case, dropout=0.4)))
    for name in ("query", "key", "key_factor"):
        assert torch.equal(found[name], without[name]), name
        assert found[name].abs().max() > 0, name


@PREFIXES
@pytest.mark.parametrize("mode", MODES)
def test_the_result_is_the_same_with_and_without_gradients(mode, prefix):
    """What the forward pass saves for the backward pass changes no bit of what it returns."""
    problem = make_problem(replace(FULL, mode=mode, prefix=prefix))
    plain = call(problem.tensors, problem.options, BACKEND)
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in problem.tensors.items()}
    saved = call(leaves, problem.options, BACKEND)
    assert all(torch.equal(a, b) for a, b in zip(plain, saved, strict=True))
    with torch.no_grad():
        assert not call(leaves, problem.options, BACKEND)[0].requires_grad


def allocations(problem: Problem, backend: str = BACKEND) -> list[int]:
    """Bytes of each tensor that torch allocates in forward and backward, largest first."""
    with torch.profiler.profile(profile_memory=True) as profile:
        gradients(problem, backend)
    events: list = profile.profiler.kineto_results.events()  # pyright: ignore
    return sorted((event.nbytes() for event in events if event.name() == "[memory]"), reverse=True)


@pytest.mark.skipif(DEVICE != "cpu", reason="counts allocations of the CPU")
@pytest.mark.parametrize(("mode", "bias"), [("multiplicative", "alibi"), ("min_shift", "shared")])
def test_no_score_matrix_is_held(mode, bias):
    """But for the gradient of a bias that is one; and no prefix is copied for each row."""
    queries, keys = 100, 400
    case = BackwardCase(tokens=(queries, keys), dims=(16, 16), heads=(2, 1), batch=3, mode=mode)
    problem = make_problem(replace(case, prefix=keys - queries, sinks=True, bias=bias))
    matrix, copied = 4 * queries * keys, 4 * 3 * keys * 16  # scores of one head; keys of all rows
    found = allocations(problem)
    if bias == "shared":
        assert found.pop(0) == matrix
    assert 4 * problem.tensors["query"].numel() <= found[0] < min(matrix, copied)
    assert allocations(problem, "reference")[0] >= 2 * 3 * matrix  # the instrument sees one


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@PREFIXES
@pytest.mark.parametrize("mode", MODES)
def test_same_input_gives_the_same_bits(mode, prefix):
    case = replace(FULL, tokens=(500, 1023), dims=(64, 64), dtype=torch.float16, mode=mode)
    problem = make_problem(replace(case, prefix=prefix, dropout=0.1))
    expected = gradients(problem)
    for _ in range(1000):
        for name, gradient in gradients(problem).items():
            assert torch.equal(gradient, expected[name]), name


def test_what_is_not_found_yet_is_not_read(monkeypatch):
    """Arithmetic with a signalling NaN is an error here; with a quiet one it goes unnoticed."""
    empty_like = torch.empty_like

    def poisoned(*args, **kwargs):
        tensor = empty_like(*args, **kwargs)
        if tensor.dtype == torch.float32:
            tensor.view(torch.int32).fill_(0x7F800001)
        return tensor

    query, key, value = (torch.randn(1, 1, 20, 16, device=DEVICE) for _ in range(3))
    factor = torch.ones(1, 20, device=DEVICE)
    factor[0, 3] = 0.1
    inputs = [tensor.requires_grad_() for tensor in (query, key, value, factor)]
    output = attention(*inputs, mode="min_shift", causal=True, backend="triton")
    monkeypatch.setattr(torch, "empty_like", poisoned)
    gradients = torch.autograd.grad(output.sum(), inputs)
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)
