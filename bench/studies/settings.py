"""What the settings of AtMan do to an explanation: factor, mode, κ with its neighbours, rule.

Everything is measured on documents that the model answers right, with the measures of
``bench.studies.truth``; ``pairs`` and ``top 5 -1`` are those of ``bench.studies.agreement``. Rows
are of one half of the documents, ``report``. On the other half, ``choose``, the setting with the
largest removal gap is chosen among all of a method; part ``choice`` reports it beside the default,
and the difference of the two document by document. Direct effects are measured on all documents,
exact ones, which cost more, on the first ``--exact``. Parts:

- ``factor``: what a token's scores are multiplied with (the paper's suppression factor is 1 less
  this), in each mode;
- ``mode``: the four definitions at the factor 0.1;
- ``neighbours``: tokens suppressed along, by threshold κ and rule, in mode ``min_shift`` at the
  factor 0.1 (which the rule ``paper`` does not know); ``neighbours`` is how many tokens are
  suppressed with one, itself apart. One command::

    python -m bench.studies.settings             # 60 documents, exact effects of 20

Rows go to ``bench/results/studies-settings.csv``, the picture to ``studies-settings.png``.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from atman_triton.demo import load_demo_model
from bench.studies import common
from bench.studies.agreement import PAIRS, TOP_1, agreement
from bench.studies.common import Labelled, Row
from bench.studies.truth import CORRELATION, GAP, PRECISION, Truth

NAME = "settings"
FACTORS = (0.0, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9)
FEW_FACTORS = (0.0, 0.1, 0.5)
MODES = ("min_shift", "multiplicative", "log_additive")
THRESHOLDS = (0.9, 0.7, 0.6, 0.4, 0.2)
FEW_THRESHOLDS = (0.7, 0.6, 0.4)
RULES = ("released", "paper")
DEFAULT = 0.1
NEIGHBOURS, DIFFERENCE = "neighbours", "removal gap less the default's"
_SHOWN = (GAP, PRECISION, CORRELATION, PAIRS, TOP_1)


class Setting(NamedTuple):
    """How to explain; ``what`` was varied in a ``part`` of the study."""

    part: str
    what: str
    method: str
    mode: str = "min_shift"
    factor: float | None = DEFAULT
    similarity: float | None = None
    rule: str | None = None

    @property
    def by(self) -> str:
        """``direct, min_shift``, for instance."""
        return f"{self.method}, {self.mode}"

    @property
    def arguments(self) -> dict[str, Any]:
        """Of ``Explainer``."""
        found: dict[str, Any] = {"method": self.method, "mode": self.mode, "factor": self.factor}
        if self.similarity is not None:
            found |= {"similarity": self.similarity, "rule": self.rule}
        if self.rule == "paper":  # which refuses a factor
            del found["factor"]
        if self.mode == "min_shift_full":
            found["backend"] = "reference"
        return found


def settings_of(method: str) -> list[Setting]:
    """All that is measured of one method; fewer of ``exact``."""
    found = []
    for mode in MODES:
        few = (method, mode) == ("exact", "log_additive")
        for factor in FEW_FACTORS if few else FACTORS:
            found.append(Setting("factor", f"factor {factor:g}", method, mode, factor))
    for rule in RULES:
        thresholds = THRESHOLDS
        if method == "exact":
            thresholds = FEW_THRESHOLDS if rule == "released" else (0.6,)
        for similarity in thresholds:
            what = f"κ {similarity:g}, {rule}"
            factor = DEFAULT if rule == "released" else None
            found.append(Setting("neighbours", what, method, "min_shift", factor, similarity, rule))
    if method == "exact":
        found.append(Setting("mode", f"factor {DEFAULT:g}", method, "min_shift_full"))
    return found


def default_of(method: str) -> Setting:
    """The default: mode ``min_shift``, factor 0.1, single tokens."""
    return Setting("factor", f"factor {DEFAULT:g}", method)


Found = dict[Setting, dict[str, float]]


def examine(
    model: Any, tokenizer: Any, case: Labelled, number: int, chosen: Sequence[Setting]
) -> Found:
    """Measures of one document by setting."""
    explained = {
        setting: common.explain(model, tokenizer, case, **setting.arguments) for setting in chosen
    }
    truth = Truth(model, tokenizer, case, next(iter(explained.values())), number)
    named = {repr(setting): explanation for setting, explanation in explained.items()}
    judged = truth.judge(named)
    found = {}
    for setting, explanation in explained.items():
        own = judged[repr(setting)] | agreement(truth.prompt_scores(explanation), truth.rises)
        own[NEIGHBOURS] = fmean(
            sum(near.token != unit.tokens[0] for near in unit.neighbours)
            for unit in explanation.units
        )
        found[setting] = own
    return found


# --- all documents --------------------------------------------------------------------------


def rows_of(found: Sequence[Found]) -> list[Row]:
    """A row per setting and measure, over the documents to report."""
    rows = []
    for setting in found[0]:
        parts = [setting.part]
        if setting.part == "factor" and setting.factor == DEFAULT:
            parts.append("mode")
        measures = [*_SHOWN, NEIGHBOURS] if setting.part == "neighbours" else _SHOWN
        for part, measure in itertools.product(parts, measures):
            values = [each[setting][measure] for each in found]
            rows.append(common.mean_row(NAME, part, setting.what, setting.by, measure, values))
    return rows


def choice(choose: Sequence[Found], report: Sequence[Found], method: str) -> list[Row]:
    """The setting with the largest gap on one half, and what it is worth on the other."""
    settings = [setting for setting in choose[0] if setting.method == method]
    chosen = common.best({setting: [each[setting][GAP] for each in choose] for setting in settings})
    default = default_of(method)
    rows = []
    for role, setting in (("default", default), ("chosen", chosen)):
        what = f"{role}: {setting.what}"
        for measure in _SHOWN:
            values = [each[setting][measure] for each in report]
            rows.append(common.mean_row(NAME, "choice", what, setting.by, measure, values))
        differences = [each[setting][GAP] - each[default][GAP] for each in report]
        rows.append(common.mean_row(NAME, "choice", what, setting.by, DIFFERENCE, differences))
    return rows


def verdicts(rows: Sequence[Row]) -> list[str]:
    """What was chosen, in plain words."""
    lines = []
    for row in common.pick(rows, part="choice", measure=DIFFERENCE):
        if row.what.startswith("chosen"):
            lines.append(
                f"{row.method.split(',')[0]}: {row.what.removeprefix('chosen: ')} "
                f"({row.method}) was chosen; on the other {row.count} documents its removal gap is "
                f"{row.value:+.3f} [{row.low:+.3f}, {row.high:+.3f}] nats from the default's."
            )
    return lines


def draw(rows: Sequence[Row], path: Path) -> None:
    """Removal gap and pairs in order over the factor, and over κ."""
    from matplotlib.figure import Figure

    colours = dict(zip(MODES, ("#2166ac", "#b2182b", "#1b7837"), strict=True))
    styles = {"direct": ("o", "-"), "exact": ("s", "--")}
    figure = Figure(figsize=(11, 7.4), layout="constrained")
    panels = figure.subplots(2, 2, squeeze=False)
    for line, measure in enumerate((GAP, PAIRS)):
        left, right = panels[line]
        for (method, (marker, style)), mode in itertools.product(styles.items(), MODES):
            own = common.pick(rows, part="factor", method=f"{method}, {mode}", measure=measure)
            places = [float(row.what.removeprefix("factor ")) for row in own]
            look = {"marker": marker, "linestyle": style, "color": colours[mode]}
            _line(left, places, own, f"{method}, {mode}", look)
        for (method, (marker, style)), rule in itertools.product(styles.items(), RULES):
            own = common.pick(
                rows, part="neighbours", method=f"{method}, min_shift", measure=measure
            )
            own = [row for row in own if row.what.endswith(rule)]
            places = [float(row.what.split()[1].rstrip(",")) for row in own]
            colour = "#2166ac" if rule == "released" else "#e08214"
            look = {"marker": marker, "linestyle": style, "color": colour}
            _line(right, places, own, f"{method}, rule {rule}", look)
        left.set_xlabel("factor (the paper's is 1 less this)")
        right.set_xlabel("κ: tokens at least as similar are suppressed along")
        label = (
            "removal gap, nats per token" if measure == GAP else "pairs in leave-one-out's order"
        )
        for axes in (left, right):
            axes.set_ylabel(label)
            axes.grid(alpha=0.2)
            axes.legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _line(
    axes: Any, places: Sequence[float], rows: Sequence[Row], label: str, look: Mapping[str, Any]
) -> None:
    values = [row.value for row in rows]
    below = [row.value - row.low for row in rows]
    above = [row.high - row.value for row in rows]
    axes.errorbar(places, values, [below, above], label=label, capsize=2, markersize=4, **look)


def main(arguments: list[str] | None = None) -> None:
    """Command line."""

    def extend(parser: argparse.ArgumentParser) -> None:
        text = "of how many documents exact effects are measured too, from 4"
        parser.add_argument("--exact", type=int, default=20, help=text)

    options = common.options_of(__doc__, arguments, 60, extend)
    if options.exact < 4 or options.documents < 4:
        raise SystemExit("settings: halves need at least 4 documents, and exact effects 4 too.")
    model, tokenizer = load_demo_model()
    cases = common.documents(model, tokenizer, options.documents)
    direct, exact = settings_of("direct"), settings_of("exact")
    found = []
    for number, case in common.progress(list(enumerate(cases)), NAME):
        chosen = direct + (exact if number < options.exact else [])
        found.append(examine(model, tokenizer, case, number, chosen))
    rows: list[Row] = []
    chosen_rows: list[Row] = []
    for method, count, own in (("direct", len(found), direct), ("exact", options.exact, exact)):
        halves = common.halves([{s: each[s] for s in own} for each in found[:count]])
        rows += rows_of(halves.report)
        chosen_rows += choice(halves.choose, halves.report, method)
    rows.sort(key=lambda row: ("factor", "mode", "neighbours").index(row.part))
    rows += chosen_rows
    common.write(rows, options.out)
    draw(rows, options.out / "studies-settings.png")
    common.show(rows, verdicts(rows))


if __name__ == "__main__":
    main()
