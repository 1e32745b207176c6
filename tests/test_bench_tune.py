"""Tuning in small: what is tried, what is dropped, and that a row needs a clear win."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="the fused kernels need triton")

from atman_triton.kernels import backward, launch, tuned
from atman_triton.kernels.configs import forward_config, forward_rule
from atman_triton.kernels.tuned import TileConfig, in_use
from bench import tune, tune_candidates
from bench.tune import Machine, Tuner, merged, table_of, timed_case
from bench.tune_candidates import Setting, clean, options, served_cases, settings, shapes

CPU = torch.device("cpu")
MACHINE = Machine(CPU, torch.float32, "interpreter", "sm_90", 1, 5, float("inf"), toy=True)
SETTING = Setting("attention", 16, "min_shift", True)
HOPPER = replace(SETTING, head_dim=128)
RULE = forward_rule("interpreter", 16, 16, torch.float32, "min_shift", 40, 0)
SMALLER = replace(RULE, block_m=32, block_n=32)

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="small on a CPU only")


@pytest.fixture
def all_clean(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """Compile nothing: every case is clean but those that a test adds to the list."""
    bad: list[dict] = []

    def reports(cases, workers=None):
        return [
            {"problems": "spills 8" if any(each.items() <= case.items() for each in bad) else ""}
            for case in cases
        ]

    monkeypatch.setattr(tune, "compiled", reports)
    monkeypatch.setattr(tune_candidates, "compiled", reports)
    return bad


def timing(monkeypatch: pytest.MonkeyPatch, speed: Callable[[TileConfig, int], float]) -> list:
    """Milliseconds of tiles in a turn, in place of a clock; the tiles of each comparison."""
    compared: list[list[TileConfig]] = []

    def in_turns(calls, turns, device):
        compared.append(list(calls))
        return {tiles: [speed(tiles, turn) for turn in range(turns)] for tiles in calls}

    monkeypatch.setattr(tune, "in_turns", in_turns)
    return compared


def test_settings_come_in_order_of_importance():
    found = settings(["forward", "backward"], [128, 64], ["multiplicative", "min_shift"])
    assert found[0] == Setting("attention", 128, "multiplicative", True)
    assert len(set(found)) == len(found) == 8 + (2 + 3) * 4
    kernels = [setting.kernel for setting in found]
    assert kernels[:8] == ["attention"] * 8
    rows = [setting for setting in found if setting.kernel == "backward_rows"]
    assert {setting.mode for setting in rows} == {"min_shift"}


@pytest.mark.parametrize("kernel", ["attention", "backward_queries", "backward_keys"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_every_candidate_may_stand_in_a_table(kernel, head_dim, architecture):
    setting = Setting(kernel, head_dim, "min_shift", True)
    rule = setting.rule(architecture, 4096, torch.bfloat16)
    every = shapes(setting, architecture, rule)
    assert every[0] == rule and len(set(every)) == len(every) > 4
    for tiles in [*every, *options(setting, rule)]:
        assert table_of(setting, architecture, torch.bfloat16, tiles).rows[0].tiles == tiles


def test_what_can_be_switched_is_tried():
    tiles = TileConfig(128, 64, 8, 3, edge_stages=3)
    found = options(HOPPER, tiles)
    assert len(found) == 8 and tiles in found
    assert replace(tiles, edge_stages=1, skip_plain_tiles=True, persistent=True) in found
    plain = options(replace(HOPPER, mode="plain"), tiles)
    assert len(plain) == 4
    assert not any(isinstance(each, TileConfig) and each.skip_plain_tiles for each in plain)
    backward = options(replace(HOPPER, kernel="backward_queries"), tiles)
    assert backward == [replace(tiles, edge_stages=1), tiles]


def test_what_a_row_serves_is_compiled():
    tiles = TileConfig(128, 64, 8, 3)
    cases = served_cases(HOPPER, "sm_90", tiles)
    assert {"stage": "training"}.items() <= cases[-1].items()
    assert cases[1]["features"] == ["causal", "sinks"]  # with a window it needs more registers
    cases = served_cases(replace(HOPPER, mode="multiplicative"), "sm_90", tiles)
    assert cases[1]["features"] == ["causal", "window", "padding", "sinks"]
    assert not any("stage" in case for case in cases)
    wide = served_cases(replace(HOPPER, head_dim=256), "sm_90", tiles)
    assert not any("stage" in case for case in wide)  # training has another load there
    backward = replace(HOPPER, kernel="backward_keys", causal=False, mode="multiplicative")
    assert served_cases(backward, "sm_90", tiles)[1]["features"] == ["window", "padding"]


def test_tiles_that_spill_are_dropped(monkeypatch):
    """By the real compiler."""
    good = TileConfig(64, 64, 4, 2)
    turns = replace(good, persistent=True)
    spilling = TileConfig(256, 128, 4, 1)
    setting = replace(HOPPER, head_dim=64, mode="multiplicative")
    found = dict(clean(setting, "sm_90", [spilling, good, turns]))
    assert list(found) == [good, turns]
    assert 32 < found[good]["registers"] <= 255 and found[good]["shared"] > 0
    assert found[turns]["persistent"]
    few = [TileConfig(16, 32, 8, 1), TileConfig(16, 32, 4, 1), TileConfig(32, 32, 4, 1)]
    monkeypatch.setattr(tune, "shapes", lambda *_: few)
    (line, *tiles) = tune.survivors([replace(HOPPER, kernel="backward_rows", head_dim=64)], "sm_90")
    assert line == "backward_rows D64 min_shift causal: 3 of 3 compile cleanly"
    assert len(tiles) == 3 and tiles[0].startswith("  16x32 8 warps") and "(the rule)" in tiles[0]
    with pytest.raises(ValueError, match=r"architecture must be one of sm_80, .*, got 'sm_75'"):
        list(clean(setting, "sm_75", [good]))


def test_a_clear_win_is_written_and_then_launched(monkeypatch, all_clean, tmp_path):
    best = replace(SMALLER, skip_plain_tiles=True)
    speeds = {best: 1.0, SMALLER: 1.5, RULE: 2.0}
    compared = timing(monkeypatch, lambda tiles, turn: speeds.get(tiles, 1.8) + turn * 0.01)
    path = tmp_path / "tuned.json"
    rows, text = tune.tune(MACHINE, [SETTING], path)
    assert compared == [[RULE, SMALLER], options(SETTING, SMALLER), [RULE, best]]
    (row,) = rows
    assert row.tiles == best and tuned.load(path).rows == (row,)
    assert (row.measured.ms, row.measured.rule_ms) == (1.02, 2.02)
    assert row.measured.spread_ms == pytest.approx(0.024)
    assert row.measured.device == row.problem.architecture == "interpreter"
    assert "+skip, 1.980 times as fast as the rule" in text
    call = ("interpreter", 16, 16, torch.float32, "min_shift", 40, 0)
    assert forward_config(*call, True, "1k", "interpreter") == RULE
    with in_use(tuned.load(path)):
        assert forward_config(*call, True, "1k", "interpreter") == best
        assert forward_config(*call, True, "4k", "interpreter") == RULE


@pytest.mark.parametrize(
    "speed",
    [
        lambda tiles, turn: 1.0,  # no faster
        lambda tiles, turn: 1.9 if tiles == SMALLER else 2.0 + (turn - 2) * 0.1,  # nor by much
        lambda tiles, turn: 1.9 + (turn - 2) * 0.1 if tiles == SMALLER else 2.0,
    ],
)
def test_a_win_within_the_spread_is_none(monkeypatch, all_clean, tmp_path, speed):
    timing(monkeypatch, speed)
    path = tmp_path / "tuned.json"
    rows, text = tune.tune(MACHINE, [SETTING], path)
    assert rows == [] and text.endswith("the rule stays")
    assert path.read_text() == "[]\n"


def test_luck_in_the_first_turns_is_not_enough(monkeypatch, all_clean):
    """The last comparison alone decides."""
    compared = timing(
        monkeypatch,
        lambda tiles, turn: 1.0 if tiles == SMALLER and len(compared) < 3 else 2.0,
    )
    rows, _ = tune.tune(MACHINE, [SETTING], None)
    assert len(compared) == 3 and rows == []


def test_tiles_that_spill_elsewhere_are_not_taken(monkeypatch, all_clean, capsys):
    """The next best are."""
    speeds = {SMALLER: 1.0, replace(SMALLER, persistent=True): 1.5}
    timing(monkeypatch, lambda tiles, turn: speeds.get(tiles, 2.0))
    all_clean.append(tune_candidates.case_of(SETTING, "sm_90", SMALLER, stage="training"))
    rows, _ = tune.tune(MACHINE, [SETTING], None)
    assert [row.tiles for row in rows] == [replace(SMALLER, persistent=True)]
    assert "not taken: 32x32 4 warps" in capsys.readouterr().err


def test_wrong_tiles_are_not_timed(monkeypatch, all_clean, capsys):
    right = tune.verdict

    def verdict(setting, machine, tiles, case):
        return "wrong: off" if tiles == SMALLER else right(setting, machine, tiles, case)

    monkeypatch.setattr(tune, "verdict", verdict)
    compared = timing(monkeypatch, lambda tiles, turn: 1.0)
    tune.tune(MACHINE, [SETTING], None)
    assert not any(SMALLER in together for together in compared)
    assert "not timed: 32x32 4 warps 1 stages (1 at edges): wrong: off" in capsys.readouterr().err


@pytest.mark.parametrize("kernel", ["attention", "backward_keys"])
def test_the_gate_runs_the_tiles_that_it_judges(monkeypatch, kernel):
    setting = replace(SETTING, kernel=kernel, mode="multiplicative")
    seen: list[TileConfig] = []
    module = launch if kernel == "attention" else backward
    name = "make_variant" if kernel == "attention" else "backward_config"
    original = getattr(module, name)

    def kept(*given, **named):
        found = original(*given, **named)
        seen.append(given[0] if kernel == "attention" else found)
        return found

    monkeypatch.setattr(module, name, kept)
    case = timed_case(setting, "1k", toy=True)
    assert tune.verdict(setting, MACHINE, SMALLER, case) is None
    assert SMALLER in seen


def test_backward_tiles_are_timed_without_the_forward_pass(monkeypatch, all_clean):
    setting = replace(SETTING, kernel="backward_keys", mode="multiplicative")
    tuner = Tuner(setting, MACHINE, print)
    case = timed_case(setting, "1k", toy=True)
    inputs = tune.inputs_of(case, torch.float32, CPU)
    calls = tuner.calls([tuner.rule, replace(tuner.rule, block_n=32)], case, inputs)
    assert len(calls) == 2
    first, second = (call() for call in calls.values())
    assert len(first) == 4  # gradients, and no output
    for ours, other in zip(first, second, strict=True):
        torch.testing.assert_close(ours, other, rtol=0, atol=1e-5)


def test_rows_of_others_stay(monkeypatch, all_clean, tmp_path):
    path = tmp_path / "tuned.json"
    (row,) = table_of(SETTING, "interpreter", torch.float32, SMALLER).rows[:1]
    mine = replace(row, measured=replace(row.measured, device="interpreter"))
    older = replace(mine, measured=replace(mine.measured, triton="3.0.0"))
    other = replace(row, measured=replace(row.measured, device="a GPU"))
    tuned.save([mine, older, other], path)
    timing(monkeypatch, lambda tiles, turn: 1.0)
    tune.tune(MACHINE, [SETTING], path)  # where the rule is as fast, the old row goes
    assert set(tuned.load(path).rows) == {older, other}
    assert merged([mine, other], [mine], {mine.place}) == [other, mine]


def test_what_time_does_not_allow_is_named(tmp_path):
    path = tmp_path / "tuned.json"
    late = replace(MACHINE, stop=0.0)
    rows, text = tune.tune(late, [SETTING, HOPPER], path)
    assert rows == [] and not path.exists()
    assert text.splitlines() == ["not reached: 2", f"  {SETTING}", f"  {HOPPER}"]


def test_bad_usage_says_what_to_do(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    for words, message in (
        (["--out", str(tmp_path / "tuned.json")], "no GPU is here; --dry-run runs the same code"),
        (["--compile-only"], "no GPU is here: --architecture says what to compile for."),
    ):
        with pytest.raises(SystemExit) as ended:
            tune.main(words)
        assert ended.value.code == 2 and message in capsys.readouterr().err


def test_a_dry_run_writes_where_it_is_told_only(monkeypatch, all_clean, capsys, tmp_path):
    words = ["--dry-run", "--directions", "forward", "--modes", "multiplicative"]
    published = tuned.FILE.read_text()
    tune.main(words)
    printed = capsys.readouterr().out
    assert "attention D16 multiplicative causal, keys 1k: " in printed
    assert printed.endswith("toy sizes: the times mean nothing\n")
    tune.main([*words, "--out", str(tmp_path / "tuned.json")])
    assert isinstance(json.loads((tmp_path / "tuned.json").read_text()), list)
    assert tuned.FILE.read_text() == published
