"""The op: backend choice, registration, and what the fused path allocates."""

import contextlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from atman_triton import attention, backend_registry
from atman_triton.testing import count_launches

MODES = ("multiplicative", "min_shift", "log_additive")


def inputs(batch=2, query_heads=4, key_heads=2, query_tokens=6, key_tokens=9, dim=16, dtype=None):
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=generator).to(dtype or torch.float32)

    query = randn(batch, query_heads, query_tokens, dim)
    key, value = (randn(batch, key_heads, key_tokens, dim) for _ in range(2))
    factor = torch.rand(batch, key_tokens, generator=generator)
    return query, key, value, factor


QUERY, KEY, VALUE, FACTOR = inputs()
# a view of a longer cache
PREFIX = tuple(torch.randn(2, 1, 2, 8, 16, generator=torch.Generator().manual_seed(1))[..., 3:, :])


def test_auto_on_cpu_launches_no_kernel():
    with count_launches() as launches:
        attention(*inputs())
    assert launches.attention == 0


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("causal", [False, True])
def test_backends_agree(mode, causal):
    reference = attention(*inputs(), mode=mode, causal=causal, backend="reference", return_lse=True)
    for backend in ("torch", "triton"):
        with count_launches() as launches:
            got = attention(*inputs(), mode=mode, causal=causal, backend=backend, return_lse=True)
        assert launches.attention == (backend == "triton")
        torch.testing.assert_close(got, reference, rtol=1e-5, atol=1e-5)


# more queries than are packed, so that each kernel for a shared prefix is launched
PREFIX_KERNELS = {6: "_packed_fwd_kernel", 20: "_shared_prefix_fwd_kernel"}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("factor_tokens", [0, 9, 14])
@pytest.mark.parametrize("queries", PREFIX_KERNELS)
def test_backends_agree_behind_a_prefix(mode, factor_tokens, queries):
    query, key, value, _ = inputs(query_tokens=queries)
    factor = torch.rand(2, factor_tokens) if factor_tokens else None
    call = {"mode": mode, "causal": True, "window": 9, "prefix": PREFIX, "return_lse": True}
    reference = attention(query, key, value, factor, backend="reference", **call)
    for backend in ("torch", "triton", "auto"):
        with count_launches() as launches:
            got = attention(query, key, value, factor, backend=backend, **call)
        fused = backend == "triton"
        assert launches.attention == launches[PREFIX_KERNELS[queries]] == fused
        torch.testing.assert_close(got, reference, rtol=1e-5, atol=1e-5)


def test_full_mode_takes_a_prefix():
    """Its minimum is taken over masked keys too, those of the prefix included."""
    query, key, value, factor = inputs()
    whole = [
        torch.cat([p.expand(2, -1, -1, -1), t], 2)
        for p, t in zip(PREFIX, (key, value), strict=True)
    ]
    call = {"mode": "min_shift_full", "causal": True, "window": 2}
    factors = torch.cat([torch.ones(2, 5), factor], 1)
    torch.testing.assert_close(
        attention(query, key, value, factor, prefix=PREFIX, **call),
        attention(query, *whole, factors, backend="reference", **call),
    )


@pytest.mark.parametrize("backend", ["torch", "triton", "reference"])
def test_an_empty_prefix_is_none(backend):
    none = tuple(t[:, :, :0] for t in PREFIX)
    call = {"causal": True, "return_lse": True, "backend": backend}
    got = attention(*inputs(), prefix=none, **call)
    expected = attention(*inputs(), **call)
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", ["torch", "triton", "reference"])
def test_a_prefix_alone(mode, backend):
    """No own keys: the last query stands at the prefix's last key."""
    query, key, value, _ = inputs()
    factor = torch.rand(2, 5)
    none = (query, key[:, :, :0], value[:, :, :0], factor)
    got = attention(*none, mode=mode, causal=True, prefix=PREFIX, backend=backend)
    whole = [t.expand(2, -1, -1, -1) for t in PREFIX]
    expected = attention(query, *whole, factor, mode=mode, causal=True, backend="reference")
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_gradients_reach_prefix_and_factors(mode):
    """Through ``auto``, as the oracle has them."""
    call = {"mode": mode, "causal": True}
    grads = []
    for backend in ("auto", "reference"):
        leaves = [t.clone().requires_grad_() for t in (QUERY, KEY, VALUE, *PREFIX)]
        factor = torch.linspace(0.1, 1.5, 28).view(2, 14).requires_grad_()
        query, key, value, *prefix = leaves
        output = attention(query, key, value, factor, prefix=tuple(prefix), backend=backend, **call)
        output.square().sum().backward()
        grads.append([t.grad for t in (*leaves, factor)])
    for got, expected in zip(*grads, strict=True):
        assert expected.abs().max() > 0
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_a_prefix_that_wants_gradients_gets_them():
    """Few queries would be packed, but the packed kernel saves nothing for a backward pass."""
    prefix = tuple(t.clone().requires_grad_() for t in PREFIX)
    with count_launches() as launches:
        output = attention(*inputs(), prefix=prefix, backend="triton")
        output.sum().backward()
    assert launches["_shared_prefix_fwd_kernel"] == launches.attention == 1
    assert all(t.grad is not None and t.grad.abs().max() > 0 for t in prefix)


