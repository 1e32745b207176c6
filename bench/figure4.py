"""Fig. 4 of the paper on the shipped model: steering turns a continuation from one fact to another.

A document states one fact twice, with different values (see ``bench.restated``), and is asked for
it. The model continues with one of the two answers; documents where it says neither are left out.
Then, in every mode and with several factors,

- the fact that it did *not* use is amplified, or
- the fact that it used is suppressed, or
- as a control, a sentence that is neither of the two, drawn by chance, gets some of the factors.

*Turned*: the greedy continuation is now exactly the other answer. *Away*: it is not the first
answer any more, be it the other or none of the two. One command::

    python -m bench.figure4                      # 100 documents, about 2 minutes

Rows go to ``bench/results/figure4.csv``, the picture to ``bench/results/figure4.png``: on the left,
as in the paper, the probabilities of the next token in one document.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

import atman_triton as atman
from atman_triton.demo import load_demo_model, prompt
from atman_triton.demo.evaluate import generate_answers
from bench.harness import RESULTS
from bench.rates import mean, provenance, write
from bench.restated import Restated, restate, spans

MODES = ("min_shift", "multiplicative", "log_additive")
AMPLIFY = (1.1, 1.25, 1.5, 2.0, 4.0, 8.0, 16.0)
SUPPRESS = (0.8, 0.5, 0.25, 0.1, 0.0)
AMPLIFIED, SUPPRESSED = "amplify the other fact", "suppress the used fact"
UNRELATED_UP, UNRELATED_DOWN = "amplify an unrelated sentence", "suppress an unrelated sentence"
WHATS = {
    AMPLIFIED: AMPLIFY,
    SUPPRESSED: SUPPRESS,
    UNRELATED_UP: (1.5, 2.0, 8.0),
    UNRELATED_DOWN: (0.5, 0.1, 0.0),
}
"""What is done, and with which factors."""
_BATCH = 32
_SHOWN = (AMPLIFIED, 1.5), (SUPPRESSED, 0.1)  # of one document, in ``min_shift``
_TOP = 3  # tokens of each distribution


@dataclasses.dataclass(frozen=True)
class Case:
    """A document with two answers.

    Attributes:
        restated: the document.
        used, other: places of the fact that the plain continuation repeats, and of the other.
        unrelated: place of a sentence that is neither.
    """

    restated: Restated
    used: int
    other: int
    unrelated: int

    @property
    def prompt(self) -> str:
        """What the model reads."""
        return prompt(" ".join(self.restated.sentences), self.restated.question)

    def place(self, what: str) -> int:
        """The sentence that is steered."""
        return {AMPLIFIED: self.other, SUPPRESSED: self.used}.get(what, self.unrelated)

    def control(self, what: str, factor: float) -> atman.TextControl:
        """That sentence's characters with a factor."""
        start, stop = spans(self.restated.sentences)[self.place(what)]
        return atman.TextControl(start, stop - start, factor=factor, overlap="complete")


@dataclasses.dataclass(frozen=True)
class Row:
    """Shares of documents, ``_se`` their standard errors."""

    what: str
    mode: str
    factor: float
    documents: int
    turned: float
    turned_se: float
    away: float
    away_se: float
    device: str
    torch: str
    transformers: str
    commit: str
    date: str


def conflicting_cases(model: Any, tokenizer: Any, count: int) -> tuple[list[Case], int]:
    """The first documents that the model answers with one of their two values; how many it read."""
    found: list[Case] = []
    tried = 0
    while len(found) < count:
        several = [restate(f"figure4-{tried + n}", "conflict") for n in range(_BATCH)]
        prompts = [prompt(" ".join(each.sentences), each.question) for each in several]
        for restated, said in zip(
            several, generate_answers(model, tokenizer, prompts), strict=True
        ):
            if len(found) == count:
                break
            tried += 1
            facts = (restated.first, restated.twin)
            used = [place for place in facts if restated.answer_of(place) == said]
            if used:
                rest = [p for p in range(len(restated.sentences)) if p not in facts]
                unrelated = random.Random(f"figure4-unrelated-{tried}").choice(rest)
                found.append(Case(restated, used[0], sum(facts) - used[0], unrelated))
    return found, tried


