"""Does a result say itself when it is a bad one? Its warning signs, and how well they predict.

The model's own answer is explained, right or wrong, on documents of five kinds, so that bad
explanations exist: ``ordinary`` ones that are answered right; ``redundant`` ones, which state the
fact twice (``bench.restated``); ``absent``, asked for a fact that is not there, and ``removed``,
where its sentence was taken out (``bench.figure19``); and ``long`` ones of 512 tokens
(``bench.studies.length``).

*Bad* is read in three ways:

- ``precision`` of the label is below 0.5 (0 where no sentence holds the answer, or none of the
  relevance is positive);
- ``share``: what the evidence has, all its relevances together, is below half of the rise of the
  loss when its sentences are deleted (0 where there are none, or the rise is below 0.1 nats per
  token): a share of the relevance says nothing where all of it is next to nothing;
- ``removal gap`` in the lowest tenth of the documents compared.

The signs, each so that more of it should be worse:

- ``additivity``: |effect of suppressing the document's five largest units together less the sum
  of their scores|, over the larger of the two in size;
- ``negative scores``: share of the document's and question's units whose score is negative;
- ``negative weight``: what the negative ones have of the sum of all |scores|;
- ``spread``: effective number of sentences (``bench.figure19``);
- ``faint``: the document's largest score, negated: nothing in it matters;
- ``improbable``: 1 less the answer's probability (geometric mean over its tokens), which needs no
  explanation;
- ``disagreement``: 1 less the linear correlation of direct and exact scores.

``AUROC``: how often a bad explanation has more of a sign than a good one, ties counting half; 0.5
is chance. ``all`` is over all kinds, ``in the text`` without ``absent`` and ``removed``, and
``ordinary and redundant`` over these two.

Part ``rule``: an explanation is doubted if its answer's probability is below 0.95, its spread above
1.5 sentences, or no score in the document above 0.1 nats; ``caught`` is the share of bad ones that
are doubted, ``false alarms`` of good ones. The three bounds were set on other documents, those of a
run before (commit 60a59b4). One command::

    python -m bench.studies.signs                # 40 ordinary documents, and 80 others

Rows go to ``bench/results/studies-signs.csv``, the picture to ``studies-signs.png``.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch

import atman_triton as atman
from atman_triton.demo import load_demo_model
from atman_triton.demo.evaluate import generate_answers
from atman_triton.engine import Effect, Engine, Settings, Unit, undisturbed
from bench.figure19 import Asked, asked, spread
from bench.removal import Removal, losses, without
from bench.restated import restate, spans
from bench.studies import common
from bench.studies.agreement import linear
from bench.studies.common import Labelled, Row
from bench.studies.length import DEPTHS, text_of
from bench.studies.truth import GAP, PRECISION

NAME = "signs"
KINDS = {"ordinary": 1.0, "redundant": 0.6, "absent": 0.6, "removed": 0.6, "long": 0.2}
"""Kind of document, and how many there are for each ordinary one."""

METHODS: dict[str, Effect] = {"direct": "direct", "exact": "total"}
SIGNS = (
    "additivity",
    "negative scores",
    "negative weight",
    "spread",
    "faint",
    "improbable",
    "disagreement",
)
POPULATIONS = {
    "all": tuple(KINDS),
    "in the text": ("ordinary", "redundant", "long"),
    "ordinary and redundant": ("ordinary", "redundant"),
}
SEED = f"{NAME}-report"
RULE = {"improbable": 0.05, "spread": 1.5, "faint": -0.1}
"""Signs, and above what each makes an explanation doubtful."""

CAUGHT, ALARMS = "caught", "false alarms"
SHARE = "share"
BAD = {
    PRECISION: "precision below 0.5",
    SHARE: "share below 0.5",
    GAP: "removal gap in the lowest tenth",
}
_RISE = 0.1  # nats per token of the answer
_MODE, _FACTOR = "min_shift", 0.1
_TOP, _LONG, _DRAWS = 5, 512, 1000


# --- documents ------------------------------------------------------------------------------


def _asked(each: Asked, evidence: tuple[int, ...]) -> Labelled:
    text = " ".join(each.sentences)
    return Labelled(text, each.question, "", tuple(spans(each.sentences)), evidence)


def case_of(kind: str, number: int, tokenizer: Any) -> Labelled:
    """A document of a kind, with the answer that is right; none where there is none."""
    seed = f"{SEED}-{kind}-{number}"
    if kind == "redundant":
        twin = restate(seed, "same")
        return Labelled(
            " ".join(twin.sentences),
            twin.question.text,
            twin.question.answer,
            tuple(spans(twin.sentences)),
            tuple(sorted((twin.first, twin.twin))),
        )
    if kind in ("absent", "removed"):
        return _asked(asked(seed)[kind], ())
    depth = random.Random(seed).choice(DEPTHS)
    return text_of(tokenizer, seed, _LONG, depth)


def cases_of(model: Any, tokenizer: Any, kind: str, count: int) -> list[Labelled]:
    """``count`` documents of a kind, each with what the model says of it.

    Ordinary and redundant ones are answered right; where the model says nothing at all, there is
    nothing to explain, and another document takes the place.
    """
    if kind == "ordinary":
        return common.documents(model, tokenizer, count, SEED)
    found: list[Labelled] = []
    for number in itertools.count():
        case = case_of(kind, number, tokenizer)
        (said,) = generate_answers(model, tokenizer, [case.prompt])
        if said if kind != "redundant" else said == case.answer:
            found.append(dataclasses.replace(case, answer=said))
        if len(found) == count:
            break
    return found


# --- signs ----------------------------------------------------------------------------------


def additivity(together: float, total: float) -> float:
    """How far an effect is from a sum, over the larger of the two in size; 0 if both are 0."""
    size = max(abs(together), abs(total))
    return abs(together - total) / size if size else 0.0


def negative(scores: Sequence[float]) -> tuple[float, float]:
    """Share of negative scores, and of their weight in the sum of sizes."""
    weight = sum(abs(score) for score in scores)
    below = sum(-score for score in scores if score < 0)
    return fmean(score < 0 for score in scores), below / weight if weight else 0.0


@dataclasses.dataclass(frozen=True)
class Found:
    """One explanation: what it is worth, and its signs."""

    precision: float
    share: float
    gap: float
    signs: dict[str, float]


def examine(model: Any, tokenizer: Any, case: Labelled, number: int) -> dict[str, Found]:
    """One document by both methods."""
    explained = {name: common.explain(model, tokenizer, case, method=name) for name in METHODS}
    removal = Removal(model, tokenizer, case.case, explained["exact"], number)
    gaps = removal.gaps({name: each.relevance.tolist() for name, each in explained.items()})
    inputs = {"input_ids": torch.tensor([removal.ids])}
    with undisturbed(model):
        engine = Engine(model, inputs, [removal.answer], Settings(_FACTOR, _MODE))
        scores = {
            name: removal.of_prompt(each.relevance.tolist()) for name, each in explained.items()
        }
        apart = 1 - _defined(linear(scores["direct"], scores["exact"]))
        where = common.places(explained["exact"], case)
        holding = [where[unit] for unit in removal.inside]
        document = [place for place, sentence in enumerate(holding) if sentence is not None]
        rise = _rise(removal, [p for p in document if holding[p] in case.evidence])
        found = {}
        for name, each in explained.items():
            order = sorted(document, key=lambda p: -scores[name][p])[:_TOP]
            unit = Unit(tuple(sorted(removal.positions[place] for place in order)))
            changed = engine.perturb([unit], METHODS[name])
            together = float((engine.base_logprobs - changed[0]).double().mean())
            precision = _defined(common.label_precision(each, case))
            own = _signs(each, case, scores[name], order, together)
            evidence = sum(scores[name][p] for p in document if holding[p] in case.evidence)
            share = evidence / rise if rise >= _RISE else 0.0
            found[name] = Found(precision, share, gaps[name], {**own, "disagreement": apart})
    return found


def _rise(removal: Removal, places: Sequence[int]) -> float:
    """Of the loss, nats per token of the answer, when some of the prompt's tokens are deleted."""
    if not places:
        return 0.0
    gone = [removal.positions[place] for place in places]
    less = without(removal.ids, gone)
    deleted, base = (losses(removal.model, [ids], removal.answer) for ids in (less, removal.ids))
    return float(deleted - base)


