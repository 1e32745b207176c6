"""The ``memory`` set of ``bench/gpu.py``: the paper's Figure 8 in one process and ten minutes.

``bench.scaling`` takes the same numbers with a fresh process for each, three times over, for which
a lent GPU leaves no time: here a model is made once and explains at every length by every method.
What memory allows no more has a note in place of its numbers.
"""

from __future__ import annotations

import gc
import math
import sys
import time
from pathlib import Path

import torch

from atman_triton import memory
from bench import scaling, scaling_run
from bench.explaining import LlamaShape
from bench.gpu_explain import fits
from bench.scaling import Row
from bench.scaling_run import Found, Job

TINY = (LlamaShape("llama-1M", 128, 2, 4, 2, 256, vocabulary=2048),)
_TINY_LENGTHS = (16, 24)
_REPEATS = 2
_MINUTES = 8.0  # after which no model is begun


def run(device: torch.device, tiny: bool) -> tuple[list[Row], str]:
    """All sizes that memory and time allow: rows, and the table."""
    names, lengths = scaling.DEFAULTS["cuda"]
    shapes = TINY if tiny else [scaling.SHAPES[name] for name in names]
    lengths = _TINY_LENGTHS if tiny else lengths
    began, rows, notes = time.perf_counter(), list[Row](), list[str]()
    for shape in shapes:
        steps = {"steps": 2} if tiny else {}  # of integrated gradients
        jobs = scaling.jobs_of([shape], lengths, scaling.BATCHES, device=device.type, **steps)
        if time.perf_counter() - began > 60 * _MINUTES:
            notes.append(f"{shape.name}: left out, {_MINUTES:g} minutes have passed")
        elif not fits(shape, device, jobs[0].dtype):
            notes.append(f"{shape.name}: left out, its weights do not fit")
        else:
            print(f"{shape.name} ...", file=sys.stderr, flush=True)
            rows += measure(shape, jobs, device)
    return rows, "\n".join([scaling.table(rows), *notes])


def measure(shape: LlamaShape, jobs: list[Job], device: torch.device) -> list[Row]:
    """One model, every length, method and batch."""
    model = shape.model(jobs[0].dtype, device, max(job.length for job in jobs) + 1)
    rows = []
    for job in jobs:
        found = []
        while len(found) < _REPEATS and not any(each.note for each in found):
            found.append(attempt(job, model, device))
        rows.append(scaling.summarised(job, found))
    del model
    _emptied(device)
    return rows


def attempt(job: Job, model: object, device: torch.device) -> Found:
    """One run; a note where memory is too little for it."""
    largest = memory.tokens_per_batch
    if job.batch == "1":
        memory.tokens_per_batch = lambda device: 1
    try:
        found = scaling_run.measured(job, model)
    except (RuntimeError, MemoryError) as error:
        if not memory.out_of_memory(error):
            raise
        name = scaling_run.device_name(device)
        found = Found(math.nan, math.nan, math.nan, name, "out of memory")
    finally:
        memory.tokens_per_batch = largest
    _emptied(device)
    return found


def write(rows: list[Row], folder: Path) -> Path:
    """Rows to ``scaling.csv``."""
    path = folder / "scaling.csv"
    scaling.write(rows, path)
    return path


def draw(folder: Path) -> list[Path]:
    """``scaling-<device>.png`` for each device of ``scaling.csv``."""
    rows, drawn = scaling.read(folder / "scaling.csv"), []
    for device in dict.fromkeys(row.device for row in rows):
        chip = "".join(letter if letter.isalnum() else "-" for letter in device.lower())
        drawn.append(folder / f"scaling-{chip}.png")
        scaling.draw([row for row in rows if row.device == device], drawn[-1])
    return drawn


def _emptied(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
