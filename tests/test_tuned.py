"""Measured tiles come before the rules, for their own problem only; a bad file is an error."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="the fused kernels need triton")

import triton
from kernel_cases import DEVICE, MODES, Case, make_inputs

from atman_triton.kernels import backward, forward, launch, shared_prefix, tuned
from atman_triton.kernels.backward_configs import backward_config, backward_rule
from atman_triton.kernels.configs import (
    device_architecture,
    device_name,
    forward_config,
    forward_rule,
    shared_prefix_config,
)
from atman_triton.kernels.tuned import (
    Measurement,
    Problem,
    Row,
    Table,
    TileConfig,
    in_use,
    length_bucket,
)

PROBLEM = Problem("sm_90", "attention", 128, 128, "half", "min_shift", True, "4k")
TILES = TileConfig(64, 32, num_warps=4, num_stages=2, edge_stages=2)
MEASURED = Measurement(
    ms=1.0,
    rule_ms=2.0,
    spread_ms=0.1,
    shape="B4-Hq16-Hk16-T4096-D128",
    device="a GPU",
    triton=triton.__version__,
    torch="2.13.0",
    date="2026-01-31",
    commit="0123456789",
)
ROW = Row(PROBLEM, TILES, MEASURED)
CALL = ("sm_90", 128, 128, torch.bfloat16, "min_shift", 4096, 0, True, "4k", "a GPU")
CONFIGS: dict[str, Any] = {"attention": forward_config, "shared_prefix": shared_prefix_config}
CONFIGS |= {f"backward_{part}": partial(backward_config, part) for part in ("queries", "keys")}
CONFIGS["backward_rows"] = partial(backward_config, "rows")


def table(*changes: dict[str, Any]) -> Table:
    """A row for each dictionary of what is another than in ROW."""
    rows = []
    for change in changes:
        parts = [
            replace(part, **{name: change[name] for name in change if name in asdict(part)})
            for part in (PROBLEM, TILES, MEASURED)
        ]
        rows.append(Row(*parts))
    return Table(rows)


@pytest.mark.parametrize("kernel", CONFIGS)
def test_measured_tiles_come_first(kernel):
    rule = CONFIGS[kernel](*CALL)
    assert rule == CONFIGS[kernel](*CALL[:7])
    with in_use(table({"kernel": kernel})):
        assert CONFIGS[kernel](*CALL) == TILES != rule
        assert CONFIGS[kernel](*CALL[:7]) == rule  # as the table of what compiles asks
    assert CONFIGS[kernel](*CALL) == rule


@pytest.mark.parametrize(
    "other",
    [
        {"kernel": "shared_prefix"},
        {"architecture": "sm_100"},
        {"head_dim": 64},
        {"value_dim": 64},
        {"dtype": "float32"},
        {"mode": "multiplicative"},
        {"causal": False},
        {"length": "1k"},
        {"length": "above"},
        {"triton": "3.0.0"},
    ],
    ids=lambda other: "-".join(map(str, *other.items())),
)
def test_a_row_serves_its_own_problem_only(other):
    with in_use(table(other)):
        assert forward_config(*CALL) == forward_rule(*CALL[:7]) != TILES
    with in_use(table({})):
        assert forward_config(*CALL) == TILES


def test_what_was_not_tuned_takes_the_rule():
    """Few rows, and features that need more registers than those that were tuned."""
    with in_use(table({})):
        for queries, load in ((16, 0), (4096, 1), (4096, 2)):
            call = (*CALL[:5], queries, load)
            assert forward_config(*call, *CALL[7:]) == forward_rule(*call)


def test_forward_rows_do_not_reach_the_shared_prefix():
    with in_use(table({"persistent": True})):
        assert forward_config(*CALL).persistent
        assert not shared_prefix_config(*CALL).persistent
        assert backward_config("queries", *CALL) == backward_rule("queries", *CALL[:7])


def test_a_device_takes_its_own_row_then_the_newest_of_its_architecture():
    rows = table(
        {"device": "another", "block_m": 128, "date": "2026-03-01"},
        {"device": "a third", "block_m": 32, "date": "2026-02-01"},
        {},
    )
    with in_use(rows):
        assert forward_config(*CALL) == TILES
        assert forward_config(*CALL[:-1], "a third").block_m == 32
        assert forward_config(*CALL[:-1], "a fourth").block_m == 128


def test_a_release_of_triton_is_one_version():
    here = tuned.release(triton.__version__)
    with in_use(table({"triton": f"{here}.99+git0123"})):
        assert forward_config(*CALL) == TILES
    assert tuned.release("3.10.2") == "3.10"


def test_lengths_are_few():
    keys = [1, 1024, 1025, 4096, 4097, 10**6]
    assert [length_bucket(each) for each in keys] == ["1k", "1k", "4k", "4k", "above", "above"]


def local(kernel: str, **change: Any) -> dict[str, Any]:
    """A row for this machine's device, as the calls below ask it."""
    interpreted = DEVICE == "cpu"
    return {
        "architecture": device_architecture(torch.device(DEVICE), interpreted),
        "device": device_name(torch.device(DEVICE), interpreted),
        "kernel": kernel,
        "head_dim": 16,
        "value_dim": 16,
        "dtype": "float32",
        "causal": True,
        "length": "1k",
        "block_m": 32,
    } | change