def _defined(value: float) -> float:
    """0 where it is not."""
    return 0.0 if math.isnan(value) else value


def _signs(
    explanation: atman.Explanation,
    case: Labelled,
    scores: Sequence[float],
    order: Sequence[int],
    together: float,
) -> dict[str, float]:
    """All signs of one explanation but the disagreement of two.

    Args:
        scores: of the prompt's units.
        order: the document's largest.
        together: what suppressing these at once does.
    """
    share, weight = negative(scores)
    logprob = explanation.base_logprobs.double().mean().item()
    shape = spread(common.by_sentence(explanation, case), logprob)
    return {
        "additivity": additivity(together, sum(scores[place] for place in order)),
        "negative scores": share,
        "negative weight": weight,
        "spread": shape.effective,
        "faint": -scores[order[0]],
        "improbable": 1 - shape.likely,
    }


# --- how well they predict --------------------------------------------------------------------


def auroc(bad: Sequence[float], good: Sequence[float]) -> tuple[float, float, float]:
    """How often a bad one is above a good one, ties half, and its interval by bootstrap.

    Bad and good ones are drawn anew each for themselves; NaN without one of both.
    """
    if not bad or not good:
        return math.nan, math.nan, math.nan
    pairs = np.sign(np.asarray(bad)[:, None] - np.asarray(good)[None, :]) / 2 + 0.5  # [bad, good]
    rng = np.random.default_rng(0)
    # how often each is drawn, over how many there are: [draws, bad], [draws, good]
    first = rng.multinomial(len(bad), [1 / len(bad)] * len(bad), _DRAWS) / len(bad)
    second = rng.multinomial(len(good), [1 / len(good)] * len(good), _DRAWS) / len(good)
    values = ((first @ pairs) * second).sum(-1)
    low, high = np.quantile(values, (0.025, 0.975))
    return float(pairs.mean()), float(low), float(high)


