"""The attention kernels compile for every target without spills, within launchable shared memory.

Compiling needs no GPU, but a process without TRITON_INTERPRET. The full table is
``python -m bench.compile_report``; here are the variants that use most registers, one test per
architecture. Legend: D head dim.
"""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="the fused kernels need triton")

from atman_triton.kernels.backward_configs import PARTS, backward_config
from atman_triton.kernels.configs import (
    extra_load,
    forward_config,
    shared_prefix_config,
    split_head_dim,
)
from atman_triton.kernels.packed_configs import packed_config
from bench.compile_report import (
    ARCHITECTURES,
    DROPPED,
    FAMILIES,
    MATRIX_INSTRUCTION,
    MODES,
    SHARED_LIMIT,
)

ROOT = Path(__file__).parent.parent
# tiles, and segments of keys, of each kernel
KERNELS = {
    "attention": (forward_config, 1),
    "shared_prefix": (shared_prefix_config, 2),
    "packed_prefix": (packed_config, 1),
    "decode": (packed_config, 1),
} | {f"backward_{part}": (partial(backward_config, part), 1) for part in PARTS}
SLIDING, CAPPED, _, DENSE = (list(family) for family in FAMILIES)


def load(row: dict) -> int:
    """What the launcher would tell the configuration."""
    return extra_load(
        row["mode"],
        row["features"].split("+"),
        KERNELS[row["kernel"]][1],
        width=max(int(row["head_dim"]), int(row["value_dim"])),
        saves=row["stage"] == "training",
    )


