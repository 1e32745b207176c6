"""What ``bench/tune.py`` tries: settings in order of importance, their tiles, which compile well.

Needs no GPU: kernels are compiled for the device's architecture by ``bench/compile_report.py``, in
a process of its own.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from atman_triton.kernels.backward_configs import backward_rule
from atman_triton.kernels.configs import extra_load, forward_rule
from atman_triton.kernels.hopper_configs import hopper_rule
from atman_triton.kernels.hopper_tiles import HopperConfig
from atman_triton.kernels.tuned import HOPPER, TileConfig, Tiles
from bench.compile_report import ARCHITECTURES
from bench.harness import ROOT
from bench.tune_hopper import compiled_hopper, hopper_shapes

QUERIES = 4096  # rows per head of what is compiled: any number that fills tiles
DIRECTIONS = {
    "forward": ("attention",),
    "hopper": (HOPPER,),
    "backward": ("backward_keys", "backward_queries"),
}
PRUNED = 240  # registers of a thread that accumulators may take where they are held in registers


@dataclasses.dataclass(frozen=True)
class Setting:
    """One kernel for one kind of problem; every bucket of lengths has tiles of its own."""

    kernel: str
    head_dim: int
    mode: str
    causal: bool

    def __str__(self) -> str:
        mask = "causal" if self.causal else "full"
        return f"{self.kernel} D{self.head_dim} {self.mode} {mask}"

    @property
    def backward(self) -> bool:
        return self.kernel.startswith("backward")

    def rule(self, architecture: str, queries: int, dtype: torch.dtype) -> Tiles:
        """The tiles that the rule gives, against which all others are timed."""
        if self.kernel == HOPPER:
            return hopper_rule(self.head_dim, self.head_dim)
        problem = (architecture, self.head_dim, self.head_dim, dtype, self.mode, queries, 0)
        if self.backward:
            return backward_rule(self.kernel.removeprefix("backward_"), *problem)
        return forward_rule(*problem)


def settings(
    directions: Sequence[str], head_dims: Sequence[int], modes: Sequence[str]
) -> list[Setting]:
    """In the order in which they are tuned: what decides how fast most calls are comes first."""
    found = []
    for direction, head_dim, causal, mode in itertools.product(
        directions, head_dims, (True, False), modes
    ):
        kernels = DIRECTIONS[direction]
        if direction == "backward" and mode == "min_shift":
            kernels = (*kernels, "backward_rows")  # elsewhere it is a sum over the output
        found += [Setting(kernel, head_dim, mode, causal) for kernel in kernels]
    return found


def shapes(setting: Setting, architecture: str, rule: Tiles) -> list[Tiles]:
    """Tiles of another size, other warps and stages than the rule's, which comes first."""
    if isinstance(rule, HopperConfig):
        return [*hopper_shapes(setting.head_dim, rule)]
    wide = setting.head_dim > 128
    if setting.kernel == "attention":
        rows, keys = ((32, 64, 128), (16, 32, 64)) if wide else ((64, 128), (32, 64, 128))
        stages = (2, 3) if wide else (2, 3, 4)
    elif setting.kernel == "backward_queries":
        rows, keys = ((32, 64), (16, 32)) if wide else ((64, 128), (32, 64))
        stages = (1, 2, 3)
    elif setting.kernel == "backward_keys":
        rows, keys = ((16, 32), (16, 32, 64)) if wide else ((16, 32, 64), (64, 128))
        stages = (1, 2)
    else:
        rows, keys, stages = (16, 32, 64), (32, 64), (1,)
    if architecture.startswith("gfx"):
        stages = tuple(number for number in stages if number < 3)
    every = itertools.product(rows, keys, (4, 8), stages)
    edges = rule.edge_stages
    tried = (TileConfig(*each, edge_stages=min(edges, each[-1])) for each in every)
    kept = [tiles for tiles in tried if _may_fit(setting, architecture, tiles)]
    return list(dict.fromkeys([rule, *kept]))


def _may_fit(setting: Setting, architecture: str, tiles: TileConfig) -> bool:
    """Whether accumulators leave registers to the rest; Blackwell holds them elsewhere."""
    if architecture not in ("sm_80", "sm_90"):
        return True
    scores, dims = tiles.block_m * tiles.block_n, setting.head_dim
    numbers = {
        "attention": scores + tiles.block_m * dims,
        "backward_queries": 2 * scores + tiles.block_m * dims,
        "backward_keys": 2 * scores + 2 * tiles.block_n * dims,
        "backward_rows": 2 * scores,
    }[setting.kernel]
    return numbers <= PRUNED * 32 * tiles.num_warps