def split(found: Sequence[Found], reading: str) -> tuple[list[Found], list[Found]]:
    """Bad ones and good ones."""
    if reading == PRECISION:
        bad = [each.precision < 0.5 for each in found]
    elif reading == SHARE:
        bad = [each.share < 0.5 for each in found]
    else:
        lowest = sorted(each.gap for each in found)[max(1, round(0.1 * len(found))) - 1]
        bad = [each.gap <= lowest for each in found]
    marked = list(zip(found, bad, strict=True))
    return [each for each, is_bad in marked if is_bad], [
        each for each, is_bad in marked if not is_bad
    ]


Documents = Mapping[str, Sequence[Mapping[str, Found]]]
"""By kind, of each document what the methods gave."""


def rows_of(documents: Documents) -> list[Row]:
    """What the kinds are like, and how well each sign predicts."""
    rows = []
    for (kind, several), method in itertools.product(documents.items(), METHODS):
        own = [each[method] for each in several]
        rows.append(_mean("kinds", kind, method, PRECISION, [each.precision for each in own]))
        rows.append(_mean("kinds", kind, method, SHARE, [each.share for each in own]))
        rows.append(_mean("kinds", kind, method, GAP, [each.gap for each in own]))
        for sign in SIGNS:
            rows.append(_mean("kinds", kind, method, sign, [each.signs[sign] for each in own]))
    for reading, (population, kinds), method in itertools.product(
        BAD, POPULATIONS.items(), METHODS
    ):
        own = [each[method] for kind in kinds for each in documents[kind]]
        bad, good = split(own, reading)
        part = f"AUROC, {BAD[reading]}"
        for sign in SIGNS:
            numbers = auroc([e.signs[sign] for e in bad], [e.signs[sign] for e in good])
            what = f"{population}: {len(bad)} bad"
            rows.append(common.row(NAME, part, what, method, sign, numbers, len(own)))
    return rows + rule_rows(documents)


