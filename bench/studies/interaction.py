"""Does the similarity of input embeddings tell which tokens stand for one another? (Paper, A.3.)

Where two tokens say the same, suppressing either changes little, because the other remains, and
suppressing both changes much: their *interaction* is positive. Of tokens i and j it is

    ΔL(ij) - ΔL(i) - ΔL(j)

with ΔL the rise of the answer's loss (nats per token) when they are suppressed, the pair as one
unit; mode ``min_shift``, factor 0.1. The paper suppresses a token along with those whose input
embeddings have a cosine similarity S of at least κ with its own; that helps as far as S predicts
interaction. Documents are of three kinds: ``ordinary`` ones; ``twice``, whose fact stands in two
sentences with the same words for its value, and ``reworded``, with other words for it
(``bench.redundancy``: the model answers right with either sentence, and wrong without both).

*Pairs*: ``all`` of a document's tokens, by direct effects; of the 16 tokens with the largest direct
effects (``largest``), by direct and by exact ones. A pair *stands for one another* if its
interaction is at least 0.1. *AUC*: how often S of such a pair is above S of another pair, ties
half; 0.5 is chance; documents without such a pair do not count. Beside S, what needs no similarity:
``nearness`` in the text, and the ``product`` of the two effects, as only what matters can interact.
``unlike ids``: S again, over pairs of different tokens alone, as the same token twice has S = 1.
``twentieth``: S, with the largest twentieth of a document's interactions instead, however small.
*Alike*: pairs with S of at least 0.6; their mean interaction, and the share of them that stand for
one another. One command::

    python -m bench.studies.interaction          # 22 documents of each kind

Rows go to ``bench/results/studies-interaction.csv``, the picture to ``studies-interaction.png``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from atman_triton.demo import load_demo_model
from atman_triton.engine import Effect, Engine, Settings, Unit, undisturbed
from atman_triton.evaluate.metrics import auroc, rank_correlation
from atman_triton.tokens import encode_prompt
from bench.redundancy import redundant_cases
from bench.restated import Relation, spans
from bench.studies import common
from bench.studies.common import Labelled, Row

NAME = "interaction"
KINDS: dict[str, Relation | None] = {"ordinary": None, "twice": "same", "reworded": "synonym"}
READINGS: dict[str, tuple[str, Effect]] = {
    "direct": ("all", "direct"),
    "direct, 16 largest": ("largest", "direct"),
    "exact, 16 largest": ("largest", "total"),
}
"""Name of a row: which pairs, and which effects."""

SIMILARITY, UNLIKE = "AUC of similarity", "AUC of similarity, unlike ids"
TWENTIETH = "AUC of similarity, twentieth"
NEARNESS, PRODUCT = "AUC of nearness", "AUC of product"
CORRELATION = "rank correlation"
ALIKE, OTHERS = "interaction of alike", "interaction of others"
FOUND, FOUND_OTHERS = "share of alike", "share of others"
PREDICTORS = (SIMILARITY, UNLIKE, TWENTIETH, NEARNESS, PRODUCT)
MEASURES = (*PREDICTORS, CORRELATION, ALIKE, OTHERS, FOUND, FOUND_OTHERS)
BINS = (-1.0, 0.0, 0.1, 0.2, 0.3, 0.4, 0.6, 0.999, 1.001)  # of similarity, in the picture
_MODE, _FACTOR = "min_shift", 0.1
_LARGEST, _SHARE, _ALIKE = 16, 0.05, 0.6
_LEAST = 0.1  # nats per token of the answer


class Pairs(NamedTuple):
    """Pairs of tokens of one document, in one order.

    Attributes:
        similarity: ``[pairs]``, cosine of the two input embeddings.
        interaction: ``[pairs]``, nats per token of the answer.
        distance: ``[pairs]``, tokens from one to the other.
        effects: ``[pairs, 2]``, of each token by itself.
        equal: Bool ``[pairs]``, whether it is the same token twice.
    """

    similarity: np.ndarray
    interaction: np.ndarray
    distance: np.ndarray
    effects: np.ndarray
    equal: np.ndarray


def largest(values: np.ndarray, share: float = _SHARE) -> np.ndarray:
    """Bool ``[pairs]``: the share with the largest values, at least one, of equals the first."""
    chosen = np.zeros(len(values), bool)
    chosen[np.argsort(-values, kind="stable")[: max(1, round(share * len(values)))]] = True
    return chosen


def area(predictor: np.ndarray, label: np.ndarray) -> float:
    """How often the predictor is above for a pair with the label; NaN without one or the other."""
    return auroc(predictor[label], predictor[~label]).value


def measures(pairs: Pairs) -> dict[str, float]:
    """All that is said of one document's pairs."""
    redundant = pairs.interaction >= _LEAST
    unlike, alike = ~pairs.equal, pairs.similarity >= _ALIKE
    return {
        SIMILARITY: area(pairs.similarity, redundant),
        UNLIKE: area(pairs.similarity[unlike], redundant[unlike]),
        TWENTIETH: area(pairs.similarity, largest(pairs.interaction)),
        NEARNESS: area(-pairs.distance, redundant),
        PRODUCT: area(np.abs(pairs.effects).prod(1), redundant),
        CORRELATION: rank_correlation(pairs.similarity, pairs.interaction).value,
        ALIKE: _mean(pairs.interaction[alike]),
        OTHERS: _mean(pairs.interaction[~alike]),
        FOUND: _mean(redundant[alike]),
        FOUND_OTHERS: _mean(redundant[~alike]),
    }


