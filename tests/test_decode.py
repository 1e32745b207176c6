"""The decode kernel against the oracle and the forward kernel; what compiles while a cache grows.

Runs compiled on a GPU and under Triton's interpreter elsewhere (fp32 and fp16 there: the
interpreter's bf16 products are wrong). Legend: B batch, Hq/Hk heads, Tq/Tk tokens, D head dim.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch._dynamo.testing
import transformers as tf
from families import FAMILIES, LAYERS, VOCAB
from torch import Tensor

from atman_triton import attention
from atman_triton.integration import manipulate
from atman_triton.testing import assert_close_to_oracle, count_launches

pytest.importorskip("triton", reason="the fused kernels need triton")

from kernel_cases import DEVICE, MODES, Allocations, Case, covering, make_inputs, poison
from triton._C.libtriton import native_specialize_impl
from triton.backends.compiler import BaseBackend

from atman_triton.kernels import packed_launch, packed_prepass, prepass
from atman_triton.kernels.decode import decode_fwd
from atman_triton.kernels.forward import attention_fwd
from atman_triton.kernels.packed_configs import split_count
from atman_triton.kernels.reference import attention_reference

__all__ = ["poison"]  # an autouse fixture

PACKED = "_packed_fwd_kernel"
# of one tile of keys, of three with an odd rest, and more queries than one
LEVELS = {
    "tokens": [(1, 131), (2, 150), (3, 64), (4, 129), (1, 1), (16, 70)],
    "dims": [(40, 40), (64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (256, 256)],
    "heads": [(2, 2), (4, 2), (3, 1)],
    "batch": [1, 2],
    "dtype": [torch.float32, torch.float16],
    "mode": [*MODES],
    "factors": ["none", "some", "per_head", "one"],
    "band": ["full", "causal", "offset", "window", "window_full"],
    "softcap": [None, 2.5],
    "sinks": [False, True],
    "bias": ["none", "dense", "shared", "alibi"],
    "mask": ["none", "left", "right", "holes", "rows", "heads"],
    "layout": ["plain", "tokens_first", "shared_keys"],
    "splits": [1, 2, 5],
}


def arguments(options: dict) -> dict:
    """The oracle's keyword arguments as the kernels take them."""
    options = dict(options)
    mask = options.pop("mask", None)
    if mask is not None:
        options["key_padding" if mask.dim() == 2 else "block_mask"] = mask
    return options


def launch(tensors: list, options: dict, splits: int = 1) -> tuple[Tensor, Tensor]:
    """Call the kernel with the oracle's arguments and a forced number of splits."""
    with patch.object(packed_launch, "split_count", lambda *_: splits), count_launches() as seen:
        result = decode_fwd(*tensors, **arguments(options))
    merged = splits > 1
    deferred = merged and tensors[3] is not None and options["mode"] == "min_shift"
    assert seen.attention == seen[PACKED] == 1
    assert (seen[f"{PACKED}.merge"], seen[f"{PACKED}.deferred"]) == (merged, deferred)
    return result


def double(values: list | dict) -> Any:
    """Floating tensors in float64, everything else as it is."""
    if isinstance(values, dict):
        return dict(zip(values, double(list(values.values())), strict=True))
    return [v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for v in values]


def compare(got: tuple[Tensor, Tensor], tensors: list, options: dict) -> None:
    """The tolerance rule, for output and log-sum-exp."""
    eager, eager_lse = attention_reference(*tensors, **options)
    oracle, oracle_lse = attention_reference(*double(tensors), **double(options))
    assert got[0].dtype == tensors[0].dtype
    assert got[1].dtype == torch.float32
    assert_close_to_oracle(got[0], eager, oracle)
    assert_close_to_oracle(got[1], eager_lse.float(), oracle_lse, name="lse")


COVERING = covering(LEVELS)


def case_of(row: dict) -> tuple[Case, int]:
    """A case of the covering set, and its number of splits."""
    return Case(**{name: value for name, value in row.items() if name != "splits"}), row["splits"]


