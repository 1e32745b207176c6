"""The ``correctness`` set of ``bench/gpu.py``: the tests that need a GPU, and where it is there
NVIDIA's sanitizer on the smallest of them.

In toy sizes, and without a GPU, the same tests are started and skip: that much can be seen there.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import torch

from bench.harness import ROOT, Row, summarise

WHAT = "tests on this device"
SMALL = "combination_in_bf16 and not backward"
"""Of the tests, those that a sanitizer runs: every feature, small shapes, no repetition."""

MARK = "pytest.mark.gpu"
TOOLS = ("memcheck", "racecheck")
_SECONDS = 420.0  # of the tests; a sanitizer slows them down a hundredfold
_SANITIZED = 60.0  # of each tool, which is told of where it stopped


@dataclass(frozen=True)
class Counts:
    """How tests ended, and which of them failed."""

    passed: int
    skipped: int
    failed: tuple[str, ...]
    seconds: float


def run(device: torch.device, tiny: bool) -> tuple[list[Row], str, *tuple[str, ...]]:
    """Run the tests, then the sanitizer's tools; rows, the table, and what failed."""
    found = {"pytest -m gpu": outcome([], _SECONDS)}
    sanitizer = shutil.which("compute-sanitizer")
    notes = [] if sanitizer else ["compute-sanitizer is not here: nothing was run under it"]
    if sanitizer and device.type == "cuda":
        for tool in TOOLS:
            prefix = [sanitizer, "--tool", tool, "--error-exitcode", "9"]
            words = ["-k", SMALL, "-x"]
            found[f"compute-sanitizer {tool}"] = outcome(words, _SANITIZED, prefix)
    rows, lines, failures = [], [], []
    for name, counts in found.items():
        numbers = {"passed": counts.passed, "failed": len(counts.failed), "skipped": counts.skipped}
        for metric, number in numbers.items():
            rows += summarise(
                {name: [float(number)]},
                what=WHAT,
                shape="all" if name.startswith("pytest") else SMALL,
                dtype=torch.bfloat16,
                device=device,
                metric=metric,
            )
        shown = ", ".join(f"{number} {metric}" for metric, number in numbers.items())
        lines.append(f"{name}: {shown} in {counts.seconds:.0f} s")
        failures += [f"{name}: {test}" for test in counts.failed]
        if device.type == "cuda" and not counts.passed:
            failures.append(f"{name}: no test passed")
    return rows, "\n".join(lines + notes), *failures


def outcome(words: list[str], seconds: float, prefix: list[str] | None = None) -> Counts:
    """Run the tests that need a GPU in a process of their own, for so long at most."""
    started = time.perf_counter()
    files = [path for path in sorted(ROOT.glob("tests/test_*.py")) if MARK in path.read_text()]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [*(prefix or []), sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        command += ["-m", "gpu", *words, f"--junitxml={report}", *map(str, files)]
        late = ""
        try:
            done = subprocess.run(
                command, cwd=ROOT, capture_output=True, text=True, timeout=seconds, check=False
            )
            code, said = done.returncode, done.stdout + done.stderr
        except subprocess.TimeoutExpired:
            code, said, late = -1, "", f"was stopped after {seconds:.0f} s"
        passed, skipped, failed = _read(report) if report.exists() else (0, 0, [])
    if late:
        failed.append(late)
    elif code and not failed:
        failed.append(f"ended with exit code {code}: {said.strip()[-500:]}")
    return Counts(passed, skipped, tuple(failed), time.perf_counter() - started)


def _read(report: Path) -> tuple[int, int, list[str]]:
    """Passed, skipped, and the names of those that failed."""
    passed, skipped, failed = 0, 0, []
    for case in ElementTree.parse(report).iter("testcase"):
        kinds = {child.tag for child in case}
        if kinds & {"failure", "error"}:
            failed.append(f"{case.get('classname')}::{case.get('name')}")
        elif "skipped" in kinds:
            skipped += 1
        else:
            passed += 1
    return passed, skipped, failed