def by_similarity(pairs: Pairs) -> list[float]:
    """Mean interaction of the pairs in each of ``BINS``; NaN where there are none."""
    edges = itertools.pairwise(BINS)
    inside = [(pairs.similarity >= low) & (pairs.similarity < high) for low, high in edges]
    return [_mean(pairs.interaction[own]) for own in inside]


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else math.nan


# --- one document ---------------------------------------------------------------------------


def rises(engine: Engine, units: Sequence[tuple[int, ...]], effect: Effect) -> np.ndarray:
    """``[units]`` rises of the loss with each unit suppressed, nats per token."""
    found = engine.perturb([Unit(unit) for unit in units], effect)
    return (engine.base_logprobs - found).double().mean(-1).numpy()


def pairs_of(
    engine: Engine, ids: Sequence[int], table: Tensor, tokens: Sequence[int], effect: Effect
) -> Pairs:
    """All pairs of some tokens.

    Args:
        ids: of the prompt.
        table: ``[vocabulary, D]``, input embeddings.
        tokens: positions.
    """
    several = list(itertools.combinations(tokens, 2))
    alone = dict(zip(tokens, rises(engine, [(t,) for t in tokens], effect), strict=True))
    effects = np.array([(alone[i], alone[j]) for i, j in several])
    unit = torch.nn.functional.normalize(table[list(ids)].double(), dim=-1)
    similarity = (unit @ unit.T).numpy()
    return Pairs(
        np.array([similarity[i, j] for i, j in several]),
        rises(engine, several, effect) - effects.sum(1),
        np.array([j - i for i, j in several], float),
        effects,
        np.array([ids[i] == ids[j] for i, j in several]),
    )


def examine(model: Any, tokenizer: Any, case: Labelled) -> dict[str, Pairs]:
    """One document by all readings."""
    words = encode_prompt(case.prompt, tokenizer, model.config.vocab_size)
    answer = tokenizer(case.answer)["input_ids"]
    inside = [p for p, span in enumerate(words.spans) if span and span[0] < len(case.text)]
    table = model.get_input_embeddings().weight.detach()
    inputs = {"input_ids": torch.tensor([words.ids])}
    found = {}
    with undisturbed(model):
        engine = Engine(model, inputs, [answer], Settings(_FACTOR, _MODE))
        direct = rises(engine, [(place,) for place in inside], "direct")
        order = np.argsort(-np.abs(direct), kind="stable")[:_LARGEST]
        chosen = {"all": inside, "largest": sorted(inside[place] for place in order)}
        for name, (which, effect) in READINGS.items():
            found[name] = pairs_of(engine, words.ids, table, chosen[which], effect)
    return found


def cases_of(model: Any, tokenizer: Any, kind: str, count: int) -> list[Labelled]:
    """``count`` documents of a kind that are answered right."""
    relation = KINDS[kind]
    if relation is None:
        return common.documents(model, tokenizer, count, NAME)
    restated, _ = redundant_cases(model, tokenizer, relation, count)
    return [
        Labelled(
            " ".join(twin.sentences),
            twin.question.text,
            twin.question.answer,
            tuple(spans(twin.sentences)),
            tuple(sorted((twin.first, twin.twin))),
        )
        for twin in restated
    ]


