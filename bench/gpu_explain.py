"""The set ``explain`` of ``bench/gpu.py``: explanations of random Llamas, every prompt token.

For each size: exact and direct, exact with each saving left out, and the loop of eager forwards
with full logits; then live citations beside plain generation (``bench/gpu_live.py``), and what the
device does meanwhile (``bench/gpu_profile.py``). What takes long is timed on evenly spread units
and scaled, and is named so: our runs by the tokens that all batches would run, the loop by its
forwards.
"""

from __future__ import annotations

import dataclasses
import gc
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from atman_triton.engine import SAVINGS, Effect, Unit, undisturbed
from bench import gpu_live
from bench.explaining import (
    LOOP,
    MODE,
    LlamaShape,
    Task,
    check,
    make_task,
    planned_tokens,
    spread,
)
from bench.gpu_live import LiveSizes
from bench.gpu_profile import under_profiler
from bench.harness import Row, clock, seconds_of, summarise

WHAT = f"explanation, {MODE}"
SIZES = (
    LlamaShape("llama-1B", 2048, 16, 32, 8, 8192),
    LlamaShape("llama-6B", 4096, 30, 32, 32, 11008),
    LlamaShape("llama-30B", 6656, 60, 52, 52, 17920),
)
TINY_SIZES = (
    LlamaShape("llama-toy", 32, 2, 4, 2, 48, vocabulary=101),
    LlamaShape("llama-toy-deeper", 32, 3, 4, 4, 48, vocabulary=101),
)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much is run."""

    prompt: int = 1024
    target: int = 4
    some: int = 128  # units of a run that is scaled: enough to fill batches
    alone: int = 32  # the same, one row at a time
    loop: int = 10
    whole: float = 45.0  # seconds that an exact explanation may take; longer ones are scaled
    live: LiveSizes = LiveSizes()  # noqa: RUF009
    minutes: float = 7.0  # after which no further model is begun
    last: float = 8.5  # after which nothing more of a model is begun


TOY = Sizes(prompt=24, target=2, some=6, alone=3, loop=3, live=gpu_live.TOY)


def checked(shape: LlamaShape, dtype: torch.dtype, device: torch.device, target: int) -> None:
    """Refuse to time wrong scores: the same shape with two layers, every variant."""
    small = dataclasses.replace(shape, layers=2)
    task = make_task(small.model(dtype, device), 96, [target])
    units = spread(96, 48)
    outputs: dict[str, tuple[Tensor, Effect]] = {
        f"without {name}": (task.scores(units, without={name}), "total")
        for name in SAVINGS
        if name != "one_pass"
    }
    check(
        task,
        {
            "exact": (task.scores(units), "total"),
            "direct": (task.scores(units, "direct"), "direct"),
            **outputs,
        },
        units,
    )


def necessary_flops(shape: LlamaShape, prompt: int, target: int) -> float:
    """Of all exact runs together: each from its suppressed token on, logits at the targets."""
    length = prompt + target - 1
    head = shape.vocabulary * shape.width
    layers = shape.parameters - 2 * head
    flops = 0.0
    for start in range(prompt):
        tokens = length - start
        pairs = (length * (length + 1) - start * (start + 1)) / 2  # of a row and a key it sees
        flops += 2 * layers * tokens + 2 * head * target + 4 * shape.layers * shape.width * pairs
    return flops


def matmul_peak(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """FLOP/s of one large matrix product, the best of ten."""
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    for _ in range(3):
        torch.mm(left, right)
    return (
        2 * size**3 / (min(clock(lambda: torch.mm(left, right), device) for _ in range(10)) / 1e3)
    )


def partly(task: Task, count: int, without: frozenset[str]) -> tuple[float, str]:
    """Seconds of an exact explanation, from some of its units, and how that is said."""
    prompt = len(task.prompt)
    units = spread(prompt, count)
    scale = planned_tokens(task, list(range(prompt)), without=without)
    scale /= planned_tokens(task, units, without=without)
    engine = task.engine(without)
    perturbations = [Unit((unit,)) for unit in units]
    with undisturbed(task.model):
        engine.perturb(perturbations[:2])  # compiles
        spent = seconds_of(lambda: engine.perturb(perturbations), task.model.device)
    return spent * scale, f" ({len(units)} of {prompt} units, scaled)"


def measure(task: Task, sizes: Sizes) -> dict[str, list[float]]:
    """Seconds of each provider, one or more times."""
    device = task.model.device
    found: dict[str, list[float]] = {}
    estimate, note = partly(task, sizes.some, frozenset())
    if estimate <= sizes.whole:
        found["exact"] = [seconds_of(task.scores, device)]
    else:
        found["exact" + note] = [estimate]

    def direct() -> None:
        task.scores(effect="direct")

    direct()
    found["direct"] = [seconds_of(direct, device) for _ in range(3)]
    for name in SAVINGS:
        if name != "one_pass":
            count = sizes.alone if name == "batching" else sizes.some
            spent, note = partly(task, count, frozenset({name}))
            found[f"exact without {name}{note}"] = [spent]
    units = spread(sizes.prompt, sizes.loop)
    task.loop(units[:1])
    spent = seconds_of(lambda: task.loop(units), device)
    name = f"{LOOP} ({len(units)} of {sizes.prompt} units, scaled)"
    found[name] = [spent * (sizes.prompt + 1) / (len(units) + 1)]
    return found


def fits(shape: LlamaShape, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the weights leave a tenth of the free memory to work with."""
    if device.type != "cuda":
        return True
    free, _ = torch.cuda.mem_get_info(device)
    return shape.parameters * dtype.itemsize <= 0.9 * free


