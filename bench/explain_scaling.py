"""How the time of an explanation grows with the length of the prompt, per method.

Every prompt token of a 34M-parameter Llama is explained for some target tokens, in mode
``min_shift``: exact, direct, hybrid (a fifth of the runs), and the loop of eager forwards with full
logits, in turns. Run it on an otherwise idle machine::

    python -m bench.explain_scaling                     # 64 ... 4096 tokens
    python -m bench.explain_scaling --lengths 64 256    # a part

What would take longer than ``--limit`` seconds is timed on evenly spread units and scaled, and its
name says so: exact runs by the tokens that all batches would run, the loop by its forwards. Rows go
to ``bench/results/<device>.csv``, the picture to ``bench/results/explain-scaling.png``.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import atman_triton as atman
from atman_triton.engine import Unit, undisturbed
from bench.explaining import (
    FACTOR,
    LLAMA_34M,
    LOOP,
    MODE,
    LlamaShape,
    Task,
    check,
    make_task,
    planned_tokens,
    spread,
)
from bench.harness import RESULTS, Row, summarise, take_turns, write_rows

WHAT = f"explanation by length, {MODE}"
METHODS = ("exact", "direct", "hybrid 0.2", LOOP)
LENGTHS = (64, 128, 256, 512, 1024, 2048, 4096)
_SOME = 16  # evenly spread units of a run that is scaled
_CHECKED = 8  # units whose scores are checked; half as many above 1024 tokens
_LOOP_WHOLE = 256  # the longest prompt of which the loop runs every unit


@dataclasses.dataclass(frozen=True)
class Timed:
    """A call and how its time becomes that of the whole explanation."""

    call: Callable[[], object]
    scale: float = 1.0
    note: str = ""


def explained(task: Task, method: str, budget: float | None = None) -> Tensor:
    """``[T, P]`` scores, by the public interface."""
    explainer = atman.Explainer(
        task.model,
        None,
        factor=FACTOR,
        mode=MODE,
        method=method,  # pyright: ignore[reportArgumentType]
        budget=budget,
        progress=False,
    )
    found = explainer.explain(task.prompt.tolist(), target=task.targets[0].tolist())
    return found.scores[:, : len(task.prompt)]


def correct(task: Task) -> None:
    """Refuse to time wrong scores; some units are checked."""
    units = spread(len(task.prompt), _CHECKED if len(task.prompt) <= 1024 else _CHECKED // 2)
    check(
        task,
        {
            "exact": (task.scores(units), "total"),
            "direct": (task.scores(units, "direct"), "direct"),
        },
        units,
    )


def _some_exact(task: Task, units: list[int]) -> Timed:
    """A few of the exact runs; the scale is that of the tokens run."""
    chosen = [units[place] for place in spread(len(units), _SOME)]
    part, whole = planned_tokens(task, chosen), planned_tokens(task, units)
    engine = task.engine()

    def call() -> None:
        with undisturbed(task.model):
            engine.perturb([Unit((unit,)) for unit in chosen])

    return Timed(call, whole / part, f" ({len(chosen)} of {len(units)} units, scaled)")


def plan(task: Task, limit: float) -> dict[str, Timed]:
    """What to time, by method; runs that would take longer than ``limit`` seconds in part."""
    prompt = len(task.prompt)
    every = list(range(prompt))
    some = _some_exact(task, every)
    started = time.perf_counter()
    some.call()
    estimate = (time.perf_counter() - started) * some.scale
    direct = Timed(lambda: explained(task, "direct"))
    if estimate <= limit:
        exact = Timed(lambda: explained(task, "exact"))
    else:
        exact = some
    if 0.2 * estimate <= limit:
        hybrid = Timed(lambda: explained(task, "hybrid", 0.2))
    else:  # the exact runs alone are scaled; the direct ones are as long as those of "direct"
        relevance = explained(task, "direct").mean(0)
        best = relevance.argsort(descending=True)[: math.ceil(0.2 * prompt)]
        hybrid = _some_exact(task, sorted(best.tolist()))
        hybrid = dataclasses.replace(hybrid, note=hybrid.note + " + direct")
    if prompt <= _LOOP_WHOLE:
        loop = Timed(lambda: task.loop(every))
    else:
        units = spread(prompt, _SOME if prompt <= 1024 else _SOME // 2)
        note = f" ({len(units)} of {prompt} units, scaled)"
        loop = Timed(lambda: task.loop(units), (prompt + 1) / (len(units) + 1), note)
    return dict(zip(METHODS, (exact, direct, hybrid, loop), strict=True))


def measure(task: Task, shape: LlamaShape, limit: float, seconds: float) -> list[Row]:
    """The rows of one length, in the order of ``METHODS``."""
    correct(task)
    timed = plan(task, limit)
    device = task.model.device
    times = take_turns({name: each.call for name, each in timed.items()}, device, seconds=seconds)
    scaled: dict[str, list[float]] = {}
    for name, each in timed.items():
        spent = [own * each.scale for own in times[name]]
        if each.note.endswith("+ direct"):
            spent = [own + more for own, more in zip(spent, times["direct"], strict=True)]
        scaled[name + each.note] = spent
    return summarise(
        scaled,
        what=WHAT,
        shape=f"{shape.name}-prompt{len(task.prompt)}-target{len(task.targets[0])}",
        dtype=task.model.dtype,
        device=device,
    )


def table(found: dict[int, list[Row]]) -> str:
    """Seconds of each method, and how many times longer the loop takes; scaled times marked."""
    lines = [f"{'tokens':>7}" + "".join(f"{name:>26}" for name in METHODS)]
    for length, rows in found.items():
        loop = rows[-1].median
        cells = [f"{length:>7}"]
        for row in rows:
            mark = "~" if "scaled" in row.provider else ""
            ratio = f" ({loop / row.median:.1f}x)" if row is not rows[-1] else ""
            cells.append(f"{mark}{row.median / 1e3:.2f} s{ratio}".rjust(26))
        lines.append("".join(cells))
    return "\n".join(
        [*lines, "~ timed in part and scaled; (x) how many times faster than the loop"]
    )


def draw(found: dict[int, list[Row]], path: Path) -> None:
    """Time over length, both axes logarithmic; hollow where scaled."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.6), layout="constrained")
    axes = figure.subplots()
    colours = ("#2166ac", "#1b7837", "#762a83", "#b2182b")
    for place, (name, colour) in enumerate(zip(METHODS, colours, strict=True)):
        rows = [rows[place] for rows in found.values()]
        seconds = [row.median / 1e3 for row in rows]
        axes.plot(list(found), seconds, color=colour, label=name, zorder=1)
        fill = ["white" if "scaled" in row.provider else colour for row in rows]
        axes.scatter(list(found), seconds, color=fill, edgecolors=colour, zorder=2)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(list(found), [str(length) for length in found])
    axes.set_xlabel("prompt tokens, every one explained")
    axes.set_ylabel("seconds")
    first = next(iter(found.values()))[0]
    axes.set_title(f"{first.shape.split('-prompt')[0]}, {first.dtype}, {first.device}", fontsize=9)
    axes.grid(which="both", alpha=0.2)
    axes.legend(title="hollow: timed in part, scaled", fontsize=8, title_fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main(arguments: list[str] | None = None, shape: LlamaShape = LLAMA_34M) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="prompt tokens")
    parser.add_argument("--targets", type=int, default=8, help="target tokens")
    parser.add_argument("--limit", type=float, default=180.0, help="longest run in full, seconds")
    parser.add_argument("--seconds", type=float, default=60.0, help="time of all rounds, a length")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of rows and picture")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = shape.model(torch.float32, device, max(options.lengths) + options.targets)
    found: dict[int, list[Row]] = {}
    for length in sorted(options.lengths):
        started = time.perf_counter()
        task = make_task(model, length, [options.targets])
        found[length] = measure(task, shape, options.limit, options.seconds)
        path = write_rows(found[length], options.out)
        spent = time.perf_counter() - started
        print(
            f"{length} tokens: done in {spent:.0f} s, rows in {path}", file=sys.stderr, flush=True
        )
    picture = options.out / "explain-scaling.png"
    draw(found, picture)
    print(f"{picture}\n{table(found)}")


if __name__ == "__main__":
    main()
