"""How much memory a call allocates at its widest point, and what stands there then.

On CUDA the allocator keeps count. On a CPU the profiler reports every allocation of torch with its
address, so that the peak is exact, whatever the allocator of the C library does; it keeps one
record per operator and allocation, which takes memory of its own (not counted). Where that would be
too many, :func:`resident_peak` asks the operating system for the process's own peak.
"""

from __future__ import annotations

import gc
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

# Else the profiler's library writes two lines to stderr each time; read when it first starts.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")


@dataclass(frozen=True)
class Peak:
    """Bytes above those that were allocated when the call began.

    Args:
        bytes: The most at any time.
        kept: Still allocated at the end, the result's included.
        standing: On a CPU, what made up the peak: ``(bytes, "operator < its callers")``, the
            largest first.
    """

    bytes: int
    kept: int
    standing: tuple[tuple[int, str], ...] = ()


def peak_of(call: Callable[[], Any], device: torch.device) -> tuple[Peak, Any]:
    """Run once: the peak, and what the call returned."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = call()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device) - before
        return Peak(peak, torch.cuda.memory_allocated(device) - before), result
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = call()
    return _from_events(_allocations(profiler)), result


@dataclass(frozen=True)
class _Event:
    """``bytes`` are negative where memory is given back."""

    nanosecond: int
    bytes: int
    address: int
    source: str


def _allocations(profiler: profile) -> list[_Event]:
    """Every allocation and release on the CPU, in order of time."""
    inner = profiler.profiler
    assert inner is not None and inner.kineto_results is not None
    found: list[_Event] = []
    pending = [(root, ()) for root in inner.kineto_results.experimental_event_tree()]
    while pending:
        event, callers = pending.pop()
        if event.tag == _EventType.Allocation:
            fields: Any = event.extra_fields
            if fields.device.type == "cpu":
                source = " < ".join(reversed(callers[-4:])) or "outside operators"
                found.append(_Event(event.start_time_ns, fields.alloc_size, fields.ptr, source))
        pending += [(child, (*callers, event.name)) for child in event.children]
    return sorted(found, key=lambda event: event.nanosecond)


def _from_events(events: list[_Event]) -> Peak:
    live = most = when = 0
    for index, event in enumerate(events):
        live += event.bytes
        if live > most:
            most, when = live, index + 1
    standing: dict[int, _Event] = {}
    for event in events[:when]:
        if event.bytes > 0:
            standing[event.address] = event
        else:
            standing.pop(event.address, None)
    by_source: Counter[str] = Counter()
    for event in standing.values():
        by_source[event.source] += event.bytes
    return Peak(most, live, tuple((size, source) for source, size in by_source.most_common()))


def resident_peak(call: Callable[[], Any]) -> tuple[int, Any]:
    """Run once on Linux: the process's largest resident memory above that at the start, in bytes.

    Counts what the C library's allocator holds on to; the kernel counts to about a quarter MiB.
    """
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _resident("VmRSS")
    result = call()
    return _resident("VmHWM") - before, result


def _resident(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}.")
