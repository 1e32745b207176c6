"""The portable backend against the float64 oracle, feature by feature and combined."""

import itertools

import pytest
import torch

from atman_triton.attention import attention
from atman_triton.kernels import portable, portable_blocks, portable_eager
from atman_triton.kernels.recompute import recomputed
from atman_triton.kernels.reference import attention_reference
from atman_triton.testing import assert_close_to_oracle

MODES = ("multiplicative", "min_shift", "log_additive", "min_shift_full")
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
B, HQ, HK = 2, 4, 2

# (Tq, Tk, D, Dv)
SHAPES = [(1, 1, 16, 16), (1, 37, 16, 16), (33, 33, 40, 40), (150, 150, 16, 24), (20, 41, 24, 16)]


def draw_case(seed):
    """One random combination of every feature; the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)

    def choose(options):
        return options[int(torch.randint(len(options), (), generator=generator))]

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    def rand(*shape):
        return torch.rand(*shape, generator=generator)

    query_tokens, key_tokens, head_dim, value_dim = choose(SHAPES)
    batch_kv = choose([1, B])
    factor = rand(*choose([(B, key_tokens), (B, HQ, key_tokens)])) * 1.5
    factor[factor < 0.3] = 0.0
    factor[(factor > 0.6) & (factor < 1.1)] = 1.0
    tensors = {
        "query": randn(B, HQ, query_tokens, head_dim),
        "key": randn(batch_kv, HK, key_tokens, head_dim),
        "value": randn(batch_kv, HK, key_tokens, value_dim),
        "key_factor": choose([factor, factor, None]),
        "sinks": choose([None, None, randn(HQ)]),
        "position_bias": choose(
            [None, None, randn(1, HQ, 1, key_tokens), randn(B, 1, query_tokens, key_tokens)]
        ),
    }
    mask = choose(
        [
            None,
            None,
            torch.arange(key_tokens)[None] >= torch.tensor([[3], [0]]),  # left padding
            torch.arange(key_tokens)[None] < torch.tensor([[key_tokens], [key_tokens - 2]]),
            rand(B, 1, query_tokens, key_tokens) > 0.5,
        ]
    )
    features = {
        "mode": choose(MODES),
        "causal": choose([False, True]),
        "query_offset": choose([None, 0, torch.tensor(2)]),
        "window": choose([None, None, 5]),
        "softcap": choose([None, None, 1.5]),
        "scale": choose([None, 0.3]),
        "mask": mask,
    }
    return tensors, features, choose([False, True]), choose([False, True]), choose(DTYPES)


@pytest.mark.parametrize("seed", range(160))
def test_combinations_meet_the_tolerance_rule(seed):
    tensors, features, return_lse, needs_grad, dtype = draw_case(seed)

    def cast(to):
        keep = {"key_factor": torch.float64 if to == torch.float64 else torch.float32}
        return {
            name: None if tensor is None else tensor.to(dtype).to(keep.get(name, to))
            for name, tensor in tensors.items()
        }

    if tensors["key_factor"] is not None:  # the factor itself is never rounded to half
        tensors["key_factor"] = tensors["key_factor"].to(dtype).float()
    exact = attention_reference(**cast(torch.float64), **features)
    eager = attention_reference(**cast(dtype), **features)
    given = cast(dtype)
    given["query"].requires_grad_(needs_grad)  # autograd and blocks go different ways
    actual = attention(**given, **features, return_lse=return_lse, backend="torch")
    if not return_lse:
        actual = (actual,)
    for got, plain, truth in zip(actual, eager, exact, strict=False):
        assert got.requires_grad == needs_grad
        got = got.detach()
        if dtype == torch.float64:  # the rule would hold float64 against itself
            torch.testing.assert_close(got, truth, rtol=1e-12, atol=1e-13)
        else:
            assert_close_to_oracle(got, plain, truth)


def test_the_draw_covers_every_pair_of_features():
    """The seeds above are only worth something if they combine everything with everything."""
    seen = set()
    for seed in range(160):
        tensors, features, return_lse, needs_grad, dtype = draw_case(seed)
        factor = tensors["key_factor"]
        labels = {
            "mode=" + ("none" if factor is None else features["mode"]),
            f"causal={features['causal']}",
            f"dtype={dtype}",
            f"lse={return_lse}",
            f"grad={needs_grad}",
            f"heads={factor is not None and factor.dim() == 3}",
            f"mask={None if features['mask'] is None else features['mask'].dim()}",
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
    assert missing <= {("heads=True", "mode=none")}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("features", [{}, {"softcap": 2.0}], ids=["folded", "eager"])
@pytest.mark.parametrize("needs_grad", [False, True], ids=["blocks", "autograd"])
def test_many_small_blocks_change_nothing(monkeypatch, mode, features, needs_grad):
    query = torch.randn(B, HQ, 70, 16, dtype=torch.float64).requires_grad_(needs_grad)
    key, value = torch.randn(2, B, HK, 90, 16, dtype=torch.float64)
    factor = torch.rand(B, 90)
    mask = torch.rand(B, 90) > 0.2
    call = {"mode": mode, "causal": True, "window": 40, "mask": mask, "backend": "torch"} | features
    whole = attention(query, key, value, factor, **call)
    for module in (portable, portable_eager):
        monkeypatch.setattr(module, "SCORES_PER_BLOCK", 1)
        monkeypatch.setattr(module, "CAUSAL_BLOCK", 7)
    monkeypatch.setattr(portable_blocks, "_SCORES_PER_BLOCK", 7 * HQ * 90)
    monkeypatch.setattr(portable_blocks, "_CAUSAL_ROWS", 7)
    torch.testing.assert_close(attention(query, key, value, factor, **call), whole)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("features", [{}, {"softcap": 2.0}], ids=["folded", "eager"])
def test_gradients_equal_the_oracle(mode, features):
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(B, heads, 9, 8, generator=generator, dtype=torch.float64)
        for heads in (HQ, HK, HK)
    ]
    factor = torch.rand(B, 9, generator=generator, dtype=torch.float64)
    factor[:, 2], factor[:, 5] = 0.0, 1.0
    weight = torch.randn(B, HQ, 9, 8, generator=generator, dtype=torch.float64)
    mask = torch.ones(B, 9, dtype=torch.bool)
    mask[0, :4] = False  # rows 0 to 3 see nothing
    gradients = []
    for backend in ("torch", "reference"):
        leaves = [t.clone().requires_grad_() for t in (*inputs, factor)]
        call = {"mode": mode, "causal": True, "mask": mask, "backend": backend} | features
        (attention(*leaves, **call) * weight).sum().backward()
        gradients.append([leaf.grad for leaf in leaves])
    for got, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


def test_a_removed_key_with_a_huge_score_does_not_overflow():
    query = torch.full((1, 1, 1, 16), 10.0)
    key = torch.zeros(1, 1, 3, 16)
    key[0, 0, 0] = 10.0  # score 400: exp overflows float32
    value = torch.randn(1, 1, 3, 16)
    factor = torch.tensor([[0.0, 1.0, 1.0]], requires_grad=True)
    output = attention(query, key, value, factor, mode="log_additive", backend="torch")
    torch.testing.assert_close(output[0, 0, 0], value[0, 0, 1:].mean(0))


def test_removing_every_key_gives_zero():
    query, key, value = (torch.randn(1, 1, 4, 16) for _ in range(3))
    output, lse = attention(
        query, key, value, torch.zeros(1, 4), mode="log_additive", backend="torch", return_lse=True
    )
    assert (output == 0).all()
    assert (lse == -torch.inf).all()
    output = attention(query, key, value, torch.zeros(1, 4), mode="log_additive", backend="torch")
    assert (output == 0).all()


@pytest.mark.parametrize("seed", range(120))
def test_gradients_of_combinations_equal_the_oracle(monkeypatch, seed):
    """Of output and log-sum-exp; every third case in blocks that are computed again."""
    tensors, features, return_lse, *_ = draw_case(seed)
    if seed % 3 == 0:
        for module in (portable, portable_eager):
            monkeypatch.setattr(module, "SCORES_PER_BLOCK", 1)
            monkeypatch.setattr(module, "CAUSAL_BLOCK", 16)
    if seed % 2:
        features |= {"dropout": 0.3, "dropout_seed": seed}
    batch, heads, rows, _ = tensors["query"].shape
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, heads, rows, tensors["value"].shape[-1])
    weights = torch.randn(shape, generator=generator, dtype=torch.float64)
    gradients = []
    for backend in ("torch", "reference"):
        leaves = {
            name: tensor.double().requires_grad_()
            for name, tensor in tensors.items()
            if tensor is not None
        }
        output, lse = attention(**leaves, **features, return_lse=True, backend=backend)
        if not return_lse:  # other ways are taken without it
            output = attention(**leaves, **features, backend=backend)
        loss = (output * weights).sum()
        if return_lse:
            loss = loss + (lse.masked_fill(lse.isinf(), 0.0) * weights[..., 0]).sum()
        found = torch.autograd.grad(
            loss, list(leaves.values()), allow_unused=True, materialize_grads=True
        )
        gradients.append(found)
    for name, got, expected in zip(leaves, *gradients, strict=True):
        torch.testing.assert_close(
            got, expected, rtol=1e-9, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("features", [{}, {"softcap": 3.0}], ids=["folded", "eager"])
def test_ties_for_the_minimum_move_one_key(features):
    """Whole rows of equal scores; half of all tied keys have factor 1."""
    query = torch.ones(1, 2, 40, 8, dtype=torch.float64)
    key = torch.randint(-1, 2, (1, 1, 40, 1), generator=torch.Generator().manual_seed(0)).double()
    key = key.expand(-1, -1, -1, 8).contiguous()
    value = torch.randn(1, 1, 40, 8, dtype=torch.float64)
    factor = torch.where(torch.arange(40) % 2 == 0, 0.3, 1.0).double()[None]
    gradients = []
    for backend in ("torch", "reference"):
        leaves = [t.clone().requires_grad_() for t in (query, key, value, factor)]
        call = {"mode": "min_shift", "causal": True, "backend": backend} | features
        attention(*leaves, **call).square().sum().backward()
        gradients.append([leaf.grad for leaf in leaves])
    for got, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)


class Kept(torch.autograd.graph.saved_tensors_hooks):
    """Bytes that autograd keeps, each storage once."""

    def __init__(self):
        self.storages = {}
        super().__init__(self.pack, lambda tensor: tensor)

    def pack(self, tensor):
        storage = tensor.untyped_storage()
        self.storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    @property
    def bytes(self):
        return sum(self.storages.values())


MEMORY_CASES = {
    "plain": {},
    "window": {"window": 700},
    "padding": {"mask": torch.arange(1500)[None] >= torch.tensor([[3], [0]])},
    "softcap": {"softcap": 3.0},
    "sinks": {"sinks": torch.randn(2)},
    "alibi": {"position_bias": torch.randn(1, 2, 1, 1500)},
    "dropout": {"dropout": 0.1},
    "log-sum-exp": {"return_lse": True},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", MEMORY_CASES)
def test_a_backward_pass_needs_no_scores(mode, name):
    """What is kept grows with the tokens, not with their square."""
    tokens = 1500
    leaves = [torch.randn(2, heads, tokens, 8).requires_grad_() for heads in (2, 1, 1)]
    leaves.append(torch.rand(2, tokens).requires_grad_())
    kept = Kept()
    with kept:
        output = attention(*leaves, mode=mode, causal=True, backend="torch", **MEMORY_CASES[name])
    inputs = sum(leaf.untyped_storage().nbytes() for leaf in leaves)
    print(f"{kept.bytes / inputs:.1f} times the inputs")
    assert inputs / 2 < kept.bytes < 4 * inputs < tokens * tokens  # a bool per score is more
    output = output[0] if isinstance(output, tuple) else output
    output.sum().backward()
    assert all(leaf.grad.isfinite().all() for leaf in leaves)


@pytest.mark.parametrize("mode", MODES)
def test_gradients_can_be_differentiated_again(mode):
    """Also through blocks that are computed again, and where one tensor is key and value."""
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 1, 2, 9, 4, generator=generator, dtype=torch.float64)
    factor = torch.rand(1, 9, generator=generator, dtype=torch.float64) + 0.1
    assert key.shape[2] > query.shape[3]

    def run(query, key, factor):
        return attention(query, key, key, factor, mode=mode, softcap=2.0, backend="torch")

    leaves = [t.requires_grad_() for t in (query, key, factor)]
    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, leaves, fast_mode=True)


def test_a_change_in_place_before_the_backward_pass_is_noticed():
    query, key, value = (torch.randn(1, 1, 40, 8).requires_grad_() for _ in range(3))
    doubled = key * 2
    output = attention(query, doubled, value, softcap=2.0, backend="torch")
    with torch.no_grad():
        doubled.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_a_tensor_given_twice_has_a_gradient_for_each_place():
    number = torch.tensor([3.0], requires_grad=True)
    [cube] = recomputed(lambda first, second: (first * first * second,), number, number)
    cube.backward()
    assert number.grad.item() == 27.0
