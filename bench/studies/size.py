"""Does a larger model have better explanations? Four sizes of the shipped reader.

The smaller ones are trained by the shipped one's recipe, for as many steps as fit into half an
hour of one thread, into ``.benchmarks/sizes`` (git does not see them)::

    python -m bench.studies.size --train         # the smaller ones, one after the other
    python -m bench.studies.size                 # 40 documents that each size answers right

- ``readers``: parameters, and ``exact match``, the share of 300 fresh documents answered right;
- ``own``: explanations on the first documents that *this* size answers right, by the measures of
  ``bench.studies.truth`` and ``bench.studies.agreement``, and the answer's ``probability``
  (geometric mean over its tokens);
- ``shared``: the same on documents that every size of at least ``--least`` exact match answers
  right, so that all explain the same answers.

These are readers of a million parameters and fewer on documents of their own making: what holds
between them need not hold between 6B and 30B parameters. The paper's AtMan on OpenImages loses a
little from 6B to 30B (mAP 65.5, 64.8, 63.6 percent; Table 1). Rows go to
``bench/results/studies-size.csv``, the picture to ``studies-size.png``.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from atman_triton.demo import load_demo_model
from atman_triton.demo.evaluate import exact_match, fresh_cases
from atman_triton.demo.packing import sample_texts
from atman_triton.demo.tokenizer import train_tokenizer
from atman_triton.demo.train import Recipe, Trainer, run
from atman_triton.demo.training import launch
from atman_triton.evaluate.paper import OPEN_IMAGES, OTHER_MODELS
from bench.harness import ROOT
from bench.studies import common
from bench.studies.agreement import LINEAR, PAIRS, TOP_1, agreement
from bench.studies.common import SALT, Labelled, Row
from bench.studies.truth import CORRELATION, GAP, PRECISION, Truth

NAME = "size"
FOLDER = ROOT / ".benchmarks" / "sizes"
SIZES: dict[str, tuple[Recipe, int]] = {
    "64x2": (Recipe(width=64, layers=2, workers=1), 4000),
    "80x3": (Recipe(width=80, layers=3, workers=1), 2400),
    "96x3": (Recipe(width=96, layers=3, workers=1), 3200),
}
"""Width by layers: recipe and steps."""
SHIPPED = "128x4"
METHODS = {name: {"method": name} for name in ("direct", "exact")}
PARAMETERS, MATCH, LIKELY = "parameters", "exact match", "probability"
_SHOWN = (GAP, PRECISION, CORRELATION, TOP_1, PAIRS, LINEAR)
_FRESH = 300
_TOKENIZER_DOCUMENTS = 4000  # as of the shipped reader


class Reader(NamedTuple):
    """One size."""

    name: str
    model: Any
    tokenizer: Any


def train(name: str, folder: Path) -> None:
    """Train a size into ``folder/NAME``, from its checkpoint on if there is one."""
    recipe, steps = SIZES[name]
    launch(_train, 1, folder / name, recipe, steps)


def _train(rank: int, out: Path, recipe: Recipe, steps: int) -> None:
    texts = sample_texts(recipe.seed, _TOKENIZER_DOCUMENTS)
    trainer = Trainer(recipe, out, train_tokenizer(texts, recipe.vocabulary), rank)
    if (out / "checkpoint.pt").exists():
        trainer.load()
    run(trainer, steps=steps, console=Console())


def readers(folder: Path) -> list[Reader]:
    """The sizes that are there, small to large, the shipped one last.

    Raises: ValueError: if there is none beside the shipped one.
    """
    found = []
    for name in SIZES:
        if (folder / name / "model" / "model.safetensors").exists():
            found.append(Reader(name, *load_demo_model(folder / name / "model")))
    if not found:
        raise ValueError(
            f"{folder} must hold a trained size ({', '.join(SIZES)}), got none; "
            "train them by: python -m bench.studies.size --train"
        )
    return [*found, Reader(SHIPPED, *load_demo_model())]


def shared(several: Sequence[Reader], count: int) -> list[Labelled]:
    """The first documents that all readers answer right, at most ``count``."""
    cases = [Labelled.of(*case) for case in fresh_cases(4 * count, SALT)]
    for reader in several:
        cases = common.answered(reader.model, reader.tokenizer, cases)
    return cases[:count]


def examine(reader: Reader, case: Labelled, number: int) -> dict[str, dict[str, float]]:
    """Measures of one document by method."""
    explained = {
        name: common.explain(reader.model, reader.tokenizer, case, **settings)
        for name, settings in METHODS.items()
    }
    truth = Truth(reader.model, reader.tokenizer, case, explained["exact"], number)
    found = truth.judge(explained)
    for name, explanation in explained.items():
        found[name] |= agreement(truth.prompt_scores(explanation), truth.rises)
        found[name][LIKELY] = math.exp(explanation.base_logprobs.double().mean().item())
    return found


def rows_of(part: str, name: str, found: Sequence[Mapping[str, Mapping[str, float]]]) -> list[Row]:
    """A row per method and measure of one size."""
    return [
        common.mean_row(
            NAME, part, name, method, measure, [each[method][measure] for each in found]
        )
        for method in METHODS
        for measure in (*_SHOWN, LIKELY)
    ]


def about(reader: Reader) -> tuple[list[Row], float]:
    """Rows of what a size is, and its exact match."""
    share = exact_match(reader.model, reader.tokenizer, fresh_cases(_FRESH, NAME))
    hits = [1.0] * share.right + [0.0] * (share.tried - share.right)
    size = float(reader.model.num_parameters())
    rows = [
        common.row(NAME, "readers", reader.name, "", PARAMETERS, (size, size, size), 1),
        common.mean_row(NAME, "readers", reader.name, "", MATCH, hits),
    ]
    return rows, share.value


def verdicts(rows: Sequence[Row]) -> list[str]:
    """Each size in a line, then what the paper says."""
    lines = []
    for size in common.pick(rows, part="readers", measure=PARAMETERS):
        (match,) = common.pick(rows, part="readers", what=size.what, measure=MATCH)
        own = {
            (row.method, row.measure): row.value
            for row in common.pick(rows, part="own", what=size.what)
        }
        parts = [
            f"{method}: precision {own[method, PRECISION]:.3f}, pairs {own[method, PAIRS]:.3f}, "
            f"rank correlation {own[method, CORRELATION]:.2f}"
            for method in METHODS
        ]
        lines.append(
            f"{size.what} ({size.value:,.0f} parameters): exact match {match.value:.1%}; "
            + "; ".join(parts)
        )
    paper = {"6B": OPEN_IMAGES["atman"], **OTHER_MODELS}
    numbers = ", ".join(f"{name} {paper[name]['mAP']}" for name in ("6B", "13B", "30B"))
    lines.append(f"The paper's mAP on OpenImages, another task: {numbers} percent.")
    return lines


def draw(rows: Sequence[Row], path: Path) -> None:
    """Exact match and the measures over parameters."""
    from matplotlib.figure import Figure

    sizes = {row.what: row.value for row in common.pick(rows, part="readers", measure=PARAMETERS)}
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    panels = figure.subplots(1, 4)
    matches = common.pick(rows, part="readers", measure=MATCH)
    _line(panels[0], sizes, matches, "exact match", "black")
    panels[0].set_title("exact match on fresh documents", fontsize=10)
    colours = {"direct": "#2166ac", "exact": "#b2182b"}
    for axes, measure in zip(panels[1:], (PRECISION, PAIRS, CORRELATION), strict=True):
        for method, colour in colours.items():
            own = common.pick(rows, part="own", method=method, measure=measure)
            _line(axes, sizes, own, method, colour)
        axes.set_title(measure, fontsize=10)
        axes.legend(fontsize=8)
    for axes in panels:
        axes.set_xscale("log")
        axes.set_xticks(
            list(sizes.values()), [f"{name}\n{n / 1e6:.2f}M" for name, n in sizes.items()]
        )
        axes.minorticks_off()
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.2)
    figure.suptitle("the last three: on what each size answers right; bars: 95%", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _line(
    axes: Any, sizes: Mapping[str, float], rows: Sequence[Row], label: str, colour: str
) -> None:
    values = [row.value for row in rows]
    spread = [
        [row.value - row.low for row in rows],
        [row.high - row.value for row in rows],
    ]
    places = [sizes[row.what] for row in rows]
    axes.errorbar(places, values, spread, marker="o", capsize=3, label=label, color=colour)


def main(arguments: list[str] | None = None) -> None:
    """Command line."""

    def extend(parser: argparse.ArgumentParser) -> None:
        add = parser.add_argument
        add("--train", nargs="*", choices=SIZES, help="train these, or all, and measure nothing")
        add("--folder", type=Path, default=FOLDER, help="of the trained sizes")
        add("--least", type=float, default=0.5, help="exact match of a size in the shared part")

    options = common.options_of(__doc__, arguments, 40, extend)
    if options.train is not None:
        for name in options.train or SIZES:
            train(name, options.folder)
        return
    rows: list[Row] = []
    able = []
    several = readers(options.folder)
    for reader in several:
        own_rows, match = about(reader)
        rows += own_rows
        able += [reader] if match >= options.least else []
        cases = common.documents(reader.model, reader.tokenizer, options.documents)
        numbered = common.progress(list(enumerate(cases)), f"{NAME} {reader.name}")
        found = [examine(reader, case, number) for number, case in numbered]
        rows += rows_of("own", reader.name, found)
    cases = shared(able, options.documents // 2)
    for reader in able:
        found = [examine(reader, case, number) for number, case in enumerate(cases)]
        rows += rows_of("shared", reader.name, found)
    rows.sort(key=lambda row: ("readers", "own", "shared").index(row.part))
    common.write(rows, options.out)
    draw(rows, options.out / "studies-size.png")
    common.show(rows, verdicts(rows))


if __name__ == "__main__":
    main()
