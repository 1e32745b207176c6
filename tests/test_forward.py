"""The fused forward kernel against the oracle, every feature in combination with every other.

Runs compiled on a GPU and under Triton's interpreter elsewhere (fp32 and fp16 there: the
interpreter's bf16 products are wrong). Legend: B batch, Hq/Hk heads, Tq/Tk tokens, D head dim.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from atman_triton.testing import assert_close_to_oracle, count_launches

pytest.importorskip("triton", reason="the fused kernels need triton")

import triton
import triton.language as tl
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
    worse,
)

from atman_triton.kernels.forward import attention_fwd
from atman_triton.kernels.primitives import key_tiles
from atman_triton.kernels.reference import attention_reference

__all__ = ["poison"]  # an autouse fixture


def launch(tensors: list, options: dict) -> tuple[Tensor, Tensor]:
    """Call the kernel with the oracle's arguments."""
    options = dict(options)
    mask = options.pop("mask", None)
    name = "key_padding" if mask is not None and mask.dim() == 2 else "block_mask"
    if mask is not None:
        options[name] = mask
    return attention_fwd(*tensors, **options)


def check(case: Case, seed: int = 0) -> None:
    """The tolerance rule, for output and log-sum-exp."""
    tensors, options = make_inputs(case, seed)
    with count_launches() as launches:
        out, lse = launch(tensors, options)
    assert launches.attention == 1
    assert out.dtype == case.dtype
    assert lse.dtype == torch.float32
    eager, eager_lse = attention_reference(*tensors, **options)
    double: list = [None if t is None else t.double() for t in tensors]
    wide = {
        name: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v
        for name, v in options.items()
    }
    oracle, oracle_lse = attention_reference(*double, **wide)
    query, key, *others = tensors
    other, other_lse = attention_reference(query.flip(-1), key.flip(-1), *others, **options)
    assert_close_to_oracle(out, worse(eager, other, oracle), oracle)
    eager_lse = worse(eager_lse, other_lse, oracle_lse)
    assert_close_to_oracle(lse, eager_lse.float(), oracle_lse, name="lse")


def from_row(row: dict) -> Case:
    """With more batch rows where one shows nothing, as keys are shared, or its error is luck."""
    case = Case(**row)
    if case.tokens[0] == 1:
        return replace(case, batch=4)
    return replace(case, batch=2) if case.layout == "shared_keys" else case


COVERING = [from_row(row) for row in covering(LEVELS, tiles)]


@pytest.mark.parametrize("case", COVERING, ids=str)
def test_features_in_combination(case):
    check(case)


ODD = Case(batch=1, heads=(2, 2))


@pytest.mark.parametrize(
    "case",
    [
        replace(ODD, tokens=tokens, mode=mode, dtype=dtype, band=band)
        for tokens, mode, dtype, band in [
            ((1, 1), "min_shift", torch.float32, "causal"),
            ((1, 1), "multiplicative", torch.float16, "full"),
            ((1, 1), "log_additive", torch.float32, "full"),
            ((239, 1), "min_shift", torch.float16, "causal"),
            ((1, 239), "min_shift", torch.float32, "window"),
            ((239, 1), "log_additive", torch.float32, "full"),
            ((799, 3), "multiplicative", torch.float32, "upper_left"),
            ((3, 799), "min_shift", torch.float16, "causal"),
            ((3, 799), "log_additive", torch.float32, "window"),
            ((113, 203), "min_shift", torch.float32, "causal"),
            ((203, 113), "multiplicative", torch.float32, "causal"),
            ((1023, 1024), "min_shift", torch.float16, "window"),
        ]
    ],
    ids=str,
)
def test_odd_shapes(case):
    check(replace(case, factors="one" if max(case.tokens) > 500 else "some"))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, 1, 2, 64, 65])
