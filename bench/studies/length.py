"""How long a text may be, and how deep the evidence may stand: answers, explanations, their cost.

The sentence that answers a question is planted at a depth (0 first, 1 last) among sentences of
other fresh documents of its kind, of which none states the fact that is asked for; ten sentences
make a paragraph. A text is as long as a number of tokens allows, the question and the answer
included. The shipped reader was trained on texts of up to 12 sentences and reads at most its
window of 2048 tokens: 4096 are asked for, and reported as out of reach. By length and depth:

- ``right``: share of texts whose answer the model gives;
- of those, by method (and of the others ``direct, wrong answers``, where what the model said
  instead is explained): ``first``, the share whose evidence has the largest relevance of all
  sentences; ``rank`` of the evidence among all sentences, 1 the first; ``precision`` of the label;
  ``forwards``, in passes over the prompt, and ``seconds``.

``direct`` rates every token; ``hybrid`` and ``hierarchical`` may spend 64 exact runs, whatever the
length, and are measured on the first texts of each cell. Settings are the default ones. One
command::

    python -m bench.studies.length               # 12 texts per length and depth
    python -m bench.studies.length --lengths 64  # the other lengths' rows stay as they are

Rows go to ``bench/results/studies-length.csv``, the picture to ``studies-length.png``.
"""

from __future__ import annotations

import argparse
import bisect
import dataclasses
import itertools
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from atman_triton.demo import Question, load_demo_model, make_document, prompt
from atman_triton.demo.evaluate import generate_answers
from atman_triton.demo.tokenizer import CONTEXT
from bench.studies import common
from bench.studies.common import Labelled, Row

NAME = "length"
LENGTHS = (64, 128, 256, 512, 1024, 2048, 4096)
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
RUNS = 64
METHODS: dict[str, dict[str, Any]] = {
    "direct": {"method": "direct"},
    "hybrid": {"method": "hybrid", "budget": RUNS},
    "hierarchical": {"method": "hierarchical", "budget": RUNS},
}
RIGHT, FIRST, RANK, PRECISION = "right", "first", "rank", "precision"
FORWARDS, SECONDS = "forwards", "seconds"
_PARAGRAPH = 10  # sentences
_LONGEST = 10  # tokens that are generated at most, and must fit into the window
ALL = "all depths"
BEYOND = f"beyond the window of {CONTEXT} tokens: not measured"


def distractors(rng: random.Random, kind: str, asked: Question) -> Iterator[str]:
    """Sentences of fresh documents of a kind that do not state the fact asked for."""
    while True:
        document = make_document(rng, kind)
        telling = {stated.sentence for stated in document.facts if stated.name == asked.fact}
        for place, sentence in enumerate(document.sentences):
            if place not in telling and asked.answer.strip() not in sentence:
                yield sentence


def planted(
    evidence: str, others: Sequence[str], depth: float
) -> tuple[str, list[tuple[int, int]], int]:
    """A text with the evidence at a depth: the text, its sentences' characters, which one it is."""
    place = round(depth * len(others))
    sentences = [*others[:place], evidence, *others[place:]]
    spans, text = [], ""
    for number, sentence in enumerate(sentences):
        if number:
            text += " " if number % _PARAGRAPH else "\n\n"
        spans.append((len(text), len(text) + len(sentence)))
        text += sentence
    return text, spans, place


