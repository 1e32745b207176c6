"""How far AtMan's influence agrees with true removal, and what a rank correlation is worth there.

Every token of a document that the model answers right is deleted in turn (leave-one-out). Part
``methods`` compares the rises of the loss with the scores of each method and mode:

- ``rank correlation``: Spearman's, over all tokens of the prompt;
- ``top 5``: the share of the five largest rises among the five largest scores;

and without the prompt's last token, the colon of ``A:``, which the answer is read from. Without it
the model writes a colon first, so that its deletion raises the loss more than any other's; this
says nothing about the document, and suppressing a key cannot show it:

- ``rank correlation -1`` and ``top 5 -1``: the same of the others;
- ``matters``: Spearman's over those whose rise is at least 0.01 nats per token of the answer, in
  documents with at least three of them;
- ``pairs``: of the pairs whose rises differ by at least 0.1 nats, the share that the scores put
  in the same order, equal scores counting half;
- ``linear``: Pearson's correlation.

Part ``witness`` asks Spearman's coefficient about rankings of which the truth is known, against
the same rises: ``float64`` and ``positions kept`` are leave-one-out again, in double precision, and
without closing the gap in the positions that a deleted token leaves; ``top tenth only`` has the
right tenth in front and the rest shuffled; ``second tenth first`` has the first two tenths
exchanged and all else right. ``negligible`` is the share of tokens whose rise is below 0.001
nats either way. One command::

    python -m bench.studies.agreement            # 60 documents

Rows go to ``bench/results/studies-agreement.csv``, the picture to ``studies-agreement.png``.
"""

from __future__ import annotations

import copy
import itertools
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch

from atman_triton.demo import load_demo_model
from bench.removal import leave_one_out, rank_correlation, ranking, removed_count
from bench.studies import common
from bench.studies.common import Labelled, Row
from bench.studies.truth import CORRELATION, GAP, TOP, Truth

NAME = "agreement"
MATTERS, PAIRS, LINEAR = "matters", "pairs", "linear"
CORRELATION_1, TOP_1 = f"{CORRELATION} -1", f"{TOP} -1"
NEGLIGIBLE = "negligible"
_MATTERS, _DIFFERS, _NEGLIGIBLE = 0.01, 0.1, 0.001  # nats per token of the answer
_MODES = ("min_shift", "multiplicative", "log_additive")
METHODS: dict[str, dict[str, Any]] = {
    f"{method}, {mode}": {"method": method, "mode": mode}
    for method, mode in itertools.product(("exact", "direct"), _MODES)
} | {
    "exact, min_shift_full": {"method": "exact", "mode": "min_shift_full", "backend": "reference"},
    "hybrid, min_shift": {"method": "hybrid", "mode": "min_shift"},
    "path, min_shift": {"method": "path", "mode": "min_shift"},
    "score_gradient, min_shift": {"method": "score_gradient", "mode": "min_shift"},
}
"""Name of a row: settings of ``Explainer``."""

_RANKINGS = ("top tenth only", "second tenth first")  # their scores are places


def pairs_in_order(scores: Sequence[float], rises: Sequence[float], least: float) -> float:
    """Of the pairs whose rises differ by ``least``, the share that the scores order alike.

    Equal scores count half; NaN without such a pair.
    """
    own, theirs = np.asarray(scores), np.asarray(rises)
    above = theirs[:, None] - theirs[None, :] >= least  # [P, P], each pair once
    if not above.any():
        return math.nan
    signs = np.sign(own[:, None] - own[None, :])[above]
    return float((signs + 1).mean() / 2)


def among(scores: Sequence[float], rises: Sequence[float], least: float) -> float:
    """Spearman's among the tokens with a rise of ``least``; NaN for fewer than three."""
    kept = [place for place, rise in enumerate(rises) if rise >= least]
    if len(kept) < 3:
        return math.nan
    return rank_correlation([scores[p] for p in kept], [rises[p] for p in kept])


def linear(scores: Sequence[float], rises: Sequence[float]) -> float:
    """Pearson's; NaN where one of them is constant."""
    own, theirs = np.asarray(scores), np.asarray(rises)
    if not (np.ptp(own) and np.ptp(theirs)):
        return math.nan
    return float(np.corrcoef(own, theirs)[0, 1])


