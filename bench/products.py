"""What oneDNN's products are worth: the same explanation with them, and with MKL's.

Every prompt token of a 34M-parameter Llama, 256 tokens, exact and direct, mode ``min_shift``. It
makes a difference on AMD's processors with AVX-512 alone (``atman_triton.products``). Run it on an
otherwise idle machine::

    python -m bench.products

Rows go to ``bench/results/<device>.csv``.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from atman_triton.perturbations import Effect
from atman_triton.products import helps
from bench.explaining import LLAMA_34M, MODE, LlamaShape, Task, check, make_task, spread
from bench.harness import RESULTS, Row, summarise, take_turns, write_rows

WHAT = f"explanation by whose products, {MODE}"
PROVIDERS = {"oneDNN": True, "MKL": False}
_EFFECTS: dict[str, Effect] = {"exact": "total", "direct": "direct"}
_CHECKED = 8


def scores(task: Task, effect: Effect, allowed: bool, units: Sequence[int] | None = None) -> Tensor:
    """``[M, U]``, with oneDNN's products where they help, or without."""
    torch.backends.mkldnn.enabled = allowed
    try:
        return task.scores(units, effect)
    finally:
        torch.backends.mkldnn.enabled = True


def measure(task: Task, shape: LlamaShape, seconds: float, most: int) -> list[Row]:
    """Check both on some units, then time them in turns."""
    rows, units = [], spread(len(task.prompt), _CHECKED)
    device = task.model.device
    for name, effect in _EFFECTS.items():
        found = {who: scores(task, effect, allowed, units) for who, allowed in PROVIDERS.items()}
        check(task, {who: (each, effect) for who, each in found.items()}, units)
        calls = {
            who: functools.partial(scores, task, effect, allowed)
            for who, allowed in PROVIDERS.items()
        }
        times = take_turns(calls, device, seconds=seconds, most=most)
        size = f"{shape.name}-prompt{len(task.prompt)}-target{len(task.targets[0])}-{name}"
        rows += summarise(times, what=WHAT, shape=size, dtype=task.model.dtype, device=device)
    return rows


def table(rows: Sequence[Row]) -> str:
    """Seconds of both, and how many times as fast oneDNN is."""
    lines = []
    for ours, other in zip(rows[::2], rows[1::2], strict=True):
        gain = other.median / ours.median
        lines.append(
            f"{ours.shape}: {ours.provider} {ours.median / 1e3:.2f} s, {other.provider} "
            f"{other.median / 1e3:.2f} s, {gain:.2f}x"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None, shape: LlamaShape = LLAMA_34M) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--prompt", type=int, default=256, help="prompt tokens")
    parser.add_argument("--target", type=int, default=8, help="tokens of the target")
    parser.add_argument("--seconds", type=float, default=60.0, help="time of all rounds of a table")
    parser.add_argument("--rounds", type=int, default=9, help="the most rounds")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the rows")
    options = parser.parse_args(arguments)
    if not helps():
        print("This processor is none that MKL takes for less than it is: nothing to compare.")
        return
    model = shape.model(torch.float32, torch.device("cpu"))
    task = make_task(model, options.prompt, [options.target])
    rows = measure(task, shape, options.seconds, options.rounds)
    print(f"rows in {write_rows(rows, options.out)}", file=sys.stderr, flush=True)
    print(table(rows))


if __name__ == "__main__":
    main()