@pytest.mark.parametrize(
    "row", COVERING, ids=lambda row: f"{case_of(row)[0]}-splits{row['splits']}"
)
def test_features_in_combination(row):
    case, splits = case_of(row)
    tensors, options = make_inputs(case)
    compare(launch(tensors, options, splits), tensors, options)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rows", [1, 3])
def test_the_last_rows_of_a_forward_pass(mode, rows):
    """A step with a cache gives what a pass over all tokens gives at its last ones."""
    case = Case(tokens=(140, 140), dims=(32, 32), heads=(4, 2), mode=mode)
    tensors, options = make_inputs(case)
    options["mask"] = torch.arange(140, device=DEVICE) >= torch.tensor([[0], [75]], device=DEVICE)
    whole, whole_lse = attention_fwd(*tensors, **arguments(options))
    steps = [tensors[0][:, :, -rows:], *tensors[1:]]
    out, lse = launch(steps, options, splits=2)
    eps = 16 * torch.finfo(torch.float32).eps  # the two sum in different orders
    assert (out - whole[:, :, -rows:]).abs().max() <= eps * whole.abs().max()
    last = whole_lse[:, :, -rows:]
    assert last.isfinite().all()
    assert (lse - last).abs().max() <= eps * last.abs().max()


@pytest.mark.parametrize("places", [(3,), (70,), (140,), (3, 70, 140)], ids=str)
@pytest.mark.parametrize("splits", [1, 3])
def test_where_the_minimum_lies(splits, places):
    """In the first, a middle or the last split, or tied in all; on keys with and without factor."""
    case = Case(tokens=(2, 150), dims=(16, 16), heads=(2, 1), batch=3, mode="min_shift")
    tensors, options = make_inputs(case)
    query, key, _, factor = tensors
    query[..., 0], key[..., 0] = 4.0, 0.0
    for place in places:
        key[:, :, place] = key[:, :, 10]
        key[:, :, place, 0] = -20.0
    factor.fill_(1.0)
    factor[0, 5] = 0.2
    factor[1, [5, 149]] = 1.5
    factor[2, [3, 70, 140]] = torch.tensor([0.5, 0.0, 1.5], device=DEVICE)
    compare(launch(tensors, options, splits), tensors, options)


@pytest.mark.parametrize("mode", MODES)
def test_every_factor_and_none(mode):
    """Factors 0 and above 1 on every key: all of them are deferred."""
    tensors, options = make_inputs(Case(tokens=(1, 150), mode=mode, dims=(32, 32)))
    tensors[3] = torch.where(torch.arange(150, device=DEVICE) % 2 == 0, 0.0, 1.7).expand(2, -1)
    compare(launch(tensors, options, 2), tensors, options)


SMALL = Case(tokens=(2, 140), dims=(16, 16), heads=(4, 2))


