"""The bottom rows of Fig. 19 of the paper on the shipped model: no answer, no place to look.

Asked for something that a document does not hold, the model says something all the same. Where does
its relevance go? Every document is explained three times, each time for the model's own answer:

- ``answered``: a question that one of its sentences answers;
- ``absent``: a question about a fact of the same kind of document that this one does not state;
- ``removed``: the first question again, the sentence that answers it taken out.

*Spread* of an explanation: relevances of the document's sentences, negative ones taken as 0, are
divided by their sum; the exponential of the entropy of these shares is the effective number of
sentences (1: all relevance on one; as many as there are: the same on each; so, too, if no sentence
has any). The sentences are suppressed one at a time (``sentence``), or a sentence has the summed
relevance of its tokens (``token``). *AUROC*: how often an explanation of this kind spreads more
than one of ``answered``, ties counting half, over all pairs; beside it, how often the model's
answer is less likely to itself than one of ``answered`` (geometric mean over its tokens), which
needs no explanation at all. One command::

    python -m bench.figure19                     # 100 documents, about 6 minutes

Rows go to ``bench/results/figure19.csv``, the picture, with one document coloured for two
questions, to ``bench/results/figure19.png``.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import random
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

import atman_triton as atman
from atman_triton.demo import Document, demo_document, load_demo_model, prompt
from atman_triton.demo.documents import make_document
from atman_triton.demo.evaluate import generate_answers
from atman_triton.demo.facts import FACTS
from bench.harness import RESULTS
from bench.rates import mean, provenance, write
from bench.restated import spans, worded

KINDS = ("answered", "absent", "removed")
METHODS = ("direct", "exact")
UNITS = ("sentence", "token")
_COLOURS = dict(zip(KINDS, ("#2166ac", "#b2182b", "#e08214"), strict=True))
_LINE = 112  # characters


@dataclasses.dataclass(frozen=True)
class Asked:
    """Sentences and a question."""

    sentences: tuple[str, ...]
    question: str

    @property
    def prompt(self) -> str:
        """What the model reads."""
        return prompt(" ".join(self.sentences), self.question)


@dataclasses.dataclass(frozen=True)
class Spread:
    """How one explanation's relevance is distributed over sentences.

    Attributes:
        effective: number of sentences, see above.
        top: the largest share.
        largest: the largest relevance, nats per token.
        likely: probability of the explained answer's tokens, geometric mean.
    """

    effective: float
    top: float
    largest: float
    likely: float


@dataclasses.dataclass(frozen=True)
class Row:
    """Means over documents, ``_se`` their standard errors.

    ``auroc`` is that of the spread against ``answered``, ``auroc_likely`` that of the answer's
    probability.
    """

    question: str
    method: str
    unit: str
    documents: int
    effective: float
    effective_se: float
    top: float
    top_se: float
    largest: float
    largest_se: float
    likely: float
    likely_se: float
    auroc: float
    auroc_likely: float
    device: str
    torch: str
    transformers: str
    commit: str
    date: str


def asked(seed: str) -> dict[str, Asked]:
    """One fresh document and what it is asked, by kind."""
    rng = random.Random(seed)
    document = make_document(rng)
    question = rng.choice(document.questions)
    rest = [text for place, text in enumerate(document.sentences) if place != question.evidence]
    return {
        "answered": Asked(document.sentences, question.text),
        "absent": Asked(document.sentences, absent_question(rng, document)),
        "removed": Asked(tuple(rest), question.text),
    }


def absent_question(rng: random.Random, document: Document) -> str:
    """A question about a fact that the document could state, but does not."""
    stated = {(fact.value_type, fact.name) for fact in document.facts}
    absent = [
        fact
        for value_type, facts in FACTS[document.kind].items()
        for fact in facts
        if (value_type, fact.name) not in stated
    ]
    return worded(rng, rng.choice(rng.choice(absent).questions)).replace("{place}", "state")


def relevances(explanation: atman.Explanation, sentences: Sequence[str]) -> list[float]:
    """Of each sentence, the summed relevance of its units, nats per token of the answer."""
    totals = [0.0] * len(sentences)
    stops = [stop for _, stop in spans(sentences)]
    for unit, relevance in zip(explanation.units, explanation.relevance.tolist(), strict=True):
        # a unit may hold the space before its sentence, so where it ends decides
        place = next(
            (p for p, stop in enumerate(stops) if (unit.stop or math.inf) <= stop + 1), None
        )
        if place is not None and unit.part == "prompt":
            totals[place] += relevance
    return totals


def spread(totals: Sequence[float], logprob: float) -> Spread:
    """How relevance is distributed, and the answer's mean log-probability as a probability."""
    kept = [max(total, 0.0) for total in totals]
    whole = sum(kept)
    shares = [each / whole for each in kept] if whole else [1 / len(kept)] * len(kept)
    entropy = -sum(share * math.log(share) for share in shares if share)
    return Spread(math.exp(entropy), max(shares), max(totals), math.exp(logprob))


