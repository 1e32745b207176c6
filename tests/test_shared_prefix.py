"""The kernel for a shared prefix against the oracle, every feature in combination.

Cases, inputs and the poisoning of ``torch.empty`` are those of ``kernel_cases``: a case is made
with all keys in one tensor, whose first part then serves as the prefix. Legend: B batch, Hq/Hk
heads, Tq/Tk tokens, Tp prefix tokens, D head dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from atman_triton.testing import assert_close_to_oracle, count_launches

pytest.importorskip("triton", reason="the fused kernels need triton")

from kernel_cases import (
    DEVICE,
    LEVELS,
    MODES,
    Allocations,
    Case,
    covering,
    make_inputs,
    poison,
    tiles,
)

from atman_triton.kernels.forward import attention_fwd
from atman_triton.kernels.reference import attention_reference
from atman_triton.kernels.shared_prefix import shared_prefix_fwd

__all__ = ["poison"]  # an autouse fixture

KERNEL = "_shared_prefix_fwd_kernel"
EPS = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class PrefixCase(Case):
    """A case whose ``tokens`` are (Tq, Tp + Tk); the first ``prefix`` of the keys are shared."""

    prefix: int = 100
    place: str = "both"  # of factors other than 1: both | prefix | own | own_length

    def __str__(self):
        place = f"-{self.place}" * (self.factors != "none")
        return f"{super().__str__()}-Tp{self.prefix}{place}"


def make_case(case: PrefixCase, seed: int = 0) -> tuple[list, dict]:
    """Query, key, value, prefix key, prefix value and factor, and the oracle's keywords.

    All four are views of longer tensors, as a prefix in a cache is.
    """
    (query, key, value, factor), options = make_inputs(case, seed)
    count = case.prefix
    if factor is not None and case.place == "own_length":
        factor = factor[..., count:]
    elif factor is not None and case.place != "both":
        factor = factor.clone()
        factor[..., count:] = factor[..., count:] if case.place == "own" else 1.0
        factor[..., :count] = factor[..., :count] if case.place == "prefix" else 1.0
    own = [key[:, :, count:], value[:, :, count:]]
    return [query, *own, key[:1, :, :count], value[:1, :, :count], factor], options


def oracle(tensors: list, options: dict) -> tuple[Tensor, Tensor]:
    query, key, value, prefix_key, prefix_value, factor = tensors
    return attention_reference(
        query, key, value, factor, prefix=(prefix_key, prefix_value), **options
    )


def launch(tensors: list, options: dict, call=shared_prefix_fwd) -> tuple[Tensor, Tensor]:
    """Call the kernel with the oracle's arguments."""
    options = dict(options)
    mask = options.pop("mask", None)
    if mask is not None:
        options["key_padding" if mask.dim() == 2 else "block_mask"] = mask
    return call(*tensors, **options)


def concatenated(tensors: list) -> list:
    """The same problem without a prefix."""
    query, key, value, prefix_key, prefix_value, factor = tensors
    batch = query.shape[0]
    whole = [
        torch.cat([shared.expand(batch, -1, -1, -1), own.expand(batch, -1, -1, -1)], dim=2)
        for shared, own in ((prefix_key, key), (prefix_value, value))
    ]
    if factor is not None and factor.shape[-1] == key.shape[2]:
        ones = torch.ones(*factor.shape[:-1], prefix_key.shape[2], device=factor.device)
        factor = torch.cat([ones, factor], dim=-1)
    return [query, *whole, factor]


def check(case: PrefixCase, seed: int = 0) -> None:
    """The tolerance rule, for output and log-sum-exp."""
    tensors, options = make_case(case, seed)
    with count_launches() as launches:
        out, lse = launch(tensors, options)
    assert launches.attention == launches[KERNEL] == 1
    assert out.dtype == case.dtype
    assert lse.dtype == torch.float32
    eager, eager_lse = oracle(tensors, options)
    double = [None if t is None else t.double() for t in tensors]
    wide = {
        name: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v
        for name, v in options.items()
    }
    exact, exact_lse = oracle(double, wide)
    assert_close_to_oracle(out, eager, exact)
    assert_close_to_oracle(lse, eager_lse.float(), exact_lse, name="lse")


