"""Memory and time of explanations over model size and prompt length: the paper's Figure 8.

A plain forward pass, AtMan (exact and direct), Chefer's rule and integrated gradients explain one
target token of a Llama with random weights, every prompt token a unit, at batch 1 as in the paper
and with the batches that each chooses itself. Every number comes from a fresh process, which
explains a short prompt first, so that what is made once does not count; methods take turns::

    python -m bench.scaling                         # small sizes, on a CPU
    python -m bench.scaling --device cuda           # the paper's: 0.5B to 30B, in bfloat16
    python -m bench.scaling --models llama-1M llama-6M --lengths 64 512 --rounds 5

Memory is what a run takes at most above the weights: on a CPU what the operating system gives the
process (``bench.allocations``), on a GPU what torch allocates. Time is the processor's where one
thread of a CPU runs (the default), so that other work does not lengthen it, else the wall's. A
method for which memory is too little has a row without numbers that says so. Rows go to
``bench/results/scaling.csv``, those of other devices stay there; the picture of this device's goes
to ``bench/results/scaling.png``.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import datetime
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.explaining import LLAMA_34M, LlamaShape
from bench.harness import RESULTS, commit, version_of
from bench.memory import checked
from bench.scaling_run import (
    FORWARD,
    METHODS,
    WARM,
    WHOLE,
    Found,
    Job,
    fresh,
)

SHAPES = {
    shape.name: shape
    for shape in (
        LlamaShape("llama-1M", 128, 2, 4, 2, 256, vocabulary=2048),
        LlamaShape("llama-6M", 256, 4, 4, 2, 512, vocabulary=8192),
        LLAMA_34M,
        # as wide and deep as published models of these sizes
        LlamaShape("llama-0.5B", 1024, 24, 16, 16, 4096),
        LlamaShape("llama-1B", 2048, 16, 32, 8, 8192),
        LlamaShape("llama-3B", 3072, 28, 24, 8, 8192),
        LlamaShape("llama-7B", 4096, 32, 32, 32, 11008),
        LlamaShape("llama-13B", 5120, 40, 40, 40, 13824),
        LlamaShape("llama-30B", 6656, 60, 52, 52, 17920),
    )
}
DEFAULTS: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {
    "cpu": (("llama-1M", "llama-6M", "llama-34M"), (64, 256)),
    "cuda": (
        ("llama-0.5B", "llama-1B", "llama-3B", "llama-7B", "llama-13B", "llama-30B"),
        (128, 256, 512, 1024),
    ),
}
BATCHES = ("1", "auto")
_MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Row:
    """What a method takes on one model and prompt, medians over fresh processes.

    ``forwards`` counts passes over the prompt, a backward one as two; ``note`` says why numbers are
    missing (NaN).
    """

    model: str
    parameters: int
    prompt_tokens: int
    target_tokens: int
    method: str
    batch: str
    peak_mib: float
    seconds: float
    seconds_p20: float
    seconds_p80: float
    forwards: float
    rounds: int
    note: str
    dtype: str
    device: str
    torch: str
    transformers: str
    captum: str
    commit: str
    date: str


# --- rows -----------------------------------------------------------------------------------------


def jobs_of(
    shapes: Iterable[LlamaShape], lengths: Iterable[int], batches: Sequence[str], **settings: Any
) -> list[Job]:
    """All that is measured; methods of one row only once, for all batches."""
    return [
        Job(shape, length, method, batch, **settings)
        for shape in shapes
        for length in lengths
        for method in METHODS
        for batch in (["1"] if method in WHOLE else batches)
    ]


def summarised(job: Job, found: Sequence[Found]) -> Row:
    """One row of all that was found by its processes."""
    lost = [each.note for each in found if each.note]
    kept = [each for each in found if not each.note] if not lost else []
    seconds = torch.tensor([each.seconds for each in kept] or [math.nan], dtype=torch.float64)
    points = torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64)
    median, p20, p80 = (round(each, 4) for each in seconds.quantile(points).tolist())
    peak = statistics.median(each.bytes for each in kept) if kept else math.nan
    return Row(
        model=job.shape.name,
        parameters=job.shape.parameters,
        prompt_tokens=job.length,
        target_tokens=1,
        method=job.method,
        batch=job.batch,
        peak_mib=round(peak / _MIB, 3),
        seconds=median,
        seconds_p20=p20,
        seconds_p80=p80,
        forwards=round(kept[0].forwards, 3) if kept else math.nan,
        rounds=len(found),
        note=lost[0] if lost else "",
        dtype=str(job.dtype).removeprefix("torch."),
        device=found[0].device,
        torch=version_of("torch"),
        transformers=version_of("transformers"),
        captum=version_of("captum"),
        commit=commit(),
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
    )


def collect(
    jobs: Sequence[Job],
    rounds: int,
    say: Callable[[str], None],
    ask: Callable[[Job], Found] = fresh,
) -> list[Row]:
    """Measure all jobs in turns, in a new order each round; what ran out of memory once is left."""
    found: dict[Job, list[Found]] = {job: [] for job in jobs}
    order, started, done = random.Random(0), time.perf_counter(), 0
    for _ in range(rounds):
        turn = list(jobs)
        order.shuffle(turn)
        for job in turn:
            if not any(each.note for each in found[job]):
                found[job].append(ask(job))
            done += 1
            left = (time.perf_counter() - started) / done * (rounds * len(jobs) - done)
            say(f"{done} of {rounds * len(jobs)}, {datetime.timedelta(seconds=round(left))} left")
    return [summarised(job, each) for job, each in found.items()]


def read(path: Path) -> list[Row]:
    """Rows of an earlier run; none where there is no file."""
    if not path.exists():
        return []
    kinds = {"int": int, "float": float, "str": str}
    rows = []
    with path.open(newline="") as file:
        for line in csv.DictReader(file):
            own: dict[str, Any] = {
                field.name: kinds[str(field.type)](line[field.name])
                for field in dataclasses.fields(Row)
            }
            rows.append(Row(**own))
    return rows


def write(rows: Sequence[Row], path: Path) -> None:
    """Write rows in place of those of the same device."""
    others = [row for row in read(path) if row.device != rows[0].device]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(Row)])
        writer.writeheader()
        writer.writerows(dataclasses.asdict(row) for row in [*others, *rows])


def table(rows: Sequence[Row]) -> str:
    """All rows for people, memory and time also in multiples of a plain forward."""
    plain = {(r.model, r.prompt_tokens): r for r in rows if r.method == FORWARD}
    lines = [f"{'model':<12}{'tokens':>7} {'method':<30}{'MiB':>10}{'':>9}{'seconds':>10}"]
    for row in rows:
        own = plain[row.model, row.prompt_tokens]
        name = row.method if row.method in WHOLE else f"{row.method}, batch {row.batch}"
        numbers = row.note or (
            f"{row.peak_mib:>10.1f}{row.peak_mib / own.peak_mib:>8.1f}x"
            f"{row.seconds:>10.3f}{row.seconds / own.seconds:>8.1f}x"
        )
        lines.append(f"{row.model:<12}{row.prompt_tokens:>7} {name:<30}{numbers}")
    return "\n".join(lines)


# --- the picture ----------------------------------------------------------------------------------

_COLOURS = dict(
    zip(METHODS, ("black", "tab:blue", "tab:cyan", "tab:red", "tab:orange"), strict=True)
)


def draw(rows: Sequence[Row], path: Path) -> None:
    """Memory (solid, left) and time (dashed, right) over model size, a panel per prompt length.

    What ran out of memory is missing, and named in its panel.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    lengths = sorted({row.prompt_tokens for row in rows})
    batches = [batch for batch in BATCHES if any(r.batch == batch for r in rows)]
    size = (1 + 4.2 * len(lengths), 0.8 + 3.2 * len(batches))
    figure = Figure(figsize=size, layout="constrained")
    panels: Any = figure.subplots(len(batches), len(lengths), squeeze=False, sharex=True)
    for line, batch in zip(panels, batches, strict=True):
        for axes, length in zip(line, lengths, strict=True):
            right = axes.twinx()
            for method in METHODS:
                own = [
                    r
                    for r in rows
                    if r.method == method
                    and r.prompt_tokens == length
                    and (method in WHOLE or r.batch == batch)
                ]
                own.sort(key=lambda row: row.parameters)
                sizes = [row.parameters for row in own]
                style = {"color": _COLOURS[method], "marker": "o", "markersize": 3}
                axes.plot(sizes, [row.peak_mib for row in own], **style)
                right.plot(sizes, [row.seconds for row in own], linestyle="--", **style)
            _label(axes, right, batch, length, rows)
    handles = [Line2D([], [], color=_COLOURS[method], label=method) for method in METHODS]
    handles += [
        Line2D([], [], color="0.3", label="memory"),
        Line2D([], [], color="0.3", linestyle="--", label="time"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(f"{rows[0].device}, {rows[0].dtype}", fontsize="medium")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _label(axes: Any, right: Any, batch: str, length: int, rows: Sequence[Row]) -> None:
    for each, name in ((axes, "peak above the weights, MiB"), (right, "seconds")):
        each.set_xscale("log")
        each.set_yscale("log")
        each.set_ylabel(name)
    sizes = {row.parameters: row.model.removeprefix("llama-") for row in rows}
    axes.set_xticks(list(sizes), list(sizes.values()))
    axes.minorticks_off()
    axes.set_xlabel("parameters")
    lost = sorted(
        {r.method for r in rows if r.note and (r.batch, r.prompt_tokens) == (batch, length)}
    )
    missing = f"\nwithout numbers: {', '.join(lost)}" if lost else ""
    axes.set_title(f"{length} tokens, batch {batch}{missing}", fontsize="small")
    axes.grid(alpha=0.2)


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=tuple(DEFAULTS), default="cpu")
    parser.add_argument("--models", nargs="+", choices=SHAPES, help="by default those of a device")
    parser.add_argument("--lengths", type=int, nargs="+", help="prompt tokens, from 8")
    parser.add_argument("--batches", nargs="+", choices=BATCHES, default=BATCHES)
    parser.add_argument("--rounds", type=int, default=3, help="processes per number")
    parser.add_argument("--steps", type=int, default=32, help="of integrated gradients")
    parser.add_argument("--threads", type=int, default=1, help="of a CPU")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of rows and picture")
    options = parser.parse_args(arguments)
    names, lengths = DEFAULTS[options.device]
    lengths = options.lengths or lengths
    if min(lengths) < WARM or options.rounds < 1 or options.threads < 1 or options.steps < 1:
        parser.error(f"lengths from {WARM}; rounds, steps and threads from 1")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU that torch can use")
    shapes = [SHAPES[name] for name in options.models or names]
    settings = {"device": options.device, "steps": options.steps, "threads": options.threads}
    commit()  # what runs now, whatever is edited until the rows are written
    torch.set_num_threads(options.threads)
    checked(SHAPES["llama-1M"], torch.device("cpu"), 1)  # what is wrong is not timed
    jobs = jobs_of(shapes, lengths, options.batches, **settings)

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    rows = collect(jobs, options.rounds, say)
    write(rows, options.out / "scaling.csv")
    draw(rows, options.out / "scaling.png")
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