def test_deferred_columns_are_found_wherever_they_stand():
    """A step of the search for them covers several tiles: first, last and between, in each."""
    tensors, options = make_inputs(replace(SMALL, tokens=(1, 1200), batch=1, mode="min_shift"))
    for places in ([0], [1023], [1024], [1199], [70, 1000], [63, 64, 1151]):
        tensors[3].fill_(1.0)
        tensors[3][0, places] = 0.3
        compare(launch(tensors, options), tensors, options)


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("mode", MODES)
def test_factors_of_one_are_plain_attention(mode, splits):
    tensors, options = make_inputs(replace(SMALL, mode=mode))
    plain = launch([*tensors[:3], None], options, splits)
    got = launch([*tensors[:3], torch.ones(2, 140, device=DEVICE)], options, splits)
    if mode == "log_additive":  # which scales scores before the softmax
        torch.testing.assert_close(got, plain, rtol=1e-6, atol=1e-6)
    else:
        assert torch.equal(got[0], plain[0])
        assert torch.equal(got[1], plain[1])


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, under the interpreter
@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("mode", MODES)
def test_factor_on_a_masked_key_is_inert(mode, splits):
    tensors, options = make_inputs(replace(SMALL, mode=mode))
    options["mask"] = torch.ones(2, 140, dtype=torch.bool, device=DEVICE)
    options["mask"][:, :5] = options["mask"][:, 100:131] = False
    expected = launch(tensors, options, splits)
    changed = tensors[3].clone()
    changed[:, :5] = changed[:, 100:131] = math.nan
    got = launch([*tensors[:3], changed], options, splits)
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("sinks", [False, True])
def test_rows_that_see_nothing(sinks, splits):
    tensors, options = make_inputs(replace(SMALL, sinks=sinks, mode="min_shift"))
    options["query_offset"] = -1  # row 0 stands before every key
    options["mask"] = torch.ones(2, 140, dtype=torch.bool, device=DEVICE)
    options["mask"][1] = False  # batch row 1 is all padding
    out, lse = launch(tensors, options, splits)
    dead = torch.zeros(2, 4, 2, dtype=torch.bool, device=DEVICE)
    dead[1], dead[:, :, 0] = True, True
    nothing = torch.full((1, 1, 1), -math.inf, device=DEVICE)
    expected = options["sinks"].float()[None, :, None] if sinks else nothing
    assert (out[dead] == 0).all()
    assert out[~dead].abs().min() > 0
    difference = torch.where(lse == expected, 0.0, lse - expected)[dead].abs()
    assert (difference <= 8 * torch.finfo(torch.float32).eps).all()
    assert out.isfinite().all() and lse[~dead].isfinite().all()


@pytest.mark.parametrize("splits", [1, 2])
def test_no_keys_and_no_queries(splits):
    for tokens in ((2, 0), (0, 7)):
        tensors, options = make_inputs(replace(SMALL, tokens=tokens, factors="none"))
        with patch.object(packed_launch, "split_count", lambda *_: splits):
            out, lse = decode_fwd(*tensors, **arguments(options))
        assert out.shape == tensors[0].shape
        assert lse.shape == out.shape[:3]
        assert (out == 0).all() and (lse == -math.inf).all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("splits", [1, 2])
def test_a_static_cache_is_a_shorter_one(mode, splits):
    """Slots behind the query are empty, whatever they hold; the offset lives on the device."""
    tensors, options = make_inputs(replace(SMALL, mode=mode, tokens=(1, 200)))
    query, key, value, factor = tensors
    filled = 130
    expected = launch(
        [query, *(t[:, :, :filled] for t in (key, value)), factor[:, :filled]], options
    )
    key[:, :, filled:] = value[:, :, filled:] = 1e4
    factor[:, filled:] = 7.0
    offset = torch.tensor([filled - 1], device=DEVICE)
    got = launch(tensors, options | {"query_offset": offset}, splits)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    if splits == 1:
        assert torch.equal(got[0], expected[0])


def test_rows_of_one_cache_share_tiles():
    """Keys of batch 1: as one copy for each row, and read in place."""
    case = replace(SMALL, batch=5, mode="min_shift", factors="per_head", layout="shared_keys")
    tensors, options = make_inputs(case)
    with Allocations(*tensors) as shared:
        out, lse = launch(tensors, options)
    assert shared.elements < tensors[1].numel()
    compare((out, lse), tensors, options)
    copies = [tensors[0], *(t.repeat(5, 1, 1, 1) for t in tensors[1:3]), tensors[3]]
    got = launch(copies, options)
    torch.testing.assert_close(got, (out, lse), rtol=1e-5, atol=1e-6)


def test_wide_offsets_are_the_same():
    tensors, options = make_inputs(replace(SMALL, mode="min_shift", factors="per_head"))
    expected = launch(tensors, options, 2)
    with patch.object(packed_launch, "_spans_beyond_int32", lambda *_: True):
        got = launch(tensors, options, 2)
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])


# ---- which kernel, how many splits -------------------------------------------------------------