@pytest.mark.parametrize("mode", ["plain", *MODES])
def test_launches_take_measured_tiles(monkeypatch, mode):
    """And nothing that they compute changes beyond the order of sums."""
    case = Case((70, 70), (16, 16), (2, 1), mode="min_shift" if mode == "plain" else mode)
    tensors, options = make_inputs(replace(case, factors="none" if mode == "plain" else "some"))
    seen: list[TileConfig] = []

    def kept(config, *given, **named):
        seen.append(config)
        return launch_variant(config, *given, **named)

    launch_variant = launch.make_variant
    monkeypatch.setattr(launch, "make_variant", kept)
    expected = forward.attention_fwd(*tensors, **options)
    with in_use(table(local("attention", mode=mode))):
        got = forward.attention_fwd(*tensors, **options)
    with in_use(table(local("attention", mode=mode, causal=False))):
        forward.attention_fwd(*tensors, **options)
    problem = launch_problem(mode)
    assert seen == [forward_rule(*problem), replace(TILES, block_m=32), forward_rule(*problem)]
    for ours, other in zip(got, expected, strict=True):
        assert (ours - other).abs().max() <= 8 * torch.finfo(torch.float32).eps


def launch_problem(mode: str) -> tuple[Any, ...]:
    architecture = device_architecture(torch.device(DEVICE), DEVICE == "cpu")
    return (architecture, 16, 16, torch.float32, mode, 70, 0)


def test_a_growing_cache_changes_tiles_between_buckets_only(monkeypatch):
    lengths: list[str] = []

    def choose(*problem):
        lengths.append(problem[8])
        return forward_config(*problem)

    monkeypatch.setattr(forward, "prepare", partial(launch.prepare, choose_config=choose))
    query = torch.randn(1, 1, 20, 16, device=DEVICE)
    for keys in (20, 1000, 1024, 1025):
        key = torch.randn(1, 1, keys, 16, device=DEVICE)
        forward.attention_fwd(query, key, key)
    assert lengths == ["1k", "1k", "1k", "4k"]


