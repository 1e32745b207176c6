"""The packed-prefix kernel against the oracle on concatenated keys, features in combination.

Runs compiled on a GPU and under Triton's interpreter elsewhere (fp32 and fp16 there: the
interpreter's bf16 products are wrong). Legend: B batch, Hq/Hk heads, Tq query tokens, Tp/Tk keys
of the prefix and of a row's own, D head dim.
"""

from __future__ import annotations

import math
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from atman_triton.testing import assert_close_to_oracle

pytest.importorskip("triton", reason="the fused kernels need triton")

from kernel_cases import DEVICE, MODES, Allocations, covering, poison, worse
from packed_cases import Case, double, make_inputs, reference

from atman_triton.kernels import packed_launch
from atman_triton.kernels.packed_prefix import packed_prefix_fwd

__all__ = ["poison"]  # an autouse fixture


def launch(tensors: list, options: dict, splits: int = 1) -> tuple[Tensor, Tensor]:
    """Call the kernel with the oracle's arguments and a forced number of splits."""
    options = dict(options)
    mask = options.pop("mask", None)
    if mask is not None:
        options["key_padding" if mask.dim() == 2 else "block_mask"] = mask
    seen = []

    def variant(*args, stage, **kwargs):
        seen.append(stage)
        return build(*args, stage=stage, **kwargs)

    build = packed_launch.packed_variant
    with (
        patch.object(packed_launch, "split_count", lambda *_: splits),
        patch.object(packed_launch, "packed_variant", variant),
    ):
        result = packed_prefix_fwd(*tensors, **options)
    kind = "plain" if tensors[5] is None else options["mode"]
    assert not seen or seen == [*packed_launch.stages(splits, kind)]
    return result


def compare(out: Tensor, lse: Tensor, tensors: list, options: dict) -> None:
    """The tolerance rule, for output and log-sum-exp."""
    eager, eager_lse = reference(tensors, options)
    oracle, oracle_lse = reference(double(tensors), double(options))
    query, key, value, prefix_key, *others = tensors
    turned = [query.flip(-1), key.flip(-1), value, prefix_key.flip(-1), *others]
    other, other_lse = reference(turned, options)
    assert out.dtype == tensors[0].dtype
    assert lse.dtype == torch.float32
    assert_close_to_oracle(out, worse(eager, other, oracle), oracle)
    eager_lse = worse(eager_lse, other_lse, oracle_lse)
    assert_close_to_oracle(lse, eager_lse.float(), oracle_lse, name="lse")


def check(case: Case, seed: int = 0) -> None:
    tensors, options = make_inputs(case, seed)
    compare(*launch(tensors, options, case.splits), tensors, options)


LEVELS = {
    "tokens": [(4, 150, 4), (1, 131, 3), (16, 100, 16), (3, 64, 7), (2, 130, 0), (5, 0, 9)],
    "dims": [(40, 40), (64, 64), (80, 80), (192, 128), (256, 256)],
    "heads": [(2, 2), (4, 2), (3, 1)],
    "batch": [1, 4, 7],
    "dtype": [torch.float32, torch.float16],
    "mode": [*MODES],
    "factors": ["none", "some", "per_head", "one", "own"],
    "band": ["full", "causal", "offset", "window", "window_full"],
    "softcap": [None, 2.5],
    "sinks": [False, True],
    "bias": ["none", "dense", "shared", "alibi"],
    "mask": ["none", "left", "right", "holes", "rows", "heads"],
    "layout": ["plain", "tokens_first", "shared_keys"],
    "splits": [1, 3],
}


def from_row(row: dict) -> Case:
    """With more batch rows where so few rows are left that the largest error of eager is luck."""
    case = Case(**row)
    few = case.batch * case.heads[0] * case.tokens[0] < 12
    return replace(case, batch=4) if few else case


COVERING = [from_row(row) for row in covering(LEVELS)]


@pytest.mark.parametrize("case", COVERING, ids=str)
def test_features_in_combination(case):
    check(case)


