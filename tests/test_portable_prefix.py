"""Portable attention behind a shared prefix, against the oracle over concatenated keys."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from atman_triton.attention import attention
from atman_triton.kernels import portable_blocks, portable_eager
from atman_triton.kernels.portable_prefix import attention_portable_prefix
from atman_triton.kernels.reference import attention_reference
from atman_triton.testing import assert_close_to_oracle

MODES = ("multiplicative", "min_shift", "log_additive", "min_shift_full")
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
B, HQ, HK = 3, 4, 2
SEEDS = range(200)

# (Tq, Tk, Tp, D, Dv)
SHAPES = [
    (1, 1, 37, 16, 16),
    (8, 8, 63, 16, 24),
    (70, 70, 33, 24, 16),
    (20, 41, 9, 40, 40),
    (5, 0, 23, 16, 16),
    (33, 33, 1, 16, 16),
]


def draw_case(seed):
    """One random combination of every feature; the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)

    def choose(options):
        return options[int(torch.randint(len(options), (), generator=generator))]

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    def rand(*shape):
        return torch.rand(*shape, generator=generator)

    query_tokens, own_tokens, prefix_tokens, head_dim, value_dim = choose(SHAPES)
    key_heads = choose([HK, HK, 1, HQ])
    tokens = prefix_tokens + own_tokens
    kind = choose(["none", "own", "own heads", "all", "all heads", "few", "few heads"])
    factor = None
    if kind != "none":
        length = own_tokens if "own" in kind else tokens
        factor = rand(B, HQ, length) * 1.5
        factor[factor < 0.3] = 0.0
        factor[(factor > 0.6) & (factor < 1.1)] = 1.0
        if "few" in kind:  # one changed column in each row at most, and none in the first
            column = torch.randint(length, (B, HQ, 1), generator=generator)
            column = column if "heads" in kind else column[:, :1].expand(-1, HQ, -1)
            kept = torch.zeros_like(factor, dtype=torch.bool).scatter_(-1, column, True)
            kept[0] = False
            factor = torch.where(kept, factor[:1, :1, :1] * 0.5, 1.0)
        factor = factor if "heads" in kind else factor[:, 0].clone()
    tensors = {
        "query": randn(B, HQ, query_tokens, head_dim),
        "key": randn(choose([1, B, B]), key_heads, own_tokens, head_dim),
        "value": randn(choose([1, B, B]), key_heads, own_tokens, value_dim),
        "key_factor": factor,
        "prefix_key": randn(1, key_heads, prefix_tokens, head_dim),
        "prefix_value": randn(1, key_heads, prefix_tokens, value_dim),
        "sinks": choose([None, None, randn(HQ)]),
        "position_bias": choose(
            [None, None, randn(1, HQ, 1, tokens), randn(B, 1, query_tokens, tokens)]
        ),
    }
    columns = torch.arange(tokens)[None]
    mask = choose(
        [
            None,
            None,
            columns >= torch.tensor([[0], [3], [tokens]]),  # left padding, all of it in a row
            columns < torch.tensor([[tokens], [tokens - 2], [1]]),
            rand(B, tokens) > 0.4,  # holes
            rand(B, 1, query_tokens, tokens) > 0.5,
            rand(1, HQ, query_tokens, tokens) > 0.5,
        ]
    )
    features = {
        "mode": choose(MODES),
        "causal": choose([False, True, True]),
        "query_offset": choose([None, None, 0, -2, tokens, torch.tensor(2)]),
        "window": choose([None, None, 5]),
        "softcap": choose([None, None, 1.5]),
        "scale": choose([None, 0.3]),
        "mask": mask,
    }
    return tensors, features, choose([False, True]), choose([False, False, True]), choose(DTYPES)


def concatenated(tensors):
    """The same without a prefix: keys of every row in full, a factor for each."""
    tensors = dict(tensors)
    for name in ("key", "value"):
        parts = (tensors.pop(f"prefix_{name}"), tensors[name])
        tensors[name] = torch.cat([part.expand(B, -1, -1, -1) for part in parts], dim=2)
    factor = tensors["key_factor"]
    if factor is not None:
        missing = tensors["key"].shape[2] - factor.shape[-1]
        tensors["key_factor"] = torch.cat(
            [factor.new_ones(*factor.shape[:-1], missing), factor], dim=-1
        )
    return tensors


def cut_from_cache(tensor):
    """The same numbers as a view of a longer buffer that holds NaN elsewhere."""
    batch, heads, tokens, dim = tensor.shape
    buffer = tensor.new_full((batch, tokens + 5, heads, dim), torch.nan)
    buffer[:, :tokens] = tensor.transpose(1, 2)
    return buffer.transpose(1, 2)[:, :, :tokens]


