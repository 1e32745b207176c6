"""Tuning of the Hopper kernel in small: which tiles, that they compile, and who may time them."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="the fused kernels need triton")
pytest.importorskip("triton.experimental.gluon", reason="the Hopper kernel needs Gluon")

from gluon_emulator.interpreter import emulated

from atman_triton import backend_registry
from atman_triton.kernels import hopper, tuned
from atman_triton.kernels.hopper_configs import hopper_config, hopper_rule
from atman_triton.kernels.hopper_tiles import HopperConfig
from bench import tune, tune_candidates, tune_hopper
from bench.apart import Ended
from bench.hopper_gate import RIGHT
from bench.tune import Machine
from bench.tune_candidates import Setting, clean, options, served_cases, settings, shapes

CPU = torch.device("cpu")
MACHINE = Machine(CPU, torch.bfloat16, "interpreter", "sm_90", 1, 5, float("inf"), toy=True)
SETTING = Setting("hopper", 64, "multiplicative", True)
RULE = hopper_rule(64, 64)
BEST = HopperConfig(64, 3, True)

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="small on a CPU only")


@pytest.mark.parametrize(
    ("head_dim", "expected"),
    [
        # 16 KB of queries, as much of output, and 32 KB a stage of 128 keys: all fit
        (64, [(n, s, own) for n in (128, 64) for s in (4, 3, 2) for own in (True, False)]),
        (128, [(128, 2, True), (128, 2, False), (128, 3, False)]
            + [(64, s, own) for s in (2, 3, 4) for own in (True, False)]),
        (256, [(64, 2, False)]),  # 64 KB of queries, 64 KB a stage of 64 keys
    ],
)  # fmt: skip
def test_all_tiles_that_fit_are_tried(head_dim, expected):
    setting = replace(SETTING, head_dim=head_dim)
    rule = setting.rule("sm_90", 4096, torch.bfloat16)
    found = shapes(setting, "sm_90", rule)
    assert found[0] == rule == hopper_rule(head_dim, head_dim)
    assert len(set(found)) == len(found)
    assert set(found) == {HopperConfig(*tiles) for tiles in expected}
    for tiles in found:
        assert options(setting, tiles) == [tiles]  # nothing is left to be switched
        tune.table_of(setting, "sm_90", torch.bfloat16, tiles)  # may stand in a file


def test_it_has_a_direction_of_its_own():
    found = settings(["hopper"], [128, 64], ["multiplicative", "min_shift"])
    assert found[0] == Setting("hopper", 128, "multiplicative", True)
    assert {setting.kernel for setting in found} == {"hopper"} and len(found) == 8
    (served,) = served_cases(SETTING, "sm_90", BEST)
    assert served["dtype"] == "float16" and served["tiles"] == [64, 3, True]


def test_tiles_are_compiled():
    """By the real compiler: what does not fit is dropped."""
    wide = HopperConfig(128, 4, True)
    reports = tune_candidates.compiled(
        [
            tune_candidates.case_of(SETTING, "sm_90", BEST),
            tune_candidates.case_of(replace(SETTING, head_dim=128), "sm_90", wide),
        ],
        workers=1,
    )
    good, large = reports
    assert good["problems"] == ""
    assert 32 < good["registers"] <= 255 and good["shared"] >= BEST.shared_bytes(64, 64)
    assert "shared memory" in large["problems"] or "OutOfResources" in large["problems"]
    with pytest.raises(RuntimeError, match=r"nothing was compiled: .*only cases of hopper"):
        tune_hopper.compiled_hopper([{"kernel": "attention"}], 1)


def test_exponentials_beside_no_product_are_timed(monkeypatch):
    """How much they cost is measured; accesses to local memory in loops are a reason."""
    from bench import compile_sm90

    row = compile_sm90.Row(
        "3.7", "hopper", "", 64, 64, "bfloat16", "plain", "full", 4096, 128, 64, 12, 3,
        registers=168, stack=0, shared=1024, wgmma=8, mma=0, local=0, local_in_loops=0,
        late_exponentials=9, problems="9 exponentials",
    )  # fmt: skip
    monkeypatch.setattr(compile_sm90, "compile_row", lambda case: row)
    case = tune_candidates.case_of(SETTING, "sm_90", BEST)
    assert tune_hopper.report_of(case) == {"problems": "", "registers": 168, "shared": 1024}
    spilling = replace(row, local_in_loops=2)
    monkeypatch.setattr(compile_sm90, "compile_row", lambda case: spilling)
    assert tune_hopper.report_of(case)["problems"].startswith("2 accesses to local memory in loop")
    monkeypatch.setattr(compile_sm90, "compile_row", lambda case: 1 / 0)
    assert "does not compile: HopperCase" in tune_hopper.report_of(case)["problems"]


def test_tiles_are_checked_elsewhere(monkeypatch):
    """What is asked there is what was to be asked."""
    case = tune.timed_case(SETTING, "1k", toy=True)
    started: list[list[str]] = []

    def run_apart(commands, seconds):
        started.extend(commands)
        return [Ended(None, "a tile:"), Ended(0, RIGHT), Ended(1, "wrong: off")][: len(commands)]

    monkeypatch.setattr(tune_hopper, "run_apart", run_apart)
    machine = replace(MACHINE, workers=3)
    tried = [RULE, BEST, HopperConfig(64, 2, False), HopperConfig(64, 4, True)]
    found = tune_hopper.verdicts_apart(SETTING, machine, tried, case)
    late = "no answer within 90 s, at a tile:"
    assert found == [late, None, "exit code 1 at wrong: off", late]
    asked = []
    monkeypatch.setattr(tune, "verdict", lambda *given: asked.append(given))
    for command in started:
        tune_hopper.check(json.loads(command[-1]))
    assert [(setting, tiles, each) for setting, _, tiles, each in asked] == [
        (SETTING, tiles, case) for tiles in tried
    ]
    assert {str(machine.device) for _, machine, *_ in asked} == {"cuda"}


@pytest.fixture
def small(monkeypatch):
    """The kernel emulated, nothing compiled, other processes not asked."""
    monkeypatch.setattr(hopper, "_hopper_fwd_kernel", emulated(hopper._hopper_fwd_kernel))
    monkeypatch.setattr(backend_registry, "_is_hopper", lambda device: True)
    for module in (tune, tune_candidates):
        monkeypatch.setattr(module, "compiled", lambda cases: [{"problems": ""} for _ in cases])
    monkeypatch.setattr(tune, "shapes", lambda *_: [RULE, BEST])


def test_a_clear_win_is_written_and_then_launched(small, monkeypatch, tmp_path):
    seen = []
    variant = hopper.variant

    def in_turns(calls, turns, device):
        for tiles, call in calls.items():
            call()
            assert seen[-1] == tiles  # each call is made with its own
        return {tiles: [1.0 if tiles == BEST else 2.0] * turns for tiles in calls}

    def kept(config, *given):
        seen.append(config)
        return variant(config, *given)

    monkeypatch.setattr(tune, "in_turns", in_turns)
    monkeypatch.setattr(hopper, "variant", kept)
    monkeypatch.setattr(tune, "verdicts_apart", lambda setting, machine, tried, case: [None] * 2)
    path = tmp_path / "tuned.json"
    (row,), text = tune.tune(MACHINE, [SETTING], path)
    assert row.tiles == BEST and tuned.load(path).rows == (row,)
    assert "64 keys 3 stages+own output, 2.000 times as fast as the rule" in text
    call = (64, 64, "interpreter", "multiplicative", True, "1k", "interpreter")
    assert hopper_config(*call) == RULE
    with tuned.in_use(tuned.load(path)):
        assert hopper_config(*call) == BEST
        assert hopper_config(64, 64) == RULE  # as the table of what compiles asks


def test_tiles_that_hang_are_not_timed(small, monkeypatch, capsys):
    def in_turns(calls, turns, device):
        assert BEST not in calls
        return {tiles: [1.0] * turns for tiles in calls}

    late = "no answer within 90 s, at 64 keys:"
    monkeypatch.setattr(tune, "in_turns", in_turns)
    monkeypatch.setattr(tune, "verdicts_apart", lambda *_: [None, late])
    rows, text = tune.tune(MACHINE, [SETTING], None)
    assert rows == [] and text.endswith("the rule stays")
    assert f"not timed: 64 keys 3 stages+own output: {late}" in capsys.readouterr().err


def test_it_is_left_out_where_it_does_not_run(monkeypatch, capsys):
    tuned_settings = []
    monkeypatch.setattr(
        tune, "tune", lambda machine, wanted, *_: (tuned_settings.extend(wanted) or [], "done")
    )
    tune.main(["--dry-run"])
    assert {setting.kernel for setting in tuned_settings} >= {"attention", "backward_keys"}
    assert "hopper" not in {setting.kernel for setting in tuned_settings}
    said = capsys.readouterr().err
    assert "the direction hopper is left out: it needs a Hopper GPU (sm_90)" in said
    monkeypatch.setattr(tune, "on_hopper", lambda device: True)
    monkeypatch.setattr(tune, "verdict_of_gate", lambda: "failed before: it hangs")
    tuned_settings.clear()
    with pytest.raises(SystemExit) as ended:
        tune.main(["--dry-run"])
    assert ended.value.code == "FAILED\natman (hopper) failed before: it hangs"
    assert tuned_settings and "hopper" not in {setting.kernel for setting in tuned_settings}
    lines = []
    monkeypatch.setattr(tune, "survivors", lambda wanted, architecture: lines.extend(wanted) or [])
    tune.main(["--compile-only", "--architecture", "sm_80"])
    assert "hopper" not in {setting.kernel for setting in lines}
    tune.main(["--compile-only", "--architecture", "sm_90", "--directions", "hopper"])
    assert {setting.kernel for setting in lines[-3:]} == {"hopper"}


def test_what_compiles_cleanly_is_kept(monkeypatch):
    bad = [HopperConfig(64, 2, True)]

    def compiled(cases):
        return [{"problems": "spills" * (case["tiles"] == [64, 2, True])} for case in cases]

    monkeypatch.setattr(tune_candidates, "compiled", compiled)
    assert [tiles for tiles, _ in clean(SETTING, "sm_90", [RULE, *bad, BEST])] == [RULE, BEST]