@settings(max_examples=8, deadline=None, derandomize=True, database=None)
@given(
    case=st.builds(
        Case,
        tokens=st.tuples(st.integers(2, 16), st.integers(0, 200), st.integers(0, 20)),
        dims=st.tuples(st.integers(16, 256), st.integers(16, 256)),
        heads=st.sampled_from([(1, 1), (2, 1), (6, 2)]),
        # of few rows the largest error of eager is luck
        batch=st.integers(4, 9),
        dtype=st.sampled_from([torch.float32, torch.float16]),
        mode=st.sampled_from(MODES),
        factors=st.sampled_from(["none", "some", "per_head", "one", "own"]),
        band=st.sampled_from(["full", "causal", "offset", "window", "window_full"]),
        softcap=st.sampled_from([None, 0.7, 30.0]),
        sinks=st.booleans(),
        bias=st.sampled_from(["none", "dense", "shared", "alibi"]),
        mask=st.sampled_from(["none", "left", "right", "holes", "rows", "heads"]),
        layout=st.sampled_from(["plain", "tokens_first", "shared_keys"]),
        splits=st.integers(1, 4),
    ),
    seed=st.integers(0, 1000),
)
def test_drawn_shapes_and_features(case, seed):
    check(case, seed)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("splits", [2, 3, 8])
def test_any_number_of_splits(mode, splits):
    """Of 4 prefix tiles: even, uneven and more splits than tiles."""
    check(Case(tokens=(4, 203, 4), batch=3, mode=mode, factors="some", splits=splits))


@pytest.mark.parametrize("mode", MODES)
def test_a_direct_explanation(mode):
    """One unit suppressed per batch row: most blocks of rows have a flagged tile or two."""
    # of draw 0 one output lies at the edge of the rule on some processors, and beyond on others
    for seed in (1, 2):
        check(Case(tokens=(3, 300, 3), batch=30, mode=mode, dims=(64, 64)), seed)


@pytest.mark.parametrize("causal", [False, True])
def test_band_at_tile_borders(causal):
    """One key too many or too few is an error of order 1."""
    case = Case(tokens=(2, 130, 2), dims=(16, 16), heads=(1, 1), batch=2, factors="none")
    tensors, options = make_inputs(case)
    options["causal"] = causal
    for window in (None, 2, 64, 65):
        for offset in (62, 63, 64, 127, 130) if causal or window else [0]:
            options |= {"window": window, "query_offset": offset}
            out, _ = launch(tensors, options)
            oracle, _ = reference(double(tensors), options)
            assert (out - oracle).abs().max() < 1e-5, (window, offset)


@pytest.mark.parametrize("mode", ["plain", "min_shift"])
@pytest.mark.parametrize("side", ["left", "right", "holes"])
def test_padding_at_tile_borders(side, mode):
    """Of one row in a block, so that the others would take the tile unmasked."""
    case = Case(tokens=(2, 140, 2), dims=(16, 16), heads=(1, 1), batch=2, band="full")
    tensors, options = make_inputs(replace(case, factors="none" if mode == "plain" else "one"))
    column = torch.arange(142, device=DEVICE)
    for start in (63, 64, 65, 128):
        shown = {"left": column >= start, "right": column < start, "holes": column != start}[side]
        options["mask"] = torch.stack([shown, column >= 0])
        out, _ = launch(tensors, options)
        oracle, _ = reference(double(tensors), options)
        assert (out - oracle).abs().max() < 1e-5, start


