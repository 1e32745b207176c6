"""The resource table of all kernels on sm_90: registers, stack, shared memory, matrix instructions.

Needs no GPU, but a process without TRITON_INTERPRET::

    python -m bench.compile_sm90 --csv bench/results/compile_sm90.csv

Counted in the assembler's own output (SASS). ``wgmma`` are HGMMA instructions, ``mma`` HMMA and
its like; ``local`` are accesses to local memory, where spilled registers go, ``local_in_loops``
those in the innermost loops over tiles; ``late_exponentials`` are those of the Hopper kernel's
loops that no matrix product runs beside.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench import compile_report, sass
from bench.compile_hopper import HopperCase, build_hopper, hopper_cases

ARCHITECTURE = "sm_90"
HOPPER = "hopper"


@dataclass
class Row:
    """One compiled variant."""

    triton: str
    kernel: str
    stage: str
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
    registers: int  # per thread at the launch; partitions of the Hopper kernel then trade theirs
    stack: int  # bytes
    shared: int  # bytes
    wgmma: int
    mma: int
    local: int
    local_in_loops: int
    late_exponentials: int | None
    problems: str


def cases() -> list[compile_report.Case | HopperCase]:
    """All kernels' variants for sm_90 of the published table, and the Hopper kernel's."""
    portable = [case for case in compile_report.table() if case.architecture == ARCHITECTURE]
    return [*portable, *hopper_cases()]


def figures(compiled: Any, name: str) -> dict[str, Any]:
    """What the assembler says, and what its output holds."""
    text = sass.disassemble(compiled.asm["cubin"])
    loops = sass.tile_loops(text)
    everything = [each for block in sass.blocks_of(text) for each in block.instructions]
    registers, stack = compile_report.resource_usage(compiled.asm, name)
    wgmma = sass.count(r"\bHGMMA\b", everything)
    return {
        "registers": registers,
        "stack": stack,
        "shared": compiled.metadata.shared,
        "wgmma": wgmma,
        "mma": sass.count(sass.MATRIX, everything) - wgmma,
        "local": sass.count(sass.LOCAL, everything),
        "local_in_loops": sum(sass.count(sass.LOCAL, loop) for loop in loops),
        "late_exponentials": sum(map(sass.late_exponentials, loops)),
    }


def compile_row(case: compile_report.Case | HopperCase) -> Row:
    """Compile one variant and read its figures; what breaks a rule goes to ``problems``."""
    import triton

    own: dict[str, Any]
    numbers: dict[str, Any]
    if isinstance(case, HopperCase):
        config = case.tiles
        numbers = figures(build_hopper(case), "_hopper_fwd_kernel")
        own = {
            "kernel": HOPPER,
            "stage": "",
            "value_dim": case.dims[1],
            "features": "causal" if case.causal else "full",
            "queries": 4096,
            "block_m": 128,
            "block_n": config.block_n,
            "num_warps": 12,
            "num_stages": config.stages,
        }
    else:
        compiled, config, kernel = compile_report.build(case)
        numbers = figures(compiled, kernel.__name__) | {"late_exponentials": None}
        own = {
            "kernel": case.kernel,
            "stage": case.stage,
            "value_dim": case.value_dim or case.head_dim,
            "features": "+".join(case.features) or "full",
            "queries": case.queries,
            "block_m": config.block_m,
            "block_n": config.block_n,
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
        }
    row = Row(
        triton=triton.__version__,
        head_dim=case.head_dim,
        dtype=case.dtype,
        mode=case.mode,
        **own,
        **numbers,
        problems="",
    )
    row.problems = "; ".join(problems(row))
    return row


def problems(row: Row) -> list[str]:
    """Which of the rules a variant breaks.

    Nothing is spilled, except that the Hopper kernel may keep in local memory what is read once in
    a block of rows: its loops over tiles are free of it.
    """
    found = []
    if row.shared > compile_report.SHARED_LIMIT[ARCHITECTURE]:
        found.append(f"shared memory {row.shared}")
    if row.kernel == HOPPER:
        if not row.wgmma:
            found.append("no warpgroup products")
        if row.local_in_loops:
            found.append(f"{row.local_in_loops} accesses to local memory in loops over tiles")
        if row.late_exponentials:
            found.append(f"{row.late_exponentials} exponentials beside no product")
    elif row.stack:
        found.append(f"stack {row.stack}")
    if row.dtype != "float32" and row.stage != "merge" and not row.wgmma + row.mma:
        found.append("no matrix instructions")
    return found


def _row_or_reason(case: compile_report.Case | HopperCase) -> Row | str:
    try:
        return compile_row(case)
    except Exception as error:  # noqa: BLE001 - one failed variant must not hide the others
        while error.__cause__ is not None:  # triton nests the place in an inner function
            error = error.__cause__
        return f"{case}: {type(error).__name__}: {error}"


def run(
    chosen: list[compile_report.Case | HopperCase], workers: int
) -> tuple[list[Row], list[str]]:
    """Compile all cases in ``workers`` processes; rows, and a line per case that failed."""
    rows: list[Row] = []
    failures: list[str] = []
    with ProcessPoolExecutor(workers) as pool:
        for done, result in enumerate(pool.map(_row_or_reason, chosen), 1):
            if isinstance(result, str):
                failures.append(result)
                print(f"{done}/{len(chosen)} {result}", file=sys.stderr, flush=True)
                continue
            rows.append(result)
            line = (
                f"{result.kernel} {result.stage} D{result.head_dim} {result.dtype} {result.mode} "
                f"{result.features}: {result.registers} registers, stack {result.stack}, "
                f"shared {result.shared}, wgmma {result.wgmma}, mma {result.mma} {result.problems}"
            )
            print(f"{done}/{len(chosen)} {line}", file=sys.stderr, flush=True)
    return rows, failures


def main() -> None:
    """Command line; exits 1 if a variant fails to compile or breaks a rule."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kernels", nargs="+", help="only these kernels")
    parser.add_argument("--head-dims", nargs="+", type=int, help="only these head dims")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--csv", type=Path, help="write the table here")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("unset TRITON_INTERPRET: the interpreter compiles nothing.")
    chosen = [
        case
        for case in cases()
        if (not options.kernels or getattr(case, "kernel", HOPPER) in options.kernels)
        and (not options.head_dims or case.head_dim in options.head_dims)
    ]
    if not chosen:
        parser.error("no variant has these kernels and head dims.")
    rows, failures = run(chosen, options.workers)
    if options.json:
        print(json.dumps({"rows": [asdict(row) for row in rows], "failures": failures}))
    if options.csv and rows:
        options.csv.parent.mkdir(parents=True, exist_ok=True)
        with options.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, asdict(rows[0]))
            writer.writeheader()
            writer.writerows(asdict(row) for row in rows)
    sys.exit(1 if failures or any(row.problems for row in rows) else 0)


if __name__ == "__main__":
    main()