def test_band_at_tile_borders(causal, window):
    """Both ends of what rows see on, before and behind a tile's border.

    One key too many or too few is an error of order 1.
    """
    case = Case(tokens=(66, 131), dims=(16, 16), heads=(1, 1), batch=1, factors="none")
    tensors, options = make_inputs(case)
    options |= {"causal": causal, "window": window}
    double = [t.double() for t in tensors[:3]]
    for offset in [-3, -1, 0, 62, 63, 64, 65] if causal or window else [0]:
        out, _ = launch(tensors, options | {"query_offset": offset})
        oracle, _ = attention_reference(*double, **options, query_offset=offset)
        assert (out - oracle).abs().max() < 1e-5, offset


@pytest.mark.parametrize("start", [63, 64, 65, 128])
@pytest.mark.parametrize("mode", ["plain", "min_shift"])
def test_padding_at_tile_borders(mode, start):
    case = Case(tokens=(3, 130), dims=(16, 16), heads=(1, 1), band="full", mode="min_shift")
    tensors, options = make_inputs(replace(case, factors="none" if mode == "plain" else "one"))
    column = torch.arange(130, device=DEVICE)
    options["mask"] = torch.stack([column >= start, column < start])
    out, _ = launch(tensors, options)
    double = [None if t is None else t.double() for t in tensors]
    oracle, _ = attention_reference(*double, **options)
    assert (out - oracle).abs().max() < 1e-5


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(
    case=st.builds(
        Case,
        # of fewer rows the largest error of eager is luck; test_odd_shapes has those
        tokens=st.tuples(st.integers(32, 140), st.integers(1, 140)),
        dims=st.tuples(st.integers(16, 256), st.integers(16, 256)),
        heads=st.sampled_from([(1, 1), (2, 1)]),
        batch=st.integers(1, 2),
        dtype=st.sampled_from([torch.float32, torch.float16]),
        mode=st.sampled_from(MODES),
        factors=st.sampled_from(["none", "some", "per_head", "one"]),
        band=st.sampled_from(["full", "causal", "upper_left", "offset", "window", "window_full"]),
        softcap=st.sampled_from([None, 0.7, 30.0]),
        sinks=st.booleans(),
        bias=st.sampled_from(["none", "dense", "shared", "alibi"]),
        mask=st.sampled_from(["none", "left", "right", "holes", "rows", "heads"]),
        layout=st.sampled_from(["plain", "tokens_first", "shared_keys"]),
    ),
    seed=st.integers(0, 1000),
)
def test_drawn_shapes_and_features(case, seed):
    check(case, seed)


SMALL = Case(tokens=(70, 130), dims=(32, 32), heads=(2, 1))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("band", ["full", "causal"])
def test_factors_of_one_are_plain_attention(mode, band):
    tensors, options = make_inputs(replace(SMALL, mode=mode, band=band))
    tensors[3] = torch.ones_like(tensors[3])
    out, lse = launch(tensors, options)
    plain, plain_lse = launch([*tensors[:3], None], options)
    if mode == "log_additive":  # scaled before, not within, the exponential
        tiny = torch.finfo(torch.float32).eps
        assert (out - plain).abs().max() <= 8 * tiny * plain.abs().max()
        assert (lse - plain_lse).abs().max() <= 8 * tiny * plain_lse.abs().max()
    else:
        assert torch.equal(out, plain)
        assert torch.equal(lse, plain_lse)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, under the interpreter
@pytest.mark.parametrize("mode", MODES)
def test_factor_on_a_masked_key_is_inert(mode):
    case = replace(SMALL, mode=mode, mask="right", band="upper_left")
    tensors, options = make_inputs(case)
    options["mask"] = (torch.arange(130) < 100).expand(2, -1).to(DEVICE)
    expected = launch(tensors, options)
    changed = tensors[3].clone()
    changed[:, 70:] = torch.rand(2, 60).to(DEVICE) * 5  # behind every query's diagonal
    changed[:, 100:] = math.nan  # and padding
    got = launch([*tensors[:3], changed], options)
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])
    changed[:, :70] *= 0.5  # while visible ones are not
    assert not torch.equal(launch([*tensors[:3], changed], options)[0], expected[0])


