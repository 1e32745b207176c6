"""A fact that stands twice: which suppression still finds it? On the shipped model.

The paper suppresses similar tokens together (3.3) because of redundancy: while one mention is
suppressed, the model reads the other. Documents here state one fact in two sentences (see
``bench.restated``). Only those count that the model answers right with both sentences and with
either one alone, but wrong without both: the fact is redundant, and is needed. They come in three
kinds:

- ``twice``: the sentence is paraphrased, the value in it is not;
- ``reworded``: other documents, where the value is in other words as well ("nine days" and
  "9 days", two states of the country asked for);
- ``once``: the documents of ``twice`` without the second sentence, the control.

What is suppressed, in mode ``min_shift`` with factor 0.1:

- ``single``: one token, or one sentence, at a time;
- ``correlated``: the same with all tokens whose input embeddings are similar (``Explainer``'s
  ``similarity`` and ``rule``); where that is dear, exact effects of tokens, at one threshold and by
  the rule ``released`` alone, and the control at one threshold;
- ``grouped``: ``pairs``: every pair of sentences as one unit; ``known``: the two sentences of the
  fact as one unit beside all others, for someone who knows where it stands.

*Found*, of one document: every unit that holds the whole fact ranks above every other unit, and its
relevance is at least half of the rise of the answer's loss (nats per token) when the sentences with
the fact are deleted from the input. The units with the fact: each of its sentences (``once``: the
one), where single tokens are suppressed with the relevance of its most relevant token; of pairs,
the pair of the two (``once``: every pair with the one). *Share*: the least relevance of these units
over that rise; *others*: the largest relevance of the other units over it. One command::

    python -m bench.redundancy                   # 100 documents of each kind, about 7 minutes

Rows go to ``bench/results/redundancy.csv``, the picture to ``bench/results/redundancy.png``.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from atman_triton.demo import load_demo_model, prompt
from atman_triton.demo.evaluate import generate_answers
from atman_triton.engine import Effect, Engine, Settings, Unit, undisturbed
from atman_triton.tokens import encode_prompt
from bench.harness import RESULTS
from bench.rates import mean, provenance, write
from bench.removal import losses, without
from bench.restated import Relation, Restated, restate, spans

MODE, FACTOR = "min_shift", 0.1
THRESHOLDS = (0.2, 0.3, 0.4, 0.6)
RULES = ("released", "paper")
_ONE = 0.6  # the threshold that the authors' code takes, where only one is measured
EFFECTS: dict[str, Effect] = {"exact": "total", "direct": "direct"}
STANDS = ("twice", "reworded", "once")
_RELATIONS: dict[str, Relation] = {"twice": "same", "reworded": "synonym"}
_SHARE = 0.5  # of the rise by deletion
_BATCH = 32


class Setting(NamedTuple):
    """What is suppressed, and how the effect is measured."""

    what: str
    unit: str
    method: str
    rule: str | None = None
    similarity: float | None = None

    @property
    def name(self) -> str:
        """``correlated 0.4 (released), token``, for instance."""
        like = f" {self.similarity} ({self.rule})" if self.similarity else ""
        return f"{self.what}{like}, {self.unit}"


def settings(stands: str) -> list[Setting]:
    """All that is compared on one kind of document."""
    found = []
    for method in EFFECTS:
        found += [Setting("single", unit, method) for unit in ("token", "sentence")]
        for unit in ("token", "sentence"):
            dear = (method, unit) == ("exact", "token")
            thresholds = (_ONE,) if dear or stands == "once" else THRESHOLDS
            found += [
                Setting("correlated", unit, method, rule, similarity)
                for rule in (RULES[:1] if dear else RULES)
                for similarity in thresholds
            ]
        found += [Setting("grouped", unit, method) for unit in ("pairs", "known")]
    return found


@dataclasses.dataclass(frozen=True)
class Found:
    """What a setting gave for one document; see above."""

    first: bool
    share: float
    others: float

    @property
    def found(self) -> bool:
        """Whether the fact was found."""
        return self.first and self.share >= _SHARE


@dataclasses.dataclass(frozen=True)
class Row:
    """Means over documents, ``_se`` their standard errors."""

    stands: str
    what: str
    unit: str
    rule: str | None
    similarity: float | None
    method: str
    documents: int
    found: float
    found_se: float
    first: float
    first_se: float
    share: float
    share_se: float
    others: float
    others_se: float
    device: str
    torch: str
    transformers: str
    commit: str
    date: str


def redundant_cases(
    model: Any, tokenizer: Any, relation: Relation, count: int
) -> tuple[list[Restated], int]:
    """The first documents whose fact is redundant and needed; how many were read for them."""
    found: list[Restated] = []
    tried = 0
    while len(found) < count:
        several = [restate(f"redundancy-{tried + n}", relation) for n in range(_BATCH)]
        right = []
        for absent in ((), ("twin",), ("first",), ("first", "twin")):
            prompts = [
                prompt(" ".join(r.without(*(getattr(r, name) for name in absent))), r.question)
                for r in several
            ]
            said = generate_answers(model, tokenizer, prompts)
            right.append([a == r.question.answer for a, r in zip(said, several, strict=True)])
        for restated, answers in zip(several, zip(*right, strict=True), strict=True):
            if len(found) < count:
                tried += 1
                if answers == (True, True, True, False):
                    found.append(restated)
    return found, tried


def examine(
    model: Any,
    tokenizer: Any,
    sentences: Sequence[str],
    evidence: Sequence[int],
    question: Any,
    chosen: Sequence[Setting],
) -> dict[Setting, Found]:
    """One document by some settings.

    Args:
        evidence: the one or two of the sentences that hold the fact.
    """
    words = encode_prompt(prompt(" ".join(sentences), question), tokenizer, model.config.vocab_size)
    answer = tokenizer(question.answer)["input_ids"]
    tokens = [
        tuple(i for i, own in enumerate(words.spans) if own and own[0] < stop and own[1] > start)
        for start, stop in spans(sentences)
    ]
    gone = [position for place in evidence for position in tokens[place]]
    deleted = losses(model, [without(words.ids, gone)], answer) - losses(model, [words.ids], answer)
    rise = float(deleted)
    inputs = {"input_ids": torch.tensor([words.ids])}
    found = {}
    with undisturbed(model):
        for how, own in itertools.groupby(
            sorted(chosen, key=lambda s: (s.rule or "", s.similarity or 0)),
            key=lambda s: (s.rule, s.similarity),
        ):
            engine = Engine(model, inputs, [answer], _suppression(*how))
            for setting in own:
                groups = list(units_of(setting, tokens, evidence))
                flat = [Unit(unit) for _, units in groups for unit in units]
                suppressed = engine.perturb(flat, EFFECTS[setting.method])
                scores = (engine.base_logprobs - suppressed).double().mean(-1).tolist()
                found[setting] = judged(groups, scores, rise)
    return {setting: found[setting] for setting in chosen}


def _suppression(rule: str | None, similarity: float | None) -> Settings:
    if similarity is None:
        return Settings(FACTOR, MODE)
    return Settings(FACTOR, MODE, similarity=similarity, rule=rule)  # pyright: ignore[reportArgumentType]


Group = tuple[bool, list[tuple[int, ...]]]
"""Whether it holds the whole fact, and the units that it is judged by."""


def units_of(
    setting: Setting, tokens: Sequence[tuple[int, ...]], evidence: Sequence[int]
) -> Iterator[Group]:
    """What is suppressed: sentences by their tokens, as they are, in pairs, or with a known pair.

    Args:
        tokens: of each sentence, the positions of its tokens.
    """
    places = range(len(tokens))
    if setting.unit == "token":
        for place in places:
            yield place in evidence, [(position,) for position in tokens[place]]
    elif setting.unit == "sentence":
        for place in places:
            yield place in evidence, [tokens[place]]
    elif setting.unit == "pairs":
        for pair in itertools.combinations(places, 2):
            yield set(evidence) <= set(pair), [tokens[pair[0]] + tokens[pair[1]]]
    else:
        yield True, [tuple(position for place in evidence for position in tokens[place])]
        for place in places:
            if place not in evidence:
                yield False, [tokens[place]]


def judged(groups: Sequence[Group], scores: Sequence[float], rise: float) -> Found:
    """Whether the units with the fact stand out.

    Args:
        scores: of all groups' units, one group after the other.
        rise: of the loss, when the fact is deleted.
    """
    rest = iter(scores)
    best = [(holds, max(next(rest) for _ in units)) for holds, units in groups]
    least = min(score for holds, score in best if holds)
    others = max(score for holds, score in best if not holds)
    return Found(least > others, least / rise, others / rise)


# --- all documents --------------------------------------------------------------------------

_worker: dict[str, Any] = {}


def _start() -> None:
    torch.set_num_threads(1)
    _worker["model"], _worker["tokenizer"] = load_demo_model()


@contextmanager
def _mapping(processes: int) -> Iterator[Callable[..., Iterable[Any]]]:
    """``map`` over some processes of one thread each, or in this one."""
    if not processes:
        yield map
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, _start) as pool:
        yield pool.map


def examine_all(stands: str, restated: Restated) -> dict[str, dict[Setting, Found]]:
    """One document, by kind; of ``twice``, the control as well."""
    several = {stands: (restated.sentences, sorted((restated.first, restated.twin)))}
    if stands == "twice":
        several["once"] = (restated.once.sentences, [restated.question.evidence])
    model, tokenizer = _worker["model"], _worker["tokenizer"]
    return {
        kind: examine(model, tokenizer, sentences, evidence, restated.question, settings(kind))
        for kind, (sentences, evidence) in several.items()
    }


def summarise(
    stands: str, found: Sequence[dict[Setting, Found]], facts: dict[str, str]
) -> list[Row]:
    """A row for each setting, over at least two documents of one kind."""
    rows = []
    for setting in found[0]:
        own = [each[setting] for each in found]
        rows.append(
            Row(
                stands,
                setting.what,
                setting.unit,
                setting.rule,
                setting.similarity,
                setting.method,
                len(own),
                *mean([float(each.found) for each in own]),
                *mean([float(each.first) for each in own]),
                *mean([each.share for each in own]),
                *mean([each.others for each in own]),
                **facts,
            )
        )
    return rows


# --- for people -----------------------------------------------------------------------------


def setting_of(row: Row) -> Setting:
    """Whose row it is."""
    return Setting(row.what, row.unit, row.method, row.rule, row.similarity)


def by_setting(rows: Sequence[Row], method: str) -> dict[Setting, dict[str, Row]]:
    """The rows of one method: of each setting, those of every kind of document."""
    found: dict[Setting, dict[str, Row]] = {}
    for row in rows:
        if row.method == method:
            found.setdefault(setting_of(row), {})[row.stands] = row
    return found


def table(rows: Sequence[Row], method: str) -> Table:
    """One method; found, and in brackets the shares of the fact and of the best other unit."""
    result = Table(title=f"{method}: found (share, others), {rows[0].documents} documents each")
    result.add_column("suppressed")
    for stands in STANDS:
        result.add_column(stands, justify="right")
    for setting, own in by_setting(rows, method).items():
        cells = []
        for stands in STANDS:
            row = own.get(stands)
            cells.append(
                f"{row.found:.0%} ± {row.found_se:.0%} ({row.share:.2f}, {row.others:.2f})"
                if row
                else ""
            )
        result.add_row(setting.name, *cells)
    return result


def verdicts(rows: Sequence[Row]) -> list[str]:
    """The best of each kind of suppression, in plain words."""
    lines = []
    for stands, method in itertools.product(STANDS, EFFECTS):
        parts = []
        for what in ("single", "correlated", "grouped"):
            own = [r for r in rows if (r.stands, r.method, r.what) == (stands, method, what)]
            best = max(own, key=lambda row: row.found)
            parts.append(f"{setting_of(best).name} finds {best.found:.0%} ± {best.found_se:.0%}")
        lines.append(f"{stands}, {method}: {'; '.join(parts)}")
    return lines


def draw(rows: Sequence[Row], path: Path) -> None:
    """Share of documents in which the fact was found, by kind of document."""
    from matplotlib.figure import Figure

    colours = dict(zip(STANDS, ("#2166ac", "#67a9cf", "0.7"), strict=True))
    figure = Figure(figsize=(12, 6), layout="constrained")
    panels = figure.subplots(1, len(EFFECTS), squeeze=False)[0]
    for method, axes in zip(EFFECTS, panels, strict=True):
        own = by_setting(rows, method)
        for index, (stands, colour) in enumerate(colours.items()):
            part = {
                place: kinds[stands] for place, kinds in enumerate(own.values()) if stands in kinds
            }
            axes.barh(
                [place + 0.27 * (index - 1) for place in part],
                [row.found for row in part.values()],
                0.27,
                xerr=[row.found_se for row in part.values()],
                color=colour,
                label=stands,
            )
        axes.set_yticks(range(len(own)), [setting.name for setting in own], fontsize=8)
        axes.invert_yaxis()
        axes.set_xlim(0, 1.05)
        axes.set_title(method)
        axes.set_xlabel("documents in which the fact is found")
        axes.grid(axis="x", alpha=0.2)
    panels[-1].legend(loc=(0.7, 0.5), fontsize=8, title="the fact stands", title_fontsize=8)
    figure.suptitle(f"{rows[0].documents} documents each; bars: one standard error", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--documents", type=int, default=100, help="of each kind, from 2")
    parser.add_argument("--processes", type=int, default=2, help="0: in this one")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of rows and picture")
    options = parser.parse_args(arguments)
    if options.documents < 2:
        parser.error("a standard error needs at least 2 documents")
    _start()
    console = Console(width=150)
    facts = provenance()
    rows: list[Row] = []
    with _mapping(options.processes) as mapped:
        for stands, relation in _RELATIONS.items():
            cases, tried = redundant_cases(
                _worker["model"], _worker["tokenizer"], relation, options.documents
            )
            console.print(f"{stands}: {len(cases)} of {tried} documents are redundant and needed")
            done = mapped(functools.partial(examine_all, stands), cases)
            found = list(track(done, stands, len(cases), console=Console(stderr=True)))
            for kind in found[0]:
                rows += summarise(kind, [each[kind] for each in found], facts)
    write(rows, options.out / "redundancy.csv")
    draw(rows, options.out / "redundancy.png")
    for method in EFFECTS:
        console.print(table(rows, method))
    for line in verdicts(rows):
        console.print(line)


if __name__ == "__main__":
    main()
