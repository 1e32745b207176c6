"""How good the cheaper methods' explanations are, on the shipped model and fresh documents.

The removal gap is defined in ``bench.removal``. Only documents that the model answers correctly
count. Mode ``min_shift``; ``bench.budget`` compares the modes::

    python -m bench.quality                      # 200 documents, then 20 long ones
    python -m bench.quality --documents 20 --long-documents 0
    python -m bench.quality --long-tokens 2048   # the model's whole window; far slower

Rows go to ``bench/results/quality.csv``, the picture to ``bench/results/quality.png``.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import datetime
import itertools
import math
import random
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

import atman_triton as atman
from atman_triton.demo import load_demo_model, prompt
from atman_triton.demo.evaluate import fresh_cases
from bench.harness import RESULTS, commit, device_name, version_of
from bench.removal import (
    SALT,
    Case,
    Removal,
    answered_cases,
    rank_correlation,
    ranking,
    standard_error,
)

MODE = "min_shift"
EXPLAINED: dict[str, tuple[str, float | None]] = {
    "exact": ("exact", None),
    "direct": ("direct", None),
    "hybrid 0.1": ("hybrid", 0.1),
    "hybrid 0.2": ("hybrid", 0.2),
    "hybrid 0.3": ("hybrid", 0.3),
    "hierarchical": ("hierarchical", 0.25),
}
"""Name of a row: method and budget."""

LEAVE_ONE_OUT, RANDOM = "leave-one-out", "random"
METHODS = (*EXPLAINED, LEAVE_ONE_OUT, RANDOM)
LONG_METHODS = ("exact", "hierarchical")
BOUND_DOCUMENTS = 100
_TOP = 5


@dataclasses.dataclass(frozen=True)
class Found:
    """What a method gave for one document; recalls are shares of the exact method's best five."""

    gap: float
    forwards: float
    exact_runs: int
    runs_share: float
    rank_correlation: float
    top5_recall: float
    top5_as_tokens: float


@dataclasses.dataclass(frozen=True)
class Row:
    """Means over documents; None where a quantity was not measured.

    ``difference`` is the gap less the exact method's, document by document; ``_se`` are standard
    errors. ``top5_recall`` looks into the method's own best five units, ``top5_as_tokens`` into the
    tokens that it gave a total effect of their own. ``runs_share`` is of the exact method's runs.
    """

    what: str
    method: str
    documents: int
    gap: float
    gap_se: float
    difference: float
    difference_se: float
    forwards: float
    exact_runs: float
    runs_share: float
    rank_correlation: float | None
    top5_recall: float
    top5_as_tokens: float
    device: str
    torch: str
    transformers: str
    commit: str
    date: str


def token_scores(explanation: atman.Explanation, places: Sequence[tuple[int, ...]]) -> list[float]:
    """Relevance of each token; one of a larger piece gets an equal part of the piece's."""
    found: dict[tuple[int, ...], float] = {}
    for unit, score in zip(explanation.units, explanation.relevance.tolist(), strict=True):
        found |= {(token,): score / len(unit.tokens) for token in unit.tokens}
    return [found[place] for place in places]


def examine(
    model: Any, tokenizer: Any, case: Case, methods: Sequence[str], seed: int
) -> dict[str, Found]:
    """What every method gives for one document; the exact one comes first.

    Leave-one-out scores the prompt's units alone, so the answer's own tokens are never in its best
    five. Without it there are no rank correlations, which are NaN then.
    """
    explanations: dict[str, atman.Explanation] = {}
    for name in methods:
        if name in EXPLAINED:
            method, budget = EXPLAINED[name]
            explainer = atman.Explainer(
                model,
                tokenizer,
                mode=MODE,
                method=method,  # pyright: ignore[reportArgumentType]
                budget=budget,
                progress=False,
            )
            explanations[name] = explainer.explain(case.prompt, case.answer)
    exact = explanations["exact"]
    removal = Removal(model, tokenizer, case, exact, seed)
    places, permutation = removal.places, removal.permutation
    scores = {name: token_scores(found, places) for name, found in explanations.items()}
    if RANDOM in methods:
        scores[RANDOM] = removal.random
    if LEAVE_ONE_OUT in methods:
        scores[LEAVE_ONE_OUT] = removal.leave_one_out()
    reference = scores.get(LEAVE_ONE_OUT)
    gaps = removal.gaps(scores)
    wanted = set(ranking(scores["exact"], permutation)[:_TOP])
    result = {}
    for name in methods:
        explained = explanations.get(name)
        alone: set[tuple[int, ...]] = set()
        forwards, runs = (len(removal.inside) + 1.0, 0) if name == LEAVE_ONE_OUT else (0.0, 0)
        if explained is not None:
            forwards = explained.provenance["forwards"]
            runs = explained.provenance["exact_runs"]
            alone = {
                unit.tokens
                for unit in explained.units
                if unit.level == "token" and unit.effect == "total"
            }
        correlation = math.nan
        if reference is not None:
            own, theirs = removal.of_prompt(scores[name]), removal.of_prompt(reference)
            correlation = rank_correlation(own, theirs)
        result[name] = Found(
            gap=gaps[name],
            forwards=forwards,
            exact_runs=runs,
            runs_share=runs / exact.provenance["exact_runs"],
            rank_correlation=correlation,
            top5_recall=fmean(u in ranking(scores[name], permutation)[:_TOP] for u in wanted),
            top5_as_tokens=fmean(places[u] in alone for u in wanted),
        )
    return result