@pytest.mark.parametrize("mode", MODES)
def test_permuting_batch_rows_permutes_outputs(mode):
    case = replace(SMALL, batch=3, mode=mode, mask="rows", bias="dense")
    tensors, options = make_inputs(case)
    out, lse = launch(tensors, options)
    order = torch.tensor([2, 0, 1], device=DEVICE)
    for name in ("mask", "position_bias"):
        options[name] = options[name][order]
    permuted, permuted_lse = launch([t[order] for t in tensors], options)
    assert torch.equal(permuted, out[order])
    assert torch.equal(permuted_lse, lse[order])


@pytest.mark.parametrize("mode", MODES)
def test_short_queries_are_the_last_rows_of_the_whole(mode):
    """A block of 32 rows sums its tiles in the same order as one of 64."""
    tensors, options = make_inputs(replace(SMALL, mode=mode, tokens=(130, 130)))
    out, lse = launch(tensors, options)
    query, *rest = tensors
    last, last_lse = launch([query[:, :, -5:], *rest], options)
    eps = 8 * torch.finfo(torch.float32).eps
    assert (last - out[:, :, -5:]).abs().max() <= eps * out.abs().max()
    assert (last_lse - lse[:, :, -5:]).abs().max() <= eps * lse.abs().max()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("sinks", [False, True])
def test_rows_that_see_nothing(mode, sinks):
    case = replace(SMALL, mode=mode, sinks=sinks, mask="left", factors="some")
    tensors, options = make_inputs(case)
    options["query_offset"] = -10  # rows 0..9 stand before every key
    options["mask"] = torch.ones(2, 130, dtype=torch.bool, device=DEVICE)
    options["mask"][0] = False  # batch row 0 is all padding
    out, lse = launch(tensors, options)
    dead = torch.zeros(2, 2, 70, dtype=torch.bool, device=DEVICE)
    dead[0], dead[:, :, :10] = True, True
    expected = (
        options["sinks"].float()[None, :, None] if sinks else torch.full((1, 1, 1), -math.inf)
    )
    assert (out[dead] == 0).all()
    assert out.isfinite().all()
    assert out[~dead].abs().min() > 0
    difference = torch.where(lse == expected, 0.0, lse - expected)[dead].abs()
    assert (difference <= 2 * torch.finfo(torch.float32).eps * 4).all()
    assert lse[~dead].isfinite().all()


def test_log_additive_zero_on_every_key_gives_zero():
    tensors, options = make_inputs(replace(SMALL, mode="log_additive"))
    tensors[3] = torch.zeros_like(tensors[3])
    out, lse = launch(tensors, options)
    assert (out == 0).all()
    assert (lse == -math.inf).all()


def test_minus_infinity_in_the_bias_hides_a_key():
    tensors, options = make_inputs(replace(SMALL, bias="alibi"))
    options["position_bias"][..., 1:] = -math.inf
    out, _ = launch(tensors, options)
    value = tensors[2].repeat_interleave(2, 1)[:, :, :1]
    assert (out - value).abs().max() <= torch.finfo(torch.float32).eps * value.abs().max()


@pytest.mark.parametrize("mode", MODES)
def test_no_keys_and_no_queries(mode):
    tensors, options = make_inputs(replace(SMALL, mode=mode))
    query, key, value, factor = tensors
    none = [query, key[:, :, :0], value[:, :, :0], factor[:, :0]]
    out, lse = launch(none, options)
    assert out.shape == query.shape
    assert (out == 0).all()
    assert (lse == -math.inf).all()
    out, lse = launch([query[:, :, :0], key, value, factor], options)
    assert out.shape == (2, 2, 0, 32)
    assert lse.shape == (2, 2, 0)


@pytest.mark.parametrize("mode", MODES)
def test_negative_and_zero_scale(mode):
    tensors, options = make_inputs(replace(SMALL, mode=mode))
    for scale in (-0.2, 0.0):
        options["scale"] = scale
        out, lse = launch(tensors, options)
        eager, eager_lse = attention_reference(*tensors, **options)
        double = [t.double() for t in tensors]
        oracle, oracle_lse = attention_reference(*double, **options)
        assert_close_to_oracle(out, eager, oracle)
        assert_close_to_oracle(lse, eager_lse, oracle_lse, name="lse")


