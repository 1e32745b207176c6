"""Many targets behind one prompt, against a call for each: exact, mode ``min_shift``.

One-token targets (the names of classes) are read off one softmax: 350 of them in one call must be
cheaper than 2 single calls. Longer ones go through the model side by side, as branches. Run it on
an otherwise idle machine::

    python -m bench.many_targets

Rows go to ``bench/results/<device>.csv``.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.explaining import LLAMA_34M, MODE, LlamaShape, Task, check, make_task, spread
from bench.harness import RESULTS, Row, summarise, take_turns, write_rows

WHAT = f"explanation of many targets, {MODE}"
_CHECKED = 8


def alone(task: Task, target: int) -> Task:
    """The same prompt with one of the targets."""
    return dataclasses.replace(task, targets=(task.targets[target],))


def measure(
    task: Task, separate: int, shape: LlamaShape, seconds: float, most: int
) -> tuple[list[Row], float]:
    """One call for all targets against calls for the first ``separate`` of them, in turns.

    Returns: the rows, and the time of the one call as a share of the calls'.
    """
    units = spread(len(task.prompt), _CHECKED)
    count, tokens = len(task.targets), len(task.targets[0])
    together = task.scores(units)  # [M, U], M all targets' tokens
    for target in {0, count - 1}:
        rows = slice(target * tokens, (target + 1) * tokens)
        single = alone(task, target).scores(units)
        check(
            task,
            {"one call": (together[rows], "total"), "single call": (single, "total")},
            units,
            target,
        )
    one, several = f"one call, {count} targets", f"{separate} single calls"

    def calls() -> None:
        for target in range(separate):
            alone(task, target).scores()

    device = task.model.device
    times = take_turns({one: task.scores, several: calls}, device, seconds=seconds, most=most)
    found = summarise(
        times,
        what=WHAT,
        shape=f"{shape.name}-prompt{len(task.prompt)}-target{tokens}",
        dtype=task.model.dtype,
        device=device,
    )
    return found, found[0].median / found[1].median


def table(rows: Sequence[Row], share: float) -> str:
    """Seconds, and what the one call costs."""
    lines = [rows[0].shape]
    lines += [f"  {row.provider:<28}{row.median / 1e3:>9.2f} s" for row in rows]
    return "\n".join([*lines, f"  the one call takes {share:.0%} of {rows[1].provider}"])


def main(arguments: list[str] | None = None, shape: LlamaShape = LLAMA_34M) -> int:
    """Command line; 1 if many one-token targets cost more than two calls."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--prompt", type=int, default=256, help="prompt tokens")
    parser.add_argument("--classes", type=int, default=350, help="targets of one token")
    parser.add_argument("--branches", type=int, default=16, help="targets of four tokens")
    parser.add_argument(
        "--seconds", type=float, default=120.0, help="time of all rounds of a table"
    )
    parser.add_argument("--rounds", type=int, default=3, help="the most rounds")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the rows")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = shape.model(torch.float32, device)
    tables, shares = [], []
    for targets, separate in (
        ([1] * options.classes, 2),
        ([4] * options.branches, options.branches),
    ):
        task = make_task(model, options.prompt, targets)
        rows, share = measure(task, separate, shape, options.seconds, options.rounds)
        path = write_rows(rows, options.out)
        print(f"{len(targets)} targets: rows in {path}", file=sys.stderr, flush=True)
        tables.append(table(rows, share))
        shares.append(share)
    print("\n".join(tables))
    if shares[0] >= 1:
        print("many one-token targets must be cheaper than two calls.", file=sys.stderr)
    return int(shares[0] >= 1)


if __name__ == "__main__":
    sys.exit(main())