def test_the_prefix_counts_and_each_backward_kernel_has_its_own_row(monkeypatch):
    query = torch.randn(2, 2, 20, 16, device=DEVICE)
    key = torch.randn(2, 2, 20, 16, device=DEVICE)
    prefix = torch.randn(1, 2, 1020, 16, device=DEVICE)
    asked: list[tuple[Any, ...]] = []

    def kept(choose, *problem):
        asked.append(problem)
        return choose(*problem)

    for module, choose in ((shared_prefix, shared_prefix_config), (backward, backward_config)):
        monkeypatch.setattr(module, choose.__name__, partial(kept, choose))
    out, lse = shared_prefix.shared_prefix_fwd(query, key, key, prefix, prefix, causal=True)
    saved = backward.Saved(out, lse, launch.NO_NUMBERS)
    row = local("backward_queries", length="4k", mode="plain", block_n=16)
    rows = table(row, row | {"kernel": "backward_keys", "block_n": 64})
    backward.attention_bwd(
        out, None, saved, query, key, key, wanted={"query", "key"},
        prefix=(prefix, prefix), causal=True,
    )  # fmt: skip
    assert all(problem[-3:-1] == (True, "4k") for problem in asked)
    with in_use(rows):
        found = {problem[0]: backward_config(*problem) for problem in asked if len(problem) == 11}
    assert set(found) == {"rows", "queries", "keys"}
    assert (found["queries"].block_n, found["keys"].block_n) == (16, 64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tiles": {"blok_m": 64}}, r"row 0, tiles: unknown field 'blok_m'; required are block_m,"),
        ({"extra": 1}, r"row 0: unknown field 'extra'; required are problem, tiles, measured\."),
        ({"measured": {"ms": "1"}}, r"row 0, measured: ms must be float, got '1'\."),
        ({"problem": {"causal": 1}}, r"row 0, problem: causal must be bool, got 1\."),
        ({"tiles": {"num_warps": True}}, r"row 0, tiles: num_warps must be int, got True\."),
        ({"tiles": {"block_m": 96}}, r"block_m must be a power of two between 16 and 256, got 96"),
        ({"tiles": {"block_n": 8}}, r"block_n must be a power of two between 16 and 256, got 8\."),
        ({"tiles": {"num_warps": 32}}, r"num_warps must be a power of two between 1 and 16, got 3"),
        ({"tiles": {"edge_stages": 0}}, r"edge_stages must lie between 1 and 8, got 0\."),
        ({"problem": {"head_dim": 257}}, r"head_dim must lie between 1 and 256, got 257\."),
        ({"problem": {"kernel": "decode"}}, r"kernel must be one of attention, .*, got 'decode'\."),
        ({"problem": {"length": "2k"}}, r"length must be one of 1k, 4k, above, got '2k'\."),
        ({"problem": {"mode": "min_shift_full"}}, r"mode must be one of plain, .*got 'min_shift_f"),
        ({"problem": {"dtype": "bfloat16"}}, r"dtype must be one of half, float32, got 'bfloat16'"),
        (
            {"problem": {"kernel": "shared_prefix"}, "tiles": {"persistent": True}},
            r"persistent is taken by attention only, got it for shared_prefix\.",
        ),
        (
            {"problem": {"kernel": "backward_keys"}, "tiles": {"skip_plain_tiles": True}},
            r"skip_plain_tiles is not taken by backward_keys in mode min_shift\.",
        ),
        (
            {"problem": {"mode": "plain"}, "tiles": {"skip_plain_tiles": True}},
            r"skip_plain_tiles is not taken by attention in mode plain\.",
        ),
        ({"measured": {"ms": 2.5}}, r"ms must lie between 0 and rule_ms = 2\.0, got 2\.5\."),
    ],
)
def test_a_bad_row_is_an_error(tmp_path, change, message):
    row = json.loads(json.dumps(asdict(ROW)))
    for part, fields in change.items():
        if isinstance(fields, dict):
            row[part] |= fields
        else:
            row[part] = fields
    path = tmp_path / "tuned.json"
    path.write_text(json.dumps([row]))
    with pytest.raises(ValueError, match=message) as raised:
        tuned.load(path)
    assert str(path) in str(raised.value)


def test_a_file_that_is_no_list_of_rows_is_an_error(tmp_path):
    path = tmp_path / "tuned.json"
    for text, message in (
        ("[{", "is not JSON: "),
        ("{}", "must hold a list of rows, got dict"),
        ("[1]", "row 0: must be an object, got 1"),
        (json.dumps([{"tiles": {}, "measured": {}}]), "row 0: missing field 'problem'"),
        (json.dumps([asdict(ROW)] * 2), "row 1: a GPU with Triton .* has a row for Problem"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            tuned.load(path)


def test_the_launch_of_a_bad_file_is_an_error(tmp_path, monkeypatch):
    """Not the rule, which would hide that nothing of it is used."""
    path = tmp_path / "tuned.json"
    path.write_text("[1]")
    monkeypatch.setattr(tuned, "FILE", path)
    monkeypatch.setattr(tuned, "_table", None)
    query = torch.zeros(1, 1, 20, 16, device=DEVICE)
    with pytest.raises(ValueError, match="row 0: must be an object, got 1"):
        forward.attention_fwd(query, query, query)


def test_rows_are_written_as_they_are_read(tmp_path):
    rows = table({}, {"mode": "plain"}, {"device": "another", "triton": "3.6.0"}).rows
    path = tmp_path / "tuned.json"
    tuned.save(rows, path)
    assert set(tuned.load(path).rows) == set(rows)
    assert len(path.read_text().splitlines()) == 2 + len(rows)
    written = path.read_text()
    tuned.save(rows[::-1], path)
    assert path.read_text() == written
    tuned.save([], path)
    assert path.read_text() == "[]\n" and tuned.load(path).rows == ()


def test_the_published_file_can_be_read():
    assert Path(tuned.FILE).exists()
    assert all(row.measured.ms < row.measured.rule_ms for row in tuned.load(tuned.FILE).rows)