def options(setting: Setting, tiles: Tiles) -> list[Tiles]:
    """The same tiles with what can be switched, switched: edges, plain tiles, a persistent grid."""
    if isinstance(tiles, HopperConfig):
        return [tiles]
    edges = (1,) if setting.kernel in ("backward_keys", "backward_rows") else (1, tiles.num_stages)
    forward = setting.kernel == "attention"
    skips = (False, True) if forward and setting.mode != "plain" else (False,)
    turns = (False, True) if forward else (False,)
    return [
        dataclasses.replace(tiles, edge_stages=edge, skip_plain_tiles=skip, persistent=turn)
        for edge, skip, turn in itertools.product(dict.fromkeys(edges), skips, turns)
    ]


# --- compiling ------------------------------------------------------------------------------------


def case_of(setting: Setting, architecture: str, tiles: Tiles, **change: Any) -> dict:
    """A case of ``bench/compile_report.py``: what is timed, or with ``change`` what is served."""
    case = {
        "architecture": architecture,
        "kernel": setting.kernel,
        "head_dim": setting.head_dim,
        "mode": setting.mode,
        "queries": QUERIES,
        "features": ["causal"] if setting.causal else [],
        "tiles": list(dataclasses.astuple(tiles)),
    }
    return case | change


def served_cases(setting: Setting, architecture: str, tiles: Tiles) -> list[dict]:
    """The hardest that a row would serve beyond what is timed: ``extra_load`` is 0 for it, too."""
    if setting.kernel == HOPPER:
        return [case_of(setting, architecture, tiles, dtype="float16")]
    band = ("causal",) if setting.causal else ()
    features = [*band, "window", "padding", *(() if setting.backward else ("sinks",))]
    if extra_load(setting.mode, features):
        features = [*band, "sinks"]
    cases = [case_of(setting, architecture, tiles, dtype="float16")]
    if not (setting.backward and "sinks" in features):
        cases.append(case_of(setting, architecture, tiles, features=features))
    saves = setting.mode == "min_shift" and not setting.backward
    if saves and not extra_load(setting.mode, band, width=setting.head_dim, saves=True):
        cases.append(case_of(setting, architecture, tiles, stage="training"))
    return cases


def compiled(cases: Iterable[dict], workers: int | None = None) -> list[dict]:
    """The report of each case, ``problems`` telling why it cannot be taken (``""`` if it can).

    Cases of the Hopper kernel do not stand beside others.

    Raises: RuntimeError: the compiling process said nothing that can be read.
    """
    cases = list(cases)
    if not cases:
        return []
    unknown = {case["architecture"] for case in cases} - set(ARCHITECTURES)
    if unknown:
        raise ValueError(
            f"architecture must be one of {', '.join(ARCHITECTURES)}, got {min(unknown)!r}."
        )
    workers = workers or min(len(cases), os.cpu_count() or 1)
    if cases[0]["kernel"] == HOPPER:
        return compiled_hopper(cases, workers)
    command = [sys.executable, "-m", "bench.compile_report", "--json", "--cases", "-"]
    environment = {name: text for name, text in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [*command, "--workers", str(workers)],
        cwd=ROOT,
        env=environment,
        input=json.dumps(cases),
        capture_output=True,
        text=True,
        check=False,
    )
    if not done.stdout.strip():
        raise RuntimeError(f"nothing was compiled: {done.stderr.strip()[-1000:]}")
    found = json.loads(done.stdout.strip().splitlines()[-1])
    reports = {_place(report): report for report in found["reports"]}
    failed = {"problems": "does not compile", "registers": 0, "spills": 0, "shared": 0}
    return [reports.get(_place(case), failed) for case in cases]


def _place(found: dict) -> tuple[Any, ...]:
    """What tells the cases of one setting apart, of a case or of its report."""
    names = ("block_m", "block_n", "num_warps", "num_stages", "edge_stages", "skip_plain")
    if "tiles" in found:
        tiles, features = tuple(found["tiles"]), "+".join(found["features"]) or "full"
    else:
        tiles = tuple(found[name] for name in (*names, "persistent"))
        features = found["features"]
    stage, dtype = found.get("stage", ""), found.get("dtype", "bfloat16")
    whose = (found["kernel"], found["head_dim"], found["mode"])
    return (*whose, tiles, features, stage, dtype)


def clean(
    setting: Setting, architecture: str, tried: Sequence[Tiles]
) -> Iterator[tuple[Tiles, dict]]:
    """Those of the tiles that compile without spills into memory that can be launched."""
    reports = compiled(case_of(setting, architecture, tiles) for tiles in tried)
    for tiles, report in zip(tried, reports, strict=True):
        if not report["problems"]:
            yield tiles, report
