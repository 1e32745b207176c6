"""bench/results/compile_sm90.csv is complete, current, without a problem, and true.

True: some variants of the Hopper kernel are compiled again and must give the numbers of the table.
Legend: D head dim.
"""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the fused kernels need triton")

import triton

from atman_triton.kernels.hopper_configs import hopper_config
from atman_triton.kernels.hopper_tiles import SHARED_LIMIT
from bench import compile_sm90
from bench.compile_hopper import HopperCase, hopper_cases
from bench.compile_report import table

ROOT = Path(__file__).parent.parent
PATH = ROOT / "bench" / "results" / "compile_sm90.csv"
NUMBERS = ("registers", "stack", "shared", "wgmma", "mma", "local", "local_in_loops")


@pytest.fixture(scope="module")
def rows() -> list[dict[str, str]]:
    with PATH.open() as file:
        return list(csv.DictReader(file))


def key(row: dict) -> tuple:
    names = "kernel stage head_dim value_dim dtype mode features queries"
    return tuple(str(row[name]) for name in names.split())


def test_it_holds_every_kernel_at_todays_tiles(rows):
    wanted = set()
    for case in compile_sm90.cases():
        kernel, stage, queries = compile_sm90.HOPPER, "", 4096
        if isinstance(case, HopperCase):
            features = "causal" if case.causal else "full"
        else:
            kernel, stage, queries = case.kernel, case.stage, case.queries
            features = "+".join(case.features) or "full"
        dims = (case.head_dim, case.value_dim or case.head_dim)
        variant = (kernel, stage, *dims, case.dtype, case.mode, features, queries)
        wanted.add(tuple(map(str, variant)))
    assert {key(row) for row in rows} == wanted
    assert len(rows) == len(compile_sm90.cases()) >= len(hopper_cases()) + 200
    portable = {(r["kernel"], key(r)): r for r in rows}
    with (ROOT / "bench" / "results" / "compile.csv").open() as file:
        for row in csv.DictReader(file):  # whose tiles test_compile.py holds against the tables
            if row["architecture"] == "sm_90":
                ours = portable[row["kernel"], key(row)]
                for name in ("block_m", "block_n", "num_warps", "num_stages", "shared"):
                    assert ours[name] == row[name], row
    for row in rows:
        if row["kernel"] == compile_sm90.HOPPER:
            config = hopper_config(int(row["head_dim"]), int(row["value_dim"]))
            tiles = (config.block_n, config.stages)
            assert (int(row["block_n"]), int(row["num_stages"])) == tiles, row


def test_nothing_breaks_a_rule(rows):
    for row in rows:
        assert row["problems"] == "", row
        assert 0 < int(row["registers"]) <= 255, row
        assert int(row["shared"]) <= SHARED_LIMIT, row
        assert int(row["local_in_loops"]) == 0, row
        if row["kernel"] == compile_sm90.HOPPER:
            assert int(row["late_exponentials"]) == 0, row
        else:
            assert int(row["stack"]) == int(row["local"]) == 0, row
        # tiles of 64 rows and more in half precision are what warpgroup products are for
        if row["dtype"] != "float32" and row["kernel"] == "attention" and row["stage"] == "":
            expected = int(row["block_m"]) >= 64
            assert (int(row["wgmma"]) > 0) == expected, row


def test_its_rules_can_be_broken():
    row = compile_sm90.Row(
        "3.7", "attention", "", 64, 64, "bfloat16", "plain", "full", 4096, 128, 64, 8, 3,
        registers=255, stack=0, shared=1024, wgmma=8, mma=0, local=0, local_in_loops=0,
        late_exponentials=None, problems="",
    )  # fmt: skip
    assert compile_sm90.problems(row) == []
    large = replace(row, shared=SHARED_LIMIT + 1)
    assert compile_sm90.problems(large) == [f"shared memory {SHARED_LIMIT + 1}"]
    assert compile_sm90.problems(replace(row, stack=8)) == ["stack 8"]
    assert compile_sm90.problems(replace(row, wgmma=0)) == ["no matrix instructions"]
    hopper = replace(row, kernel="hopper", stack=8, late_exponentials=3)
    assert compile_sm90.problems(hopper) == ["3 exponentials beside no product"]
    hopper = replace(row, kernel="hopper", local_in_loops=2, late_exponentials=0)
    spilled = "2 accesses to local memory in loops over tiles"
    assert compile_sm90.problems(hopper) == [spilled]
    hopper = replace(row, kernel="hopper", wgmma=0, mma=8, late_exponentials=0)
    assert compile_sm90.problems(hopper) == ["no warpgroup products"]


def test_the_hopper_kernel_compiles_to_the_published_numbers(rows):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    # as pytest would have it where kernels are compiled in its own process, on a GPU
    command = [sys.executable, "-W", "error::UserWarning"]
    command += ["-m", "bench.compile_sm90", "--json", "--workers", "1"]
    command += ["--kernels", "hopper", "--head-dims", "128"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip(), done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found["failures"] == []
    published = {key(row): row for row in rows}
    assert len(found["rows"]) == sum(case.head_dim == 128 for case in hopper_cases())
    for row in found["rows"]:
        assert row["wgmma"] > 0
        assert row["late_exponentials"] == 0
        listed = published[key(row)]
        if triton.__version__ == listed["triton"]:  # 3.6.0 spills a few registers in min_shift
            assert row["problems"] == ""
            for name in NUMBERS:
                assert int(listed[name]) == row[name], (name, listed, row)


def test_all_sm_90_variants_are_listed_once():
    listed = [case for case in table() if case.architecture == "sm_90"]
    assert len(set(map(str, listed))) == len(listed)