@dataclasses.dataclass
class Findings:
    """What was measured of all models.

    Args:
        peak: FLOP/s of a large matrix product.
        ends: When nothing more may be begun, on the clock of ``time.perf_counter``.
        traces: Folder of the profiler's traces, None keeps none.
    """

    sizes: Sizes
    dtype: torch.dtype
    device: torch.device
    peak: float
    ends: float
    traces: Path | None = None
    rows: list[Row] = dataclasses.field(default_factory=list)
    lines: list[str] = dataclasses.field(default_factory=list)
    failures: list[str] = dataclasses.field(default_factory=list)

    def add(self, shape: LlamaShape) -> None:
        """All of one model."""
        sizes, dtype, device = self.sizes, self.dtype, self.device
        checked(shape, dtype, device, sizes.target)
        wrong = self._wrong_live(shape)  # before the whole model takes the memory
        positions = sizes.prompt + max(sizes.target, sizes.live.new_tokens)
        task = make_task(shape.model(dtype, device, positions), sizes.prompt, [sizes.target])
        label = f"{shape.name}-prompt{sizes.prompt}-target{sizes.target}"
        found = measure(task, sizes)
        own = summarise(found, what=WHAT, shape=label, dtype=dtype, device=device, metric="s")
        self.rows += own
        flops = necessary_flops(shape, sizes.prompt, sizes.target)
        share = flops / own[0].median / self.peak
        self.lines.append(
            f"{label} {own[0].dtype}: exact uses {share:.1%} of the matrix product's rate on the "
            f"necessary work, {sizes.prompt / own[0].median:.1f} units/s"
        )
        for row in own:
            ratio = row.median / own[0].median
            self.lines.append(f"  {row.provider:<62}{row.median:>10.3f} s{ratio:>9.2f}x exact")
        if wrong is None:
            self._part("live citations", lambda: gpu_live.measure(task, shape.name, sizes.live))
        else:
            self.failures.append(f"live citations of {shape.name}: {wrong}")
            self.lines.append("  live citations: wrong, so not timed")
        steps = sizes.live.gate_tokens
        self._part("profile", lambda: under_profiler(task, label, steps, self.traces))

    def _wrong_live(self, shape: LlamaShape) -> str | None:
        """What is wrong with live citations on two layers of this shape."""
        try:
            gpu_live.checked(shape, self.dtype, self.device, self.sizes.live)
        except AssertionError as error:
            return str(error)
        return None

    def _part(self, name: str, part: Callable[[], tuple[list[Row], list[str]]]) -> None:
        """Add a part, if there is time."""
        if time.perf_counter() > self.ends:
            self.lines.append(f"  {name}: left out, {self.sizes.last:g} minutes have passed")
            return
        rows, lines = part()
        self.rows += rows
        self.lines += lines


def run(
    device: torch.device, tiny: bool, traces: Path | None = None
) -> tuple[list[Row], str, *tuple[str, ...]]:
    """All sizes that memory and time allow: rows, the table, and what was wrong."""
    began = time.perf_counter()
    sizes = TOY if tiny else Sizes()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    peak = matmul_peak(device, dtype, 128 if tiny else 8192)
    found = Findings(sizes, dtype, device, peak, began + 60 * sizes.last, traces)
    found.lines.append(f"matrix product: {peak / 1e12:.3g} TFLOP/s")
    for shape in TINY_SIZES if tiny else SIZES:
        if not fits(shape, device, dtype):
            found.lines.append(f"{shape.name}: left out, its weights do not fit")
            continue
        if time.perf_counter() - began > 60 * sizes.minutes:
            found.lines.append(f"{shape.name}: left out, {sizes.minutes:g} minutes have passed")
            continue
        print(f"{shape.name} ...", file=sys.stderr, flush=True)
        found.add(shape)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return found.rows, "\n".join(found.lines), *found.failures