def auroc(higher: Sequence[float], lower: Sequence[float]) -> float:
    """How often one of the first is above one of the second, ties counting half."""
    pairs = itertools.product(higher, lower)
    return fmean(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs)


def examine(model: Any, tokenizer: Any, case: Mapping[str, Asked]) -> dict[tuple, Spread]:
    """Spreads of one document, by kind, method and unit."""
    prompts = [each.prompt for each in case.values()]
    answers = dict(zip(case, generate_answers(model, tokenizer, prompts), strict=True))
    found = {}
    for method, unit in itertools.product(METHODS, UNITS):
        explainer = atman.Explainer(model, tokenizer, method=method, progress=False)  # pyright: ignore[reportArgumentType]
        for kind, each in case.items():
            explanation = explainer.explain(
                each.prompt,
                answers[kind],
                unit,  # pyright: ignore[reportArgumentType]
                separator="",
            )
            totals = relevances(explanation, each.sentences)
            logprob = explanation.base_logprobs.mean().item()
            found[kind, method, unit] = spread(totals, logprob)
    return found


def summarise(found: Sequence[Mapping[tuple, Spread]]) -> list[Row]:
    """A row for each kind, method and unit, over at least two documents."""
    facts = provenance()
    rows = []
    for method, unit, kind in itertools.product(METHODS, UNITS, KINDS):
        own = [each[kind, method, unit] for each in found]
        effective = [each.effective for each in own]
        likely = [each.likely for each in own]
        answered = [each["answered", method, unit] for each in found]
        rows.append(
            Row(
                kind,
                method,
                unit,
                len(found),
                *mean(effective),
                *mean([each.top for each in own]),
                *mean([each.largest for each in own]),
                *mean(likely),
                round(auroc(effective, [each.effective for each in answered]), 4),
                round(auroc([each.likely for each in answered], likely), 4),
                **facts,
            )
        )
    return rows


# --- for people -----------------------------------------------------------------------------


def table(rows: Sequence[Row]) -> Table:
    """All rows."""
    result = Table(title=f"{rows[0].documents} documents, {rows[0].device}")
    names = (
        "question|method|unit|effective sentences|top share|largest|p(answer)|AUROC|of p(answer)"
    )
    for index, name in enumerate(names.split("|")):
        result.add_column(name, justify="left" if index < 3 else "right")
    for row in rows:
        result.add_row(
            row.question,
            row.method,
            row.unit,
            f"{row.effective:.2f} ± {row.effective_se:.2f}",
            f"{row.top:.1%} ± {row.top_se:.1%}",
            f"{row.largest:.2f} ± {row.largest_se:.2f}",
            f"{row.likely:.3f} ± {row.likely_se:.3f}",
            f"{row.auroc:.3f}",
            f"{row.auroc_likely:.3f}",
        )
    return result


Coloured = tuple[str, str, str, list[float]]
"""Question, answer, text, and the relevance of each character."""


