"""What a device does while a call runs: how much of the time it works, where it waits, on what.

A call is run once under ``torch.profiler``. On a GPU what counts are kernels, copies and fills, as
the driver timed them, and the time in which none of them ran is a gap: the host had not launched
the next one yet. On a CPU the same is done with PyTorch's operators, and a gap is Python's own
time. Intervals overlap (streams; operators within operators), so the busy time is their union.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from bench.harness import Row, summarise

WORK = {"cuda": ("kernel", "gpu_memcpy", "gpu_memset"), "cpu": ("cpu_op",)}
"""Categories of a trace in which a device works."""

HOST = ("cuda_runtime", "cuda_driver")
"""What the host asks of a GPU: from its first call on, the time counts."""

# The first that is found in a kernel's name says what it is for; attention may be made of CUTLASS.
KINDS = {
    "attention": re.compile(
        r"attention|fmha|flash|sdpa|packed|shared_prefix|factor_tiles|key_range", re.IGNORECASE
    ),
    "matrix products": re.compile(
        r"gemm|gemv|cutlass|cublas|nvjet|xmma|mkldnn|matmul|splitK|::(mm|bmm|addmm|baddbmm|linear)$",
        re.IGNORECASE,
    ),
}
REST = "the rest"

Interval = tuple[float, float]
"""Start and end, microseconds."""


@dataclasses.dataclass(frozen=True)
class Work:
    """One kernel, or on a CPU one operator.

    Args:
        start, stop: Microseconds.
        line: Where it ran: a stream, a thread. Only there can it hold others.
    """

    name: str
    start: float
    stop: float
    line: Any = 0


@dataclasses.dataclass(frozen=True)
class Profile:
    """One run of a call.

    Args:
        work: What the device did.
        window: From the first thing that was seen to the last, on the profiler's clock.
        seconds: Wall time of the same call without a profiler.
    """

    work: tuple[Work, ...]
    window: Interval
    seconds: float

    @property
    def busy(self) -> float:
        """Microseconds in which the device worked."""
        return length_of(union(clipped(self.work, self.window)))

    @property
    def share(self) -> float:
        """Of the profiled time, in which the device worked."""
        return self.busy / max(self.window[1] - self.window[0], 1e-9)

    @property
    def share_alone(self) -> float:
        """The same of the time that the call takes without a profiler, which slows the host."""
        return self.busy / 1e6 / self.seconds

    @property
    def gaps(self) -> list[float]:
        """Microseconds without work, the longest first."""
        return sorted((b - a for a, b in gaps(self.work, self.window)), reverse=True)

    def by_name(self) -> dict[str, tuple[float, int]]:
        """Microseconds of its own and calls of everything that worked, most time first."""
        found: dict[str, list[float]] = defaultdict(list)
        for work, own in own_times(self.work):
            found[work.name].append(own)
        sums = {name: (sum(spent), len(spent)) for name, spent in found.items()}
        return dict(sorted(sums.items(), key=lambda item: -item[1][0]))

    def by_kind(self) -> dict[str, float]:
        """Shares of all work."""
        sums = dict.fromkeys([*KINDS, REST], 0.0)
        for name, (spent, _) in self.by_name().items():
            sums[kind_of(name)] += spent
        total = sum(sums.values())
        return {kind: spent / total if total else 0.0 for kind, spent in sums.items()}


# --- intervals ------------------------------------------------------------------------------------


def clipped(work: Iterable[Work], window: Interval) -> list[Interval]:
    """The parts that lie in a window; what lies outside is gone."""
    low, high = window
    inside = ((max(each.start, low), min(each.stop, high)) for each in work)
    return [(start, stop) for start, stop in inside if stop > start]


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The same points in intervals that are apart, in order."""
    apart: list[Interval] = []
    for start, stop in sorted(intervals):
        if apart and start <= apart[-1][1]:
            apart[-1] = apart[-1][0], max(apart[-1][1], stop)
        else:
            apart.append((start, stop))
    return apart


def length_of(intervals: Iterable[Interval]) -> float:
    """Of all together."""
    return sum(stop - start for start, stop in intervals)


def gaps(work: Iterable[Work], window: Interval) -> list[Interval]:
    """The parts of a window in which nothing works, its ends included."""
    found, reached = [], window[0]
    for start, stop in union(clipped(work, window)):
        if start > reached:
            found.append((reached, start))
        reached = stop
    return [*found, (reached, window[1])] if reached < window[1] else found


