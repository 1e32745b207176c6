"""Training with attention implementation "atman" beside "sdpa": the same loss curves.

transformers' Trainer fine-tunes the shipped reader and trains a small GPT-2, BERT (padded rows) and
Mistral (window shorter than its rows) from random weights, on generated contracts, in float32, with
its own optimizer, AdamW::

    python -m bench.training                     # 50 steps, 8 seeds of dropout
    python -m bench.training --device cuda       # the same on a GPU

Without dropout the curves must agree within rounding at every step. What rounding may do is
measured, by another right implementation: the distance of transformers' own "eager" from "sdpa", at
its largest so far, since training carries differences on. Ours may be three times that and two
roundings of the loss. With activation checkpointing the curve must be the very same.

Where dropout is on, the two draw other masks. So over many seeds, from the same weights and
batches, the mean losses of every ten steps must have the same distribution: permutation tests of
their means and of their spreads must not tell the two apart at 1%. GPT-2 has all its dropout on,
BERT that of the attention alone, so that nothing else makes its runs differ.

Both verdicts can fail, and show it: the first on "sdpa" whose gradient of the queries is 0.1% too
large, the second on "sdpa" without its attention dropout.

Verdicts go to ``bench/results/training.csv``, curves to ``training-curves.csv``, the picture to
``training.png``.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import datetime
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from bench.harness import RESULTS, commit, device_name, version_of
from bench.training_tasks import (
    WRONG_GRADIENT,
    Task,
    make_tasks,
    train,
)

OURS, RIVAL, YARDSTICK = "atman", "sdpa", "eager"
CHECKPOINTED = "atman, checkpointed"
NO_DROPOUT = "sdpa without attention dropout"
CONTROLS = (WRONG_GRADIENT, NO_DROPOUT)
"""Providers that a verdict must refuse."""

LEAST_P = 0.01
_TIMES = 3.0  # the yardstick's deviation
_ROUNDINGS = 2.0  # of the loss, where the yardstick happens to agree to the last bit
# Tasks with attention dropout, and how much the rest of the model has.
_DROPOUT = {"GPT-2": 0.1, "BERT": 0.0}
_BLOCK = 10  # steps whose mean loss is one number of the tests

Curves = dict[str, Tensor]
"""``[runs, steps]`` losses by provider, float64."""


@dataclasses.dataclass(frozen=True)
class Row:
    """How a provider's curves compare with "sdpa"; None where a verdict is not about it.

    ``largest_difference`` is of mean curves, over all steps, in nats per token. ``share_of_bound``
    is the largest one of a step's difference in what rounding may do there.
    """

    what: str
    provider: str
    runs: int
    steps: int
    first_loss: float
    last_loss: float
    largest_difference: float
    share_of_bound: float | None
    p_value: float | None
    same: bool
    device: str
    torch: str
    transformers: str
    commit: str
    date: str


def rounding_bound(rival: Tensor, yardstick: Tensor) -> Tensor:
    """How far a right implementation may be from the rival at each step: ``[steps]``, nats.

    Args:
        rival, yardstick: ``[steps]`` losses of two right implementations, computed in float32.
    """
    so_far = (yardstick - rival).abs().cummax(0).values
    return _TIMES * so_far + _ROUNDINGS * torch.finfo(torch.float32).eps * rival.abs()


def permutation_p(first: Tensor, second: Tensor) -> float:
    """Chance, if the runs of both came from one distribution, to see means this far apart.

    Every way to part all runs into two groups of these sizes counts. The distance of two groups is
    the largest over the columns, each in units of its own spread over all runs.

    Args:
        first, second: ``[runs, columns]``.
    """
    together = torch.cat([first, second])
    spread = together.std(0)
    if bool((spread == 0).any()):
        raise ValueError("first and second must vary from run to run in every column.")
    together = (together - together.mean(0)) / spread
    runs, own = len(together), len(first)
    groups = torch.tensor(list(itertools.combinations(range(runs), own)))  # [ways, own]
    sums = together[groups].sum(1)  # all runs sum to 0, so the other group's sum is its negative
    distances = (sums / own + sums / (runs - own)).abs().amax(-1)  # [ways]
    return float((distances >= distances[0] * (1 - 1e-9)).double().mean())


def distribution_p(first: Tensor, second: Tensor) -> float:
    """Chance, if both came from one distribution, to see means or spreads this far apart.

    Two permutation tests of the mean losses of every ten steps, and of their distances from their
    own group's mean; the smaller chance, twice because there are two.

    Args:
        first, second: ``[runs, steps]`` losses.
    """
    blocks = [
        torch.stack([block.mean(1) for block in losses.split(_BLOCK, dim=1)], dim=1)
        for losses in (first, second)
    ]
    spreads = [block - block.mean(0) for block in blocks]
    means_p = permutation_p(*blocks)
    spreads_p = permutation_p(spreads[0].abs(), spreads[1].abs())
    return min(1.0, 2 * min(means_p, spreads_p))


def exact_curves(task: Task, steps: int, device: str, advance: Any = lambda: None) -> Curves:
    """A run of every provider without dropout, and one of ours with activation checkpointing."""
    curves = {}
    for provider in (RIVAL, YARDSTICK, OURS, CHECKPOINTED, WRONG_GRADIENT):
        checkpointed = provider == CHECKPOINTED
        losses = train(
            task,
            OURS if checkpointed else provider,
            steps=steps,
            checkpointing=checkpointed,
            device=device,
        )
        curves[provider] = torch.tensor([losses], dtype=torch.float64)
        advance()
    return curves


def dropout_curves(
    task: Task,
    steps: int,
    seeds: int,
    device: str,
    advance: Any = lambda: None,
    attention_dropout: float = 0.3,
) -> Curves:
    """Runs with dropout, and of the rival with none in its attention.

    Ours once with activation checkpointing, where the layers must drop the same again.
    """
    curves = {}
    for provider in (RIVAL, OURS, CHECKPOINTED, NO_DROPOUT):
        runs = []
        for seed in range(1 if provider == CHECKPOINTED else seeds):
            losses = train(
                task,
                OURS if provider in (OURS, CHECKPOINTED) else RIVAL,
                steps=steps,
                seed=seed,
                dropout=_DROPOUT[task.name],
                attention_dropout=0.0 if provider == NO_DROPOUT else attention_dropout,
                checkpointing=provider == CHECKPOINTED,
                device=device,
            )
            runs.append(losses)
            advance()
        curves[provider] = torch.tensor(runs, dtype=torch.float64)
    return curves


def compare(what: str, curves: Curves, device: str) -> list[Row]:
    """A row per provider, with its verdict."""
    rival, rows = curves[RIVAL], []
    steps = rival.shape[1]
    for provider, own in curves.items():
        share = p_value = None
        same = True
        if provider == CHECKPOINTED:
            same = torch.equal(own[0], curves[OURS][0])
        elif YARDSTICK in curves and provider != RIVAL:
            bound = rounding_bound(rival[0], curves[YARDSTICK][0])
            share = float(((own - rival).abs()[0] / bound).max())
            same = share <= 1
        elif provider != RIVAL:
            p_value = distribution_p(own, rival)
            same = p_value > LEAST_P
        base = rival[:1] if provider == CHECKPOINTED else rival
        mean = own.mean(0)
        rows.append(
            Row(
                what=what,
                provider=provider,
                runs=len(own),
                steps=steps,
                first_loss=round(float(mean[0]), 6),
                last_loss=round(float(mean[-1]), 6),
                largest_difference=float(f"{float((mean - base.mean(0)).abs().max()):.3g}"),
                share_of_bound=None if share is None else round(share, 4),
                p_value=None if p_value is None else round(p_value, 5),
                same=same,
                device=device_name(torch.device(device)),
                torch=version_of("torch"),
                transformers=version_of("transformers"),
                commit=commit(),
                date=datetime.datetime.now(datetime.UTC).date().isoformat(),
            )
        )
    return rows


def as_expected(row: Row) -> bool:
    """Whether right providers were found the same, and controls not."""
    return row.same == (row.provider not in CONTROLS)


def table(rows: Sequence[Row]) -> Table:
    """Rows for people."""
    result = Table(title=f"Training beside {RIVAL}, {rows[0].steps} steps, {rows[0].device}")
    for name in ("", "provider", "runs", "loss", "largest difference", "of the bound", "p", "same"):
        result.add_column(name, justify="right" if name not in ("", "provider") else "left")
    for row in rows:
        result.add_row(
            row.what,
            row.provider,
            str(row.runs),
            f"{row.first_loss:.3f} → {row.last_loss:.3f}",
            f"{row.largest_difference:.1e}",
            "" if row.share_of_bound is None else f"{row.share_of_bound:.2f}",
            "" if row.p_value is None else f"{row.p_value:.4f}",
            "yes" if row.same else "no",
        )
    return result


def write(path: Path, names: Sequence[str], rows: Sequence[dict[str, Any]]) -> None:
    """Write rows in place of those of an earlier run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)


