"""What the studies share: labelled documents, what an explanation is worth on one, rows.

*Label precision*: of the relevance that an explanation puts on the document (the question apart),
negative relevance taken as 0, the share that stands on the sentence with the answer. *Removal gap*
and *leave-one-out* are those of ``bench.removal``, over all tokens of the prompt.

Legend: U units, D of them in the document, S sentences.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

import atman_triton as atman
from atman_triton.demo import Document, Question, prompt
from atman_triton.demo.evaluate import fresh_cases, generate_answers
from atman_triton.evaluate.bootstrap import bootstrap
from atman_triton.evaluate.metrics import precision
from bench.harness import RESULTS
from bench.rates import provenance
from bench.rates import write as write_rows
from bench.removal import Case

SALT = "studies"


@dataclasses.dataclass(frozen=True)
class Labelled:
    """A text, a question, and where its answer stands.

    Attributes:
        text: What is read.
        question: What is asked of it.
        answer: What the model is to say; begins with a space.
        sentences: Characters ``(start, stop)`` of each sentence in ``text``, and so in ``prompt``.
        evidence: Which sentences hold the answer; none where the text does not tell it.
    """

    text: str
    question: str
    answer: str
    sentences: tuple[tuple[int, int], ...]
    evidence: tuple[int, ...]

    @property
    def prompt(self) -> str:
        """What the model reads."""
        return prompt(self.text, self.question)

    @property
    def case(self) -> Case:
        """As ``bench.removal`` takes it."""
        return Case(self.prompt, self.answer)

    @classmethod
    def of(cls, document: Document, question: Question) -> Labelled:
        """A generated document and one of its questions."""
        return cls(
            document.text, question.text, question.answer, document.spans, (question.evidence,)
        )


def answered(model: Any, tokenizer: Any, cases: Sequence[Labelled]) -> list[Labelled]:
    """Those that the model answers right."""
    said = generate_answers(model, tokenizer, [case.prompt for case in cases])
    return [case for case, each in zip(cases, said, strict=True) if each == case.answer]


def documents(model: Any, tokenizer: Any, count: int, salt: str = SALT) -> list[Labelled]:
    """``count`` fresh documents, the first that the model answers right, in a fixed order.

    Raises: ValueError: if it answers so few right that they are not to be had.
    """
    found: list[Labelled] = []
    tried = 0
    while len(found) < count:
        upto = tried + max(8, count - len(found))
        fresh = [Labelled.of(*case) for case in fresh_cases(upto, salt)[tried:]]
        found += answered(model, tokenizer, fresh)
        tried = upto
        if tried > 50 * (count + 8):
            raise ValueError(
                f"documents needs a model that answers some right, got {len(found)} of {tried}; "
                "take one that was trained longer."
            )
    return found[:count]


class Halves(NamedTuple):
    """Settings are chosen on one half of the documents, numbers are reported on the other."""

    choose: list[Any]
    report: list[Any]


def halves(several: Sequence[Any]) -> Halves:
    """Every second one to choose on, the others to report."""
    return Halves(list(several[1::2]), list(several[::2]))


def explain(
    model: Any, tokenizer: Any, case: Labelled, granularity: str = "token", **settings: Any
) -> atman.Explanation:
    """The answer explained; ``settings`` are those of ``Explainer``."""
    explainer = atman.Explainer(model, tokenizer, progress=False, **settings)
    separator = "" if granularity == "sentence" else None
    return explainer.explain(case.prompt, case.answer, granularity, separator=separator)  # pyright: ignore[reportArgumentType]


# --- the label ------------------------------------------------------------------------------


def sentence_of(case: Labelled, start: int, stop: int) -> int | None:
    """The sentence with the most of some characters of the prompt; None outside of the text."""
    shared = [min(stop, own[1]) - max(start, own[0]) for own in case.sentences]
    best = max(range(len(shared)), key=shared.__getitem__)
    return best if shared[best] > 0 else None


def places(explanation: atman.Explanation, case: Labelled) -> list[int | None]:
    """``U``: of each unit, its sentence; None of the question's and the answer's units."""
    found: list[int | None] = []
    for unit in explanation.units:
        if unit.part == "prompt" and unit.start is not None and unit.stop is not None:
            found.append(sentence_of(case, unit.start, unit.stop))
        else:
            found.append(None)
    return found


def by_sentence(explanation: atman.Explanation, case: Labelled) -> list[float]:
    """``S`` sums of the units' relevance, nats per token of the answer."""
    totals = [0.0] * len(case.sentences)
    relevance = explanation.relevance.tolist()
    for place, value in zip(places(explanation, case), relevance, strict=True):
        if place is not None:
            totals[place] += value
    return totals


def label_precision(explanation: atman.Explanation, case: Labelled) -> float:
    """Share of the document's relevance on the evidence; NaN where none of it is positive."""
    relevance = explanation.relevance.tolist()
    kept = [
        (value, float(place in case.evidence))
        for value, place in zip(relevance, places(explanation, case), strict=True)
        if place is not None
    ]
    return precision(*zip(*kept, strict=True)).value