def text_of(tokenizer: Any, seed: str, tokens: int, depth: float) -> Labelled:
    """The longest text of at most so many tokens, the question and the answer among them.

    Raises: ValueError: if not even the evidence with one other sentence fits.
    """
    rng = random.Random(seed)
    document = make_document(rng)
    question = rng.choice(document.questions)
    evidence = document.sentences[question.evidence]
    several = distractors(rng, document.kind, question)
    others = list(itertools.islice(several, 1 + tokens // 4))  # no sentence has 4 tokens or fewer

    def fits(count: int) -> bool:
        text, _, _ = planted(evidence, others[:count], depth)
        # more than the window holds are counted as well, and would be warned of
        asked = tokenizer(prompt(text, question), verbose=False)["input_ids"]
        answer = tokenizer(question.answer)["input_ids"]
        return len(asked) + len(answer) <= tokens and len(asked) + _LONGEST <= CONTEXT

    count = bisect.bisect_left(range(1, len(others) + 1), True, key=lambda n: not fits(n))
    if not count:
        raise ValueError(f"tokens must hold the evidence and another sentence, got {tokens}.")
    text, spans, place = planted(evidence, others[:count], depth)
    return Labelled(text, question.text, question.answer, tuple(spans), (place,))


Found = dict[str, float]


def examine(model: Any, tokenizer: Any, case: Labelled, methods: Sequence[str]) -> dict[str, Found]:
    """What each method gives for one text and the answer that goes with it."""
    found = {}
    for name in methods:
        started = time.perf_counter()
        explanation = common.explain(model, tokenizer, case, **METHODS[name])
        seconds = time.perf_counter() - started
        rank = common.evidence_rank(explanation, case)
        found[name] = {
            FIRST: float(rank == 1),
            RANK: float(rank),
            PRECISION: common.label_precision(explanation, case),
            FORWARDS: float(explanation.provenance["forwards"]),
            SECONDS: seconds,
        }
    return found


class Cell(NamedTuple):
    """Texts of one length and depth.

    Attributes:
        right: Of each, whether it was answered right.
        found: Of those, what each method gave for the answer.
        wrong: Of the others, what ``direct`` gave for what the model said instead.
    """

    right: list[bool]
    found: list[dict[str, Found]]
    wrong: list[dict[str, Found]]


def cell(
    model: Any, tokenizer: Any, length: int, depth: float, documents: int, costly: int
) -> Cell:
    """Read and explain the texts of one length and depth, ``costly`` of them by every method."""
    whole = Cell([], [], [])
    for number in range(documents):
        case = text_of(tokenizer, f"{NAME}-{number}", length, depth)
        (said,) = generate_answers(model, tokenizer, [case.prompt])
        whole.right.append(said == case.answer)
        if whole.right[-1]:
            methods = list(METHODS) if len(whole.found) < costly else ["direct"]
            whole.found.append(examine(model, tokenizer, case, methods))
        elif said:
            own = dataclasses.replace(case, answer=said)
            whole.wrong.append(examine(model, tokenizer, own, ["direct"]))
    return whole


def rows_of(length: int, what: str, cells: Sequence[Cell]) -> list[Row]:
    """Rows of some cells of one length together."""
    part = f"{length} tokens"
    right = [float(fits) for each in cells for fits in each.right]
    rows = [common.mean_row(NAME, part, what, "", RIGHT, right)]
    for wrong, name in [*((False, name) for name in METHODS), (True, "direct")]:
        found = [each for own in cells for each in (own.wrong if wrong else own.found)]
        for measure in (FIRST, RANK, PRECISION, FORWARDS, SECONDS):
            values = [each[name][measure] for each in found if name in each]
            if values:
                method = f"{name}, wrong answers" if wrong else name
                rows.append(common.mean_row(NAME, part, what, method, measure, values))
    return rows


def measure(model: Any, tokenizer: Any, length: int, documents: int, costly: int) -> list[Row]:
    """All depths of one length, and all together; of a length beyond the window that it is."""
    if length > CONTEXT:
        return [common.mean_row(NAME, f"{length} tokens", BEYOND, "", RIGHT, [])]
    cells = {
        depth: cell(model, tokenizer, length, depth, documents, costly)
        for depth in common.progress(DEPTHS, f"{length} tokens")
    }
    rows = [
        row for depth, own in cells.items() for row in rows_of(length, f"depth {depth:g}", [own])
    ]
    return [*rows, *rows_of(length, ALL, list(cells.values()))]


# --- for people -----------------------------------------------------------------------------


def verdicts(rows: Sequence[Row]) -> list[str]:
    """By length, in plain words."""
    lines = []
    for part in dict.fromkeys(row.part for row in rows):
        own = common.pick(rows, part=part, what=ALL)
        if not own:
            lines.append(f"{part}: {BEYOND}")
            continue
        value = {(row.method, row.measure): row for row in own}
        line = f"{part}: {value['', RIGHT].value:.0%} answered right"
        if ("direct", FIRST) in value:
            first, seconds = value["direct", FIRST], value["direct", SECONDS]
            line += (
                f"; of these {first.count}, direct puts the evidence first in {first.value:.0%}, "
                f"in {seconds.value:.2f} s each"
            )
        lines.append(line)
    return lines


def draw(rows: Sequence[Row], path: Path) -> None:
    """Length by depth: answers that are right, and evidence that is found where they are."""
    from matplotlib.figure import Figure

    lengths = [length for length in LENGTHS if common.pick(rows, part=f"{length} tokens")]
    figure = Figure(figsize=(11, 4), layout="constrained")
    panels = figure.subplots(1, 3)
    shown = (
        (RIGHT, "", "answered right"),
        (FIRST, "direct", "evidence first"),
        (PRECISION, "direct", "precision"),
    )
    for axes, (name, method, title) in zip(panels, shown, strict=True):
        grid = np.full((len(DEPTHS), len(lengths)), np.nan)
        for (y, depth), (x, length) in itertools.product(enumerate(DEPTHS), enumerate(lengths)):
            own = common.pick(
                rows, part=f"{length} tokens", what=f"depth {depth:g}", method=method, measure=name
            )
            if own:
                grid[y, x] = own[0].value
                text = f"{own[0].value:.2f}" + ("" if name == RIGHT else f"\nof {own[0].count}")
                dark = own[0].value > 0.6
                axes.text(
                    x, y, text, ha="center", va="center", fontsize=7, color="w" if dark else "k"
                )
            else:
                axes.text(x, y, "–", ha="center", va="center", fontsize=8, color="grey")
        axes.imshow(grid, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        axes.set_xticks(range(len(lengths)), [str(length) for length in lengths], fontsize=8)
        axes.set_yticks(range(len(DEPTHS)), [f"{depth:g}" for depth in DEPTHS], fontsize=8)
        axes.set_xlabel("tokens of the prompt and the answer")
        axes.set_title(title if name == RIGHT else f"{title}, of right answers", fontsize=10)
    panels[0].set_ylabel("depth of the evidence")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main(arguments: list[str] | None = None) -> None:
    """Command line."""

    def extend(parser: argparse.ArgumentParser) -> None:
        text = "of each length and depth, how many right ones every method explains"
        parser.add_argument("--costly", type=int, default=2, help=text)
        parser.add_argument(
            "--lengths", type=int, nargs="+", default=list(LENGTHS), help="tokens, from 64"
        )

    options = common.options_of(__doc__, arguments, 12, extend)
    model, tokenizer = load_demo_model()
    path = options.out / f"studies-{NAME}.csv"
    fresh = {f"{length} tokens" for length in options.lengths}
    rows = [row for row in common.read(path) if row.part not in fresh]
    for length in options.lengths:
        rows += measure(model, tokenizer, length, options.documents, options.costly)
        rows.sort(key=lambda row: int(row.part.split()[0]))
        common.write(rows, options.out)
    draw(rows, options.out / "studies-length.png")
    common.show(rows, verdicts(rows))


if __name__ == "__main__":
    main()