def test_few_queries_are_decoded():
    """Where nothing is trained; more queries, dropout and gradients take the other kernel."""
    tensors, _ = make_inputs(replace(SMALL, tokens=(16, 20)))
    more, _ = make_inputs(replace(SMALL, tokens=(17, 20)))
    leaf = tensors[0].clone().requires_grad_()
    calls: list[tuple[list, dict, str]] = [
        (tensors, {}, PACKED),
        (more, {}, "_attention_fwd_kernel"),
        (tensors, {"dropout": 0.5}, "_attention_fwd_kernel"),
        ([leaf, *tensors[1:]], {}, "_attention_fwd_kernel"),
    ]
    for given, features, kernel in calls:
        with count_launches() as launches:
            attention(*given, backend="triton", **features)
        assert launches[kernel] == launches.attention == 1


@pytest.mark.parametrize("window", [None, 64])
def test_long_caches_are_split(window):
    """On a device with room: not what is short, and no more than a window reaches."""
    case = Case(tokens=(1, 600), dims=(16, 16), heads=(1, 1), batch=1, mode="min_shift")
    tensors, options = make_inputs(case)
    options["window"] = window
    for keys in (600, 300):
        cut = [tensors[0], *(t[:, :, :keys] for t in tensors[1:3]), tensors[3][:, :keys]]
        with patch.object(packed_launch, "_processors", lambda _: 132), count_launches() as seen:
            got = decode_fwd(*cut, **options)
        assert seen[f"{PACKED}.merge"] == (keys == 600 and window is None)
        compare(got, cut, options)


