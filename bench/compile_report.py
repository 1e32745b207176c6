"""What the compiler says about the attention kernels: registers, spills, shared memory.

Needs no GPU, but a process without TRITON_INTERPRET::

    python -m bench.compile_report --csv bench/results/compile.csv

Every line is one compiled variant at the tiles that ``kernels/configs.py`` gives it.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from bench.compile_signatures import signature
from bench.sass import tool

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
MODES = ("plain", "multiplicative", "min_shift", "log_additive")
FEATURES = ("causal", "window", "softcap", "bias", "alibi", "padding", "mask", "sinks", "dropout")
PER_HEAD = ("causal", "per_head")  # of the packed two: a factor for each key and head
BACKWARD = ("rows", "queries", "keys", "bias")
# what goes together in models: sliding window and sinks; soft cap; ALiBi; dense bias or mask
FAMILIES = (
    ("causal", "window", "padding", "sinks"),
    ("causal", "window", "padding", "softcap"),
    ("causal", "padding", "alibi"),
    ("causal", "bias", "mask"),
)
DROPPED = ("causal", "padding", "dropout")
# bytes that one program can be launched with
SHARED_LIMIT = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
MATRIX_INSTRUCTION = {
    "sm_80": r"mma\.sync",
    "sm_90": r"wgmma\.mma_async|mma\.sync",
    "sm_100": r"tcgen05\.mma|mma\.sync",
    "gfx942": r"v_mfma",
}


@dataclass(frozen=True)
class Case:
    """One variant to compile; tiles are the configured ones unless given."""

    architecture: str
    head_dim: int
    kernel: str = "attention"  # | shared_prefix | packed_prefix | decode | backward_rows ...
    stage: str = ""  # of the packed two: whole | partial | deferred | merge; else: training
    dtype: str = "bfloat16"
    mode: str = "multiplicative"
    value_dim: int | None = None
    queries: int = 4096  # rows per head; of the packed two, all rows that read the same keys
    features: tuple[str, ...] = ("causal",)
    tiles: tuple[int, ...] | None = None  # the configuration's numbers, in order
    skip_plain: bool | None = None
    persistent: bool = False


@dataclass
class Report:
    """What was compiled and what came of it; ``spills`` are bytes of stack, or AMD VGPRs."""

    triton: str
    kernel: str
    stage: str
    architecture: str
    head_dim: int
    value_dim: int
    dtype: str
    mode: str
    features: str
    queries: int
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    edge_stages: int
    skip_plain: bool
    persistent: bool
    registers: int
    spills: int
    shared: int
    matrix_instructions: int
    matrix_kind: str
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Family:
    """A kernel, the functions that choose its tiles and variant, and its segments of keys."""

    kernel: Any
    choose_config: Any
    make_variant: Any
    segments: int


def family(name: str) -> Family:
    """The kernel of that name; imports triton."""
    from functools import partial

    from atman_triton.kernels import (
        backward,
        backward_configs,
        configs,
        forward,
        launch,
        packed_launch,
        shared_prefix,
    )

    if name.removeprefix("backward_") in BACKWARD:
        part = name.removeprefix("backward_")
        short = {"queries": "dq", "keys": "dkv"}.get(part, part)
        return Family(
            getattr(backward, f"_attention_bwd_{short}_kernel"),
            partial(backward_configs.backward_config, part),
            launch.make_variant,
            1,
        )
    families = {
        "attention": Family(
            forward._attention_fwd_kernel, configs.forward_config, launch.make_variant, 1
        ),
        "shared_prefix": Family(
            shared_prefix._shared_prefix_fwd_kernel,
            configs.shared_prefix_config,
            launch.make_variant,
            2,
        ),
        "packed_prefix": Family(
            packed_launch._packed_fwd_kernel,
            packed_launch.packed_config,
            packed_launch.packed_variant,
            1,
        ),
        "decode": Family(
            packed_launch._packed_fwd_kernel,
            packed_launch.packed_config,
            partial(packed_launch.packed_variant, one_batch=True, has_own=False),
            1,
        ),
    }
    if name not in families:
        raise ValueError(f"kernel must be one of {', '.join(families)}, got {name!r}.")
    return families[name]


def build(case: Case) -> tuple[Any, Any, Any]:
    """Compile one variant: what triton made of it, its tiles and its kernel."""
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from atman_triton.kernels.configs import extra_load

    chosen = family(case.kernel)
    kernel = chosen.kernel
    value_dim = case.value_dim or case.head_dim
    config = chosen.choose_config(
        case.architecture,
        case.head_dim,
        value_dim,
        getattr(torch, case.dtype),
        case.mode,
        case.queries,
        load=extra_load(
            case.mode,
            case.features,
            chosen.segments,
            width=max(case.head_dim, value_dim),
            saves=case.stage == "training" and case.mode == "min_shift",
        ),
    )
    if case.tiles is not None:
        config = type(config)(*case.tiles)
    if case.skip_plain is not None:
        config = replace(config, skip_plain_tiles=case.skip_plain)
    if case.persistent:
        config = replace(config, persistent=True)
    stage: dict[str, Any] = {"stage": case.stage} if case.stage else {}
    if case.stage == "training":
        stage = {"save_minimum": case.mode == "min_shift"}
    if "per_head" in case.features:
        stage["factor_per_head"] = True
    continues = case.stage == "continues"
    if continues:
        stage = {}
    spec = chosen.make_variant(config, case.head_dim, value_dim, case.mode, case.features, **stage)
    types, constants, attributes = signature(kernel, spec, case.dtype, continues)
    if case.architecture.startswith("sm_"):
        target = GPUTarget("cuda", int(case.architecture[3:]), 32)
    else:
        target = GPUTarget("hip", case.architecture, 64)
    compiled = triton.compile(
        ASTSource(kernel, types, constants, attributes),
        target=target,
        options={
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
            "enable_fp_fusion": True,
        },
    )
    return compiled, config, kernel


def compile_case(case: Case) -> Report:
    """Compile one variant and read its figures; what breaks a rule goes to ``problems``."""
    import triton

    compiled, config, kernel = build(case)
    value_dim = case.value_dim or case.head_dim
    registers, spills = resource_usage(compiled.asm, kernel.__name__)
    text = compiled.asm.get("ptx") or compiled.asm["amdgcn"]
    matrix = re.findall(MATRIX_INSTRUCTION[case.architecture], text)
    report = Report(
        triton=triton.__version__,
        kernel=case.kernel,
        stage=case.stage,
        architecture=case.architecture,
        head_dim=case.head_dim,
        value_dim=value_dim,
        dtype=case.dtype,
        mode=case.mode,
        features="+".join(case.features) or "full",
        queries=case.queries,
        block_m=config.block_m,
        block_n=config.block_n,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        edge_stages=getattr(config, "edge_stages", config.num_stages),
        skip_plain=getattr(config, "skip_plain_tiles", False),
        persistent=getattr(config, "persistent", False),
        registers=registers,
        spills=spills,
        shared=compiled.metadata.shared,
        matrix_instructions=len(matrix),
        matrix_kind="/".join(sorted(set(matrix))),
    )
    if spills:
        report.problems.append(f"spills {spills}")
    if report.shared > SHARED_LIMIT[case.architecture]:
        report.problems.append(f"shared memory above {SHARED_LIMIT[case.architecture]}")
    if not matrix and case.dtype != "float32" and case.stage != "merge":
        report.problems.append("no matrix instructions")
    return report


def resource_usage(asm: dict[str, Any], name: str) -> tuple[int, int]:
    """Registers per thread and spills, as the assembler counted them."""
    if "amdgcn" in asm:
        found = dict(re.findall(r"\.(vgpr_count|vgpr_spill_count):\s+(\d+)", asm["amdgcn"]))
        return int(found["vgpr_count"]), int(found["vgpr_spill_count"])
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(asm["cubin"])
        command = [tool("cuobjdump"), "--dump-resource-usage", str(cubin)]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(rf"{name}:\s*REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump reported no registers and stack: {text!r}")
    return int(found[1]), int(found[2])


def _compile_or_explain(case: Case) -> Report | str:
    try:
        return compile_case(case)
    except Exception as error:  # noqa: BLE001 - one failed variant must not hide the others
        while error.__cause__ is not None:  # triton nests the place in an inner function
            error = error.__cause__
        return f"{case}: {type(error).__name__}: {error}"


def run(cases: list[Case], workers: int) -> tuple[list[Report], list[str]]:
    """Compile all cases in ``workers`` processes; reports, and a line per case that failed."""
    reports, failures = [], []
    with ProcessPoolExecutor(workers) as pool:
        for result in pool.map(_compile_or_explain, cases):
            (failures if isinstance(result, str) else reports).append(result)
            print(_line(result), file=sys.stderr, flush=True)
    return reports, failures


def _line(result: Report | str) -> str:
    if isinstance(result, str):
        return result
    r = result
    dims = str(r.head_dim) if r.head_dim == r.value_dim else f"{r.head_dim}/{r.value_dim}"
    tiles = (
        f"{r.block_m}x{r.block_n}x{r.num_warps}w{r.num_stages}s{r.edge_stages}"
        + "+skip" * r.skip_plain
        + "+persistent" * r.persistent
    )
    return (
        f"{r.kernel:17}{r.stage:8}{r.architecture:7} {dims:8} {r.dtype:9} {r.mode:15} "
        f"{r.features:28} q{r.queries:<5} {tiles:16} regs {r.registers:3} "
        f"spills {r.spills:3} shared {r.shared:6} {r.matrix_kind} {r.matrix_instructions} "
        f"{', '.join(r.problems)}"
    )


def prefix_cases(architecture: str) -> list[Case]:
    """Both kernels for a shared prefix: every head dim and mode; split keys for one of them."""
    cases = []
    for head_dim in (64, 128, 256):
        for mode in MODES:
            case = Case(architecture, head_dim, mode=mode)
            cases.append(replace(case, kernel="shared_prefix"))
            cases.append(replace(case, kernel="shared_prefix", dtype="float16"))
            cases.append(replace(case, kernel="packed_prefix", stage="whole"))
        case = Case(architecture, head_dim, kernel="packed_prefix", mode="min_shift")
        cases.append(replace(case, stage="partial"))
    return cases


def decode_cases(architecture: str) -> list[Case]:
    """One query of four heads: all modes, the stages of split keys; and more queries."""
    cases = []
    for head_dim in (64, 128, 256):
        case = Case(architecture, head_dim, mode="min_shift", kernel="decode", queries=4)
        cases += [replace(case, mode=mode, stage="whole") for mode in MODES]
        cases += [replace(case, stage=stage) for stage in ("partial", "deferred", "merge")]
        hard = (FAMILIES[0], FAMILIES[-1], PER_HEAD)
        cases += [replace(case, stage="whole", features=features) for features in hard]
        cases.append(replace(case, stage="whole", queries=64))
    return cases


def training_cases(architecture: str) -> list[Case]:
    """What training needs: the forward kernel that saves more, and all backward kernels."""
    cases = []
    for head_dim in (64, 128, 256):
        case = Case(architecture, head_dim, mode="min_shift")
        cases.append(replace(case, stage="training"))
        cases.append(replace(case, stage="training", features=DROPPED))
        cases.append(replace(case, kernel="backward_rows"))
        cases.append(replace(case, kernel="backward_bias", features=FAMILIES[-1]))
        cases.append(replace(case, kernel="backward_queries", stage="continues"))
        for kernel in ("backward_queries", "backward_keys"):
            cases += [replace(case, kernel=kernel, mode=mode) for mode in MODES]
            cases += [replace(case, kernel=kernel, features=f) for f in (*FAMILIES, DROPPED)]
            cases.append(replace(case, kernel=kernel, dtype="float16"))
    for kernel in ("backward_queries", "backward_keys"):
        cases.append(Case(architecture, 192, value_dim=128, mode="min_shift", kernel=kernel))
    return cases


def table() -> list[Case]:
    """The published table: every architecture, head dim, dtype and mode, and what is hardest."""
    cases = []
    for architecture in ARCHITECTURES:
        for head_dim in (64, 128, 256):
            for dtype in ("bfloat16", "float16"):
                cases += [Case(architecture, head_dim, dtype=dtype, mode=mode) for mode in MODES]
            for mode in ("multiplicative", "min_shift"):
                cases += [Case(architecture, head_dim, mode=mode, features=f) for f in FAMILIES]
            cases.append(Case(architecture, head_dim, mode="min_shift", features=()))
            cases.append(Case(architecture, head_dim, mode="min_shift", queries=1))
            cases.append(Case(architecture, head_dim, dtype="float32", mode="min_shift"))
        cases += prefix_cases(architecture)
        cases += decode_cases(architecture)
        cases += training_cases(architecture)
        cases += [Case(architecture, 192, value_dim=128, mode=mode) for mode in MODES]
        cases += [Case(architecture, dim, mode="min_shift") for dim in (40, 80, 96)]
    return cases


def main() -> None:
    """Command line; exits 1 if a variant fails to compile or breaks a rule."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", help="JSON list of cases, '-' reads it from standard input")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--csv", type=Path, help="write the reports here")
    parser.add_argument("--json", action="store_true", help="print the reports as JSON")
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("unset TRITON_INTERPRET: the interpreter compiles nothing.")
    cases = table()
    if options.cases:
        text = sys.stdin.read() if options.cases == "-" else options.cases
        cases = [Case(**item) for item in json.loads(text)]
    reports, failures = run(cases, options.workers)
    rows = [asdict(report) | {"problems": "; ".join(report.problems)} for report in reports]
    if options.json:
        print(json.dumps({"reports": rows, "failures": failures}))
    if options.csv:
        options.csv.parent.mkdir(parents=True, exist_ok=True)
        with options.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    sys.exit(1 if failures or any(report.problems for report in reports) else 0)


if __name__ == "__main__":
    main()
