"""Parts of an explanation under the profiler, for the set ``explain`` of ``bench/gpu.py``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from atman_triton import memory
from atman_triton.engine import Unit, undisturbed
from bench import gpu_live
from bench.explaining import Task
from bench.harness import Row, seconds_of
from bench.profiled import lines_of, profiled, rows_of


def profiled_calls(task: Task, new_tokens: int) -> Iterator[tuple[str, Callable[[], object]]]:
    """What is run under the profiler: one batch, a whole direct run, steps of a generation."""
    prompt = len(task.prompt)
    middle = prompt // 2
    most = memory.tokens_per_batch(task.model.device)
    engine = task.engine()
    rows = max(1, min(prompt - middle, most // (prompt - middle)))
    batch = [Unit((unit,)) for unit in range(middle, middle + rows)]

    def exact() -> None:
        with undisturbed(task.model):
            engine.perturb(batch)

    before = len(engine.record.batch_sizes)
    exact()
    batches = len(engine.record.batch_sizes) - before
    yield f"exact, {rows} units from the middle on, {batches} batch{'es' * (batches > 1)}", exact
    yield "direct", lambda: task.scores(effect="direct")
    case = gpu_live.case_of(task.model, prompt, new_tokens)
    yield f"{gpu_live.PLAIN}, {new_tokens} tokens", case.plain
    yield f"{gpu_live.LIVE}, {new_tokens} tokens", case.live


def under_profiler(
    task: Task, label: str, new_tokens: int, traces: Path | None
) -> tuple[list[Row], list[str]]:
    """Busy share, gaps and kernels: rows, and lines of the table."""
    device, dtype = task.model.device, task.model.dtype
    rows: list[Row] = []
    lines = ["  under a profiler:"]
    for name, call in profiled_calls(task, new_tokens):
        call()  # warm
        spent = seconds_of(call, device)
        keep = None
        if traces is not None:
            keep = traces / f"{label}-{name.split(',')[0]}.json.gz"
        found = profiled(call, device, spent, keep)
        rows += rows_of(found, name, label, dtype, device)
        lines += lines_of(found, name)
    return rows, lines