def own_times(work: Sequence[Work]) -> list[tuple[Work, float]]:
    """Time of each without that of those that it holds, on its own line."""
    own: list[list[Any]] = []
    open_by_line: dict[Any, list[list[Any]]] = defaultdict(list)
    for each in sorted(work, key=lambda each: (each.start, -each.stop)):
        around = open_by_line[each.line]
        while around and around[-1][0].stop < each.stop:
            around.pop()
        if around and around[-1][0].stop > each.start:
            around[-1][1] -= each.stop - each.start
        own.append([each, each.stop - each.start])
        around.append(own[-1])
    return [(each, spent) for each, spent in own]


def kind_of(name: str) -> str:
    """What a kernel is for, by its name."""
    return next((kind for kind, words in KINDS.items() if words.search(name)), REST)


# --- profiling ------------------------------------------------------------------------------------


def read_trace(trace: dict[str, Any], device_type: str, seconds: float) -> Profile:
    """A trace in Chrome's format, as the profiler writes it."""
    work, low, high = [], float("inf"), float("-inf")
    for event in trace["traceEvents"]:
        category = event.get("cat")
        if event.get("ph") != "X" or category not in (*WORK[device_type], *HOST):
            continue
        start, stop = event["ts"], event["ts"] + event["dur"]
        low, high = min(low, start), max(high, stop)
        if category in WORK[device_type]:
            work.append(Work(event["name"], start, stop, (event["pid"], event["tid"])))
    return Profile(tuple(work), (low, high) if work else (0.0, 0.0), seconds)


def profiled(
    call: Callable[[], object],
    device: torch.device,
    seconds: float,
    keep: Path | None = None,
) -> Profile:
    """Run a call, which must be warm, under the profiler.

    Args:
        seconds: Its wall time without one.
        keep: Where the trace is written for people, gzipped: chrome://tracing shows it.
    """
    on_gpu = device.type == "cuda"
    # operators of the host are left out on a GPU: recording them would slow what is measured
    activities = [ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]
    with profile(activities=activities):
        torch.zeros(1, device=device)  # the first profile sets the profiler up
    with profile(activities=activities) as recorded:
        call()
        if on_gpu:
            torch.cuda.synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(path))
        text = path.read_text()
    if keep is not None:
        keep.parent.mkdir(parents=True, exist_ok=True)
        keep.write_bytes(gzip.compress(text.encode()))
    return read_trace(json.loads(text), device.type, seconds)


def rows_of(
    found: Profile, name: str, shape: str, dtype: torch.dtype, device: torch.device
) -> list[Row]:
    """One row per number."""
    if not found.work:
        return []
    numbers = {
        "busy share of the profiled time": found.share,
        "busy share of the time without a profiler": found.share_alone,
        "busy ms": found.busy / 1e3,
        "ms without a profiler": found.seconds * 1e3,
        "kernels": float(len(found.work)),
        "longest gap, ms": max(found.gaps, default=0.0) / 1e3,
        "gaps, ms": sum(found.gaps) / 1e3,
    }
    numbers |= {f"{kind}, share of the work": share for kind, share in found.by_kind().items()}
    rows: list[Row] = []
    for metric, number in numbers.items():
        rows += summarise(
            {name: [number]},
            what="under a profiler",
            shape=shape,
            dtype=dtype,
            device=device,
            metric=metric,
        )
    return rows


def lines_of(found: Profile, name: str, top: int = 3) -> list[str]:
    """For people: busy share, gaps, what takes the time."""
    if not found.work:
        return [f"  {name}: the profiler recorded no work of the device"]
    shares = ", ".join(f"{kind} {share:.0%}" for kind, share in found.by_kind().items())
    longest = ", ".join(f"{gap / 1e3:.3g}" for gap in found.gaps[:3])
    lines = [
        f"  {name}: busy {found.share_alone:.0%} of {found.seconds * 1e3:.3g} ms"
        f" ({found.share:.0%} under the profiler), longest gaps {longest} ms",
        f"    {shares}",
    ]
    total = sum(spent for spent, _ in found.by_name().values())
    for kernel, (spent, calls) in list(found.by_name().items())[:top]:
        lines.append(f"    {spent / total:>5.0%} {calls:>6}x {kernel[:80]}")
    return lines
