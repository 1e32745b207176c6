"""The Hopper kernel against the oracle: on a Hopper GPU compiled, elsewhere emulated.

The emulator runs the partitions under many schedules and refuses races, see gluon_emulator;
that it compiles and what of is in test_compile_sm90.py. Legend: B batch, Hq/Hk heads, Tq/Tk tokens,
D head dim.
"""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from atman_triton.testing import assert_close_to_oracle

pytest.importorskip("triton", reason="the fused kernels need triton")
pytest.importorskip("triton.experimental.gluon", reason="the Hopper kernel needs Gluon")

from gluon_emulator.errors import DeadlockError, FenceError, RaceError
from gluon_emulator.interpreter import emulated
from kernel_cases import DEVICE, MODES, Case, covering, make_inputs, poison, worse

from atman_triton.kernels import hopper
from atman_triton.kernels.hopper_configs import hopper_config, why_not_hopper
from atman_triton.kernels.hopper_tiles import SHARED_LIMIT, HopperConfig
from atman_triton.kernels.reference import attention_reference
from bench.hopper_gate import on_hopper

__all__ = ["poison"]  # an autouse fixture

ON_HOPPER = on_hopper()
# the emulator takes tensors on the CPU alone
pytestmark = pytest.mark.skipif(
    DEVICE == "cuda" and not ON_HOPPER, reason="this GPU is not Hopper, and no CPU is under test"
)
LEVELS = {
    "tokens": [(17, 131), (65, 64), (200, 300), (130, 70), (300, 20), (129, 640)],
    "batch": [1, 2, 3],
    "dims": [(64, 64), (128, 128), (256, 256), (64, 128), (256, 64)],
    "heads": [(2, 2), (4, 2), (3, 1)],
    "dtype": [torch.bfloat16, torch.float16],
    "mode": [*MODES],
    "factors": ["none", "some", "per_head", "one"],
    "band": ["full", "causal", "upper_left", "offset"],
    "layout": ["plain", "tokens_first", "shared_keys"],
    "config": [None, HopperConfig(32, 2, False), HopperConfig(64, 3, True)],
    "seed": [*range(6)],
}


def launch(
    tensors: list, options: dict, config: HopperConfig | None = None, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Call the launcher with the oracle's arguments."""
    options = {name: value for name, value in options.items() if name != "softcap"}
    with pytest.MonkeyPatch.context() as patch:
        if not ON_HOPPER:
            kernel = emulated(hopper._hopper_fwd_kernel, seed=seed)
            patch.setattr(hopper, "_hopper_fwd_kernel", kernel)
        return hopper.attention_fwd_hopper(*tensors, **options, config=config)


def inputs_of(case: Case, seed: int = 0) -> tuple[list, dict]:
    """As the other kernels' inputs, but as TMA takes them: strides of multiples of 16 bytes."""
    tensors, options = make_inputs(replace(case, layout="plain"), seed)
    if case.layout == "tokens_first":
        tensors[:3] = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in tensors[:3]]
    if case.layout == "shared_keys":
        tensors[1], tensors[2] = tensors[1][:1], tensors[2][:1].expand(case.batch, -1, -1, -1)
    if isinstance(options.get("query_offset"), Tensor):
        options["query_offset"] = int(options["query_offset"])
    return tensors, options


def check(case: Case, config: HopperConfig | None = None, seed: int = 0) -> None:
    """The tolerance rule, for output and log-sum-exp."""
    tensors, options = inputs_of(case)
    if config is not None and not config.own_output and case.dims[0] != case.dims[1]:
        config = replace(config, own_output=True)
    if config is not None and config.shared_bytes(*case.dims) + 1024 > SHARED_LIMIT:
        config = replace(config, stages=2, own_output=False)
        assert config.shared_bytes(*case.dims) + 1024 <= SHARED_LIMIT
    out, lse = launch(tensors, options, config, seed)
    assert out.dtype == case.dtype
    assert lse.dtype == torch.float32
    query, key, value, factor = tensors
    key = key.expand(case.batch, -1, -1, -1)
    tensors = [query, key, value, factor]
    eager, eager_lse = attention_reference(*tensors, **options)
    double = [None if t is None else t.double() for t in tensors]
    oracle, oracle_lse = attention_reference(*double, **options)
    other, other_lse = attention_reference(query.flip(-1), key.flip(-1), value, factor, **options)
    assert_close_to_oracle(out, worse(eager, other, oracle), oracle)
    eager_lse = worse(eager_lse, other_lse, oracle_lse)
    assert_close_to_oracle(lse, eager_lse.float(), oracle_lse, name="lse")