@torch.inference_mode()
def steered_answers(
    model: Any, tokenizer: Any, cases: Sequence[Case], what: str, mode: str, factor: float
) -> list[str]:
    """The greedy continuation of each case while its sentence has the factor."""
    answers: list[str] = []
    for start in range(0, len(cases), _BATCH):
        part = cases[start : start + _BATCH]
        inputs = tokenizer(
            [case.prompt for case in part], padding=True, padding_side="left", return_tensors="pt"
        )
        controls = [[case.control(what, factor)] for case in part]
        with atman.steer(model, controls, inputs=inputs, mode=mode):
            output = model.generate(**inputs, max_new_tokens=10, do_sample=False)
        for row in output[:, inputs["input_ids"].shape[1] :].tolist():
            end = row.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in row else None
            answers.append(str(tokenizer.decode(row[:end])))
    return answers


def measure(model: Any, tokenizer: Any, cases: Sequence[Case]) -> list[Row]:
    """Every kind of steering in every mode with every factor."""
    settings = [(what, mode, factor) for what in WHATS for mode in MODES for factor in WHATS[what]]
    facts = provenance()
    rows = []
    for what, mode, factor in track(settings, "Steering", console=Console(stderr=True)):
        said = steered_answers(model, tokenizer, cases, what, mode, factor)
        rows.append(summarise(cases, said, what, mode, factor, facts))
    return rows


def summarise(
    cases: Sequence[Case],
    said: Sequence[str],
    what: str,
    mode: str,
    factor: float,
    facts: Mapping[str, str],
) -> Row:
    """One row of the results, from what was said about each case."""
    pairs = list(zip(cases, said, strict=True))
    turned = [float(text == case.restated.answer_of(case.other)) for case, text in pairs]
    away = [float(text != case.restated.answer_of(case.used)) for case, text in pairs]
    return Row(what, mode, factor, len(cases), *mean(turned), *mean(away), **facts)


# --- one document ---------------------------------------------------------------------------


def shown_case(tokenizer: Any, cases: Sequence[Case]) -> Case:
    """The first contract whose two answers differ in their first token, or else any document."""

    def differs(case: Case) -> bool:
        first, second = (
            tokenizer(case.restated.answer_of(place))["input_ids"][0]
            for place in (case.used, case.other)
        )
        return first != second

    apart = [case for case in cases if differs(case)]
    contracts = [case for case in apart if case.restated.once.kind == "contract"]
    return [*contracts, *apart, *cases][0]


@torch.inference_mode()
def next_tokens(
    model: Any, tokenizer: Any, case: Case, mode: str = "min_shift"
) -> dict[str, list[tuple[str, float]]]:
    """Next-token probabilities of one document, plain and steered, the same tokens in each.

    The tokens are the likeliest of any of the distributions.
    """
    inputs = tokenizer(case.prompt, return_tensors="pt")

    def probabilities(**steering: Any) -> torch.Tensor:
        if not steering:
            return model(**inputs).logits[0, -1].softmax(-1)
        with atman.steer(model, [case.control(**steering)], inputs=inputs, mode=mode):
            return model(**inputs).logits[0, -1].softmax(-1)

    found = {"plain": probabilities()}
    for what, factor in _SHOWN:
        found[f"{what}, {factor}"] = probabilities(what=what, factor=factor)
    best = torch.stack(list(found.values())).amax(0).topk(_TOP).indices.tolist()
    return {
        name: [(tokenizer.decode([token]), float(row[token])) for token in best]
        for name, row in found.items()
    }


# --- for people -----------------------------------------------------------------------------


def document_table(case: Case, probabilities: Mapping[str, Sequence[tuple[str, float]]]) -> Table:
    """Plain against steered next-token probabilities of one document."""
    table = Table(title=f"next token, min_shift: {case.restated.question.text}")
    table.add_column("token")
    for name in probabilities:
        table.add_column(name, justify="right")
    columns = list(probabilities.values())
    for index, (token, _) in enumerate(columns[0]):
        table.add_row(repr(token), *(f"{column[index][1]:.4f}" for column in columns))
    return table