@pytest.mark.parametrize(
    ("backend", "queries"), [("torch", 6), *(("triton", queries) for queries in PREFIX_KERNELS)]
)
def test_a_prefix_compiles_whole(backend, queries):
    def run(query, key, value, factor, prefix):
        return attention(
            query, key, value, factor, mode="min_shift", causal=True, prefix=prefix, backend=backend
        )

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (9, 12):
        case = (*inputs(query_tokens=queries, key_tokens=tokens), PREFIX)
        torch.testing.assert_close(compiled(*case), run(*case))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", ["torch", "triton", "reference"])
@pytest.mark.parametrize("features", [{}, {"softcap": 2.0}], ids=["plain", "softcap"])
def test_no_queries_and_no_keys(mode, backend, features):
    call = {"mode": mode, "backend": backend, "return_lse": True, **features}
    output, lse = attention(QUERY[:, :, :0], KEY, VALUE, FACTOR, **call)
    assert output.shape == (2, 4, 0, 16)
    assert lse.shape == (2, 4, 0)
    output, lse = attention(QUERY, KEY[:, :, :0], VALUE[:, :, :0], FACTOR[:, :0], **call)
    assert (output == 0).all()
    assert output.shape == QUERY.shape
    assert (lse == -torch.inf).all()


@pytest.mark.parametrize("backend", ["torch", "triton", "reference"])
def test_a_removed_key_may_have_the_largest_score(backend):
    query, key = torch.ones(1, 1, 1, 1), torch.tensor([200.0, 0.0])[None, None, :, None]
    value, factor = torch.tensor([5.0, 1.0])[None, None, :, None], torch.tensor([[0.0, 1.0]])
    output, lse = attention(
        query, key, value, factor, mode="log_additive", scale=1.0, backend=backend, return_lse=True
    )
    assert output.item() == 1
    assert lse.item() == 0


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("sinks", [torch.randn(8)[::2], torch.tensor([1.5]).expand(4)])
def test_sinks_may_have_any_stride(backend, sinks):
    expected = attention(*inputs(), sinks=sinks, backend="reference")
    got = attention(*inputs(), sinks=sinks, backend=backend)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("scale", [-0.2, 0.0])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_scale_may_be_zero_or_negative(mode, scale, backend):
    query, key, value, factor = inputs(query_tokens=9)  # square: the shortcut is_causal
    call = {"mode": mode, "causal": True, "scale": scale}
    expected = attention(query, key, value, factor, backend="reference", **call)
    got = attention(query, key, value, factor, backend=backend, **call)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("backend", "mode"), [*(("torch", mode) for mode in MODES), ("triton", "min_shift")]
)
def test_compiles_with_dynamic_shapes(backend, mode):
    """To the fused kernels a mode is a word among their operator's arguments."""

    def run(query, key, value, factor):
        return attention(
            query, key, value, factor, mode=mode, causal=True, window=7, backend=backend
        )

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (17, 33):
        case = inputs(3, 4, 2, tokens, tokens + 16)
        torch.testing.assert_close(compiled(*case), run(*case))


OPTIONALS = [
    {},
    {"causal": True, "window": 4, "softcap": 2.0},
    {"sinks": torch.zeros(4), "position_bias": torch.zeros(1, 4, 1, 9)},
    {"mask": torch.arange(9)[None].expand(2, 9) < 8, "query_offset": torch.tensor(0)},
    {"mask": torch.ones(1, 1, 6, 9, dtype=torch.bool), "causal": True, "query_offset": 2},
]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("features", OPTIONALS, ids=[" ".join(o) or "plain" for o in OPTIONALS])
def test_compiles_whole(mode, features):
    """The fused kernels do with gradients, in ``test_backward_autograd``."""

    def run(query, key, value, factor):
        return attention(query, key, value, factor, mode=mode, backend="torch", **features)

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs()), run(*inputs()))


