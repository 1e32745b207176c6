"""Randomised weights must destroy an explanation: the check of Adebayo et al. (2018).

An explanation that stays the same when the model forgets what it learnt does not explain what it
learnt. The shipped reader's weights are replaced by those of a new, untrained one: of the last
layer, of the last two, and so on to all four, then all weights, embeddings included (they are also
what the reader writes with, so they come last). In ``all, shuffled`` every weight matrix keeps its
own numbers in a random order. The same answer is explained by every method before and after:

- ``rank correlation``: Spearman's over all tokens of the prompt, and ``in document`` over those of
  the text alone, as a method may know the question's place without any reading;
- ``top 5``: the share of the five largest scores that stay among the five largest;
- ``precision``: of the label, see ``bench.studies.common``; ``trained`` is what it was before.

All should fall to where ``random`` is, whose two sets of numbers know nothing of each other::

    python -m bench.studies.sanity               # 60 documents

Rows go to ``bench/results/studies-sanity.csv``, the picture to ``studies-sanity.png``.
Source: Adebayo et al., "Sanity checks for saliency maps", arXiv 1810.03292, Section 3.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import atman_triton as atman
from atman_triton.baselines import Baseline
from atman_triton.demo import load_demo_model
from atman_triton.demo.model import make_model
from bench.removal import rank_correlation
from bench.studies import common
from bench.studies.agreement import overlap
from bench.studies.common import Labelled, Row
from bench.studies.slowly import extend, measured, methods
from bench.studies.truth import CORRELATION, PRECISION, TOP

NAME = "sanity"
INSIDE, TRAINED = "in document", "trained"
MEASURES = (CORRELATION, INSIDE, TOP, PRECISION)
RANDOM = "random"
METHODS = ("direct", "exact", "chefer", "rollout", "input_x_gradient", RANDOM)
_OURS = ("direct", "exact")
_COLOURS = ("#2166ac", "#4393c3", "#b2182b", "#e08214", "#1b7837", "grey")
_SEED = 0


def randomised(model: Any, tokenizer: Any) -> dict[str, Any]:
    """The reader by how much of it was replaced, the least first."""
    torch.manual_seed(_SEED)
    fresh = make_model(tokenizer).eval()
    found: dict[str, Any] = {}
    layers = model.config.num_hidden_layers
    for first in reversed(range(layers)):
        changed = copy.deepcopy(next(reversed(found.values())) if found else model)
        changed.model.layers[first].load_state_dict(fresh.model.layers[first].state_dict())
        name = f"layer {first}" if first == layers - 1 else f"layers {first} to {layers - 1}"
        found[name] = changed
    return found | {"all": fresh, "all, shuffled": shuffled(model)}


def shuffled(model: Any) -> Any:
    """A copy whose matrices hold the same numbers in a random order."""
    drawn = torch.Generator().manual_seed(_SEED)
    changed = copy.deepcopy(model)
    with torch.no_grad():
        for weight in changed.parameters():
            if weight.dim() > 1:
                order = torch.randperm(weight.numel(), generator=drawn)
                weight.copy_(weight.flatten()[order].view_as(weight))
    return changed


def explain(
    model: Any, tokenizer: Any, case: Labelled, method: str, seed: int
) -> atman.Explanation:
    """The answer explained by one of ``METHODS``; the seed is that of ``random``."""
    if method in _OURS:
        return common.explain(model, tokenizer, case, method=method)
    options: dict[str, Any] = {"seed": seed} if method == RANDOM else {}
    baseline = Baseline(model, tokenizer, method=method, progress=False, **options)
    return baseline.explain(case.prompt, case.answer)


def compare(
    before: atman.Explanation, after: atman.Explanation, case: Labelled
) -> dict[str, float]:
    """How far one explanation of a document is like another, and the other's precision."""
    places = common.places(before, case)
    prompt = [index for index, unit in enumerate(before.units) if unit.part == "prompt"]
    inside = [index for index, place in enumerate(places) if place is not None]
    own, other = before.relevance.tolist(), after.relevance.tolist()

    def both(units: Sequence[int]) -> tuple[list[float], list[float]]:
        return [other[unit] for unit in units], [own[unit] for unit in units]

    return {
        CORRELATION: rank_correlation(*both(prompt)),
        INSIDE: rank_correlation(*both(inside)),
        TOP: overlap(*both(prompt)),
        PRECISION: common.label_precision(after, case),
    }


