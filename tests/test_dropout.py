"""Attention dropout: one mask for every backend and tiling, drawn from a counter."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from atman_triton import attention
from atman_triton.kernels import dropout as module
from atman_triton.kernels import portable_eager
from atman_triton.kernels.dropout import draw_seed, dropout_threshold, keep_mask

MODES = ("multiplicative", "min_shift", "log_additive")
SEEDS = [0, 1, -1, 1 << 32, (5 << 40) + 3, (1 << 63) - 1, -(1 << 63)]
B, HQ, HK, TQ, TK, D, DV = 2, 4, 2, 5, 7, 3, 2
P = 0.3


def make_inputs(seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(B, HQ, TQ, D), (B, HK, TK, D), (B, HK, TK, DV)]
    tensors = [torch.randn(*shape, generator=generator, dtype=dtype) for shape in shapes]
    return *tensors, torch.rand(B, TK, generator=generator, dtype=dtype) + 0.2


# --- the mask -----------------------------------------------------------------------------------


def philox_of_triton(seed, rows, columns, stream):
    """The first word as a kernel gets it, int64 ``[rows, columns]``."""
    triton = pytest.importorskip("triton")
    tl = pytest.importorskip("triton.language")

    @triton.jit
    def words(out_ptr, seed_ptr, first_row, first_column, stream, SIZE: tl.constexpr):  # pyright: ignore
        row = first_row + tl.arange(0, SIZE)[:, None] + tl.zeros((SIZE, SIZE), tl.int32)
        column = first_column + tl.arange(0, SIZE)[None, :] + tl.zeros((SIZE, SIZE), tl.int32)
        zero = tl.zeros((SIZE, SIZE), tl.int32)
        word, _, _, _ = tl.philox(tl.load(seed_ptr), column, row, zero + stream, zero)
        place = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
        tl.store(out_ptr + place, word.to(tl.int64))

    words.fn.__globals__["tl"] = tl
    device = "cuda" if torch.cuda.is_available() else "cpu"
    out = torch.empty(16, 16, dtype=torch.int64, device=device)
    words[(1,)](out, torch.tensor([seed], device=device), rows[0], columns[0], stream, SIZE=16)
    return out.cpu()


@pytest.mark.parametrize("seed", SEEDS)
def test_the_mask_is_that_of_tritons_generator(seed):
    rows, columns, heads = (1000, 1016), ((1 << 31) - 40, (1 << 31) - 24), 3
    keep = keep_mask(torch.tensor([seed]), P, heads=heads, batch=(5, 7), rows=rows, columns=columns)
    for batch, head in ((5, 0), (6, 2)):
        word = philox_of_triton(seed, rows, columns, batch * heads + head)
        assert word.min() >= 0 and word.max() > 1 << 31  # unsigned
        assert torch.equal(keep[batch - 5, head], (word >> 8) >= dropout_threshold(P))


@pytest.mark.parametrize("chunk", [1, 40, 1 << 16])
def test_any_block_is_cut_from_one_mask(monkeypatch, chunk):
    seed = torch.tensor([77])
    size = {"batch": (0, 4), "rows": (0, 9), "columns": (0, 20)}
    whole = keep_mask(seed, P, heads=3, **size)
    assert whole.shape == (4, 3, 9, 20)
    monkeypatch.setattr(module, "_COUNTERS_PER_CHUNK", chunk)
    assert torch.equal(keep_mask(seed, P, heads=3, **size), whole)
    part = keep_mask(seed, P, heads=3, batch=(1, 3), rows=(2, 8), columns=(5, 19))
    assert torch.equal(part, whole[1:3, :, 2:8, 5:19])
    nothing = keep_mask(seed, P, heads=3, batch=(1, 1), rows=(2, 8), columns=(5, 5))
    assert nothing.shape == (0, 3, 6, 0)


@pytest.mark.parametrize("dropout", [0.01, 0.1, 0.5, 0.9])
def test_the_share_kept_is_as_asked_for(dropout):
    """In all, and along each axis; 5 standard errors of a binomial share."""
    size = {"batch": (0, 8), "rows": (0, 128), "columns": (0, 128)}
    keep = keep_mask(torch.tensor([3]), dropout, heads=8, **size).double()
    for axes in ((0, 1, 2, 3), (1, 2, 3), (0, 2, 3), (0, 1, 3), (0, 1, 2)):
        share = keep.mean(axes)
        count = keep.numel() / share.numel()
        bound = 5 * math.sqrt(dropout * (1 - dropout) / count)
        assert (share - (1 - dropout)).abs().max() < bound


def test_seeds_and_streams_are_independent():
    size = {"batch": (0, 2), "rows": (0, 64), "columns": (0, 64)}
    masks = [keep_mask(torch.tensor([s]), 0.5, heads=2, **size).double() for s in SEEDS]
    planes = torch.stack(masks).flatten(0, 2).flatten(1) - 0.5
    correlation = 4 * planes @ planes.T / planes.shape[1]
    correlation.fill_diagonal_(0.0)
    assert correlation.abs().max() < 5 / math.sqrt(planes.shape[1])


def test_drawn_seeds_follow_torchs_generator():
    torch.manual_seed(5)
    first, second = (draw_seed(torch.device("cpu")) for _ in range(2))
    torch.manual_seed(5)
    assert torch.equal(draw_seed(torch.device("cpu")), first)
    assert first.dtype == torch.int64 and first.shape == (1,)
    assert first != second and max(first, second) > 1 << 32


# --- the op -------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_dropout_by_hand(backend):
    """softmax, then keep or not, then values; the log-sum-exp knows nothing of it."""
    query, key, value, _ = make_inputs()
    sinks = torch.randn(HQ, dtype=torch.float64)
    key, value = key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)
    scores = torch.cat([query @ key.mT, sinks.view(1, -1, 1, 1).expand(B, -1, TQ, 1)], -1)
    size = {"batch": (0, B), "rows": (0, TQ), "columns": (0, TK)}
    keep = keep_mask(torch.tensor([9]), P, heads=HQ, **size)
    expected = scores.softmax(-1)[..., :-1] * keep / (1 - P) @ value
    actual, lse = attention(
        query, key, value, scale=1.0, sinks=sinks,
        dropout=P, dropout_seed=9, return_lse=True, backend=backend,
    )  # fmt: skip
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(lse, scores.logsumexp(-1), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_the_mean_over_seeds_is_attention_without_dropout(mode, backend):
    """Within 5 standard errors of 400 seeds, the variance being known: Σ (p v)² d / (1 − d)."""
    query, key, value, factor = make_inputs()
    seeds, call = 400, {"mode": mode, "causal": True, "backend": backend}
    outputs = torch.stack(
        [
            attention(query, key, value, factor, dropout=P, dropout_seed=seed, **call)
            for seed in range(seeds)
        ]
    )
    plain = attention(query, key, value, factor, **call)
    squares = (
        attention(  # one value dim per key: the probabilities
            query, key, torch.eye(TK, dtype=torch.float64).expand(B, HK, TK, TK), factor, **call
        ).square()
        @ value.repeat_interleave(2, 1).square()
    )
    error = (squares * P / (1 - P) / seeds).sqrt()
    assert ((outputs.mean(0) - plain).abs() <= 5 * error + 1e-12).all()
    assert (outputs.std(0) > 0).any()
    torch.testing.assert_close(
        outputs.var(0).mean(), (error.square() * seeds).mean(), rtol=0.1, atol=0
    )


@pytest.mark.parametrize("mode", MODES)
def test_all_backends_drop_the_same(mode):
    call = {"mode": mode, "causal": True, "dropout": P, "dropout_seed": (7 << 33) + 1}
    inputs = make_inputs(dtype=torch.float32)
    expected = attention(*inputs, backend="reference", **call)
    for backend in ("torch", "triton"):
        actual = attention(*inputs, backend=backend, **call)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
def test_same_seed_same_output(backend):
    call = {"dropout": P, "backend": backend}
    first = attention(*make_inputs(), dropout_seed=3, **call)
    assert torch.equal(attention(*make_inputs(), dropout_seed=torch.tensor(3), **call), first)
    assert torch.equal(attention(*make_inputs(), dropout_seed=torch.tensor([3]), **call), first)
    assert not torch.equal(attention(*make_inputs(), dropout_seed=4, **call), first)
    torch.manual_seed(1)
    drawn = [attention(*make_inputs(), **call) for _ in range(2)]
    torch.manual_seed(1)
    assert torch.equal(attention(*make_inputs(), **call), drawn[0])
    assert not torch.equal(*drawn)


def test_without_dropout_no_seed_is_drawn_and_none_matters():
    state = torch.get_rng_state()
    plain = attention(*make_inputs())
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(attention(*make_inputs(), dropout_seed=3), plain)
    attention(*make_inputs(), dropout=P)
    assert not torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rows", [1, 2, 64])
@pytest.mark.parametrize("prefix", [False, True])
def test_blocks_of_any_size_keep_the_same(monkeypatch, mode, rows, prefix):
    query, key, value, factor = make_inputs()
    call = {"mode": mode, "causal": True, "dropout": P, "dropout_seed": -5}
    expected = attention(query, key, value, factor, backend="reference", **call)
    if prefix:
        key, value = (t[:1].expand(B, -1, -1, -1) for t in (key, value))
        expected = attention(query, key, value, factor, backend="reference", **call)
        call["prefix"] = (key[:1, :, :3], value[:1, :, :3])
        key, value = key[:, :, 3:], value[:, :, 3:]
        oracle = attention(query, key, value, factor, backend="reference", **call)
        torch.testing.assert_close(oracle, expected, rtol=1e-12, atol=1e-13)
    monkeypatch.setattr(portable_eager, "CAUSAL_BLOCK", rows)
    actual = attention(query, key, value, factor, backend="torch", **call)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_the_mask_does_not_depend_on_the_dtype(dtype):
    query, key, _, factor = make_inputs(dtype=torch.float32)
    value = torch.eye(TK).expand(B, HK, TK, TK)
    call = {"dropout": P, "dropout_seed": 8, "backend": "torch"}
    probabilities = attention(*(t.to(dtype) for t in (query, key, value)), factor, **call)
    size = {"batch": (0, B), "rows": (0, TQ), "columns": (0, TK)}
    keep = keep_mask(torch.tensor([8]), P, heads=HQ, **size)
    assert torch.equal(probabilities != 0, keep)


# --- gradients ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_gradcheck(mode, backend):
    inputs = tuple(t.requires_grad_() for t in (*make_inputs(), torch.randn(HQ).double()))

    def run(query, key, value, factor, sinks):
        return attention(
            query, key, value, factor, mode=mode, causal=True, sinks=sinks, dropout=P,
            dropout_seed=4, return_lse=True, backend=backend,
        )  # fmt: skip

    assert torch.autograd.gradcheck(run, inputs)


def test_a_seed_counted_up_before_the_backward_pass_changes_nothing():
    """The backward pass draws the mask again, from the seed as it was."""
    grads = []
    for step in (0, 1):
        query, key, value, factor = (t.requires_grad_() for t in make_inputs())
        seed, offset = torch.tensor([4]), torch.tensor(2)
        output = attention(
            query, key, value, factor, causal=True, query_offset=offset, dropout=P,
            dropout_seed=seed, backend="torch",
        )  # fmt: skip
        seed += step
        offset += step
        output.square().sum().backward()
        grads.append([t.grad for t in (query, key, value, factor)])
    assert all(map(torch.equal, *grads))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_repeats_the_mask(reentrant):
    grads = []
    for checkpointing in (False, True):
        torch.manual_seed(2)
        leaves = [t.requires_grad_() for t in make_inputs()]

        def layer(*leaves):
            return attention(*leaves, dropout=P)

        if checkpointing:
            output = checkpoint(layer, *leaves, use_reentrant=reentrant)
        else:
            output = layer(*leaves)
        attention(*make_inputs(), dropout=P)  # something else draws before the backward pass
        output.square().sum().backward()
        grads.append([leaf.grad for leaf in leaves])
    assert all(map(torch.equal, *grads))


def test_compiles_whole_forward_and_backward():
    def run(query, key, value, factor, seed):
        return attention(
            query, key, value, factor, mode="min_shift", causal=True, dropout=P,
            dropout_seed=seed, backend="torch",
        )  # fmt: skip

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    generator = torch.Generator().manual_seed(0)
    leaves = [
        torch.randn(2, heads, 17, 8, generator=generator).requires_grad_() for heads in (HQ, HK, HK)
    ]
    leaves.append(torch.rand(2, 17, generator=generator).requires_grad_())
    for seed in (1, 2):
        outputs = [f(*leaves, torch.tensor([seed])) for f in (compiled, run)]
        torch.testing.assert_close(*outputs)
        grads = [torch.autograd.grad(out.square().sum(), leaves) for out in outputs]
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


def test_compiled_draws_a_seed_on_every_call():
    def run(*tensors):
        return attention(*tensors, dropout=P)

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.manual_seed(0)
    first, second = (compiled(*make_inputs()) for _ in range(2))
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(compiled(*make_inputs()), first)
    torch._dynamo.reset()


def test_dropout_that_keeps_all_trains_as_without():
    """A linear layer learns through the op: nothing is detached on the way."""
    layer = nn.Linear(D, D).double()
    query, key, value, factor = make_inputs()
    attention(layer(query), key, value, factor, dropout=1e-9).sum().backward()
    grad, layer.weight.grad = layer.weight.grad, None
    attention(layer(query), key, value, factor).sum().backward()
    torch.testing.assert_close(layer.weight.grad, grad)