def test_split_counts():
    """Of one sequence of a model with 8 key heads on 132 multiprocessors; tiles have 64 keys."""
    assert [split_count(8, keys // 64, 132) for keys in (256, 1024, 8192, 131072)] == [1, 4, 32, 33]
    assert split_count(8 * 64, 131072 // 64, 132) == 1  # a large batch fills the device


# ---- what is compiled --------------------------------------------------------------------------


class Recorder:
    """Stands in for a jit kernel: notes what Triton would compile for, and launches nothing."""

    def __init__(self, kernel: Any, keys: set[str]) -> None:
        self._names = kernel.arg_names
        self._kept = getattr(kernel, "kwargs", vars(kernel))["do_not_specialize"]
        self._keys = keys

    def __getitem__(self, grid: Any) -> Any:
        return self._record

    def _record(self, *args: Any, **constants: Any) -> None:
        special = [
            native_specialize_impl(BaseBackend, value, False, name not in self._kept, True)
            for name, value in zip(self._names, args, strict=False)
        ]
        self._keys.add(f"{self._names} {special} {constants}")


def compile_keys(case: Case, counts: Iterable[int]) -> int:
    """How many kernels Triton compiles while a cache of ``case`` grows through ``counts``."""
    keys: set[str] = set()
    places = [
        (packed_launch, PACKED),
        (prepass, "_key_range_kernel"),
        (prepass, "_factor_tiles_kernel"),
        (packed_prepass, "_packed_tiles_kernel"),
    ]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(packed_launch, "_processors", lambda _: 132)
        for module, name in places:
            patched.setattr(module, name, Recorder(getattr(module, name), keys))
        for count in counts:
            tensors, options = make_inputs(replace(case, tokens=(1, count)))
            tensors[3] = tail_of_longer(tensors[3], count)
            options |= {
                name: tail_of_longer(options[name], count)
                for name in ("mask", "position_bias")
                if name in options
            }
            decode_fwd(*tensors, **arguments(options))
    return len(keys)


def tail_of_longer(tensor: Tensor, count: int) -> Tensor:
    """The same as a view that begins ``count % 16`` elements into longer rows."""
    before = count % 16
    return torch.nn.functional.pad(tensor, (before, 0))[..., before:]


FEATURED = replace(SMALL, mode="min_shift", bias="alibi", mask="left")


@pytest.mark.parametrize(
    ("case", "kernels"),
    [
        (FEATURED, 2),  # the kernel itself, and where padding ends
        (replace(FEATURED, factors="per_head", bias="dense", mask="heads"), 1),
        (replace(FEATURED, layout="shared_keys"), 4),  # and two for the list of flagged tiles
    ],
    ids=str,
)
def test_a_growing_cache_compiles_nothing_again(case, kernels):
    """Neither a length nor a stride or an address that follows from it is specialised."""
    assert compile_keys(case, range(2, 35)) == kernels


def test_a_cache_that_becomes_long_compiles_its_split_kernels_once():
    case = replace(SMALL, batch=1, mode="min_shift")
    assert compile_keys(case, [200, 1000, 1001, 5000, 9001]) == 1 + 3


@pytest.mark.parametrize("mode", ["multiplicative", "min_shift"])
def test_a_static_cache_compiles_whole_and_once(mode):
    """One graph serves every step; the query's place is a tensor."""

    def step(query, key, value, factor, place):
        return attention(
            query, key, value, factor, mode=mode, causal=True, query_offset=place, backend="triton"
        )

    tensors, _ = make_inputs(replace(SMALL, tokens=(1, 70)))
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    with torch.no_grad(), count_launches() as launches:
        for place in (3, 64, 69):
            offset = torch.tensor(place, device=DEVICE)
            got = compiled(*tensors, offset)
            cut = [tensors[0], *(t[:, :, : place + 1] for t in tensors[1:3])]
            expected = attention(
                *cut, tensors[3][:, : place + 1], mode=mode, causal=True, backend="reference"
            )
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1
    assert launches[PACKED] == launches.attention == 3
    torch._dynamo.reset()


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generating_with_a_cache_decodes(cache):
    """Through transformers: the prompt by the forward kernel, each step by this one."""
    model = FAMILIES["llama"].build().float().to(DEVICE)
    ids = torch.randint(3, VOCAB, (2, 20), generator=torch.Generator().manual_seed(5)).to(DEVICE)
    padding = torch.ones_like(ids)
    padding[0, :3] = 0
    factor = torch.ones(2, 20, device=DEVICE)
    factor[:, 5:9] = torch.tensor([[0.1, 4.0, 1.0, 0.3], [3.0, 0.2, 0.1, 1.0]], device=DEVICE)
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": VOCAB + 1}
    options |= {"cache_implementation": "static"} if cache == "static" else {}
    found = []
    for backend in ("torch", "triton"):
        with manipulate(model, factor, "min_shift", backend=backend), count_launches() as launches:
            found.append(model.generate(ids, attention_mask=padding, **options))
    assert torch.equal(*found)
    assert launches["_attention_fwd_kernel"] == LAYERS  # pyright: ignore
    assert launches[PACKED] == 3 * LAYERS  # pyright: ignore


# ---- caches that are refused -------------------------------------------------------------------


def test_a_paged_cache_is_refused_by_name():
    """As continuous batching passes it on through the model, with or without a manipulation."""
    model = FAMILIES["llama"].build().float()
    ids = torch.tensor([[3, 4, 5, 6]])
    text = r"^a paged cache \(continuous batching\) is not supported by 'atman'; use generate\(\)"
    with pytest.raises(ValueError, match=text), manipulate(model, torch.ones(1, 4)):
        model(ids, cache=object())
    model.set_attn_implementation("atman")
    with pytest.raises(ValueError, match=text):
        model(ids, cache=object())


def test_continuous_batching_is_refused():
    """By transformers itself, before it starts."""
    model = FAMILIES["llama"].build().float()
    options = tf.GenerationConfig(max_new_tokens=2, do_sample=False, eos_token_id=VOCAB + 1)
    with (
        pytest.raises(ValueError, match="atman"),
        manipulate(model, torch.ones(1, 4)),
    ):
        model.generate_batch([[3, 4, 5, 6]], generation_config=options, progress_bar=False)