@pytest.mark.parametrize("features", [OPTIONALS[0], OPTIONALS[3]], ids=["plain", "mask offset"])
def test_opcheck(features):
    """Without gradients; with them, ``test_backward_autograd`` has every feature."""
    query, key, value, factor = inputs()
    mask = features.get("mask")
    offset = features.get("query_offset", 3)
    arguments = (
        query,
        key,
        value,
        None,
        None,
        factor,
        features.get("sinks"),
        features.get("position_bias"),
        mask if mask is not None and mask.dim() == 2 else None,
        mask if mask is not None and mask.dim() == 4 else None,
        offset if isinstance(offset, torch.Tensor) else None,
        None,
        offset if isinstance(offset, int) else 0,
        "min_shift",
        features.get("causal", False),
        0.25,
        features.get("window"),
        features.get("softcap"),
        0.0,
        False,
        False,
    )
    torch.library.opcheck(torch.ops.atman_triton.attention_fwd.default, arguments)


def test_kernels_are_launched_on_their_tensors_device(monkeypatch):
    """Triton launches on the current device, which need not be that of a layer of a split model."""
    from atman_triton import triton_ops

    seen = []

    @contextlib.contextmanager
    def device_of(tensor):
        seen.append(tensor.device)
        yield
        seen.append("left")

    def operator(query, key):
        seen.append("launched")
        return query + key

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    guarded = triton_ops._on_their_device(operator)
    assert guarded(torch.ones(1), torch.ones(1)) == 2
    assert seen == [torch.device("cpu"), "launched", "left"]
    seen.clear()
    tensors = [t.requires_grad_() for t in inputs()[:3]]
    attention(*tensors, backend="triton")[0].sum().backward()
    assert len(seen) == 4


@pytest.mark.parametrize("queries", PREFIX_KERNELS)
def test_opcheck_of_a_prefix(queries):
    query, key, value, factor = inputs(query_tokens=queries)
    optional = (None, None, torch.ones(2, 14, dtype=torch.bool), None, torch.tensor(3), None, 0)
    options = ("min_shift", True, 0.25, 4, None, 0.0, False, False)
    torch.library.opcheck(
        torch.ops.atman_triton.attention_fwd.default,
        (query, key, value, *PREFIX, factor, *optional, *options),
    )


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operator returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(
                    self.elements, tensor.untyped_storage().nbytes() // tensor.element_size()
                )
        return out


@pytest.fixture
def open_operators(monkeypatch):
    """Call the launcher as a plain function: a dispatch mode does not see into an operator."""
    monkeypatch.setattr(
        backend_registry, "attention_triton", backend_registry.attention_triton._init_fn
    )


@pytest.mark.usefixtures("open_operators")
@pytest.mark.parametrize("mode", MODES)
def test_the_fused_path_holds_no_score_matrix(mode):
    tokens, dim = 160, 16
    query, key, value, factor = inputs(1, 2, 1, tokens, tokens, dim)
    features = {"mode": mode, "causal": True, "window": 100, "softcap": 3.0}
    features["mask"] = torch.ones(1, tokens, dtype=torch.bool)
    with LargestTensor() as largest:
        attention(query, key, value, factor, backend="triton", return_lse=True, **features)
    assert query.numel() <= largest.elements < tokens * tokens
    with LargestTensor() as largest:
        attention(query, key, value, factor, backend="reference", **features)
    assert largest.elements >= tokens * tokens  # the same instrument sees the score matrix


@pytest.mark.usefixtures("open_operators")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("tokens", [4, 24], ids=["packed", "long"])
def test_the_fused_path_copies_no_prefix(mode, tokens):
    """Neither a prefix per batch row, B·Tp·D, nor a score matrix, Tq·(Tp + Tk)."""
    batch, prefix_tokens, dim = 16, 200, 16
    query, key, value, factor = inputs(batch, 2, 1, tokens, tokens, dim)
    prefix = tuple(torch.randn(2, 1, 1, prefix_tokens, dim))
    factor = torch.cat([torch.ones(batch, prefix_tokens), factor], 1)
    factor[:, 7] = 0.5
    with LargestTensor() as largest:
        attention(
            query, key, value, factor, mode=mode, causal=True, prefix=prefix, backend="triton"
        )
    scores = batch * 2 * tokens * (prefix_tokens + tokens)
    assert query.numel() <= largest.elements < min(batch * prefix_tokens * dim, scores)
    with LargestTensor() as largest:
        attention(
            query, key, value, factor, mode=mode, causal=True, prefix=prefix, backend="reference"
        )
    assert largest.elements >= max(batch * prefix_tokens * dim, scores)