def overlap(scores: Sequence[float], rises: Sequence[float], count: int = 5) -> float:
    """Share of the largest rises among the largest scores, of equal scores the first ones."""
    theirs, own = (ranking(values, range(len(values)))[:count] for values in (rises, scores))
    return len(set(theirs) & set(own)) / len(theirs)


def agreement(scores: Sequence[float], rises: Sequence[float]) -> dict[str, float]:
    """Coefficients of ``P`` scores; all but the first without the last token."""
    whole = rank_correlation(scores, rises)
    scores, rises = scores[:-1], rises[:-1]
    return {
        CORRELATION: whole,
        CORRELATION_1: rank_correlation(scores, rises),
        TOP_1: overlap(scores, rises),
        MATTERS: among(scores, rises, _MATTERS),
        PAIRS: pairs_in_order(scores, rises, _DIFFERS),
        LINEAR: linear(scores, rises),
    }


# --- what the coefficient says of known rankings ----------------------------------------------


def scored(order: Sequence[int]) -> list[float]:
    """``P`` scores that rank in an order, the first the highest."""
    scores = [0.0] * len(order)
    for place, token in enumerate(order):
        scores[token] = float(len(order) - place)
    return scores


def top_only(order: Sequence[int], rng: random.Random) -> list[int]:
    """The first tenth as it is, the rest shuffled."""
    count = removed_count(len(order))
    return [*order[:count], *rng.sample(order[count:], len(order) - count)]


def second_first(order: Sequence[int]) -> list[int]:
    """The first two tenths exchanged, the rest as it is."""
    count = removed_count(len(order))
    return [*order[count : 2 * count], *order[:count], *order[2 * count :]]