# (Tq, Tp + Tk) and Tp: long suffixes, a prefix of whole tiles, of one key, and nothing behind it
SHAPES = [((70, 180), 100), ((66, 194), 128), ((100, 131), 1), ((40, 90), 90), ((33, 191), 158)]
CHOICES = LEVELS | {
    "tokens": SHAPES,
    "heads": [(2, 1), (2, 2)],
    "softcap": [None, 2.5],
    "place": ["both", "prefix", "own", "own_length"],
}


def from_row(row: dict) -> PrefixCase:
    tokens, prefix = row["tokens"]
    case = PrefixCase(**row | {"tokens": tokens, "prefix": prefix})
    return replace(case, batch=2) if case.layout == "shared_keys" else case


COVERING = [
    from_row(row)
    for row in covering(CHOICES, lambda row: tiles(row | {"tokens": row["tokens"][0]}))
]


@pytest.mark.parametrize("case", COVERING, ids=str)
def test_features_in_combination(case):
    check(case)


@settings(max_examples=8, deadline=None, derandomize=True, database=None)
@given(
    case=st.builds(
        PrefixCase,
        # of fewer rows the largest error of eager is luck
        tokens=st.tuples(st.integers(32, 100), st.integers(70, 160)),
        prefix=st.integers(1, 70),
        dims=st.tuples(st.integers(16, 256), st.integers(16, 256)),
        heads=st.sampled_from([(1, 1), (2, 1)]),
        batch=st.integers(1, 2),
        **{
            name: st.sampled_from(CHOICES[name])
            for name in CHOICES
            if name not in ("tokens", "dims", "heads", "batch")
        },
    ),
    seed=st.integers(0, 1000),
)
def test_drawn_shapes_and_features(case, seed):
    check(case, seed)


SMALL = PrefixCase(tokens=(40, 130), dims=(32, 32), heads=(2, 1), prefix=70)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("place", ["both", "own_length"])
def test_factors_of_one_are_plain_attention(mode, place):
    tensors, options = make_case(replace(SMALL, mode=mode, place=place))
    tensors[5] = torch.ones_like(tensors[5])
    out, lse = launch(tensors, options)
    plain, plain_lse = launch([*tensors[:5], None], options)
    if mode == "log_additive":  # scaled before, not within, the exponential
        assert (out - plain).abs().max() <= 8 * EPS * plain.abs().max()
        assert (lse - plain_lse).abs().max() <= 8 * EPS * plain_lse.abs().max()
    else:
        assert torch.equal(out, plain)
        assert torch.equal(lse, plain_lse)


@pytest.mark.parametrize("mode", MODES)
def test_factors_of_own_length_are_ones_on_the_prefix(mode):
    tensors, options = make_case(replace(SMALL, mode=mode, place="own"))
    expected = launch(tensors, options)
    got = launch([*tensors[:5], tensors[5][:, 70:]], options)
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("prefix", [64, 70])
def test_a_shared_prefix_is_the_same_as_a_concatenated_one(mode, prefix):
    case = replace(SMALL, mode=mode, prefix=prefix, factors="per_head", mask="left", bias="alibi")
    tensors, options = make_case(case)
    out, lse = launch(tensors, options)
    whole, whole_lse = launch(concatenated(tensors), options, attention_fwd)
    assert (out - whole).abs().max() <= 8 * EPS * whole.abs().max()
    seen = whole_lse.isfinite()
    assert torch.equal(seen, lse.isfinite())
    assert (lse - whole_lse)[seen].abs().max() <= 8 * EPS * whole_lse[seen].abs().max()