def curve_rows(what: str, curves: Curves) -> list[dict[str, Any]]:
    """Mean and spread of every step, for the file of curves."""
    rows = []
    for provider, losses in curves.items():
        for step, column in enumerate(losses.T, start=1):
            row: dict[str, Any] = {"what": what, "provider": provider, "step": step}
            # Enough digits to tell apart what float32 can.
            row["mean"] = f"{float(column.mean()):.9g}"
            row["sd"] = f"{float(column.std()):.3g}" if len(column) > 1 else ""
            rows.append(row)
    return rows


def draw(exact: dict[str, Curves], dropped: dict[str, Curves], path: Path) -> None:
    """A column per task: the curves of both, and how far they are apart, on a logarithmic scale."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 6), layout="constrained")
    panels = figure.subplots(2, len(exact), sharex=True, squeeze=False)
    blue, red, grey = "#2166ac", "#b2182b", "#777777"
    for (name, curves), upper, lower in zip(exact.items(), *panels, strict=True):
        rival, ours = curves[RIVAL][0], curves[OURS][0]
        steps = range(1, len(rival) + 1)
        upper.plot(steps, rival, color=blue, alpha=0.35, linewidth=5, label="sdpa")
        upper.plot(steps, ours, color=blue, linewidth=1, label="atman")
        bound = rounding_bound(rival, curves[YARDSTICK][0])
        lower.plot(steps, bound, color=blue, alpha=0.35, label="rounding may")
        apart = (ours - rival).abs()
        lower.plot(steps, apart, "o", color=blue, markersize=3, label="atman")
        wrong = (curves[WRONG_GRADIENT][0] - rival).abs()
        lower.plot(steps, wrong, color=grey, linestyle=":", label="query gradient 0.1% off")
        if name in dropped:
            theirs, own = dropped[name][RIVAL], dropped[name][OURS]
            mean, error = theirs.mean(0), theirs.std(0) / len(theirs) ** 0.5
            upper.plot(steps, mean, color=red, alpha=0.35, linewidth=5, label="sdpa, dropout")
            upper.plot(steps, own.mean(0), color=red, linewidth=1, label="atman, dropout")
            both = (error**2 + own.var(0) / len(own)).sqrt()
            lower.plot(steps, 2 * both, color=red, alpha=0.35, label="2 standard errors")
            apart = (own.mean(0) - mean).abs()
            lower.plot(steps, apart, "o", color=red, markersize=3, label="atman, dropout (means)")
        upper.set_title(name, fontsize=11)
        lower.set_yscale("symlog", linthresh=1e-8)
        lower.set_ylim(0, 1)
        lower.set_xlabel("step")
        for panel in (upper, lower):
            panel.grid(alpha=0.2)
    panels[0][0].set_ylabel("loss, nats per token")
    panels[1][0].set_ylabel("|atman − sdpa|, nats per token")
    most = next((index for index, name in enumerate(exact) if name in dropped), 0)
    for panel in (panels[0][most], panels[1][most]):
        panel.legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main(arguments: list[str] | None = None) -> int:
    """Command line; 0 if every verdict was as expected, 1 if not."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=50, help="updates of each run")
    parser.add_argument("--seeds", type=int, default=8, help="runs with dropout, from 2 to 10")
    parser.add_argument("--width", type=int, default=64, help="hidden size of the small models")
    parser.add_argument("--tokens", type=int, default=96, help="most tokens of their rows")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of rows and picture")
    options = parser.parse_args(arguments)
    if options.steps < 1 or not 2 <= options.seeds <= 10:
        parser.error("needs at least 1 step, and from 2 to 10 seeds")
    torch.set_num_threads(1)
    disable_progress_bar()  # of loading weights, within ours
    tasks = make_tasks(width=options.width, tokens=options.tokens)
    exact: dict[str, Curves] = {}
    dropped: dict[str, Curves] = {}
    with Progress(console=Console(stderr=True)) as progress:
        total = 5 * len(tasks) + (3 * options.seeds + 1) * len(_DROPOUT)
        bar = progress.add_task("Training", total=total)

        def advance() -> None:
            progress.advance(bar)

        for name, task in tasks.items():
            progress.update(bar, description=name)
            exact[name] = exact_curves(task, options.steps, options.device, advance)
        for name in _DROPOUT:
            progress.update(bar, description=f"{name}, dropout")
            dropped[name] = dropout_curves(
                tasks[name], options.steps, options.seeds, options.device, advance
            )
    named = exact | {f"{name}, dropout": curves for name, curves in dropped.items()}
    rows = [row for what, curves in named.items() for row in compare(what, curves, options.device)]
    fields = [field.name for field in dataclasses.fields(Row)]
    write(options.out / "training.csv", fields, [dataclasses.asdict(row) for row in rows])
    points = [row for what, curves in named.items() for row in curve_rows(what, curves)]
    write(options.out / "training-curves.csv", list(points[0]), points)
    draw(exact, dropped, options.out / "training.png")
    console = Console(width=120)
    console.print(table(rows))
    failed = [row for row in rows if not as_expected(row)]
    for row in failed:
        found = "the same as" if row.same else "another than"
        console.print(f"NOT AS EXPECTED: {row.what}: {row.provider} is {found} {RIVAL}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