@torch.inference_mode()
def kept_positions(model: Any, ids: Sequence[int], answer: Sequence[int]) -> list[float]:
    """``P`` rises of the loss, each with one token deleted and the others where they were."""
    whole = torch.tensor([*ids, *answer[:-1]])
    rows = torch.stack([_without(whole, place) for place in range(len(ids))])
    positions = torch.stack([_without(torch.arange(len(whole)), p) for p in range(len(ids))])
    target = torch.tensor(answer)

    def losses(rows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        output = model(
            rows,
            # without a mask, a step in the positions would count as the start of another text
            attention_mask=torch.ones_like(rows),
            position_ids=positions,
            logits_to_keep=len(answer),
            use_cache=False,
        )
        logprobs = output.logits.float().log_softmax(-1)
        wanted = target.expand(len(rows), -1)[..., None]
        return -logprobs.gather(-1, wanted).squeeze(-1).double().mean(-1)

    base = losses(whole[None], torch.arange(len(whole))[None])
    return (losses(rows, positions) - base).tolist()


def _without(values: torch.Tensor, place: int) -> torch.Tensor:
    return torch.cat([values[:place], values[place + 1 :]])


class _Double(torch.nn.Module):
    """A copy in double precision whose logits ``bench.removal`` reads as they are."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).double()

    def forward(self, ids: Any, **settings: Any) -> Any:
        output = self.model(ids, **settings)
        output.logits = _Kept(output.logits)
        return output


class _Kept:
    """Logits that stay double where float32 is asked for."""

    def __init__(self, logits: torch.Tensor) -> None:
        self._logits = logits

    def float(self) -> torch.Tensor:
        return self._logits


# --- all documents --------------------------------------------------------------------------


def examine(
    model: Any, double: Any, tokenizer: Any, case: Labelled, number: int
) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, float]], Truth]:
    """One document: measures by method, and by known ranking."""
    explained = {
        name: common.explain(model, tokenizer, case, **settings)
        for name, settings in METHODS.items()
    }
    truth = Truth(model, tokenizer, case, next(iter(explained.values())), number)
    methods = truth.judge(explained)
    for name, explanation in explained.items():
        methods[name] |= agreement(truth.prompt_scores(explanation), truth.rises)
    rng = random.Random(f"{NAME}-{number}")
    order = truth.order(truth.rises)
    known = {
        "float64": leave_one_out(double, truth.ids, truth.answer, truth.positions),
        "positions kept": kept_positions(model, truth.ids, truth.answer),
        "top tenth only": scored(top_only(order, rng)),
        "second tenth first": scored(second_first(order)),
        "random": [rng.random() for _ in order],
    }
    witness = {}
    gaps = truth.gaps({name: _over_units(truth, scores) for name, scores in known.items()})
    for name, scores in known.items():
        witness[name] = {GAP: gaps[name], TOP: truth.overlap(scores)}
        witness[name] |= agreement(scores, truth.rises)
        if name in _RANKINGS:
            del witness[name][LINEAR]
    small = fmean(abs(rise) < _NEGLIGIBLE for rise in truth.rises)
    witness["leave-one-out"] = {
        GAP: truth.gaps({"": _over_units(truth, truth.rises)})[""],
        NEGLIGIBLE: small,
    }
    return methods, witness, truth


def _over_units(truth: Truth, scores: Sequence[float]) -> list[float]:
    """``P`` scores as ``U`` of which only the prompt's count."""
    whole = [-math.inf] * len(truth.places)
    for unit, score in zip(truth.inside, scores, strict=True):
        whole[unit] = score
    return whole


def rows_of(
    part: str, found: Sequence[Mapping[str, Mapping[str, float]]], *, methods: bool
) -> list[Row]:
    """A row for every name and measure."""
    rows = []
    for name in found[0]:
        what, method = ("", name) if methods else (name, "")
        for measure in found[0][name]:
            values = [each[name][measure] for each in found]
            rows.append(common.mean_row(NAME, part, what, method, measure, values))
    return rows


def verdicts(rows: Sequence[Row]) -> list[str]:
    """Why the coefficient is a weak witness, in plain words."""

    def value(what: str, measure: str) -> float:
        return common.pick(rows, part="witness", what=what, measure=measure)[0].value

    return [
        f"{value('leave-one-out', NEGLIGIBLE):.1%} of the tokens change the loss by less than "
        f"{_NEGLIGIBLE} nats when they are deleted; their order is most of a rank correlation.",
        f"Leave-one-out agrees with itself at {value('positions kept', CORRELATION):.2f} if "
        f"positions are kept (pairs {value('positions kept', PAIRS):.2f}).",
        f"A ranking with only the first tenth right has {value('top tenth only', CORRELATION):.2f} "
        f"(gap {value('top tenth only', GAP):.2f}); one with everything right but that tenth "
        f"{value('second tenth first', CORRELATION):.2f} "
        f"(gap {value('second tenth first', GAP):.2f}).",
    ]


def draw(truths: Sequence[Truth], rows: Sequence[Row], path: Path) -> None:
    """How large the rises are, and the coefficients against the removal gap."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for truth in truths:
        falling = sorted((max(abs(rise), 1e-8) for rise in truth.rises), reverse=True)
        left.plot(range(1, len(falling) + 1), falling, color="#2166ac", alpha=0.2, linewidth=0.8)
    left.axhline(_NEGLIGIBLE, color="grey", linestyle=":", label=f"{_NEGLIGIBLE} nats")
    left.set_yscale("log")
    left.set_xlabel("token, the most influential first")
    left.set_ylabel("|rise of the loss| when it is deleted, nats")
    left.set_title("a line per document", fontsize=10)
    left.legend(fontsize=8)
    for measure, colour in ((CORRELATION_1, "#b2182b"), (PAIRS, "#2166ac"), (TOP_1, "#1b7837")):
        own = common.pick(rows, part="methods", measure=measure)
        names = [each.method for each in own]
        right.errorbar(
            [each.value for each in own],
            range(len(own)),
            xerr=[
                [each.value - each.low for each in own],
                [each.high - each.value for each in own],
            ],
            fmt="o",
            capsize=2,
            color=colour,
            label=measure,
        )
        right.set_yticks(range(len(names)), names, fontsize=8)
    right.invert_yaxis()
    right.set_xlabel("agreement with leave-one-out")
    right.grid(axis="x", alpha=0.2)
    right.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    options = common.options_of(__doc__, arguments, 60)
    model, tokenizer = load_demo_model()
    double = _Double(model).eval()
    cases = common.documents(model, tokenizer, options.documents)
    numbered = common.progress(list(enumerate(cases)), NAME)
    found = [examine(model, double, tokenizer, case, number) for number, case in numbered]
    methods, witness, truths = zip(*found, strict=True)
    rows = rows_of("methods", methods, methods=True) + rows_of("witness", witness, methods=False)
    common.write(rows, options.out)
    draw(truths, rows, options.out / "studies-agreement.png")
    common.show(rows, verdicts(rows))


if __name__ == "__main__":
    main()