@pytest.mark.parametrize("mode", MODES)
def test_the_minimum_is_taken_over_prefix_and_own_keys(mode):
    """The row's smallest score in one segment moves what a factor does in the other."""
    case = replace(SMALL, mode=mode, batch=1, heads=(1, 1), factors="one", band="full")
    for place, far in (("own", 3), ("prefix", 1)):  # factor in one segment, score in the other
        tensors, options = make_case(replace(case, place=place))
        tensors[5] = torch.ones(1, 130, device=DEVICE)
        tensors[5][:, 100 if place == "own" else 10] = 0.5
        tensors[far] = tensors[far].clone()
        tensors[far][:, :, 5] = -20 * tensors[0].mean(2)
        out, _ = launch(tensors, options)
        exact, _ = oracle([t.double() for t in tensors], options)
        eager, _ = oracle(tensors, options)
        assert_close_to_oracle(out, eager, exact)
    check(replace(case, place="prefix"))


def test_permuting_batch_rows_permutes_outputs():
    case = replace(SMALL, batch=3, mode="min_shift", mask="rows", bias="dense")
    tensors, options = make_case(case)
    out, lse = launch(tensors, options)
    order = torch.tensor([2, 0, 1], device=DEVICE)
    for name in ("mask", "position_bias"):
        options[name] = options[name][order]
    moved = [t if i in (3, 4) else t[order] for i, t in enumerate(tensors)]
    permuted, permuted_lse = launch(moved, options)
    assert torch.equal(permuted, out[order])
    assert torch.equal(permuted_lse, lse[order])


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, under the interpreter
@pytest.mark.parametrize("mode", MODES)
def test_factor_on_a_masked_key_is_inert(mode):
    tensors, options = make_case(replace(SMALL, mode=mode, mask="left"))
    options["mask"] = (torch.arange(130) >= 30).expand(2, -1).to(DEVICE)
    expected = launch(tensors, options)
    changed = tensors[5].clone()
    changed[:, :30] = math.nan
    got = launch([*tensors[:5], changed], options)
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])
    changed[:, 30:70] *= 0.5  # while visible ones are not
    assert not torch.equal(launch([*tensors[:5], changed], options)[0], expected[0])


@pytest.mark.parametrize("start", [63, 64, 65, 69, 70, 71, 129])
def test_padding_at_the_borders_of_tiles_and_segments(start):
    case = replace(SMALL, tokens=(3, 130), heads=(1, 1), band="full", mode="min_shift")
    tensors, options = make_case(case)
    column = torch.arange(130, device=DEVICE)
    options["mask"] = torch.stack([column >= start, column < start])
    out, _ = launch(tensors, options)
    exact, _ = oracle([t.double() for t in tensors], options)
    assert (out - exact).abs().max() < 1e-5


@pytest.mark.parametrize("offset", [-3, 0, 5, 66, 69, 70, 71, 90, 400])
def test_window_at_the_borders_of_segments(offset):
    """One key too many or too few is an error of order 1; far rows see nothing at all."""
    case = replace(SMALL, tokens=(34, 130), heads=(1, 1), batch=1, mode="min_shift")
    tensors, options = make_case(case)
    for causal in (False, True):
        options |= {"causal": causal, "window": 20, "query_offset": offset}
        out, _ = launch(tensors, options)
        exact, _ = oracle([t.double() for t in tensors], options)
        assert (out - exact).abs().max() < 1e-5


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("sinks", [False, True])
def test_rows_that_see_nothing(mode, sinks):
    tensors, options = make_case(replace(SMALL, mode=mode, sinks=sinks))
    options["query_offset"] = -10  # rows 0..9 stand before every key
    options["mask"] = torch.ones(2, 130, dtype=torch.bool, device=DEVICE)
    options["mask"][0] = False  # batch row 0 is all padding
    out, lse = launch(tensors, options)
    dead = torch.zeros(2, 2, 40, dtype=torch.bool, device=DEVICE)
    dead[0], dead[:, :, :10] = True, True
    expected = (
        options["sinks"].float()[None, :, None] if sinks else torch.full((1, 1, 1), -math.inf)
    )
    assert (out[dead] == 0).all()
    assert out.isfinite().all()
    assert out[~dead].abs().min() > 0
    difference = torch.where(lse == expected, 0.0, lse - expected)[dead].abs()
    assert (difference <= 8 * EPS).all()
    assert lse[~dead].isfinite().all()