def examine(
    model: Any,
    changed: Mapping[str, Any],
    tokenizer: Any,
    case: Labelled,
    number: int,
    tried: Sequence[str] = METHODS,
) -> dict[tuple[str, str], dict[str, float]]:
    """One document: measures by what was replaced and method."""
    found = {}
    for method in tried:
        before = explain(model, tokenizer, case, method, 2 * number)
        found[TRAINED, method] = {PRECISION: common.label_precision(before, case)}
        for what, other in changed.items():
            after = explain(other, tokenizer, case, method, 2 * number + 1)
            found[what, method] = compare(before, after, case)
    return found


def rows_of(found: Sequence[Mapping[tuple[str, str], Mapping[str, float]]]) -> list[Row]:
    """A row for every replacement, method and measure."""
    return [
        common.mean_row(NAME, "weights", *key, measure, measured(found, key, measure))
        for key in found[0]
        for measure in found[0][key]
    ]


def verdicts(rows: Sequence[Row]) -> list[str]:
    """Which methods forget, in plain words: their interval without any training holds chance's."""
    said = []
    for what in ("all", "all, shuffled"):
        for measure in (CORRELATION, INSIDE, TOP):
            own = {row.method: row for row in common.pick(rows, what=what, measure=measure)}
            chance = own.pop(RANDOM)
            kept = [
                f"{name} ({row.value:.2f} [{row.low:.2f}, {row.high:.2f}])"
                for name, row in own.items()
                if row.low > chance.high
            ]
            said.append(
                f"{what}, {measure}: above chance ({chance.value:.2f} "
                f"[{chance.low:.2f}, {chance.high:.2f}]): {', '.join(kept) or 'none'}."
            )
    return said


def draw(rows: Sequence[Row], path: Path) -> None:
    """Every measure along the cascade, a line per method; the shuffled model apart."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 7.5), layout="constrained")
    names = [TRAINED, *dict.fromkeys(row.what for row in rows if row.what != TRAINED)]
    for axes, measure in zip(figure.subplots(2, 2).flat, MEASURES, strict=True):
        for method, colour in zip(METHODS, _COLOURS, strict=True):
            own = {row.what: row for row in common.pick(rows, method=method, measure=measure)}
            values = [own[name].value if name in own else 1.0 for name in names]
            axes.plot(range(len(names) - 1), values[:-1], "o-", color=colour, label=method)
            axes.plot([len(names) - 1], values[-1:], "o", color=colour)
            for place, name in enumerate(names):
                if name in own:
                    axes.vlines(place, own[name].low, own[name].high, color=colour, alpha=0.5)
        axes.set_xticks(range(len(names)), names, rotation=20, ha="right", fontsize=8)
        axes.set_ylabel(measure if measure == PRECISION else f"{measure}, with trained")
        axes.grid(alpha=0.2)
    figure.axes[0].legend(fontsize=8)
    figure.supxlabel("weights that were replaced")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    options = common.options_of(__doc__, arguments, 60, extend)
    model, tokenizer = load_demo_model()
    changed = randomised(model, tokenizer)
    several = common.documents(model, tokenizer, options.documents)
    found = [
        examine(
            model,
            changed,
            tokenizer,
            case,
            number,
            methods(METHODS, number, options.exact_documents),
        )
        for number, case in common.progress(list(enumerate(several)), "Randomised weights")
    ]
    rows = rows_of(found)
    common.write(rows, options.out)
    draw(rows, options.out / f"studies-{NAME}.png")
    common.show(rows, verdicts(rows))


if __name__ == "__main__":
    main()