COVERING = [
    (Case(**row), config, seed)
    for row in covering(LEVELS, lambda row: row["batch"] * row["heads"][0] * row["tokens"][0])
    for config, seed in [(row.pop("config"), row.pop("seed"))]
]


@pytest.mark.parametrize(("case", "config", "seed"), COVERING, ids=str)
def test_features_in_combination(case, config, seed):
    check(case, config, seed)


@pytest.mark.parametrize("seed", range(9))
@pytest.mark.parametrize("mode", MODES)
def test_schedules_change_nothing(mode, seed):
    """Copies that complete at once, late, or in any order: the same numbers, bit for bit."""
    case = Case((200, 300), (64, 64), (4, 2), 2, torch.bfloat16, mode)
    tensors, options = inputs_of(case)
    first = launch(tensors, options)
    for a, b in zip(launch(tensors, options, seed=seed), first, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("mode", ["multiplicative", "min_shift"])  # log_additive scales earlier
def test_factor_1_is_plain_attention(mode):
    tensors, options = inputs_of(Case((200, 300), dtype=torch.bfloat16, mode=mode))
    tensors[3] = torch.ones(2, 300, device=DEVICE)
    plain = launch([*tensors[:3], None], options)
    for a, b in zip(launch(tensors, options), plain, strict=True):
        assert torch.equal(a, b)


def test_rows_that_see_nothing():
    tensors, options = inputs_of(Case((300, 40), dtype=torch.bfloat16))
    for config in (None, HopperConfig(64, 2, False)):
        out, lse = launch(tensors, options, config)
        assert (out[:, :, :260] == 0).all()
        assert lse[:, :, :260].isneginf().all()
        assert lse[:, :, 260:].isfinite().all()
        nothing = [tensors[0], tensors[1][:, :, :0], tensors[2][:, :, :0], tensors[3][:, :0]]
        out, lse = launch(nothing, options, config)
        assert (out == 0).all()
        assert lse.isneginf().all()


# --- what it serves -------------------------------------------------------------------------------


def ask(tensors: list[Tensor] | None = None, **changes) -> str | None:
    query, key, value = tensors or [torch.zeros(1, 2, 64, 128, dtype=torch.bfloat16)] * 3
    options: dict = {"mode": "multiplicative", "query_offset": 0, "scale": 0.1, "dropout": 0.0}
    names = "window softcap sinks position_bias mask prefix"
    options |= dict.fromkeys(names.split()) | {"needs_grad": False} | changes
    return why_not_hopper(query, key, value, **options)


def test_it_says_what_it_does_not_serve():
    zeros = [torch.zeros(1, 2, 64, 128, dtype=torch.bfloat16)] * 3
    assert ask() is None
    assert ask(mode="log_additive", needs_grad=True) is None
    assert ask(window=4, softcap=2.0) == "does not serve window, softcap"
    assert ask(dropout=0.1) == "does not serve dropout"
    for name in ("sinks", "position_bias", "mask", "prefix"):
        assert ask(**{name: torch.zeros(2)}) == f"does not serve {name}"
    assert ask([t.float() for t in zeros]) == "serves fp16 and bf16, got torch.float32"
    assert ask(mode="min_shift_full") == "cannot serve mode='min_shift_full'"
    assert ask([t[..., :96] for t in zeros]) == "serves head dims 64, 128 and 256, got 96"
    assert ask(query_offset=torch.tensor(3)) == "needs query_offset as a number, got a tensor"
    assert ask(scale=-1.0) == "needs a positive scale, got -1"
    few = ask([zeros[0][:, :, :16], *zeros[1:]])
    assert few == "needs more query rows than fit one small tile, got 16"
    saved = "saves no row minima, which the backward pass of min_shift needs"
    assert ask(mode="min_shift", needs_grad=True) == saved
    assert ask(mode="min_shift") is None


def test_it_says_which_strides_it_cannot_copy():
    odd = torch.zeros(1, 2, 64, 131, dtype=torch.bfloat16)[..., :128]
    good = torch.zeros(1, 2, 64, 128, dtype=torch.bfloat16)
    assert ask([good, odd, good]) == (
        "needs key with its last dimension contiguous and the other strides multiples of 16 bytes, "
        "got strides (16768, 8384, 131, 1) at torch.bfloat16"
    )
    turned = torch.zeros(1, 2, 128, 64, dtype=torch.bfloat16).transpose(2, 3)
    assert str(ask([good, good, turned])).startswith("needs value with its last dimension")
    # heads that share their keys by a stride of 0 would be one dimension without a step
    assert str(ask([good, good[:, :1].expand(-1, 2, -1, -1), good])).startswith("needs key with")
    shared = good.expand(3, -1, -1, -1)  # a batch row that all share is read in place
    assert ask([good.repeat(3, 1, 1, 1), shared, shared]) is None
    assert str(ask([shared, shared, shared])).startswith("needs query with")


@pytest.mark.parametrize("dims", [(d, v) for d in (64, 128, 256) for v in (64, 128, 256)], ids=str)
def test_tiles_fit_shared_memory(dims):
    config = hopper_config(*dims)
    assert config.shared_bytes(*dims) + 1024 <= SHARED_LIMIT
    assert config.own_output or dims[0] == dims[1]


# --- mistakes that the emulator must find ---------------------------------------------------------

MISTAKES = {
    "keys released too early": (
        "hopper_consumer",
        "    scores = warpgroup_mma_wait(1, deps=[pending_scores])\n"
        "    mbarrier.arrive(key_empty.index(slot))\n",
        "    mbarrier.arrive(key_empty.index(slot))\n"
        "    scores = warpgroup_mma_wait(1, deps=[pending_scores])\n",
        RaceError,
    ),
    "values never released": (
        "hopper_consumer",
        "    mbarrier.arrive(value_empty.index(last_slot))\n",
        "",
        DeadlockError,
    ),
    "queries overwritten by the output": (
        "hopper_consumer",
        "            tma.store_wait(0)\n            mbarrier",
        "            mbarrier",
        RaceError,
    ),
    "a wrong parity": (
        "hopper_producer",
        "    mbarrier.wait(empty.index(slot), parity ^ 1)\n",
        "    mbarrier.wait(empty.index(slot), parity)\n",
        DeadlockError,
    ),
    "barriers that copies may not see": (
        "hopper_kernel",
        "    fence_async_shared()  # the copies see the barriers initialised\n",
        "",
        FenceError,
    ),
    "no wait for values": (
        "hopper_consumer",
        "    mbarrier.wait(value_full.index(last_slot), last_parity)\n",
        "",
        RaceError,
    ),
}


@pytest.mark.skipif(ON_HOPPER, reason="a mistake would hang the GPU")
@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_emulator_finds_mistakes(mistake, tmp_path, monkeypatch):
    module, right, wrong, error = MISTAKES[mistake]
    package = tmp_path / "mistaken_kernels"
    package.mkdir()
    for path in (Path(hopper.__file__).parent).glob("*.py"):
        text = path.read_text()
        if path.stem == module:
            assert right in text
            text = text.replace(right, wrong, 1)
        (package / path.name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    try:
        copy = importlib.import_module("mistaken_kernels.hopper")
        tensors, options = inputs_of(Case((200, 300), (64, 64), (4, 2), 2, torch.bfloat16))
        options.pop("softcap")
        config = HopperConfig(64, 2, False)
        mistaken = copy._hopper_fwd_kernel

        def run() -> None:
            for seed in range(9):
                monkeypatch.setattr(copy, "_hopper_fwd_kernel", emulated(mistaken, seed=seed))
                copy.attention_fwd_hopper(*tensors, **options, config=config)

        with pytest.raises(error):
            run()
    finally:
        for name in [name for name in sys.modules if name.startswith("mistaken_kernels")]:
            del sys.modules[name]