@pytest.mark.parametrize("mode", MODES)
def test_no_prefix_no_own_keys_and_no_queries(mode):
    tensors, options = make_case(replace(SMALL, mode=mode))
    query, key, value, prefix_key, prefix_value, factor = tensors
    none = [prefix_key[:, :, :0], prefix_value[:, :, :0]]
    with count_launches() as launches:
        got = launch([query, key, value, *none, factor[:, 70:]], options)
    assert launches["_attention_fwd_kernel"] == launches.attention == 1
    expected = launch([query, key, value, factor[:, 70:]], options, attention_fwd)
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])
    out, lse = launch([query, key[:, :, :0], value[:, :, :0], *none, factor[:, :0]], options)
    assert (out == 0).all()
    assert (lse == -math.inf).all()
    out, lse = launch([query[:, :, :0], *tensors[1:]], options)
    assert out.shape == (2, 2, 0, 32)
    assert lse.shape == (2, 2, 0)


def test_offset_in_memory_is_the_same_as_a_number():
    tensors, options = make_case(SMALL)
    expected = launch(tensors, options | {"query_offset": 85})
    got = launch(tensors, options | {"query_offset": torch.tensor(85, device=DEVICE)})
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])


def test_prefix_keys_far_apart_use_wide_offsets():
    """Keys 2^23 elements apart, from where offsets within a tile are computed in 64 bits."""
    case = replace(SMALL, tokens=(3, 9), batch=1, dims=(16, 16), heads=(1, 1), prefix=5)
    tensors, options = make_case(case)
    expected = launch(tensors, options)
    far = torch.zeros(5 << 23, device=DEVICE).as_strided((1, 1, 5, 16), (0, 0, 1 << 23, 1))
    tensors[3] = far.copy_(tensors[3])
    got = launch(tensors, options)
    assert torch.equal(got[0], expected[0])


@pytest.mark.parametrize("mode", MODES)
def test_neither_the_prefix_nor_a_score_is_copied(mode):
    """Only results and lists of tiles are allocated, whatever is strided, broadcast or shared."""
    case = replace(SMALL, tokens=(20, 130), batch=3, mode=mode, bias="alibi", mask="heads")
    case = replace(case, layout="tokens_first")
    tensors, options = make_case(case)
    known = [*tensors, options["position_bias"], options["mask"]]
    with Allocations(*known) as seen:
        out, lse = launch(tensors, options)
    lists = 2 * 3 * 2 * (70 // 32 + 2)
    assert seen.elements <= out.numel() + lse.numel() + lists
    assert seen.elements >= out.numel() + lse.numel()
    assert seen.elements < min(3 * 70 * 32, 3 * 2 * 20 * 130)  # B·Tp·D and B·Hq·Tq·(Tp + Tk)
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("case", COVERING, ids=str)
def test_features_in_combination_in_bf16(case):
    check(replace(case, dtype=torch.bfloat16))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_same_input_gives_the_same_bits():
    case = PrefixCase(tokens=(500, 1524), prefix=1024, dtype=torch.float16, mode="min_shift")
    tensors, options = make_case(case)
    out, lse = launch(tensors, options)
    for _ in range(1000):
        again, again_lse = launch(tensors, options)
        assert torch.equal(again, out)
        assert torch.equal(again_lse, lse)