def doubtful(found: Found) -> bool:
    """Whether one of the rule's signs is above its bound."""
    return any(found.signs[sign] > bound for sign, bound in RULE.items())


def rule_rows(documents: Documents) -> list[Row]:
    """How many bad and good explanations the rule doubts, by reading, population and method."""
    rows = []
    several = itertools.product((PRECISION, SHARE), POPULATIONS.items(), METHODS)
    for reading, (population, kinds), method in several:
        own = [each[method] for kind in kinds for each in documents[kind]]
        what = f"{population}; bad: {BAD[reading]}"
        for measure, group in zip((CAUGHT, ALARMS), split(own, reading), strict=True):
            doubted = [float(doubtful(each)) for each in group]
            rows.append(_mean("rule", what, method, measure, doubted))
    return rows


def _mean(part: str, what: str, method: str, measure: str, values: Sequence[float]) -> Row:
    return common.mean_row(NAME, part, what, method, measure, values)


def verdicts(rows: Sequence[Row]) -> list[str]:
    """The best sign of each part, population and method."""
    lines = []
    for part in dict.fromkeys(row.part for row in rows if row.part.startswith("AUROC")):
        own = common.pick(rows, part=part)
        for key in dict.fromkeys((row.what, row.method) for row in own):
            several = [row for row in own if (row.what, row.method) == key]
            best = max(several, key=lambda row: -1 if math.isnan(row.value) else row.value)
            lines.append(
                f"{part}; {key[0]} of {best.count}, {key[1]}: {best.measure} "
                f"{best.value:.3f} [{best.low:.3f}, {best.high:.3f}]"
            )
    return lines


def draw(rows: Sequence[Row], path: Path) -> None:
    """AUROC of every sign, by population and method, a panel per reading of bad."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 4.6), layout="constrained")
    panels = figure.subplots(1, len(BAD), sharey=True)
    colours = dict(zip(POPULATIONS, ("#2166ac", "#e08214", "#b2182b"), strict=True))
    for axes, text in zip(panels, BAD.values(), strict=True):
        own = common.pick(rows, part=f"AUROC, {text}")
        for index, (population, method) in enumerate(itertools.product(POPULATIONS, METHODS)):
            line = [r for r in own if r.method == method and r.what.startswith(f"{population}:")]
            axes.errorbar(
                [row.value for row in line],
                [place + 0.13 * (index - 2.5) for place in range(len(line))],
                xerr=[
                    [row.value - row.low for row in line],
                    [row.high - row.value for row in line],
                ],
                fmt="o" if method == "direct" else "s",
                markersize=4,
                capsize=2,
                color=colours[population],
                label=f"{population}, {method}",
            )
        axes.axvline(0.5, color="grey", linestyle=":")
        axes.set_yticks(range(len(SIGNS)), SIGNS, fontsize=9)
        axes.set_xlim(0, 1.02)
        axes.set_xlabel("AUROC")
        axes.set_title(f"bad: {text}", fontsize=10)
        axes.grid(axis="x", alpha=0.2)
    panels[0].invert_yaxis()
    figure.legend(
        *panels[0].get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=6
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    options = common.options_of(__doc__, arguments, 40)
    model, tokenizer = load_demo_model()
    documents = {}
    for kind, share in KINDS.items():
        cases = cases_of(model, tokenizer, kind, max(2, round(share * options.documents)))
        numbered = common.progress(list(enumerate(cases)), f"{NAME}: {kind}")
        documents[kind] = [examine(model, tokenizer, case, number) for number, case in numbered]
    rows = rows_of(documents)
    common.write(rows, options.out)
    draw(rows, options.out / "studies-signs.png")
    common.show(rows, verdicts(rows))


if __name__ == "__main__":
    main()
