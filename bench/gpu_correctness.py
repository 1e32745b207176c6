"""The ``correctness`` set of ``bench/gpu.py``: the tests that need a GPU, those of what only a GPU
shows as it is, and where it is there NVIDIA's sanitizer on the smallest of them.

Tests compile for long, so where pytest-xdist is installed several processes share them out. Those
of the Hopper kernel come after the gate of ``bench/hopper_gate.py``, and are left out where it
fails. Each part has a limit of time, and all together end inside ten minutes.

In toy sizes, and without a GPU, the same tests are started and skip, and of those that do not need
one a few run: that much can be seen there.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import torch

from bench.apart import run_apart
from bench.harness import ROOT, Row, summarise
from bench.hopper_gate import on_hopper, verdict
from bench.rivals import OURS_HOPPER

WHAT = "tests on this device"
SMALL = "combination_in_bf16 and not backward"
"""Of the tests, those that a sanitizer runs: every feature, small shapes, no repetition."""

MARK = "pytest.mark.gpu"
ANYWHERE = ("test_persistent.py", "test_tuned.py")
"""Files of tests that run on a CPU, too, but other code: there the interpreter's, or an emulator's.
"""

HOPPER = "test_hopper*.py"
FEW = "fit"  # of the tests that run anywhere, those that toys can run: sizes that fit
TOOLS = ("memcheck", "racecheck")
_TOTAL = 560.0  # seconds of everything, the gate among it
_ANYWHERE = 180.0  # of the tests that run anywhere, which come first
_MARKED = 420.0  # of those that need a GPU
_SANITIZED = 60.0  # of each tool, which slows tests down a hundredfold
_LEAST = 15.0  # with less, nothing more is begun
_WORKERS = 8
_GRACE = 10.0  # for pytest to write what it knows when it is stopped


@dataclass(frozen=True)
class Part:
    """Some tests, run by one command.

    Args:
        name, shape: provider and shape of its rows.
        words: options of pytest.
        prefix: what the command begins with, before Python.
    """

    name: str
    shape: str
    files: list[Path]
    words: list[str]
    seconds: float
    prefix: tuple[str, ...] = ()


@dataclass(frozen=True)
class Counts:
    """How tests ended, and which of them failed."""

    passed: int
    skipped: int
    failed: tuple[str, ...]
    seconds: float


def run(device: torch.device, tiny: bool) -> tuple[list[Row], str, *tuple[str, ...]]:
    """Run the tests, then the sanitizer's tools; rows, the table, and what failed."""
    stop = time.perf_counter() + _TOTAL
    notes: list[str] = []
    failures: list[str] = []
    anywhere = files_of(*ANYWHERE)
    if not on_hopper(device):
        notes.append("tests of the Hopper kernel are left out: it needs a Hopper GPU (sm_90)")
    elif (reason := verdict()) is not None:
        failures.append(f"{OURS_HOPPER} {reason}")
        notes.append(f"tests of the Hopper kernel are left out: it {reason}")
    else:
        anywhere = files_of(HOPPER, *ANYWHERE)
    shared = share_out(device)
    if not shared and device.type == "cuda":
        notes.append("pytest-xdist is not here: one process runs all tests, which may take longer")
    marked = [path for path in files_of("test_*.py") if MARK in path.read_text()]
    few = ["-k", FEW] if device.type != "cuda" else []
    parts = [
        Part("pytest", "of the kernels", anywhere, [*shared, *few], _ANYWHERE),
        Part("pytest -m gpu", "all", marked, ["-m", "gpu", *shared], _MARKED),
    ]
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        notes.append("compute-sanitizer is not here: nothing was run under it")
    elif device.type == "cuda":
        for tool in TOOLS:
            prefix = (sanitizer, "--tool", tool, "--error-exitcode", "9")
            words = ["-m", "gpu", "-k", SMALL, "-x"]
            name = f"compute-sanitizer {tool}"
            parts.append(Part(name, SMALL, marked, words, _SANITIZED, prefix))
    rows, lines = [], []
    for part in parts:
        seconds = min(part.seconds, stop - time.perf_counter())
        if seconds < _LEAST:
            failures.append(f"{part.name}: no time was left")
            continue
        counts = outcome(part.files, part.words, seconds, part.prefix)
        numbers = {"passed": counts.passed, "failed": len(counts.failed), "skipped": counts.skipped}
        for metric, number in numbers.items():
            rows += summarise(
                {part.name: [float(number)]},
                what=WHAT,
                shape=part.shape,
                dtype=torch.bfloat16,
                device=device,
                metric=metric,
            )
        shown = ", ".join(f"{number} {metric}" for metric, number in numbers.items())
        lines.append(f"{part.name} ({part.shape}): {shown} in {counts.seconds:.0f} s")
        failures += [f"{part.name}: {test}" for test in counts.failed]
        if device.type == "cuda" and not counts.passed:
            failures.append(f"{part.name}: no test passed")
    return rows, "\n".join(lines + notes), *failures


def files_of(*patterns: str) -> list[Path]:
    """Files of tests, each pattern's in order."""
    return [path for pattern in patterns for path in sorted(ROOT.glob(f"tests/{pattern}"))]


def share_out(device: torch.device) -> list[str]:
    """Words by which pytest shares tests out among processes, where it can."""
    if device.type != "cuda" or importlib.util.find_spec("xdist") is None:
        return []
    return ["-n", str(min(_WORKERS, os.cpu_count() or 1)), "--dist", "worksteal"]


def outcome(
    files: Sequence[Path], words: Sequence[str], seconds: float, prefix: Sequence[str] = ()
) -> Counts:
    """Run tests in a process of their own, for so long at most."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [*prefix, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        command += [*words, f"--junitxml={report}", "-o", "junit_duration_report=call"]
        command += map(str, files)
        (ended,) = run_apart([command], seconds, folder=ROOT, grace=_GRACE)
        passed, skipped, failed = 0, 0, []
        if report.exists():
            passed, skipped, failed = _read(report, stopped=ended.code is None)
    if ended.code is None:
        failed.append(f"was stopped after {seconds:.0f} s")
    elif ended.code and not failed:
        failed.append(f"ended with exit code {ended.code}: {ended.said.strip()[-500:]}")
    return Counts(passed, skipped, tuple(failed), time.perf_counter() - started)


def _read(report: Path, stopped: bool) -> tuple[int, int, list[str]]:
    """Passed, skipped, and the names of those that failed.

    Args:
        stopped: tests that took no time may not have ended, and are not counted.
    """
    passed, skipped, failed = 0, 0, []
    for case in ElementTree.parse(report).iter("testcase"):
        kinds = {child.tag for child in case}
        if kinds & {"failure", "error"}:
            failed.append(f"{case.get('classname')}::{case.get('name')}")
        elif "skipped" in kinds:
            skipped += 1
        elif not stopped or float(case.get("time", "0")) > 0:
            passed += 1
    return passed, skipped, failed
