"""What each of the engine's savings is worth: the same explanation with one of them left out.

Every prompt token of a 34M-parameter Llama, 256 tokens, exact, mode ``min_shift``. Sharing one pass
between targets is measured with several targets, the rest with one. Run it on an otherwise idle
machine::

    python -m bench.savings

Rows go to ``bench/results/<device>.csv``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from atman_triton.engine import SAVINGS
from bench.explaining import LLAMA_34M, MODE, LlamaShape, Task, check, make_task, spread
from bench.harness import RESULTS, Row, summarise, take_turns, write_rows

WHAT = f"explanation with savings left out, {MODE}"
ALL_ON = "all savings"
_CHECKED = 8


def variants(targets: int) -> dict[str, frozenset[str]]:
    """What is left out, by name: each saving that matters with so many targets, and all of them."""
    if targets > 1:
        return {ALL_ON: frozenset(), "without one_pass": frozenset({"one_pass"})}
    single = [name for name in SAVINGS if name != "one_pass"]
    each = {f"without {name}": frozenset({name}) for name in single}
    return {ALL_ON: frozenset(), **each, "without all": frozenset(SAVINGS)}


def measure(task: Task, shape: LlamaShape, seconds: float, most: int) -> list[Row]:
    """Check every variant on some units, then time them in turns."""
    chosen = variants(len(task.targets))
    units = spread(len(task.prompt), _CHECKED)
    first = len(task.targets[0])
    check(
        task,
        {
            name: (task.scores(units, without=left_out)[:first], "total")
            for name, left_out in chosen.items()
        },
        units,
    )
    calls = {
        name: lambda left_out=left_out: task.scores(without=left_out)
        for name, left_out in chosen.items()
    }
    device = task.model.device
    times = take_turns(calls, device, seconds=seconds, most=most)
    prompt, count = len(task.prompt), len(task.targets)
    return summarise(
        times,
        what=WHAT,
        shape=f"{shape.name}-prompt{prompt}-target{first}" + f"x{count}" * (count > 1),
        dtype=task.model.dtype,
        device=device,
    )


def table(rows: Sequence[Row]) -> str:
    """Seconds, and how many times slower than with all savings."""
    own = rows[0].median
    lines = [rows[0].shape]
    for row in rows:
        lines.append(f"  {row.provider:<24}{row.median / 1e3:>9.2f} s {row.median / own:>7.2f}x")
    return "\n".join(lines)


def main(arguments: list[str] | None = None, shape: LlamaShape = LLAMA_34M) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--prompt", type=int, default=256, help="prompt tokens")
    parser.add_argument("--target", type=int, default=8, help="tokens of a target")
    parser.add_argument("--targets", type=int, default=4, help="targets, where several matter")
    parser.add_argument(
        "--seconds", type=float, default=180.0, help="time of all rounds of a table"
    )
    parser.add_argument("--rounds", type=int, default=3, help="the most rounds")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the rows")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = shape.model(torch.float32, device)
    tables = []
    for count in (1, options.targets):
        task = make_task(model, options.prompt, count * [options.target])
        rows = measure(task, shape, options.seconds, options.rounds)
        path = write_rows(rows, options.out)
        print(f"{count} target(s): rows in {path}", file=sys.stderr, flush=True)
        tables.append(table(rows))
    print("\n".join(tables))


if __name__ == "__main__":
    main()