def call(tensors, features, **more):
    tensors = dict(tensors)
    prefix = tuple(cut_from_cache(tensors.pop(f"prefix_{name}")) for name in ("key", "value"))
    return attention(**tensors, **features, prefix=prefix, backend="torch", **more)


@pytest.mark.parametrize("seed", SEEDS)
def test_combinations_meet_the_tolerance_rule(seed, monkeypatch):
    if seed % 2:  # calls as small as these are never searched for changed columns otherwise
        monkeypatch.setattr(portable_blocks, "_SCORES_TO_SEARCH", 0)
    tensors, features, return_lse, needs_grad, dtype = draw_case(seed)

    def cast(to):
        keep = {"key_factor": torch.float64 if to == torch.float64 else torch.float32}
        return {
            name: None if tensor is None else tensor.to(dtype).to(keep.get(name, to))
            for name, tensor in tensors.items()
        }

    if tensors["key_factor"] is not None:  # the factor itself is never rounded to half
        tensors["key_factor"] = tensors["key_factor"].to(dtype).float()
    exact = attention_reference(**concatenated(cast(torch.float64)), **features)
    eager = attention_reference(**concatenated(cast(dtype)), **features)
    given_tensors = cast(dtype)
    given_tensors["query"].requires_grad_(needs_grad)  # autograd and blocks go different ways
    actual = call(given_tensors, features, return_lse=return_lse)
    if not return_lse:
        actual = (actual,)
    for got, plain, truth in zip(actual, eager, exact, strict=False):
        assert got.requires_grad == needs_grad
        if dtype == torch.float64:  # the rule would hold float64 against itself
            torch.testing.assert_close(got.detach(), truth, rtol=1e-12, atol=1e-13)
        else:
            assert_close_to_oracle(got.detach(), plain, truth)


def test_the_draw_covers_every_pair_of_features():
    """The seeds above are only worth something if they combine everything with everything."""
    seen = set()
    for seed in SEEDS:
        tensors, features, return_lse, needs_grad, dtype = draw_case(seed)
        factor, mask = tensors["key_factor"], features["mask"]
        own = factor is not None and factor.shape[-1] == tensors["key"].shape[2]
        few = factor is not None and bool((factor[0] == 1).all())
        labels = {
            "mode=" + ("none" if factor is None else features["mode"]),
            f"causal={features['causal']}",
            f"dtype={dtype}",
            f"lse={return_lse}",
            f"grad={needs_grad}",
            f"heads={factor is not None and factor.dim() == 3}",
            f"own={own}",
            f"few={few}",
            f"mask={None if mask is None else mask.dim()}",
            f"group={HQ // tensors['key'].shape[1]}",
            *(f"{name}={features[name] is not None}" for name in ("window", "softcap", "scale")),
            *(f"{name}={tensors[name] is not None}" for name in ("sinks", "position_bias")),
        }
        seen |= set(itertools.combinations(sorted(labels), 2))
    labels = {label for pair in seen for label in pair}
    missing = {
        (a, b)
        for a, b in itertools.combinations(sorted(labels), 2)
        if a.split("=")[0] != b.split("=")[0] and (a, b) not in seen
    }
    assert len(labels) > 35
    plain = {("heads=True", "mode=none"), ("few=True", "mode=none"), ("mode=none", "own=True")}
    assert missing <= plain  # without factors they have no shape


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 5),
    tokens=st.tuples(st.integers(1, 40), st.integers(0, 40), st.integers(0, 40)),
    heads=st.sampled_from([(1, 1), (4, 1), (6, 2), (3, 3)]),
    budget=st.sampled_from([1, 300, 2000, 1 << 21]),
    causal_rows=st.sampled_from([3, 64]),
    mode=st.sampled_from(MODES),
    causal=st.booleans(),
    window=st.none() | st.integers(1, 50),
    changed=st.integers(0, 3),
    seed=st.integers(0, 1 << 16),
)
def test_any_size_in_any_blocks(
    batch, tokens, heads, budget, causal_rows, mode, causal, window, changed, seed
):
    query_tokens, own_tokens, prefix_tokens = tokens
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    query = randn(batch, heads[0], query_tokens, 8)
    key, value = randn(2, batch, heads[1], own_tokens, 8)
    prefix = tuple(randn(2, 1, heads[1], prefix_tokens, 8))
    factor = torch.ones(batch, prefix_tokens + own_tokens, dtype=torch.float64)
    if factor.numel():
        at = torch.randint(factor.shape[1], (batch, changed), generator=generator)
        factor.scatter_(1, at, torch.rand(batch, changed, generator=generator).double())
    features = {"mode": mode, "causal": causal, "window": window, "return_lse": True}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(portable_blocks, "_SCORES_PER_BLOCK", budget)
        patch.setattr(portable_blocks, "_CAUSAL_ROWS", causal_rows)
        actual = attention(query, key, value, factor, prefix=prefix, backend="torch", **features)
    keys, values = (
        torch.cat([shared.expand(batch, -1, -1, -1), own], 2)
        for shared, own in zip(prefix, (key, value), strict=True)
    )
    expected = attention(query, keys, values, factor, backend="reference", **features)
    for got, truth in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, truth, rtol=1e-11, atol=1e-12)