def evidence_rank(explanation: atman.Explanation, case: Labelled) -> int:
    """Place of the best evidence sentence among all, 1 the first; equal ones stand before it."""
    totals = by_sentence(explanation, case)
    best = max(totals[place] for place in case.evidence)
    others = [total for place, total in enumerate(totals) if place not in case.evidence]
    return 1 + sum(total >= best for total in others)


# --- rows -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Row:
    """One number.

    Attributes:
        study, part: Which study, and which of its questions.
        what: What was varied, such as ``factor 0.1``.
        method: How it was explained, such as ``direct, min_shift``; empty where nothing was.
        measure: What ``value`` is.
        count: Over how many documents; those where the measure is not defined are not among them.
        value, low, high: A mean (or what ``measure`` says) and its interval of 95% by bootstrap.
    """

    study: str
    part: str
    what: str
    method: str
    measure: str
    count: int
    value: float
    low: float
    high: float
    device: str
    torch: str
    transformers: str
    commit: str
    date: str


@functools.cache
def _facts() -> dict[str, str]:
    return provenance()


def row(
    study: str,
    part: str,
    what: str,
    method: str,
    measure: str,
    numbers: tuple[float, float, float],
    count: int,
) -> Row:
    """A row of a value with its interval."""
    value, low, high = (round(number, 4) for number in numbers)
    return Row(study, part, what, method, measure, count, value, low, high, **_facts())


def mean_row(
    study: str, part: str, what: str, method: str, measure: str, values: Iterable[float]
) -> Row:
    """A row of the mean of what is defined; NaN without any, no interval of a single one."""
    kept = [value for value in values if not math.isnan(value)]
    found = bootstrap(kept)
    return row(study, part, what, method, measure, found[:3], len(kept))


def write(rows: Sequence[Row], out: Path) -> Path:
    """Write ``studies-NAME.csv`` in place of an earlier run's; returns where."""
    path = out / f"studies-{rows[0].study}.csv"
    write_rows(rows, path)
    return path


def read(path: Path) -> list[Row]:
    """Rows of an earlier run; none without one."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        found: list[dict[str, Any]] = [dict(each) for each in csv.DictReader(file)]
    for each in found:
        each |= {name: float(each[name]) for name in ("value", "low", "high")}
        each["count"] = int(each["count"])
    return [Row(**each) for each in found]


def pick(rows: Sequence[Row], **wanted: str) -> list[Row]:
    """The rows of which some fields are as wanted."""
    return [each for each in rows if all(getattr(each, k) == v for k, v in wanted.items())]


def best(scores: Mapping[Any, Sequence[float]]) -> Any:
    """The key with the largest mean of its defined values, the first of equals."""
    means = {
        key: fmean(kept) if (kept := [v for v in values if not math.isnan(v)]) else -math.inf
        for key, values in scores.items()
    }
    return max(means, key=means.__getitem__)


def table(rows: Sequence[Row], part: str) -> Table:
    """One part of a study: a line for what was varied and each method, a column per measure.

    Behind each value, half the width of its interval.
    """
    own = pick(rows, part=part)
    measures = list(dict.fromkeys(each.measure for each in own))
    result = Table(title=f"{own[0].study}: {part}")
    for name in ("varied", "method", "documents", *measures):
        result.add_column(name, justify="left" if name in ("varied", "method") else "right")
    lines: dict[tuple[str, str], dict[str, Row]] = {}
    for each in own:
        lines.setdefault((each.what, each.method), {})[each.measure] = each
    for (what, method), cells in lines.items():
        count = max(each.count for each in cells.values())
        result.add_row(what, method, str(count), *(_cell(cells.get(name)) for name in measures))
    return result


def _cell(found: Row | None) -> str:
    return f"{found.value:.3f} ±{(found.high - found.low) / 2:.3f}" if found else ""


# --- the command ----------------------------------------------------------------------------


def options_of(
    doc: str | None,
    arguments: list[str] | None,
    documents: int,
    extend: Callable[[argparse.ArgumentParser], Any] | None = None,
) -> argparse.Namespace:
    """What a study's command line says; at least 2 documents, one thread from then on."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--documents", type=int, default=documents, help="from 2")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of rows and picture")
    if extend is not None:
        extend(parser)
    options = parser.parse_args(arguments)
    if options.documents < 2:
        parser.error("an interval needs at least 2 documents")
    torch.set_num_threads(1)
    _facts()  # of the code that runs, whatever is committed meanwhile
    return options


def progress(several: Sequence[Any], title: str) -> Iterable[Any]:
    """The same, with a progress bar on stderr."""
    return track(several, title, console=Console(stderr=True))


def show(rows: Sequence[Row], verdicts: Sequence[str] = ()) -> None:
    """All parts, then sentences, on stdout."""
    console = Console(width=170)
    for part in dict.fromkeys(each.part for each in rows):
        console.print(table(rows, part))
    for line in verdicts:
        console.print(line, highlight=False)