def shown(model: Any, tokenizer: Any) -> list[Coloured]:
    """The demo contract, asked for what it says, and for what it does not say.

    Of the questions on the facts that it does not state, the one whose spread is the median.
    """
    document = demo_document()
    answered = next(each for each in document.questions if each.fact == "hourly pay")
    stated = {fact.name for fact in document.facts}
    facts = [fact for group in FACTS[document.kind].values() for fact in group]
    questions = [f.questions[0].replace("{place}", "state") for f in facts if f.name not in stated]
    rng = random.Random(0)
    explainer = atman.Explainer(model, tokenizer, progress=False)
    explained = [explainer.explain(prompt(document, worded(rng, each))) for each in questions]
    spreads = [spread(relevances(each, document.sentences), 0.0).effective for each in explained]
    order = sorted(range(len(spreads)), key=spreads.__getitem__)
    middle = order[len(order) // 2]
    first = explainer.explain(prompt(document, answered))
    return [
        _characters(first, document, answered.text),
        _characters(explained[middle], document, questions[middle]),
    ]


def _characters(explanation: atman.Explanation, document: Document, question: str) -> Coloured:
    characters = [0.0] * len(document.text)
    for unit, relevance in zip(explanation.units, explanation.relevance.tolist(), strict=True):
        if unit.start is not None and unit.stop is not None and unit.part == "prompt":
            for place in range(unit.start, min(unit.stop, len(characters))):
                characters[place] = relevance
    answer = explanation.text[explanation.prompt_stop :].strip()
    return question, answer, document.text, characters


def draw(
    found: Sequence[Mapping[tuple, Spread]],
    coloured: Sequence[Coloured],
    path: Path,
) -> None:
    """One document coloured for two questions, and the spreads of all documents."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 7.2), layout="constrained")
    grid = figure.add_gridspec(3, len(METHODS), height_ratios=(1, 1, 1.9))
    for index, (question, answer, text, characters) in enumerate(coloured):
        axes = figure.add_subplot(grid[index, :])
        kind = ("answered", "not answered")[index]
        axes.set_title(f"{kind} — Q: {question} A: {answer}", loc="left", fontsize=9)
        _colour(axes, text, characters)
    for index, method in enumerate(METHODS):
        axes = figure.add_subplot(grid[2, index])
        for kind, colour in _COLOURS.items():
            values = sorted(each[kind, method, "sentence"].effective for each in found)
            heights = [(n + 1) / len(values) for n in range(len(values))]
            axes.step([1, *values], [0, *heights], where="post", color=colour, label=kind)
        axes.set_xlabel(f"effective number of sentences, {method}")
        axes.set_ylabel("share of documents with at most")
        axes.grid(alpha=0.2)
        axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _colour(axes: Any, text: str, characters: Sequence[float]) -> None:
    """Text whose background is the darker, the more relevant a character is within this text."""
    lines = textwrap.wrap(text, _LINE)
    most = max(max(characters), 1e-9)
    place = 0
    for number, line in enumerate(lines):
        place = text.index(line, place)
        for column, character in enumerate(line):
            share = max(characters[place + column], 0.0) / most
            if share > 0.01:
                axes.axvspan(
                    column / _LINE,
                    (column + 1) / _LINE,
                    1 - (number + 1) / len(lines),
                    1 - number / len(lines),
                    color="#2166ac",
                    alpha=0.75 * share,
                    linewidth=0,
                )
            axes.text(
                (column + 0.5) / _LINE,
                1 - (number + 0.5) / len(lines),
                character,
                family="monospace",
                fontsize=9.5,
                ha="center",
                va="center",
            )
        place += len(line)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.axis("off")


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--documents", type=int, default=100, help="from 2")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of rows and picture")
    options = parser.parse_args(arguments)
    if options.documents < 2:
        parser.error("a standard error needs at least 2 documents")
    torch.set_num_threads(1)
    console = Console(width=140)
    model, tokenizer = load_demo_model()
    numbers = track(range(options.documents), "Explaining", console=Console(stderr=True))
    found = [examine(model, tokenizer, asked(f"figure19-{number}")) for number in numbers]
    rows = summarise(found)
    write(rows, options.out / "figure19.csv")
    draw(found, shown(model, tokenizer), options.out / "figure19.png")
    console.print(table(rows))


if __name__ == "__main__":
    main()
