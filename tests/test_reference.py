"""The oracle against loops over single numbers, and its gradients against differences."""

import math
from itertools import product

import pytest
import torch

from atman_triton.kernels.reference import MODES, attention_reference

B, HQ, HK, TQ, TK, D, DV = 2, 4, 2, 5, 7, 3, 2


def make_inputs(seed=0):
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    query, key, value = randn(B, HQ, TQ, D), randn(B, HK, TK, D), randn(B, HK, TK, DV)
    factor = torch.rand(B, TK, generator=generator, dtype=torch.float64) * 1.5
    factor[0, 2], factor[1, 3], factor[0, 4] = 0.0, 1.0, 1.0
    return query, key, value, factor


def by_hand(query, key, value, factor, *, mode, sees, scale, softcap=None, sinks=None, bias=None):
    """One number at a time, from DESIGN's definitions; ``sees(b, h, i, j)`` is the mask."""
    out = torch.zeros(B, HQ, TQ, DV, dtype=torch.float64)
    lse = torch.full((B, HQ, TQ), -math.inf, dtype=torch.float64)
    for b, h, i in product(range(B), range(HQ), range(TQ)):
        group = h // (HQ // HK)
        raw = []
        for j in range(TK):
            s = scale * float(query[b, h, i] @ key[b, group, j])
            raw.append(s if softcap is None else softcap * math.tanh(s / softcap))
        visible = [j for j in range(TK) if sees(b, h, i, j)]
        floor = {"min_shift": visible, "min_shift_full": range(TK)}.get(mode, ())
        c = min((raw[j] for j in floor), default=0.0)
        weights = {}
        for j in visible:
            m = float(factor[b, j] if factor.dim() == 2 else factor[b, h, j])
            if mode == "multiplicative":
                s = m * raw[j]
            elif mode == "log_additive":
                s = raw[j] + (math.log(m) if m > 0 else -math.inf)
            else:
                s = c + m * (raw[j] - c)
            s += 0.0 if bias is None else float(bias[b % len(bias), h, i, j])
            weights[j] = math.exp(s)
        total = sum(weights.values()) + (0.0 if sinks is None else math.exp(float(sinks[h])))
        if total > 0:
            lse[b, h, i] = math.log(total)
            for j, weight in weights.items():
                out[b, h, i] += weight / total * value[b, group, j]
    return out, lse


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("extras", [False, True], ids=["bare", "softcap-sinks-bias-mask-heads"])
def test_equals_the_definition(mode, causal, window, extras):
    query, key, value, factor = make_inputs()
    bias = sinks = softcap = mask = None
    if extras:
        bias, sinks, softcap = torch.randn(1, HQ, TQ, TK).double(), torch.randn(HQ).double(), 0.8
        mask = torch.ones(B, TK, dtype=torch.bool)
        mask[0, :3] = False
        mask[1, -2:] = False
        factor = torch.rand(B, HQ, TK, dtype=torch.float64) * 2

    def sees(b, h, i, j):
        p = i + TK - TQ
        return (
            (not causal or j <= p)
            and (window is None or (p - j if causal else abs(p - j)) < window)
            and (mask is None or bool(mask[b, j]))
        )

    features = {"softcap": softcap, "sinks": sinks}
    expected = by_hand(
        query, key, value, factor, mode=mode, sees=sees, scale=0.7, bias=bias, **features
    )
    actual = attention_reference(
        query,
        key,
        value,
        factor,
        mode=mode,
        causal=causal,
        window=window,
        scale=0.7,
        position_bias=bias,
        mask=mask,
        **features,
    )
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(actual[1], expected[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("offset", [0, 1, torch.tensor(1)], ids=["0", "1", "tensor"])
def test_query_offset_moves_the_diagonal(offset):
    query, key, value, factor = make_inputs()
    mask = torch.arange(TK)[None, :] <= torch.arange(TQ)[:, None] + offset
    moved = attention_reference(query, key, value, factor, causal=True, query_offset=offset)
    dense = attention_reference(query, key, value, factor, mask=mask[None, None])
    torch.testing.assert_close(moved, dense, rtol=0, atol=0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("own_length", [False, True], ids=["spanning", "own_length"])
def test_a_prefix_stands_in_front_of_every_row(mode, own_length):
    """As written out by hand: the first 3 keys of row 0 are those of row 1 too."""
    query, key, value, factor = make_inputs()
    key[1, :, :3], value[1, :, :3] = key[0, :, :3], value[0, :, :3]
    if own_length:
        factor[:, :3] = 1.0
    prefix = (key[:1, :, :3], value[:1, :, :3])
    mask = torch.ones(B, TK, dtype=torch.bool)
    mask[1, 1] = mask[0, 5] = False
    expected = by_hand(
        query, key, value, factor, mode=mode, scale=0.7,
        sees=lambda b, h, i, j: j <= i + TK - TQ and bool(mask[b, j]),
    )  # fmt: skip
    actual = attention_reference(
        query, key[:, :, 3:], value[:, :, 3:], factor[:, 3 * own_length :],
        mode=mode, causal=True, scale=0.7, mask=mask, prefix=prefix,
    )  # fmt: skip
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(actual[1], expected[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_rows_without_a_key_give_zero(mode):
    query, key, value, factor = make_inputs()
    mask = torch.ones(B, TK, dtype=torch.bool)
    mask[0] = False
    inputs = [t.requires_grad_() for t in (query, key, value, factor)]
    output, lse = attention_reference(*inputs, mode=mode, mask=mask)
    assert (output[0] == 0).all()
    assert (lse[0] == -math.inf).all()
    output.sum().backward()
    assert all(t.grad is not None and t.grad.isfinite().all() for t in inputs)
    sinks = torch.randn(HQ).double()
    _, lse = attention_reference(*inputs, mode=mode, mask=mask, sinks=sinks)
    torch.testing.assert_close(lse[0], sinks[:, None].expand(HQ, TQ))


def test_removing_every_key_by_factor_gives_zero():
    query, key, value, factor = make_inputs()
    output, lse = attention_reference(query, key, value, factor * 0, mode="log_additive")
    assert (output == 0).all()
    assert (lse == -math.inf).all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("features", [{}, {"softcap": 1.0, "window": 3}], ids=["plain", "capped"])
def test_gradients(mode, features):
    query, key, value, factor = make_inputs()
    if mode == "log_additive":
        factor = factor + 0.1  # differences cannot be taken across m = 0: see the next test
    sinks = torch.randn(HQ, dtype=torch.float64)
    inputs = tuple(t.requires_grad_() for t in (query, key, value, factor, sinks))

    def run(query, key, value, factor, sinks):
        return attention_reference(
            query, key, value, factor, mode=mode, causal=True, sinks=sinks, **features
        )

    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


@pytest.mark.parametrize("mode", MODES)
def test_gradients_of_a_prefix(mode):
    query, key, value, factor = make_inputs()
    inputs = (query, key[:, :, 3:], value[:, :, 3:], factor + 0.1, key[:1, :, :3], value[:1, :, :3])
    inputs = tuple(t.detach().clone().requires_grad_() for t in inputs)

    def run(query, key, value, factor, *prefix):
        return attention_reference(query, key, value, factor, mode=mode, causal=True, prefix=prefix)

    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


def test_log_additive_gradient_is_finite_where_a_key_is_removed():
    query, key, value, factor = make_inputs()
    factor[0, 2] = 0.0
    factor.requires_grad_()
    attention_reference(query, key, value, factor, mode="log_additive")[0].sum().backward()
    step = 1e-6
    moved = factor.detach().clone()
    moved[0, 2] = step
    with torch.no_grad():
        base = attention_reference(query, key, value, factor, mode="log_additive")[0].sum()
        ahead = attention_reference(query, key, value, moved, mode="log_additive")[0].sum()
    torch.testing.assert_close(factor.grad[0, 2], (ahead - base) / step, rtol=1e-4, atol=1e-6)


def test_unknown_mode():
    with pytest.raises(ValueError, match=r"mode must be one of multiplicative, .*got 'additive'"):
        attention_reference(*make_inputs(), mode="additive")


HOLES = torch.ones(B, TK, dtype=torch.bool)
HOLES[0, :6], HOLES[1, 2] = False, False  # where causal, some rows of batch row 0 see nothing
NEVER_ZERO = torch.tensor(
    [[0.4, 1.0, 1.7, 0.2, 1.0, 2.5, 0.9], [1.0, 0.6, 0.3, 1.0, 1.4, 0.1, 1.0]]
)
FEATURES = {
    "padding": {"causal": True, "mask": HOLES},
    "block-mask": {
        "mask": torch.rand(B, 1, TQ, TK, generator=torch.Generator().manual_seed(3)) > 0.4
    },
    "window": {"causal": True, "window": 2},
    "softcap-dropout": {"softcap": 1.2, "dropout": 0.3, "dropout_seed": torch.tensor([5])},
    "all": {
        "causal": True,
        "query_offset": 1,
        "mask": HOLES,
        "window": 4,
        "softcap": 0.9,
        "dropout": 0.2,
        "dropout_seed": torch.tensor([-5]),
    },
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)
@pytest.mark.parametrize("behind", [False, True], ids=["whole", "prefix"])
def test_gradients_of_every_feature(mode, features, behind):
    """With sinks, a position bias, factors per head of 0, 1 and more, and keys that rows share."""
    query, key, value, _ = make_inputs(1)
    factor = NEVER_ZERO.double()[:, None].repeat(1, HQ, 1)
    if mode != "log_additive":  # its derivative at 0 is from one side only: see below
        factor[:, 1, 3] = factor[1, :, 5] = 0.0
    generator = torch.Generator().manual_seed(2)
    sinks = torch.randn(HQ, generator=generator, dtype=torch.float64)
    bias = torch.randn(1, HQ, TQ, TK, generator=generator, dtype=torch.float64)
    leaves = (
        [query, key[:, :, 3:], value[:, :, 3:], factor, sinks, bias]
        if behind
        else [query, key[:1], value[:1], factor, sinks, bias]
    )
    leaves += [key[:1, :, :3], value[:1, :, :3]] if behind else []
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]

    def run(query, key, value, factor, sinks, bias, *prefix):
        return attention_reference(
            query, key, value, factor,
            mode=mode, sinks=sinks, position_bias=bias, prefix=prefix or None, **features,
        )  # fmt: skip

    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


@pytest.mark.parametrize("mode", ["min_shift", "min_shift_full"])
def test_a_tie_for_the_minimum_moves_one_key(mode):
    """Half of the row's keys tie: the gradient that goes to the minimum goes to one of them."""
    query = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    key = torch.tensor([0.5, -1.0, 2.0, -1.0]).double().view(1, 1, 4, 1).requires_grad_()
    value = torch.arange(4.0).double().view(1, 1, 4, 1)
    factor = torch.tensor([[0.2, 1.0, 1.0, 1.0]]).double()
    attention_reference(query, key, value, factor, mode=mode, scale=1.0)[0].sum().backward()
    apart = key.detach().clone()
    apart[0, 0, 3] += 1e-9  # key 1 alone is the minimum
    apart.requires_grad_()
    attention_reference(query, apart, value, factor, mode=mode, scale=1.0)[0].sum().backward()
    torch.testing.assert_close(key.grad, apart.grad, rtol=1e-6, atol=1e-8)


def test_dropout_needs_a_seed():
    with pytest.raises(ValueError, match=r"^dropout needs a dropout_seed, got None\.$"):
        attention_reference(*make_inputs(), dropout=0.1)
