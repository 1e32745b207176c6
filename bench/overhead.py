"""What the host does per layer and step, in microseconds: a model so small that nothing computes.

Llamas of width 16 that differ only in their number of layers; the difference of their times over
the difference of their layers is the time of a layer, nearly all of it Python and the dispatch of
operators. It is the processor's time, not the wall's, so that other work on the machine counts less
(and waiting of one thread for another not at all). A pass of an exact batch, of a direct run and a
step of live citations stand beside the same pass of transformers alone, and a step of plain
generation. ``launches`` takes the fused kernels' way, with the kernels themselves replaced by
nothing: what our launchers cost the host beside Triton's own launch, also without a GPU::

    python -m bench.overhead             # the portable backend, 1 thread
    python -m bench.overhead launches    # in place of a GPU
    python -m bench.overhead direct --profile    # and where the time goes, by function

Rows go to ``bench/results/<device>.csv`` where ``--write`` says so.
"""

from __future__ import annotations

import argparse
import cProfile
import os
import pstats
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

if "launches" in sys.argv[1:]:  # before triton is imported
    os.environ["TRITON_INTERPRET"] = "1"

import torch

from atman_triton.engine import Engine, Settings, undisturbed
from bench.explaining import FACTOR, MODE, LlamaShape, make_task
from bench.harness import RESULTS, Row, summarise, write_rows
from bench.live import Case

LAYERS = (4, 20)
PROMPT, TARGET, ROWS = 64, 4, 8
STEPS = (4, 20)  # new tokens; their difference leaves out the prompt's pass
KINDS = ("exact", "direct", "transformers", "live", "generate")


class Nothing:
    """Stands in for a kernel that is not launched; attention is 0 then."""

    def __init__(self, attends: bool) -> None:
        self._attends = attends

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return self._launch

    def _launch(self, *args: Any, **kwargs: Any) -> None:
        if self._attends:
            args[0].zero_()  # its output; another number might be NaN


@contextmanager
def without_kernels() -> Iterator[None]:
    """Launchers do all but launch, and no product is oneDNN's, as is the case on a GPU."""
    from atman_triton import products
    from atman_triton.kernels import forward, packed_launch, packed_prepass, prepass, shared_prefix

    with ExitStack() as stack:
        stack.callback(setattr, products, "_is_plain", products._is_plain)
        products._is_plain = lambda tensor: False
        for module in (forward, packed_launch, packed_prepass, prepass, shared_prefix):
            for name in [name for name in vars(module) if name.endswith("_kernel")]:
                stack.callback(setattr, module, name, getattr(module, name))
                setattr(module, name, Nothing(name.endswith("_fwd_kernel")))
        yield


def model_of(layers: int) -> Any:
    """Two heads of eight dims."""
    shape = LlamaShape(f"layers{layers}", 16, layers, 2, 1, 16, vocabulary=32)
    return shape.model(torch.float32, torch.device("cpu"), PROMPT + TARGET + max(STEPS))


def calls_of(model: Any, backend: str) -> dict[str, Callable[[], object]]:
    """One pass of each kind; of generation, as many steps as :data:`STEPS` say."""
    task = make_task(model, PROMPT, [TARGET])
    with undisturbed(model):
        engine = Engine(
            model,
            {"input_ids": task.prompt[None]},
            [task.targets[0].tolist()],
            Settings(FACTOR, MODE, backend=backend),
        )
    runner: Any = engine._runners[0]
    start, length = PROMPT // 2, runner.branches.length
    factors = torch.ones(ROWS, length)
    factors[torch.arange(ROWS), start + torch.arange(ROWS)] = FACTOR
    tokens = torch.zeros(ROWS, length - start, dtype=torch.long)

    def run(first: int, effect: str) -> Callable[[], object]:
        def call() -> object:
            with undisturbed(model):
                return runner.run_factors(factors, first, effect)

        return call

    def plain() -> object:
        with torch.no_grad():
            return model(tokens, use_cache=True, logits_to_keep=TARGET)

    calls: dict[str, Callable[[], object]] = {
        "exact": run(start, "total"),
        "direct": run(PROMPT - 1, "direct"),
        "transformers": plain,
    }
    for steps in STEPS:
        case = Case(model, PROMPT, ROWS, steps, every=1, backend=backend)
        calls[f"live {steps}"], calls[f"generate {steps}"] = case.live, case.plain
    return calls


def timed(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Microseconds of processor time of each call, in turns."""
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            started = time.process_time()
            call()
            times[name].append((time.process_time() - started) * 1e6)
    return times


def measure(backend: str, rounds: int, kinds: tuple[str, ...] = KINDS) -> dict[str, float]:
    """Microseconds of a layer and pass by kind."""
    calls = {
        (name, layers): call
        for layers in LAYERS
        for name, call in calls_of(model_of(layers), backend).items()
        if name.split()[0] in kinds
    }
    times = timed(calls, rounds)  # pyright: ignore[reportArgumentType]
    medians: Any = {place: statistics.median(spent) for place, spent in times.items()}
    few, many = LAYERS
    slopes = {
        name: (medians[name, many] - medians[name, few]) / (many - few)
        for name, layers in medians
        if layers == few
    }
    for kind in ("live", "generate"):
        if kind in kinds:
            less, more = (slopes.pop(f"{kind} {steps}") for steps in STEPS)
            slopes[kind] = (more - less) / (STEPS[1] - STEPS[0])
    return slopes


def rows_of(slopes: dict[str, float], backend: str) -> list[Row]:
    """One row per kind."""
    return summarise(
        {name: [number] for name, number in slopes.items()},
        what=f"processor time per layer and pass, {MODE}, backend {backend}",
        shape=f"llama-width16-prompt{PROMPT}-rows{ROWS}",
        dtype=torch.float32,
        device=torch.device("cpu"),
        metric="us",
    )


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("words", nargs="*", help=f"launches, and of {', '.join(KINDS)}; or all")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--profile", action="store_true", help="the functions that take longest")
    parser.add_argument("--write", action="store_true", help="keep the rows")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the rows")
    options = parser.parse_args(arguments)
    kinds = tuple(kind for kind in KINDS if kind in options.words) or KINDS
    unknown = sorted(set(options.words) - {*KINDS, "launches"})
    if unknown:
        parser.error(f"words must be among launches, {', '.join(KINDS)}, got {', '.join(unknown)}")
    backend = "triton" if "launches" in options.words else "torch"
    torch.set_num_threads(1)
    with without_kernels() if backend == "triton" else ExitStack():
        if options.profile:
            call = calls_of(model_of(max(LAYERS)), backend)[kinds[0]]
            call()
            with cProfile.Profile() as profile:
                for _ in range(options.rounds):
                    call()
            pstats.Stats(profile).sort_stats("tottime").print_stats(45)
            return
        rows = rows_of(measure(backend, options.rounds, kinds), backend)
    for row in rows:
        print(f"{row.provider:<14}{row.median:>9.1f} us per layer and pass")
    if options.write:
        print(f"rows in {write_rows(rows, options.out)}", file=sys.stderr)


if __name__ == "__main__":
    main()