def compile_cases(cases: list[dict]) -> list[dict]:
    """Reports of ``cases``, compiled in a process of their own; fails if one does not compile."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.compile_report", "--json", "--workers", "1"]
    done = subprocess.run(
        [*command, "--cases", json.dumps(cases)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip(), done.stderr[-3000:]
    result = json.loads(done.stdout.strip().splitlines()[-1])
    print(done.stderr)
    assert result["failures"] == []
    assert len(result["reports"]) == len(cases)
    return result["reports"]


def cases_of(architecture: str) -> list[dict]:
    """Every kernel's variants that use most registers, and some of the others.

    ``min_shift`` comes on top of the other modes, and what training saves on top of the plain
    forward pass. The others take turns: all of them on sm_90, three on each other architecture.
    """
    base = {"architecture": architecture, "mode": "min_shift", "head_dim": 128}
    shared = base | {"kernel": "shared_prefix"}
    packed = base | {"kernel": "packed_prefix", "stage": "whole"}
    decode = base | {"kernel": "decode", "stage": "whole", "queries": 4}
    keys = base | {"kernel": "backward_keys"}
    queries = base | {"kernel": "backward_queries"}
    turns = {
        "sm_80": [
            shared | {"head_dim": 64},
            packed | {"head_dim": 256, "dtype": "float16"},
            queries | {"head_dim": 64, "features": CAPPED},
        ],
        "sm_100": [
            base | {"head_dim": 64, "features": SLIDING},
            packed | {"head_dim": 64},
            queries | {"head_dim": 256, "mode": "log_additive"},
        ],
        "gfx942": [
            base | {"dtype": "float16", "mode": "log_additive"},
            shared | {"head_dim": 256},
            keys | {"head_dim": 64, "mode": "multiplicative"},
        ],
        "sm_90": [
            shared | {"dtype": "float16", "mode": "multiplicative"},
            packed | {"queries": 16},
            keys,
        ],
    }
    # one loop more costs registers: narrower tiles on sm_80, and no pipelined edges
    turn = {"persistent": True, "tiles": [128, 64, 8, 3, 1]}
    if architecture == "sm_80":
        turn["tiles"] = [128, 32, 8, 3, 1]
    elif architecture == "gfx942":
        turn["tiles"] = [64, 64, 4, 2, 1]
    others = turns[architecture]
    if architecture == "sm_90":
        others = [case for cases in turns.values() for case in cases]
    return [
        base | {"features": DENSE},
        base | {"stage": "training"},
        base | {"head_dim": 256, "features": CAPPED},
        shared,
        packed | {"stage": "partial"},
        decode | {"features": SLIDING},
        decode | {"stage": "deferred", "head_dim": 256},
        keys | {"features": list(DROPPED)},
        keys | {"head_dim": 256, "features": DENSE},
        queries | {"stage": "continues"},
        *(base | turn | {"head_dim": head_dim} for head_dim in (64, 128)),
        base | turn | {"mode": "multiplicative"},
        base | {"kernel": "backward_rows"},
        base | {"kernel": "backward_bias", "features": DENSE},
        *(case | {"architecture": architecture} for case in others),
    ]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_spills_and_launchable(architecture):
    """Nothing spills, all can be launched, and the matrix units are used.

    All in one process, whose start costs as much as some variants. One on each side has far too
    large a tile per warp, which must be reported, or the others prove nothing.
    """
    large = {"architecture": architecture, "head_dim": 128, "mode": "plain", "features": []}
    spilling = [large | {"tiles": [256, 128, 4, 1, 1]}] * (architecture in ("sm_90", "gfx942"))
    cases = cases_of(architecture)
    reports = compile_cases([*cases, *spilling])
    for report in reports[len(cases) :]:
        assert report["spills"] > 0
        assert "spills" in report["problems"]
    for report in reports[: len(cases)]:
        assert report["spills"] == 0, report
        assert report["registers"] > 32, report  # a count that was not read would be small
        assert 0 < report["shared"] <= SHARED_LIMIT[report["architecture"]], report
        assert report["matrix_instructions"] > 0, report
        forward = report["kernel"] == "attention" and report["stage"] != "training"
        forward = forward and not report["persistent"]
        shared = report["kernel"] == "shared_prefix" and report["mode"] != "min_shift"
        if report["head_dim"] <= 128 and (shared or (forward and load(report) == 0)):
            assert min(report["block_m"], report["block_n"]) >= 64, report


def test_published_table_is_complete_and_current():
    """bench/results/compile.csv holds every combination at today's tiles, none with a problem."""
    with (ROOT / "bench" / "results" / "compile.csv").open() as file:
        rows = list(csv.DictReader(file))
    seen = set()
    for row in rows:
        assert row["problems"] == "", row
        choose_config, _ = KERNELS[row["kernel"]]
        config = choose_config(
            row["architecture"],
            int(row["head_dim"]),
            int(row["value_dim"]),
            getattr(torch, row["dtype"]),
            row["mode"],
            int(row["queries"]),
            load=load(row),
        )
        tiles = (config.block_m, config.block_n, config.num_warps, config.num_stages)
        named = ("block_m", "block_n", "num_warps", "num_stages")
        assert tuple(int(row[name]) for name in named) == tiles, row
        seen.add(
            (row["kernel"], row["architecture"], int(row["head_dim"]), row["dtype"], row["mode"])
        )
    forward = [kernel for kernel in KERNELS if not kernel.startswith("backward")]
    wanted = {
        (kernel, architecture, head_dim, dtype, mode)
        for kernel in forward
        for architecture in ARCHITECTURES
        for head_dim in (64, 128, 256)
        for dtype in ("bfloat16", "float16")[: 1 if kernel in ("packed_prefix", "decode") else 2]
        for mode in MODES[1:]
    }
    wanted |= {
        (f"backward_{part}", architecture, head_dim, "bfloat16", mode)
        for part, modes in {"queries": MODES, "keys": MODES, "rows": MODES[2:3]}.items()
        for architecture in ARCHITECTURES
        for head_dim in (64, 128, 256)
        for mode in modes
    }
    assert wanted <= seen
    assert set(MATRIX_INSTRUCTION) == set(ARCHITECTURES)


def test_head_dims_are_split_with_little_padding():
    for size in range(1, 257):
        first, second = split_head_dim(size)
        assert first + second >= size
        for part in (first, second):
            assert part == 0 or (part >= 16 and part & (part - 1) == 0)
        assert first + second <= max(16, 1 << (size - 1).bit_length())
        if size % 16 == 0 and size.bit_count() <= 2:
            assert first + second == size


@pytest.mark.parametrize(
    ("size", "parts"),
    [(40, (32, 16)), (64, (64, 0)), (80, (64, 16)), (96, (64, 32)), (192, (128, 64)), (8, (16, 0))],
)
def test_split_examples(size, parts):
    assert split_head_dim(size) == parts
