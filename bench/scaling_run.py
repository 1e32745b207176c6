"""One number of ``bench.scaling``: memory and time of one explanation, in a process of its own.

Apart from that module, so that the server of processes can import it ahead.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import gc
import math
import multiprocessing
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch

import atman_triton as atman
from atman_triton import memory
from atman_triton.baselines import Baseline
from atman_triton.products import fast_products
from bench.allocations import resident_peak
from bench.explaining import LlamaShape
from bench.harness import device_name

FORWARD, CHEFER, GRADIENTS = "plain forward", "Chefer", "integrated gradients"
EXACT, DIRECT = "AtMan exact", "AtMan direct"
METHODS = (FORWARD, EXACT, DIRECT, CHEFER, GRADIENTS)
WHOLE = (FORWARD, CHEFER)  # run one row, however many there could be
WARM = 8  # prompt tokens of the run that comes first


@dataclasses.dataclass(frozen=True)
class Job:
    """What one process measures."""

    shape: LlamaShape
    length: int
    method: str
    batch: str
    device: str
    steps: int = 32
    threads: int = 1

    @property
    def dtype(self) -> torch.dtype:
        """Half of the digits on a GPU, as large models are used there."""
        return torch.bfloat16 if self.device == "cuda" else torch.float32


@dataclasses.dataclass(frozen=True)
class Found:
    """What one process found, and with which chip; NaN and a note where memory ran out."""

    bytes: float
    seconds: float
    forwards: float
    device: str
    note: str = ""


def runner(job: Job, model: Any) -> Callable[[Sequence[int]], float]:
    """Explains the last token of a prompt of ids; gives its cost in forward passes."""
    if job.method == FORWARD:
        return functools.partial(_forward, model)
    if job.method in (EXACT, DIRECT):
        explainer = atman.Explainer(
            model,
            method="exact" if job.method == EXACT else "direct",
            batch_size=1 if job.batch == "1" else "auto",
            progress=False,
        )
    elif job.method == CHEFER:
        explainer = Baseline(model, method="chefer", progress=False)
    else:
        explainer = Baseline(model, method="integrated_gradients", steps=job.steps, progress=False)

    def explain(ids: Sequence[int]) -> float:
        found = explainer.explain(list(ids[:-1]), [ids[-1]])
        if not bool(found.scores.isfinite().all()):
            raise RuntimeError(f"{job.method} gave scores that are not finite.")
        return float(found.provenance["forwards"])

    return explain


def _forward(model: Any, ids: Sequence[int]) -> float:
    with torch.no_grad(), fast_products():  # as the methods' own passes
        read = torch.tensor([ids[:-1]], device=model.device)
        logits = model(read, use_cache=False, logits_to_keep=1).logits
        float(logits[0, -1].float().log_softmax(-1)[ids[-1]])  # waits for a GPU
    return 1.0


def measure(job: Job) -> Found:
    """Peak and time of one run, in a process that has run nothing else."""
    torch.set_num_threads(job.threads)
    if job.batch == "1":
        memory.tokens_per_batch = lambda device: 1  # a process of its own, which ends with this
    return measured(job, job.shape.model(job.dtype, torch.device(job.device), job.length + 1))


def measured(job: Job, model: Any) -> Found:
    """The same with a model that is there, after a run over a short prompt."""
    device = torch.device(job.device)
    run = runner(job, model)
    drawn = torch.Generator().manual_seed(1)
    ids = torch.randint(job.shape.vocabulary, (job.length + 1,), generator=drawn).tolist()
    run(ids[: WARM + 1])
    _trim()

    # Of one thread the processor's time, which other work on the machine does not lengthen.
    alone = device.type == "cpu" and job.threads == 1
    clock = time.process_time if alone else time.perf_counter

    def timed() -> tuple[float, float]:
        started = clock()
        forwards = run(ids)
        return clock() - started, forwards

    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        seconds, forwards = timed()
        peak = torch.cuda.max_memory_allocated() - before
    else:
        peak, (seconds, forwards) = resident_peak(timed)
    return Found(peak, seconds, forwards, device_name(device))


def _trim() -> None:
    """Hand back what glibc's allocator holds on to, or less than is needed would be counted."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _answer(job: Job, send: Connection) -> None:
    """What a process does: ``measure``, or the check of its model."""
    try:
        send.send(measure(job))
    except Exception as error:  # told to the process that asked
        if memory.out_of_memory(error):
            name = device_name(torch.device(job.device))
            send.send(Found(math.nan, math.nan, math.nan, name, "out of memory"))
            return
        send.send(f"{type(error).__name__}: {error}")
        raise


def fresh(job: Job) -> Found:
    """``measure`` in a new process.

    It comes from a server that has imported all there is to import, and run nothing.

    Raises: RuntimeError: if it failed for another reason than memory.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "captum.attr"])
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(job, send))
    process.start()
    send.close()
    try:
        found = receive.recv()
    except EOFError:
        found = None
    process.join()
    if isinstance(found, Found):
        return found
    if found is None and process.exitcode == -9:  # what Linux does where memory runs out
        name = device_name(torch.device(job.device))
        return Found(math.nan, math.nan, math.nan, name, "killed, as where memory runs out")
    what = found or f"ended with exit code {process.exitcode}"
    raise RuntimeError(f"{job.method} on {job.shape.name}, {job.length} tokens: {what}")
