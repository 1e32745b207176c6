"""Timing that can be trusted: rivals in turns, on the same inputs, and only after they are right.

Used by the pytest-benchmark files of this folder. Rows go to ``bench/results/<device>.csv``.
"""

from __future__ import annotations

import csv
import dataclasses
import datetime
import functools
import importlib.metadata
import os
import platform
import random
import re
import subprocess
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from atman_triton.testing import assert_close_to_oracle

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(os.environ.get("ATMAN_BENCH_RESULTS", ROOT / "bench" / "results"))
# Larger than any GPU's second-level cache.
_FLUSH_BYTES = 256 * 2**20


@dataclasses.dataclass(frozen=True)
class Row:
    """One measured number, with all that is needed to read it later."""

    what: str
    provider: str
    shape: str
    dtype: str
    metric: str
    median: float
    p20: float
    p80: float
    device: str
    torch: str
    triton: str
    transformers: str
    commit: str
    date: str


def device_name(device: torch.device) -> str:
    """The chip, and for a CPU how many threads torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:  # not Linux
        found = None
    return f"{found[1].strip() if found else name}, {torch.get_num_threads()} threads"


def version_of(package: str) -> str:
    """The installed version, or "none"."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


@functools.cache
def commit() -> str:
    """The checkout's commit, with a ``+`` where tracked files differ from it."""

    def git(*command: str) -> str:
        done = subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results")
        return (git("rev-parse", "--short=10", "HEAD") or "unknown") + ("+" if changed else "")
    except FileNotFoundError:  # no git
        return "unknown"


def clock(call: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of one call: wall time, on CUDA device time with a cold second-level cache."""
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e3
    torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device).zero_()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """Wall time of one call, the device's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def interleave(
    benchmark: Any,
    ours: str,
    providers: Mapping[str, Callable[[], object]],
    *,
    outputs: Mapping[str, Tensor],
    eager: Tensor,
    oracle: Tensor,
    device: torch.device,
    seconds: float = 5.0,
    rounds: int | None = None,
    checked: Collection[str] = (),
) -> dict[str, list[float]]:
    """Check every provider, then time them in turns, in a new random order each round.

    pytest-benchmark's table shows ``ours``; its rivals run in the set-up of every round.

    Args:
        benchmark: the fixture of pytest-benchmark.
        ours: the provider that the fixture times.
        outputs: what each provider computed for some input.
        eager, oracle: the same by plain PyTorch in the providers' dtype, and in float64.
        seconds: about how long all rounds take together, where ``rounds`` is not given.
        checked: providers of another quantity, which the caller has checked.
    Returns: milliseconds of every round, by provider.
    Raises: AssertionError: a provider is wrong, so its time would mean nothing.
    """
    for name in providers:
        if name not in checked:
            assert_close_to_oracle(outputs[name], eager, oracle, name=name)
    times: dict[str, list[float]] = {name: [] for name in providers}

    def measure(name: str) -> None:
        times[name].append(clock(providers[name], device))

    if rounds is None:
        for name in 2 * list(providers):  # the first call of each may compile or allocate
            measure(name)
        once = sum(spent[-1] for spent in times.values()) / 1e3
        rounds = max(5, min(200, int(seconds / once)))
        for spent in times.values():
            spent.clear()

    rivals = [name for name in providers if name != ours]
    order = random.Random(0)

    def others() -> None:
        order.shuffle(rivals)
        for name in rivals:
            measure(name)

    benchmark.pedantic(measure, args=(ours,), setup=others, rounds=rounds, iterations=1)
    return times


def take_turns(
    providers: Mapping[str, Callable[[], object]],
    device: torch.device,
    *,
    seconds: float = 60.0,
    most: int = 5,
) -> dict[str, list[float]]:
    """Time calls that are known to be right in turns, in a new random order each round.

    Args:
        seconds: about how long all rounds take together; one round is always run.
        most: rounds, however quick they are.
    Returns: milliseconds of every round, by provider.
    """
    times: dict[str, list[float]] = {name: [] for name in providers}
    order, names = random.Random(0), list(providers)
    rounds = most
    while len(times[names[0]]) < rounds:
        order.shuffle(names)
        for name in names:
            times[name].append(clock(providers[name], device))
        once = sum(spent[0] for spent in times.values()) / 1e3
        rounds = max(1, min(most, int(seconds / once)))
    return times


def summarise(
    times: Mapping[str, list[float]],
    *,
    what: str,
    shape: str,
    dtype: torch.dtype,
    device: torch.device,
    metric: str = "ms",
) -> list[Row]:
    """One row per provider: median, 20% and 80% quantiles."""
    rows = []
    for provider, spent in times.items():
        points = torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64)
        median, p20, p80 = torch.tensor(spent, dtype=torch.float64).quantile(points).tolist()
        rows.append(
            Row(
                what=what,
                provider=provider,
                shape=shape,
                dtype=str(dtype).removeprefix("torch."),
                metric=metric,
                median=round(median, 4),
                p20=round(p20, 4),
                p80=round(p80, 4),
                device=device_name(device),
                torch=version_of("torch"),
                triton=version_of("triton"),
                transformers=version_of("transformers"),
                commit=commit(),
                date=datetime.datetime.now(datetime.UTC).date().isoformat(),
            )
        )
    return rows


def write_rows(rows: list[Row], folder: Path = RESULTS) -> Path:
    """Append rows to the device's file, ``<device>.csv``."""
    path = folder / f"{re.sub(r'[^a-z0-9]+', '-', rows[0].device.lower()).strip('-')}.csv"
    folder.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(Row)])
        if new:
            writer.writeheader()
        writer.writerows(dataclasses.asdict(row) for row in rows)
    return path


def report(rows: list[Row], ours: str) -> str:
    """A line per row, with each provider's time as a multiple of ours."""
    (own,) = (row.median for row in rows if row.provider == ours)
    lines = [f"{rows[0].what}  {rows[0].shape}  {rows[0].dtype}  {rows[0].device}"]
    for row in rows:
        lines.append(
            f"  {row.provider:<44} {row.median:>10.3f} {row.metric}"
            f"  [{row.p20:.3f}, {row.p80:.3f}]  {row.median / own:6.2f}x ours"
        )
    return "\n".join(lines)
