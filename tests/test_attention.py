"""The op: errors, backend choice, registration, and what the fused path allocates."""

import re
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from atman_triton import attention
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

# name: (arguments replaced, error, its whole text)
BAD = {
    "query-dim": (
        {"query": QUERY[0]},
        ValueError,
        "query must have 4 dimensions [batch, heads, tokens, dim], got shape [4, 6, 16].",
    ),
    "query-dtype": (
        {"query": QUERY.int()},
        TypeError,
        "query must have a floating dtype, got torch.int32.",
    ),
    "query-type": ({"query": [1.0]}, TypeError, "query must be a tensor, got list."),
    "key-dtype": (
        {"key": KEY.half()},
        TypeError,
        "key must have query's dtype torch.float32, got torch.float16.",
    ),
    "key-batch": (
        {"key": KEY.repeat(2, 1, 1, 1)},
        ValueError,
        "key must have batch 2 or 1, got 4.",
    ),
    "key-dim": ({"key": KEY[..., :8]}, ValueError, "key must have query's head dim 16, got 8."),
    "value-tokens": (
        {"value": VALUE[:, :, 1:]},
        ValueError,
        "value must have key's heads and tokens [2, 9], got [2, 8].",
    ),
    "heads": (
        {"query": QUERY[:, :3]},
        ValueError,
        "query heads must be a multiple of key heads, got 3 and 2.",
    ),
    "factor-shape": (
        {"key_factor": FACTOR[:, :5]},
        ValueError,
        "key_factor must have shape [2, 9] or [2, 4, 9], got [2, 5].",
    ),
    "factor-half": (
        {"key_factor": FACTOR.half()},
        TypeError,
        "key_factor must be torch.float32, got torch.float16; use key_factor.float().",
    ),
    "factor-double": (
        {"key_factor": FACTOR.double()},
        TypeError,
        "key_factor must be torch.float32, got torch.float64; use key_factor.float().",
    ),
    "factor-device": (
        {"key_factor": FACTOR.to("meta")},
        ValueError,
        "key_factor must be on query's device cpu, got meta.",
    ),
    "key-device": (
        {"key": KEY.to("meta")},
        ValueError,
        "key must be on query's device cpu, got meta.",
    ),
    "value-device": (
        {"value": VALUE.to("meta"), "backend": "triton"},
        ValueError,
        "value must be on query's device cpu, got meta.",
    ),
    "no-heads": (
        {"query": QUERY[:, :0]},
        ValueError,
        "query heads must be a multiple of key heads, got 0 and 2.",
    ),
    "no-value-dim": (
        {"value": VALUE[..., :0]},
        ValueError,
        "value must have a head dim of at least 1, got 0.",
    ),
    "causal": ({"causal": "no"}, TypeError, "causal must be True or False, got 'no'."),
    "window-type": ({"window": 1.5}, TypeError, "window must be an int, got 1.5."),
    "window-bool": ({"window": True}, TypeError, "window must be an int, got True."),
    "offset-type": ({"query_offset": 1.5}, TypeError, "query_offset must be an int, got 1.5."),
    "softcap-type": ({"softcap": "a"}, TypeError, "softcap must be a number, got 'a'."),
    "scale-type": ({"scale": "a"}, TypeError, "scale must be a number, got 'a'."),
    "sinks-dtype": (
        {"sinks": torch.zeros(4, dtype=torch.int)},
        TypeError,
        "sinks must have a floating dtype, got torch.int32.",
    ),
    "mode": (
        {"mode": "add"},
        ValueError,
        "mode must be one of multiplicative, min_shift, min_shift_full, log_additive, got 'add'.",
    ),
    "backend": (
        {"backend": "cuda"},
        ValueError,
        "backend must be one of auto, triton, torch, reference, got 'cuda'.",
    ),
    "window": ({"window": 0}, ValueError, "window must be at least 1 token, got 0."),
    "softcap": ({"softcap": 0.0}, ValueError, "softcap must be greater than 0, got 0.0."),
    "sinks": ({"sinks": torch.zeros(2)}, ValueError, "sinks must have shape [4], got [2]."),
    "bias-shape": (
        {"position_bias": torch.zeros(1, 4, 6, 8)},
        ValueError,
        "position_bias must broadcast to [2, 4, 6, 9], got [1, 4, 6, 8].",
    ),
    "bias-dtype": (
        {"position_bias": torch.zeros(1, 4, 6, 9, dtype=torch.int)},
        TypeError,
        "position_bias must have a floating dtype, got torch.int32.",
    ),
    "mask-dtype": (
        {"mask": torch.ones(2, 9)},
        TypeError,
        "mask must be torch.bool (True = visible), got torch.float32.",
    ),
    "mask-padding": (
        {"mask": torch.ones(2, 6, dtype=torch.bool)},
        ValueError,
        "mask must have shape [2, 9] or [2, 4, 6, 9], got [2, 6].",
    ),
    "mask-dense": (
        {"mask": torch.ones(2, 1, 1, 9, dtype=torch.bool)},
        ValueError,
        "mask must have shape [2, 4, 6, 9], got [2, 1, 1, 9].",
    ),
    "offset": (
        {"query_offset": torch.tensor(0.5)},
        ValueError,
        "query_offset must be an int or an integer tensor of one element, "
        "got torch.float32 of shape [].",
    ),
    "dropout-type": ({"dropout": "a"}, TypeError, "dropout must be a number, got 'a'."),
    "dropout-bool": ({"dropout": True}, TypeError, "dropout must be a number, got True."),
    "dropout-one": (
        {"dropout": 1.0},
        ValueError,
        "dropout must be at least 0 and less than 1, got 1.0.",
    ),
    "dropout-negative": (
        {"dropout": -0.1},
        ValueError,
        "dropout must be at least 0 and less than 1, got -0.1.",
    ),
    "dropout-nan": (
        {"dropout": float("nan")},
        ValueError,
        "dropout must be at least 0 and less than 1, got nan.",
    ),
    "seed-type": ({"dropout_seed": 1.5}, TypeError, "dropout_seed must be an int, got 1.5."),
    "seed-size": (
        {"dropout_seed": 1 << 63},
        ValueError,
        "dropout_seed must fit in 64 bits with sign, got 9223372036854775808.",
    ),
    "seed-dtype": (
        {"dropout_seed": torch.zeros(1)},
        ValueError,
        "dropout_seed must be an int or a torch.int64 tensor of one element, "
        "got torch.float32 of shape [1].",
    ),
    "seed-shape": (
        {"dropout_seed": torch.zeros(2, dtype=torch.int64)},
        ValueError,
        "dropout_seed must be an int or a torch.int64 tensor of one element, "
        "got torch.int64 of shape [2].",
    ),
    "seed-device": (
        {"dropout_seed": torch.zeros(1, dtype=torch.int64, device="meta")},
        ValueError,
        "dropout_seed must be on query's device cpu, got meta.",
    ),
    "full-torch": (
        {"mode": "min_shift_full", "backend": "torch"},
        ValueError,
        "backend='torch' cannot serve mode='min_shift_full'; use backend='reference'.",
    ),
    "full-triton": (
        {"mode": "min_shift_full", "backend": "triton"},
        ValueError,
        "backend='triton' cannot serve mode='min_shift_full'; use backend='reference'.",
    ),
    "prefix-type": (
        {"prefix": [PREFIX[0], PREFIX[1]]},
        TypeError,
        "prefix must be a tuple (key, value), got list.",
    ),
    "prefix-length": (
        {"prefix": (*PREFIX, None)},
        TypeError,
        "prefix must be a tuple (key, value), got a tuple of 3.",
    ),
    "prefix-tensor": (
        {"prefix": (PREFIX[0], None)},
        TypeError,
        "prefix value must be a tensor, got NoneType.",
    ),
    "prefix-device": (
        {"prefix": (PREFIX[0].to("meta"), PREFIX[1])},
        ValueError,
        "prefix key must be on query's device cpu, got meta.",
    ),
    "prefix-dtype": (
        {"prefix": (PREFIX[0], PREFIX[1].half())},
        TypeError,
        "prefix value must have query's dtype torch.float32, got torch.float16.",
    ),
    "prefix-key-dim": (
        {"prefix": (PREFIX[0][..., :8], PREFIX[1])},
        ValueError,
        "prefix key must have shape [1, 2, Tp, 16], got [1, 2, 5, 8].",
    ),
    "prefix-key-rank": (
        {"prefix": (PREFIX[0][0], PREFIX[1])},
        ValueError,
        "prefix key must have shape [1, 2, Tp, 16], got [2, 5, 16].",
    ),
    "prefix-key-batch": (
        {"prefix": tuple(t.expand(2, -1, -1, -1) for t in PREFIX)},
        ValueError,
        "prefix key must have shape [1, 2, Tp, 16], got [2, 2, 5, 16].",
    ),
    "prefix-value-tokens": (
        {"prefix": (PREFIX[0], PREFIX[1][:, :, 1:])},
        ValueError,
        "prefix value must have shape [1, 2, 5, 16], got [1, 2, 4, 16].",
    ),
    "prefix-factor": (
        {"prefix": PREFIX, "key_factor": FACTOR[:, :5]},
        ValueError,
        "key_factor must have shape [2, 14] or [2, 4, 14], or [2, 9] or [2, 4, 9] without the "
        "prefix, got [2, 5].",
    ),
    "prefix-mask": (
        {"prefix": PREFIX, "mask": torch.ones(2, 9, dtype=torch.bool)},
        ValueError,
        "mask must have shape [2, 14] or [2, 4, 6, 14], got [2, 9].",
    ),
    "prefix-bias": (
        {"prefix": PREFIX, "position_bias": torch.zeros(1, 4, 6, 9)},
        ValueError,
        "position_bias must broadcast to [2, 4, 6, 14], got [1, 4, 6, 9].",
    ),
    "prefix-full-torch": (
        {"prefix": PREFIX, "mode": "min_shift_full", "backend": "torch"},
        ValueError,
        "backend='torch' cannot serve mode='min_shift_full'; use backend='reference'.",
    ),
    "double-triton": (
        {
            "query": QUERY.double(),
            "key": KEY.double(),
            "value": VALUE.double(),
            "backend": "triton",
        },
        ValueError,
        "backend='triton' serves fp16, bf16 and fp32, got torch.float64; use backend='torch'.",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_by_name(name):
    replaced, error, text = BAD[name]
    arguments = {"query": QUERY, "key": KEY, "value": VALUE, "key_factor": FACTOR} | replaced
    with pytest.raises(error, match=f"^{re.escape(text)}$"):
        attention(**arguments)


def test_head_dim_too_large_for_triton():
    query, key, value, factor = inputs(dim=260)
    with pytest.raises(ValueError, match="serves head dims up to 256, got 260"):
        attention(query, key, value, factor, backend="triton")


def test_triton_without_gpu_or_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match=r"needs a GPU or the interpreter \(TRITON_INTERPRET=1\)"):
        attention(*inputs(), backend="triton")


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


def test_full_mode_takes_a_prefix_on_the_reference():
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


@pytest.mark.parametrize("queries", PREFIX_KERNELS)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_prefix_compiles_whole(queries, backend):
    def run(query, key, value, factor, prefix):
        return attention(
            query, key, value, factor, mode="min_shift", causal=True, prefix=prefix, backend=backend
        )

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (9, 12):
        case = (*inputs(query_tokens=queries, key_tokens=tokens), PREFIX)
        torch.testing.assert_close(compiled(*case), run(*case))


def test_full_mode_is_served_by_the_reference():
    call = {"mode": "min_shift_full", "causal": True}
    torch.testing.assert_close(
        attention(*inputs(), **call), attention(*inputs(), backend="reference", **call)
    )


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


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_compiles_with_dynamic_shapes(mode, backend):
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
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_compiles_whole(mode, features, backend):
    def run(query, key, value, factor):
        return attention(query, key, value, factor, mode=mode, backend=backend, **features)

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs()), run(*inputs()))


@pytest.mark.parametrize("features", OPTIONALS, ids=[" ".join(o) or "plain" for o in OPTIONALS])
def test_opcheck(features):
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
    )
    torch.library.opcheck(torch.ops.atman_triton.attention_fwd.default, arguments)


@pytest.mark.parametrize("queries", PREFIX_KERNELS)
def test_opcheck_of_a_prefix(queries):
    query, key, value, factor = inputs(query_tokens=queries)
    optional = (None, None, torch.ones(2, 14, dtype=torch.bool), None, torch.tensor(3), None, 0)
    options = ("min_shift", True, 0.25, 4, None, 0.0, False)
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
    module = sys.modules["atman_triton.attention"]  # the package's attribute is the function
    monkeypatch.setattr(module, "attention_triton", module.attention_triton._init_fn)


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