def rate_table(rows: Sequence[Row], whats: Sequence[str]) -> Table:
    """Turned, and away if that is more; the first kind of steering has all the factors."""
    factors = WHATS[whats[0]]
    table = Table(title=f"turned (away), {rows[0].documents} documents, {rows[0].device}")
    table.add_column("steering")
    table.add_column("mode")
    for factor in factors:
        table.add_column(f"{factor:g}", justify="right")
    for what in whats:
        for mode in MODES:
            own = {row.factor: row for row in rows if (row.what, row.mode) == (what, mode)}
            cells = []
            for row in map(own.get, factors):
                if row is None:
                    cells.append("")
                    continue
                more = f" ({row.away:.0%})" if row.away > row.turned else ""
                cells.append(f"{row.turned:.0%} ± {row.turned_se:.0%}{more}")
            table.add_row(what, mode, *cells)
    return table


def draw(
    case: Case,
    probabilities: Mapping[str, Sequence[tuple[str, float]]],
    rows: Sequence[Row],
    path: Path,
) -> None:
    """Probabilities of one document beside the shares of all that turned."""
    from matplotlib.figure import Figure

    colours = {"min_shift": "#2166ac", "multiplicative": "#1b7837", "log_additive": "#b2182b"}
    figure = Figure(figsize=(13, 4.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=(1.25, 1, 1))
    height = 0.8 / len(probabilities)
    shades = ("0.6", "#e08214", "#542788")
    for index, ((name, bars), colour) in enumerate(zip(probabilities.items(), shades, strict=True)):
        places = [place + index * height for place in range(len(bars))]
        left.barh(places, [p for _, p in bars], height, color=colour, label=name)
    names = [f"“{token.strip()}”" for token, _ in next(iter(probabilities.values()))]
    left.set_yticks([place + 0.4 - height / 2 for place in range(len(names))], names)
    left.invert_yaxis()
    left.set_xlabel("probability of the next token")
    sentences, places = case.restated.sentences, (case.used, case.other)
    used, other = (sentences[place] for place in places)
    left.set_title(f"{case.restated.question.text}\nused: {used}\nother: {other}", fontsize=8)
    left.legend(fontsize=8, loc="lower right")
    panels = ((middle, AMPLIFIED, UNRELATED_UP), (right, SUPPRESSED, UNRELATED_DOWN))
    for axes, what, control in panels:
        for mode, colour in colours.items():
            for kind, style in ((what, "o-"), (control, "x:")):
                own = [row for row in rows if (row.what, row.mode) == (kind, mode)]
                axes.errorbar(
                    [WHATS[what].index(row.factor) for row in own],
                    [row.turned for row in own],
                    [row.turned_se for row in own],
                    fmt=style,
                    color=colour,
                    markersize=4,
                    capsize=2,
                    linewidth=1,
                    label=mode if kind == what else None,
                )
        axes.set_xticks(range(len(WHATS[what])), [f"{factor:g}" for factor in WHATS[what]])
        axes.set_xlabel("factor")
        axes.set_ylim(-0.03, 1.03)
        axes.set_title(f"{what}\n(dotted: {control})", fontsize=9)
        axes.grid(alpha=0.2)
    middle.set_ylabel("continuation turns to the other fact")
    right.legend(fontsize=8, loc="center right")
    figure.suptitle(f"{rows[0].documents} documents; bars: one standard error", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--documents", type=int, default=100, help="with one of two answers")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of rows and picture")
    options = parser.parse_args(arguments)
    if options.documents < 2:
        parser.error("a standard error needs at least 2 documents")
    torch.set_num_threads(1)
    console = Console(width=150)
    model, tokenizer = load_demo_model()
    cases, tried = conflicting_cases(model, tokenizer, options.documents)
    console.print(f"{len(cases)} of {tried} documents are answered with one of their two values")
    case = shown_case(tokenizer, cases)
    probabilities = next_tokens(model, tokenizer, case)
    console.print(case.prompt, highlight=False)
    console.print(document_table(case, probabilities))
    rows = measure(model, tokenizer, cases)
    write(rows, options.out / "figure4.csv")
    draw(case, probabilities, rows, options.out / "figure4.png")
    for whats in ((AMPLIFIED, UNRELATED_UP), (SUPPRESSED, UNRELATED_DOWN)):
        console.print(rate_table(rows, whats))


if __name__ == "__main__":
    main()