# --- all documents --------------------------------------------------------------------------

Documents = Mapping[str, Sequence[Mapping[str, Pairs]]]
"""By kind, of each document its pairs by reading."""


def rows_of(documents: Documents) -> list[Row]:
    """A row for each reading, kind and measure."""
    rows = []
    for reading, (kind, several) in itertools.product(READINGS, documents.items()):
        own = [measures(each[reading]) for each in several]
        for measure in MEASURES:
            values = [each[measure] for each in own]
            rows.append(common.mean_row(NAME, "pairs", kind, reading, measure, values))
    return rows


def verdicts(rows: Sequence[Row]) -> list[str]:
    """Whether similarity predicts interaction, in plain words."""
    lines = []
    for reading, kind in itertools.product(READINGS, KINDS):
        own = {row.measure: row for row in common.pick(rows, method=reading, what=kind)}
        same, unlike = own[SIMILARITY], own[UNLIKE]
        other = max((own[NEARNESS], own[PRODUCT]), key=lambda row: row.value)
        lines.append(
            f"{reading}, {kind}: S predicts which pairs stand for one another with AUC "
            f"{same.value:.2f} [{same.low:.2f}, {same.high:.2f}], {unlike.value:.2f} where the "
            f"tokens differ; {other.measure[7:]} with {other.value:.2f} ({same.count} documents)"
        )
    return lines


def draw(rows: Sequence[Row], documents: Documents, path: Path) -> None:
    """AUC of every predictor by kind, and the mean interaction by similarity."""
    from matplotlib.figure import Figure

    colours = dict(zip(KINDS, ("0.6", "#2166ac", "#67a9cf"), strict=True))
    figure = Figure(figsize=(13, 7), layout="constrained")
    panels = figure.subplots(2, len(READINGS))
    middle = np.arange(len(BINS) - 1)
    labels = ["< 0", *(f"{a:g} to {b:g}" for a, b in itertools.pairwise(BINS[1:-2])), "< 1", "1"]
    for column, reading in enumerate(READINGS):
        above, below = panels[0][column], panels[1][column]
        for index, (kind, colour) in enumerate(colours.items()):
            own = {row.measure: row for row in common.pick(rows, method=reading, what=kind)}
            line = [own[measure] for measure in PREDICTORS]
            above.errorbar(
                [row.value for row in line],
                [place + 0.2 * (index - 1) for place in range(len(line))],
                xerr=[[r.value - r.low for r in line], [r.high - r.value for r in line]],
                fmt="o",
                markersize=4,
                capsize=2,
                color=colour,
                label=kind,
            )
            bins = np.array([by_similarity(each[reading]) for each in documents[kind]])
            seen = ~np.isnan(bins).all(0)
            means = np.nanmean(bins[:, seen], 0)
            below.plot(middle[seen], means, "o-", color=colour, markersize=4, label=kind)
        above.axvline(0.5, color="grey", linestyle=":")
        above.set_yticks(range(len(PREDICTORS)), [name[7:] for name in PREDICTORS], fontsize=9)
        above.invert_yaxis()
        above.set_xlim(0, 1.02)
        above.set_title(reading, fontsize=10)
        above.set_xlabel("AUC against interaction")
        below.axhline(0, color="grey", linestyle=":")
        below.set_xticks(middle, labels, fontsize=8, rotation=30)
        below.set_xlabel("cosine similarity of the two input embeddings")
        below.set_ylabel("mean interaction, nats per token")
        for axes in (above, below):
            axes.grid(alpha=0.2)
    panels[0][0].legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    options = common.options_of(__doc__, arguments, 22)
    model, tokenizer = load_demo_model()
    documents = {}
    for kind in KINDS:
        cases = cases_of(model, tokenizer, kind, options.documents)
        shown = common.progress(cases, f"{NAME}: {kind}")
        documents[kind] = [examine(model, tokenizer, case) for case in shown]
    rows = rows_of(documents)
    common.write(rows, options.out)
    draw(rows, documents, options.out / "studies-interaction.png")
    common.show(rows, verdicts(rows))


if __name__ == "__main__":
    main()
