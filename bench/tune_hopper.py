"""What ``bench/tune.py`` must know of the Hopper kernel: its tiles, how they compile, who checks.

Its tiles are checked in processes of their own, with a limit of time, since wrong ones can hang.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, astuple, replace
from typing import Any

import torch

from atman_triton.kernels.hopper_tiles import HopperConfig
from atman_triton.kernels.tuned import HOPPER
from bench.apart import run_apart
from bench.compile_hopper import HopperCase
from bench.harness import ROOT
from bench.hopper_gate import RIGHT, SECONDS, reason_of
from bench.kernel_cases import Case

_BLOCKS, _STAGES = (128, 64), (2, 3, 4)


def hopper_shapes(head_dim: int, rule: HopperConfig) -> list[HopperConfig]:
    """The rule's tiles, and all others that fit shared memory."""
    every = itertools.starmap(HopperConfig, itertools.product(_BLOCKS, _STAGES, (True, False)))
    fitting = (tiles for tiles in every if tiles.trouble(head_dim, head_dim) is None)
    return list(dict.fromkeys([rule, *fitting]))


def text_of(tiles: HopperConfig) -> str:
    """For people."""
    return f"{tiles.block_n} keys {tiles.stages} stages" + "+own output" * tiles.own_output


# --- compiling ------------------------------------------------------------------------------------


def compiled_hopper(cases: Sequence[dict[str, Any]], workers: int) -> list[dict[str, Any]]:
    """The report of each case of ``tune_candidates.case_of``: ``problems``, registers, memory.

    Raises: RuntimeError: the compiling process said nothing that can be read.
    """
    environment = {name: text for name, text in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "bench.tune_hopper", "compile", str(workers)],
        cwd=ROOT,
        env=environment,
        input=json.dumps(list(cases)),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode or not done.stdout.strip():
        raise RuntimeError(f"nothing was compiled: {done.stderr.strip()[-1000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def report_of(case: dict[str, Any]) -> dict[str, Any]:
    """Compile one case for sm_90, here.

    Exponentials that stand beside no product are no problem: how long they take is measured.
    """
    from bench import compile_sm90

    row = compile_sm90._row_or_reason(
        HopperCase(
            case["head_dim"],
            case["mode"],
            "causal" in case["features"],
            case.get("dtype", "bfloat16"),
            config=HopperConfig(*case["tiles"]),
        )
    )
    if isinstance(row, str):
        return {"problems": f"does not compile: {row}", "registers": 0, "shared": 0}
    found = compile_sm90.problems(replace(row, late_exponentials=0))
    return {"problems": "; ".join(found), "registers": row.registers, "shared": row.shared}


# --- checking -------------------------------------------------------------------------------------


def verdicts_apart(
    setting: Any, machine: Any, tried: Sequence[HopperConfig], case: Case
) -> list[str | None]:
    """Of each of the tiles, why they must not be timed: ``tune.verdict``, asked elsewhere."""
    commands = []
    for tiles in tried:
        asked = {
            "setting": asdict(setting),
            "architecture": machine.architecture,
            "tiles": astuple(tiles),
            "case": asdict(case),
        }
        commands.append([sys.executable, "-m", "bench.tune_hopper", "check", json.dumps(asked)])
    at_once = max(1, machine.workers)
    found: list[str | None] = []
    for start in range(0, len(commands), at_once):
        ended = run_apart(commands[start : start + at_once], SECONDS)
        found += [reason_of(each, SECONDS) for each in ended]
    return found


def check(asked: dict[str, Any]) -> None:
    """Ask about one tile here, and say so as the gate does; exits 1 where it must not be timed."""
    from bench.tune import Machine, verdict
    from bench.tune_candidates import Setting

    name = asked["architecture"]
    machine = Machine(torch.device("cuda"), torch.bfloat16, name, name, 1, 1, float("inf"))
    tiles = HopperConfig(*asked["tiles"])
    print(f"{text_of(tiles)}:", flush=True)
    reason = verdict(Setting(**asked["setting"]), machine, tiles, Case(**asked["case"]))
    print(reason or RIGHT, flush=True)
    if reason is not None:
        os._exit(1)  # nothing that waits for the GPU is waited for


def main() -> None:
    """Command line, for this file's own processes."""
    if sys.argv[1] == "check":
        check(json.loads(sys.argv[2]))
        return
    cases = json.load(sys.stdin)
    if any(case["kernel"] != HOPPER for case in cases):
        sys.exit(f"only cases of {HOPPER} are compiled here")
    with ProcessPoolExecutor(int(sys.argv[2])) as pool:
        print(json.dumps(list(pool.map(report_of, cases))))


if __name__ == "__main__":
    main()