@pytest.mark.parametrize("places", [(70,), (3,), (149,), (152,), (3, 70, 149, 152)], ids=str)
@pytest.mark.parametrize("splits", [1, 3])
def test_where_the_minimum_lies(splits, places):
    """In a plain, a flagged, an edge or an own tile, or tied in all of them."""
    case = Case(tokens=(4, 150, 6), batch=4, heads=(2, 1), mode="min_shift", band="full")
    tensors, options = make_inputs(case)
    query, key, _, prefix_key, _, factor = tensors
    query[..., 0], prefix_key[..., 0], key[..., 0] = 4.0, 0.0, 0.0
    for place in places:
        spot = prefix_key[:, :, place] if place < 150 else key[:, :, place - 150]
        spot.copy_(prefix_key[:, :, 10])
        spot[..., 0] = -20.0
    factor.fill_(1.0)
    factor[0, 5] = 0.2
    factor[1, [5, 151]] = 1.5
    factor[2, [3, 149, 152]] = torch.tensor([0.5, 0.0, 1.5], device=DEVICE)  # also on the ties
    factor[3, [7, 152]] = 0.3
    compare(*launch(tensors, options, splits), tensors, options)


@pytest.mark.parametrize("mode", MODES)
def test_every_factor_and_none(mode):
    """Factors 0 and above 1 on every key: no tile is plain."""
    tensors, options = make_inputs(Case(mode=mode, dims=(64, 64)))
    tensors[5] = torch.where(torch.arange(154, device=DEVICE) % 2 == 0, 0.0, 1.7).expand(5, -1)
    compare(*launch(tensors, options), tensors, options)


SMALL = Case(tokens=(3, 130, 3), batch=3)


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("mode", ["multiplicative", "min_shift"])
def test_factors_of_one_are_plain_attention(mode, splits):
    tensors, options = make_inputs(replace(SMALL, mode=mode))
    plain = launch([*tensors[:5], None], options, splits)
    for count in (133, 3):  # over prefix and own keys, or own keys only
        ones = torch.ones(3, count, device=DEVICE)
        got = launch([*tensors[:5], ones], options, splits)
        assert torch.equal(got[0], plain[0])
        assert torch.equal(got[1], plain[1])


@pytest.mark.parametrize("mode", MODES)
def test_own_factors_are_ones_on_the_prefix(mode):
    tensors, options = make_inputs(replace(SMALL, mode=mode, factors="own"))
    whole = torch.cat([torch.ones(3, 130, device=DEVICE), tensors[5]], 1)
    expected = launch([*tensors[:5], whole], options)
    got = launch(tensors, options)
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, under the interpreter
@pytest.mark.parametrize("mode", MODES)
def test_factor_on_a_masked_key_is_inert(mode):
    tensors, options = make_inputs(replace(SMALL, mode=mode, factors="some"))
    options["mask"] = torch.ones(3, 133, dtype=torch.bool, device=DEVICE)
    options["mask"][:, :5] = options["mask"][:, 100:131] = False
    expected = launch(tensors, options)
    changed = tensors[5].clone()
    changed[:, :5] = changed[:, 100:131] = math.nan
    got = launch([*tensors[:5], changed], options)
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])


@pytest.mark.parametrize("mode", MODES)
def test_permuting_batch_rows_permutes_outputs(mode):
    """A row's neighbours in its tile change; they may change the order of sums, no more."""
    case = Case(tokens=(3, 200, 3), batch=12, mode=mode, mask="rows", bias="dense")
    tensors, options = make_inputs(case)
    out, lse = launch(tensors, options)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    for name in ("mask", "position_bias"):
        options[name] = options[name][order]
    for index in (0, 1, 2, 5):
        tensors[index] = tensors[index][order]
    permuted, permuted_lse = launch(tensors, options)
    eps = 8 * torch.finfo(torch.float32).eps
    assert (permuted - out[order]).abs().max() <= eps * out.abs().max()
    assert (permuted_lse - lse[order]).abs().max() <= eps * lse.abs().max()


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("sinks", [False, True])
def test_rows_that_see_nothing(sinks, splits):
    tensors, options = make_inputs(replace(SMALL, sinks=sinks, factors="some"))
    options["query_offset"] = -2  # rows 0 and 1 stand before every key
    options["mask"] = torch.ones(3, 133, dtype=torch.bool, device=DEVICE)
    options["mask"][1] = False  # batch row 1 is all padding
    out, lse = launch(tensors, options, splits)
    dead = torch.zeros(3, 4, 3, dtype=torch.bool, device=DEVICE)
    dead[1], dead[:, :, :2] = True, True
    expected = (
        options["sinks"].float()[None, :, None] if sinks else torch.full((1, 1, 1), -math.inf)
    )
    assert (out[dead] == 0).all()
    assert out[~dead].abs().min() > 0
    difference = torch.where(lse == expected, 0.0, lse - expected)[dead].abs()
    assert (difference <= 2 * torch.finfo(torch.float32).eps * 4).all()
    assert out.isfinite().all() and lse[~dead].isfinite().all()


