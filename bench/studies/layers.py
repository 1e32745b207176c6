"""Where suppression acts: in single layers, from a layer on, up to a layer, in single heads.

The shipped reader's answers are explained with the factor in some of its layers or heads only.
``removal gap`` and ``precision`` of the label are those of ``bench.studies.common``; a ranking by
chance is the floor of the first, the share of tokens that the answer's sentence has that of the
second. ``largest`` is the largest score of a token of the prompt, nats: where suppression does
nothing, a ranking is one of rounding errors, and there is no precision. Layers and heads count
from 0.

Part ``layers`` suppresses in every head of some layers (``only 2``, ``from 2``, ``up to 2``,
``all``), part ``heads`` in one head of one layer, and in one head of every layer. Part ``chosen``
has what has the largest gap on every second document, on the others: ``difference`` is its gap less
that of suppression everywhere, document by document. Means are over the documents in which a
measure is defined. One command::

    python -m bench.studies.layers               # 60 documents

Rows go to ``bench/results/studies-layers.csv``, the picture to ``studies-layers.png``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from atman_triton.demo import load_demo_model
from bench.removal import Removal
from bench.studies import common
from bench.studies.common import Labelled, Row
from bench.studies.slowly import extend, measured, methods
from bench.studies.truth import GAP, PRECISION

NAME = "layers"
RANDOM, ALL, DIFFERENCE, LARGEST = "random", "all", "difference", "largest"
METHODS = ("direct", "exact")
_ROUNDING = 1e-5  # nats; of float32 log-probabilities
_COLOURS = {"only": "#2166ac", "from": "#b2182b", "up to": "#1b7837"}

Places = dict[str, list[int]]
"""Of ``Explainer``: which ``layers`` and ``heads``; all where nothing is said."""


def layer_settings(layers: int) -> dict[str, Places]:
    """Name of a row: where suppression acts, each place once."""
    found: dict[str, Places] = {f"only {layer}": {"layers": [layer]} for layer in range(layers)}
    for layer in range(1, layers - 1):  # from the last on is only it, up to the first likewise
        found[f"from {layer}"] = {"layers": list(range(layer, layers))}
        found[f"up to {layer}"] = {"layers": list(range(layer + 1))}
    return found | {ALL: {}}


def head_settings(layers: int, heads: int) -> dict[str, Places]:
    """Single heads, and the same head in every layer."""
    found: dict[str, Places] = {
        f"layer {layer}, head {head}": {"layers": [layer], "heads": [head]}
        for layer in range(layers)
        for head in range(heads)
    }
    return found | {f"head {head}": {"heads": [head]} for head in range(heads)}


def chance(explanation: Any, case: Labelled) -> float:
    """Precision of an explanation that gives every token of the document the same."""
    places = [place for place in common.places(explanation, case) if place is not None]
    return sum(place in case.evidence for place in places) / len(places)


def examine(
    model: Any,
    tokenizer: Any,
    case: Labelled,
    number: int,
    tried: Sequence[str] = METHODS,
) -> dict[tuple[str, str, str], dict[str, float]]:
    """One document: measures by part, place and method."""
    config = model.config
    parts: dict[str, tuple[dict[str, Places], Sequence[str]]] = {
        "layers": (layer_settings(config.num_hidden_layers), tried),
        "heads": (
            head_settings(config.num_hidden_layers, config.num_attention_heads),
            ("direct",),
        ),
    }
    explained: dict[tuple[str, str, str], Any] = {
        (part, what, method): common.explain(model, tokenizer, case, method=method, **places)  # pyright: ignore[reportArgumentType]
        for part, (settings, methods) in parts.items()
        for what, places in settings.items()
        for method in methods
    }
    first = next(iter(explained.values()))
    removal = Removal(model, tokenizer, case.case, first, number)
    gaps: dict[Any, float] = removal.gaps(
        {key: each.relevance.tolist() for key, each in explained.items()}  # pyright: ignore[reportArgumentType]
        | {RANDOM: removal.random}
    )
    found = {}
    for key, explanation in explained.items():
        largest = max(removal.of_prompt(explanation.relevance.tolist()))
        precision = common.label_precision(explanation, case)
        found[key] = {
            GAP: gaps[key],
            PRECISION: precision if largest > _ROUNDING else math.nan,
            LARGEST: largest,
        }
    return found | {("layers", "", RANDOM): {GAP: gaps[RANDOM], PRECISION: chance(first, case)}}


Found = Mapping[tuple[str, str, str], Mapping[str, float]]
"""Measures of one document by part, place and method."""


def rows_of(found: Sequence[Found]) -> list[Row]:
    """A row for every place, method and measure."""
    return [
        common.mean_row(NAME, part, what, method, measure, measured(found, key, measure))
        for key in found[0]
        for part, what, method in [key]
        for measure in found[0][key]
    ]


def chosen_rows(found: Sequence[Found]) -> list[Row]:
    """Of each part and method, the best place of one half of the documents, on the other half."""
    choose, report = common.halves(found)
    rows = []
    for part, method in dict.fromkeys((part, method) for part, _, method in found[0]):
        if method == RANDOM:
            continue
        whole = ("layers", ALL, method)
        places = [key for key in found[0] if (key[0], key[2]) == (part, method)]
        key = common.best({place: measured(choose, place, GAP) for place in places})
        numbers = {measure: measured(report, key, measure) for measure in found[0][key]}
        both = zip(numbers[GAP], measured(report, whole, GAP), strict=True)
        numbers[DIFFERENCE] = [own - theirs for own, theirs in both]
        rows += [
            common.mean_row(NAME, "chosen", f"{part}: {key[1]}", method, measure, values)
            for measure, values in numbers.items()
        ]
    return rows


def verdicts(rows: Sequence[Row]) -> list[str]:
    """What the chosen places are worth, in plain words."""
    said = []
    for each in common.pick(rows, part="chosen", measure=DIFFERENCE):
        (gap,) = common.pick(rows, part="chosen", what=each.what, method=each.method, measure=GAP)
        said.append(
            f"{each.what}, {each.method}: chosen on half of the documents; on the other "
            f"{each.count} its removal gap is {gap.value:.2f}, {each.value:+.2f} "
            f"[{each.low:+.2f}, {each.high:+.2f}] against suppression everywhere."
        )
    return said


def draw(rows: Sequence[Row], path: Path) -> None:
    """Both measures by layer, and of single heads."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 7), layout="constrained")
    grid = figure.subplots(2, 3)
    for line, measure in zip(grid, (GAP, PRECISION), strict=True):
        own = [row for row in common.pick(rows, measure=measure) if row.part != "chosen"]
        for axes, method in zip(line, METHODS, strict=False):
            _by_layer(axes, common.pick(own, part="layers", method=method), measure)
            (floor,) = common.pick(own, method=RANDOM)
            axes.axhline(floor.value, color="grey", linestyle=":", label="chance")
            axes.set_title(f"every head, {method}", fontsize=10)
        _by_head(figure, line[2], common.pick(own, part="heads"), measure)
    grid[0, 0].legend(fontsize=8, loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _by_layer(axes: Any, rows: Sequence[Row], measure: str) -> None:
    by = {row.what: row for row in rows}
    last = max(int(what.split()[-1]) for what in by if what.startswith("only"))
    ends = {
        f"from {last}": f"only {last}",
        "from 0": ALL,
        "up to 0": "only 0",
        f"up to {last}": ALL,
    }
    for kind, colour in _COLOURS.items():
        names = [f"{kind} {layer}" for layer in range(last + 1)]
        own = [by[ends.get(name, name)] for name in names]
        axes.errorbar(
            range(last + 1),
            [row.value for row in own],
            [[row.value - row.low for row in own], [row.high - row.value for row in own]],
            color=colour,
            fmt="o-",
            capsize=3,
            label=f"{kind} this layer",
        )
    axes.set_xticks(range(last + 1))
    axes.set_xlabel("layer")
    axes.set_ylabel(f"{measure}, nats per token" if measure == GAP else measure)
    axes.grid(alpha=0.2)


def _by_head(figure: Any, axes: Any, rows: Sequence[Row], measure: str) -> None:
    single = {row.what: row.value for row in rows if row.what.startswith("layer")}
    heads = len(rows) - len(single)
    values = list(single.values())
    table = [values[start : start + heads] for start in range(0, len(values), heads)]
    table.append([row.value for row in rows if not row.what.startswith("layer")])
    picture = axes.imshow(table, cmap="Blues", vmin=0)
    top = max(number for line in table for number in line if not math.isnan(number))
    for line, numbers in enumerate(table):
        for column, number in enumerate(numbers):
            colour = "white" if number > 0.6 * top else "black"
            text = "" if math.isnan(number) else f"{number:.2f}"
            axes.text(column, line, text, ha="center", va="center", color=colour)
    axes.set_xticks(range(heads), [f"head {head}" for head in range(heads)])
    axes.set_yticks(
        range(len(table)), [*(f"layer {layer}" for layer in range(len(table) - 1)), "every layer"]
    )
    axes.set_title(f"one head, direct: {measure}", fontsize=10)
    figure.colorbar(picture, ax=axes, shrink=0.8)


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    options = common.options_of(__doc__, arguments, 60, extend)
    model, tokenizer = load_demo_model()
    several = common.documents(model, tokenizer, options.documents)
    found = [
        examine(model, tokenizer, case, number, methods(METHODS, number, options.exact_documents))
        for number, case in common.progress(list(enumerate(several)), "Layers and heads")
    ]
    rows = rows_of(found) + chosen_rows(found)
    common.write(rows, options.out)
    draw(rows, options.out / f"studies-{NAME}.png")
    common.show(rows, verdicts(rows))


if __name__ == "__main__":
    main()