def long_cases(model: Any, tokenizer: Any, count: int, tokens: int) -> list[Case]:
    """Generated documents joined by blank lines, as many as fit, and a question about one."""
    limit = min(tokens, model.config.max_position_embeddings)
    fresh = iter(fresh_cases(count * (limit // 32 + 1), f"{SALT}-long"))
    rng, found = random.Random(f"{SALT}-long"), []
    for _ in range(count):
        parts: list[Any] = []
        case: Case | None = None
        for part in fresh:
            texts = "\n\n".join(document.text for document, _ in [*parts, part])
            questions = [question for _, question in [*parts, part]]
            longest = max(
                len(tokenizer(prompt(texts, question) + question.answer)["input_ids"])
                for question in questions
            )
            if longest > limit:
                break
            parts.append(part)
            question = rng.choice(questions)
            case = Case(prompt(texts, question), question.answer)
        if case is None or len(parts) < 2:
            raise ValueError(f"long documents must fit two of the generated, got {limit} tokens.")
        found.append(case)
    return found


def summarise(
    what: str, found: Sequence[dict[str, Found]], device: torch.device | None = None
) -> list[Row]:
    """A row per method, over all documents, of which there are at least two."""
    rows = []
    exact = [each["exact"].gap for each in found]
    for name in found[0]:
        own = [each[name] for each in found]
        gaps = [each.gap for each in own]
        differences = [mine - theirs for mine, theirs in zip(gaps, exact, strict=True)]
        correlation = fmean(each.rank_correlation for each in own)
        rows.append(
            Row(
                what=what,
                method=name,
                documents=len(found),
                gap=round(fmean(gaps), 4),
                gap_se=round(standard_error(gaps), 4),
                difference=round(fmean(differences), 4),
                difference_se=round(standard_error(differences), 4),
                forwards=round(fmean(each.forwards for each in own), 2),
                exact_runs=round(fmean(each.exact_runs for each in own), 2),
                runs_share=round(fmean(each.runs_share for each in own), 4),
                rank_correlation=None if math.isnan(correlation) else round(correlation, 4),
                top5_recall=round(fmean(each.top5_recall for each in own), 4),
                top5_as_tokens=round(fmean(each.top5_as_tokens for each in own), 4),
                device=device_name(device or torch.device("cpu")),
                torch=version_of("torch"),
                transformers=version_of("transformers"),
                commit=commit(),
                date=datetime.datetime.now(datetime.UTC).date().isoformat(),
            )
        )
    return rows


def verdicts(rows: Sequence[Row], bound: Sequence[Row], most: float) -> list[str]:
    """The two requirements, and whether they are met.

    Args:
        rows, bound: of all documents, and of those that the hierarchical bound is about.
        most: the largest share of runs that hierarchical took for one document.
    """
    by = {row.method: row for row in rows}
    hybrid, exact = by["hybrid 0.2"], by["exact"]
    near = abs(hybrid.difference) <= exact.gap_se
    tokens = next(row for row in bound if row.method == "hierarchical")
    holds = tokens.top5_as_tokens >= 0.9 and most <= 0.25
    return [
        f"hybrid 0.2 within a standard error of exact's gap: {'yes' if near else 'NO'} "
        f"(|{hybrid.difference:+.4f}| against {exact.gap_se:.4f})",
        f"hierarchical recalls 90% with at most 25% of the runs: {'yes' if holds else 'NO'} "
        f"({tokens.top5_as_tokens:.1%} of {tokens.documents} documents' best five, "
        f"at most {most:.1%} of the runs)",
    ]


def table(rows: Sequence[Row]) -> Table:
    """Rows of one kind, for people."""
    result = Table(title=f"{rows[0].what}: {rows[0].documents} documents, {rows[0].device}")
    names = "method|gap, nats|minus exact|forwards|exact runs|share|rank corr.|top 5|as tokens"
    for name in names.split("|"):
        result.add_column(name, justify="left" if name == "method" else "right")
    for row in rows:
        correlation = row.rank_correlation
        result.add_row(
            row.method,
            f"{row.gap:.3f} ± {row.gap_se:.3f}",
            f"{row.difference:+.3f} ± {row.difference_se:.3f}",
            f"{row.forwards:.1f}",
            f"{row.exact_runs:.1f}",
            f"{row.runs_share:.1%}",
            "" if correlation is None else f"{correlation:.3f}",
            f"{row.top5_recall:.1%}",
            f"{row.top5_as_tokens:.1%}",
        )
    return result


def write(rows: Sequence[Row], path: Path) -> None:
    """Write rows in place of those of an earlier run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(Row)])
        writer.writeheader()
        writer.writerows(dataclasses.asdict(row) for row in rows)


def draw(rows: Sequence[Row], path: Path) -> None:
    """Gap over cost, logarithmic; random, which costs nothing, as a line."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.8, 4.4), layout="constrained")
    axes = figure.subplots()
    colours = itertools.cycle(("#2166ac", "#1b7837", "#762a83", "#b2182b", "#e08214", "#35978f"))
    for row in rows:
        if row.method == RANDOM:
            label = "random (no forwards)"
            axes.axhline(row.gap, color="grey", linestyle=":", label=label)
            axes.axhspan(row.gap - row.gap_se, row.gap + row.gap_se, color="grey", alpha=0.15)
            continue
        axes.errorbar(
            row.forwards,
            row.gap,
            row.gap_se,
            fmt="o",
            capsize=3,
            color=next(colours) if row.method != LEAVE_ONE_OUT else "black",
            label=row.method,
        )
    axes.set_xscale("log")
    ticks = [2, 5, 10, 20, 50, 100, 200]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_xlabel("cost, forwards of the prompt")
    axes.set_ylabel("removal gap, nats per answer token")
    title = f"{rows[0].documents} documents, {MODE}; bars: one standard error"
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.2)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--documents", type=int, default=200, help="answered correctly, from 2")
    parser.add_argument("--long-documents", type=int, default=20, help="0, or from 2")
    parser.add_argument("--long-tokens", type=int, default=512, help="most tokens of a long one")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of rows and picture")
    options = parser.parse_args(arguments)
    if options.documents < 2 or options.long_documents == 1:
        parser.error("a standard error needs at least 2 documents")
    torch.set_num_threads(1)
    console = Console(width=120)
    model, tokenizer = load_demo_model()

    def run(title: str, cases: Sequence[Case], methods: Sequence[str]) -> list[dict[str, Found]]:
        numbered = track(list(enumerate(cases)), title, console=Console(stderr=True))
        return [examine(model, tokenizer, case, methods, number) for number, case in numbered]

    found = run("Documents", answered_cases(model, tokenizer, options.documents), METHODS)
    rows = summarise(f"removal gap, {MODE}", found)
    first = found[:BOUND_DOCUMENTS]
    bound = [{name: each[name] for name in LONG_METHODS} for each in first]
    bound_rows = summarise(f"first {len(first)} documents, {MODE}", bound)
    most = max(each["hierarchical"].runs_share for each in first)
    draw(rows, options.out / "quality.png")
    kinds = [rows, bound_rows]
    write([row for kind in kinds for row in kind], options.out / "quality.csv")
    if options.long_documents:
        cases = long_cases(model, tokenizer, options.long_documents, options.long_tokens)
        what = f"long documents up to {options.long_tokens} tokens, {MODE}"
        kinds.append(summarise(what, run("Long documents", cases, LONG_METHODS)))
        write([row for kind in kinds for row in kind], options.out / "quality.csv")
    for kind in kinds:
        console.print(table(kind))
    for line in verdicts(rows, bound_rows, most):
        console.print(line)


if __name__ == "__main__":
    main()