@pytest.mark.parametrize("splits", [1, 2])
def test_no_keys_and_no_queries(splits):
    for empty in (replace(SMALL, tokens=(3, 0, 0)), replace(SMALL, tokens=(0, 130, 3))):
        tensors, options = make_inputs(replace(empty, batch=2))
        out, lse = launch(tensors, options, splits)
        assert out.shape == tensors[0].shape
        assert lse.shape == out.shape[:3]
        assert (out == 0).all() and (lse == -math.inf).all()


@pytest.mark.parametrize("mode", MODES)
def test_negative_and_zero_scale(mode):
    tensors, options = make_inputs(replace(SMALL, mode=mode, batch=6))
    for scale in (-0.2, 0.0):
        options["scale"] = scale
        compare(*launch(tensors, options, 2), tensors, options)


def test_offset_in_memory_is_the_same_as_a_number():
    tensors, options = make_inputs(SMALL)
    expected = launch(tensors, options | {"query_offset": 37})
    for dtype in (torch.int32, torch.int64):
        offset = torch.tensor(37, dtype=dtype, device=DEVICE)
        got = launch(tensors, options | {"query_offset": offset})
        assert torch.equal(got[0], expected[0])
        assert torch.equal(got[1], expected[1])


def test_rows_far_apart_use_wide_offsets():
    """Prefix rows 2^22 elements apart, from where offsets within a tile take 64 bits."""
    tensors, options = make_inputs(replace(SMALL, tokens=(3, 5, 3), dims=(16, 16), heads=(1, 1)))
    expected = launch(tensors, options)
    far = torch.zeros(5 << 22, device=DEVICE).as_strided((1, 1, 5, 16), (0, 0, 1 << 22, 1))
    far.copy_(tensors[3])
    tensors[3] = far
    with patch.object(packed_launch, "_spans_beyond_int32") as wide:
        wide.return_value = True
        forced = launch(tensors, options)
    got = launch(tensors, options)
    for result in (forced, got):
        assert torch.equal(result[0], expected[0])
        assert torch.equal(result[1], expected[1])


@pytest.mark.parametrize("splits", [1, 3])
def test_nothing_is_copied(splits):
    """Strided, broadcast and shared inputs are read in place: results, states, lists of tiles."""
    case = Case(tokens=(1, 300, 1), batch=12, bias="alibi", mask="heads", layout="tokens_first")
    tensors, options = make_inputs(case)
    known = [*tensors, options["position_bias"], options["mask"]]
    with Allocations(*known) as seen:
        out, lse = launch(tensors, options, splits)
    states = splits * 12 * 4 * (32 + 3) if splits > 1 else 0
    lists = 12 * (5 + 6) + 5 + 6
    assert out.numel() + lse.numel() <= seen.elements
    assert seen.elements <= out.numel() + lse.numel() + states + lists
    assert seen.elements < 12 * 300 * 32
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("case", COVERING, ids=str)
def test_features_in_combination_in_bf16(case):
    check(replace(case, dtype=torch.bfloat16))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("splits", [1, 5])
def test_same_input_gives_the_same_bits(splits):
    case = Case(tokens=(4, 4096, 4), batch=64, dims=(128, 128), dtype=torch.float16)
    tensors, options = make_inputs(case)
    out, lse = launch(tensors, options, splits)
    for _ in range(1000):
        again, again_lse = launch(tensors, options, splits)
        assert torch.equal(again, out)
        assert torch.equal(again_lse, lse)