def test_offset_in_memory_is_the_same_as_a_number():
    tensors, options = make_inputs(SMALL)
    expected = launch(tensors, options | {"query_offset": 37})
    for dtype in (torch.int32, torch.int64):
        offset = torch.tensor(37, dtype=dtype, device=DEVICE)
        got = launch(tensors, options | {"query_offset": offset})
        assert torch.equal(got[0], expected[0])
        assert torch.equal(got[1], expected[1])


def test_rows_far_apart_use_wide_offsets():
    """Rows 2^23 elements apart, from where offsets within a tile are computed in 64 bits."""
    case = replace(SMALL, tokens=(3, 5), batch=1, dims=(16, 16), heads=(1, 1))
    tensors, options = make_inputs(case)
    expected = launch(tensors, options)
    storage = torch.zeros(5 << 23, device=DEVICE)
    far = storage.as_strided((1, 1, 5, 16), (0, 0, 1 << 23, 1))
    far.copy_(tensors[1])
    got = launch([tensors[0], far, *tensors[2:]], options)
    assert torch.equal(got[0], expected[0])


@triton.jit
def _key_tiles_kernel(
    found_ptr, position, window, keys, CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr
):
    low, high, inner_low, inner_high = key_tiles(  # pyright: ignore
        position, position + 63, 0, keys, window, CAUSAL, HAS_WINDOW, 64
    )
    tl.store(found_ptr, low)
    tl.store(found_ptr + 1, inner_low)
    tl.store(found_ptr + 2, inner_high)
    tl.store(found_ptr + 3, high)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("position", [-5000, -64, 0, 100, 193, 5000])
@pytest.mark.parametrize("window", [None, 40])
def test_tiles_of_rows_beyond_the_keys_stay_among_the_tiles(causal, position, window):
    """They index lists of flagged tiles, wherever the rows stand."""
    found = torch.zeros(4, dtype=torch.int32, device=DEVICE)
    _key_tiles_kernel[(1,)](found, position, window or 0, 130, causal, window is not None)
    assert found.tolist() == sorted(found.tolist())
    assert 0 <= found[0] <= found[3] <= 3


def test_nothing_is_copied():
    """Strided, broadcast and shared inputs are read in place: only results are allocated."""
    case = replace(SMALL, batch=3, heads=(4, 2), mode="min_shift", bias="alibi", mask="heads")
    tensors, options = make_inputs(replace(case, layout="shared_keys"))
    query = torch.randn(3, 70, 4, 32, device=DEVICE).transpose(1, 2)
    factor = tensors[3][:1].expand(3, -1)
    tensors = [query, *tensors[1:3], factor]
    known = [*tensors, options["position_bias"], options["mask"]]
    with Allocations(*known) as seen:
        out, lse = launch(tensors, options)
    tile_lists = 2 * 3 * (130 // 32 + 2)
    assert seen.elements <= out.numel() + lse.numel() + tile_lists
    assert seen.elements >= out.numel() + lse.numel()
    assert out.transpose(1, 2).is_contiguous()


def test_head_dims_beyond_256_are_refused():
    query = torch.zeros(1, 1, 2, 257, device=DEVICE)
    with pytest.raises(ValueError, match=r"head dims must lie between 1 and 256, got 257\."):
        attention_fwd(query, query, query)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("case", COVERING, ids=str)
def test_features_in_combination_in_bf16(case):
    check(replace(case, dtype=torch.bfloat16))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_same_input_gives_the_same_bits():
    tensors, options = make_inputs(Case(tokens=(1023, 1024), dtype=torch.float16, mode="min_shift"))
    out, lse = launch(tensors, options)
    for _ in range(1000):
        again, again_lse = launch(tensors, options)
        assert torch.equal(again, out)
        assert torch.equal(again_lse, lse)