GRADIENT_CASES = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"causal": True, "window": 6, "return_lse": True},
    "cap": {"softcap": 2.0, "causal": True},
}


def gradient_leaves():
    generator = torch.Generator().manual_seed(0)
    shapes = [(B, HQ, 5, 4), (B, HK, 5, 4), (B, HK, 5, 3), (1, HK, 7, 4), (1, HK, 7, 3)]
    leaves = [torch.randn(*s, generator=generator, dtype=torch.float64) for s in shapes]
    factor = torch.rand(B, 12, generator=generator, dtype=torch.float64)
    factor[:, 2], factor[:, 5] = 0.0, 1.0
    sinks = torch.randn(HQ, generator=generator, dtype=torch.float64)
    return [*leaves, factor, sinks]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", GRADIENT_CASES)
def test_gradients_equal_the_oracle(mode, name):
    features = GRADIENT_CASES[name]
    mask = torch.ones(B, 12, dtype=torch.bool)
    mask[0, :8] = False  # some rows see nothing where causal
    gradients = []
    for joined in (False, True):
        leaves = [leaf.requires_grad_() for leaf in gradient_leaves()]
        query, key, value, prefix_key, prefix_value, factor, sinks = leaves
        more = {"prefix": (prefix_key, prefix_value), "backend": "torch"}
        if joined:
            key = torch.cat([prefix_key.expand(B, -1, -1, -1), key], 2)
            value = torch.cat([prefix_value.expand(B, -1, -1, -1), value], 2)
            more = {"backend": "reference"}
        more |= {"sinks": sinks} if name == "cap" else {}
        out = attention(query, key, value, factor, mode=mode, mask=mask, **features, **more)
        out = out if isinstance(out, tuple) else (out,)
        loss = sum(
            (part.masked_fill(part.isinf(), 0.0) * torch.arange(part.numel()).view_as(part)).sum()
            for part in out
        )
        gradients.append(torch.autograd.grad(loss, leaves, allow_unused=True))
    for got, truth in zip(*gradients, strict=True):
        assert (got is None) == (truth is None)
        if got is not None:
            torch.testing.assert_close(got, truth, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mode", MODES)
def test_gradcheck(mode):
    def run(query, key, value, prefix_key, prefix_value, factor):
        return attention(
            query[:1, :, :3],
            key[:1],
            value[:1],
            factor[:1],
            mode=mode,
            causal=True,
            prefix=(prefix_key, prefix_value),
            backend="torch",
            return_lse=True,
        )

    leaves = [leaf.requires_grad_() for leaf in gradient_leaves()[:-1]]
    with torch.no_grad():
        leaves[-1].add_(0.1)  # the removed key of log_additive has no derivative from below
    assert torch.autograd.gradcheck(run, leaves)


class Largest(TorchDispatchMode):
    """Number of elements of the largest storage that any operator returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                size = leaf.untyped_storage().nbytes() // leaf.element_size()
                self.elements = max(self.elements, size)
        return result


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("needs_grad", [False, True], ids=["blocks", "autograd"])
@pytest.mark.parametrize("length", ["own", "all"])
def test_the_prefix_is_never_copied_per_row(mode, dtype, needs_grad, length):
    rows, tokens, head_dim = 160, 512, 64
    query = torch.randn(rows, HQ, 2, head_dim).to(dtype).requires_grad_(needs_grad)
    key, value = torch.randn(2, rows, HK, 2, head_dim).to(dtype)
    prefix = tuple(torch.randn(2, 1, HK, tokens, head_dim).to(dtype))
    factor = torch.ones(rows, 2 + (tokens if length == "all" else 0))
    factor[:, 1] = 0.5
    with Largest() as largest:
        output = attention(
            query, key, value, factor, mode=mode, causal=True, prefix=prefix, backend="torch"
        )
        if needs_grad:
            output.sum().backward()
    copies = rows * HK * tokens * head_dim
    # scores are [rows, HQ, 2, 514]: an eighth of the copies; blocks of them are bounded
    assert 0 < largest.elements < copies / 4
    if not needs_grad:
        assert largest.elements <= portable_blocks._SCORES_PER_BLOCK


def test_scores_are_held_for_one_block_only():
    rows = 64
    query = torch.randn(rows, HQ, 64, 8)
    key, value = torch.randn(2, rows, HK, 64, 8)
    prefix = tuple(torch.randn(2, 1, HK, 960, 8))
    with Largest() as largest:
        attention(query, key, value, causal=True, prefix=prefix, backend="torch")
    assert rows * HQ * 64 * 1024 > 4 * portable_blocks._SCORES_PER_BLOCK
    assert largest.elements <= portable_blocks._SCORES_PER_BLOCK


@pytest.mark.parametrize("mode", MODES)
def test_autograd_in_many_small_blocks_changes_nothing(monkeypatch, mode):
    tensors, features, *_ = draw_case(4)
    tensors = {n: None if t is None else t.double() for n, t in tensors.items()}
    tensors["query"].requires_grad_()
    features |= {"mode": mode, "causal": True, "query_offset": None}
    whole = call(tensors, features)
    monkeypatch.setattr(portable_eager, "SCORES_PER_BLOCK", 1)
    monkeypatch.setattr(portable_eager, "CAUSAL_BLOCK", 7)
    torch.testing.assert_close(call(tensors, features), whole)


@pytest.mark.parametrize("mode", MODES)
def test_compiled_equals_eager(mode):
    query = torch.randn(B, HQ, 5, 16)
    key, value = torch.randn(2, B, HK, 5, 16)
    prefix = tuple(torch.randn(2, 1, HK, 11, 16))
    factor = torch.ones(B, 5)
    factor[:, 2] = 0.3

    def run(query, key, value, factor, *prefix):
        return attention(
            query, key, value, factor, mode=mode, causal=True, prefix=prefix, backend="torch"
        )

    compiled = torch.compile(run, backend="eager", fullgraph=True)
    expected = run(query, key, value, factor, *prefix)
    torch.testing.assert_close(compiled(query, key, value, factor, *prefix), expected)


def test_an_empty_prefix_is_no_prefix():
    query, key, value = (torch.randn(B, HK, 6, 16) for _ in range(3))
    factor = torch.rand(B, 6)
    features = {
        "mode": "min_shift",
        "causal": True,
        "query_offset": 0,
        "scale": 0.25,
        "return_lse": True,
        "dropout": 0.0,
    } | dict.fromkeys(("window", "softcap", "sinks", "position_bias", "mask", "dropout_seed"))
    actual = attention_portable_prefix(
        query, key, value, factor, key[:1, :, :0], value[:1, :, :0], **features
    )
    expected = attention(
        query, key, value, factor, mode="min_shift", causal=True, return_lse=True, backend="torch"
    )
    assert all(map(torch.equal, actual, expected))


@pytest.mark.parametrize(
    "sinks", [None, torch.tensor([0.5, -1.0, 2.0, 0.0])], ids=["none", "sinks"]
)
def test_rows_that_see_no_key(sinks):
    query = torch.randn(2, HQ, 3, 16)
    key, value = torch.randn(2, 2, HK, 3, 16)
    prefix = tuple(torch.randn(2, 1, HK, 4, 16))
    mask = torch.tensor([[False], [True]]).expand(2, 7)
    factor = torch.rand(2, 7)
    for mode in MODES:
        output, lse = attention(
            query,
            key,
            value,
            factor,
            mode=mode,
            mask=mask,
            prefix=prefix,
            sinks=sinks,
            return_lse=True,
            backend="torch",
        )
        assert (output[0] == 0).all() and output[1].abs().sum() > 0
        expected = torch.full((HQ,), -torch.inf) if sinks is None else sinks
        torch.testing.assert_close(lse[0], expected[:, None].expand(HQ, 3))
        assert lse[1].isfinite().all()


def test_removing_every_key_gives_zero():
    query, key, value = (torch.randn(1, 1, 4, 16) for _ in range(3))
    prefix = tuple(torch.randn(2, 1, 1, 3, 16))
    output, lse = attention(
        query,
        key,
        value,
        torch.zeros(1, 7),
        mode="log_additive",
        prefix=prefix,
        backend="torch",
        return_lse=True,
    )
    assert (output == 0).all() and (lse == -torch.inf).all()


def test_nan_is_not_taken_for_a_row_without_keys():
    query, key, value = (torch.randn(1, 1, 4, 16) for _ in range(3))
    query[0, 0, 1] = torch.nan
    prefix = tuple(torch.randn(2, 1, 1, 3, 16))
    mask = torch.ones(1, 7, dtype=torch.bool)
    output = attention(query, key, value, mask=mask, prefix=prefix, backend="torch")
    assert output[0, 0].isnan().all(-1).tolist() == [False, True, False, False]
