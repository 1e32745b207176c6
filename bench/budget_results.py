"""What ``bench.budget`` measured, over all documents: rows, a table, a picture, a conclusion."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.table import Table

from bench.removal import standard_error

_MARKERS = {"min_shift": "o", "multiplicative": "s", "log_additive": "^"}
MODES = tuple(_MARKERS)
# Modes cost the same, so they are drawn side by side.
_BESIDE = {"min_shift": 0.96, "multiplicative": 1.0, "log_additive": 1.04}


@dataclasses.dataclass(frozen=True)
class Setting:
    """A way to explain: a method, its budget or steps if it has any, and a mode."""

    method: str
    level: float | int | None = None
    mode: str = ""

    @property
    def name(self) -> str:
        """``hybrid 0.2, min_shift``, for instance."""
        level = "" if self.level is None else f" {self.level}"
        return self.method + level + (f", {self.mode}" if self.mode else "")


LEAVE_ONE_OUT, RANDOM = Setting("leave-one-out"), Setting("random")
REFERENCE = Setting("exact", None, "min_shift")
"""The setting from which the others' differences are taken."""


@dataclasses.dataclass(frozen=True)
class Found:
    """What a setting gave for one document; the gap in nats per token of the answer."""

    gap: float
    forwards: float
    rank_correlation: float


@dataclasses.dataclass(frozen=True)
class Document:
    """One document, ``found`` by the settings' names."""

    prompt_tokens: int
    found: dict[str, Found]


@dataclasses.dataclass(frozen=True)
class Row:
    """Means over documents, ``_se`` their standard errors.

    ``difference`` is the gap less that of ``REFERENCE``, document by document; None without it.
    ``level`` is the budget of hybrid, the steps of path.
    """

    method: str
    level: float | int | None
    mode: str
    documents: int
    prompt_tokens: float
    forwards: float
    gap: float
    gap_se: float
    difference: float | None
    difference_se: float | None
    rank_correlation: float
    rank_correlation_se: float
    device: str
    torch: str
    transformers: str
    commit: str
    date: str

    @property
    def setting(self) -> Setting:
        """Whose row it is."""
        return Setting(self.method, self.level, self.mode)


def paired(documents: Sequence[Document], first: Setting, second: Setting) -> tuple[float, float]:
    """Mean of the first's gap less the second's, and its standard error."""
    gaps = [each.found[first.name].gap - each.found[second.name].gap for each in documents]
    return fmean(gaps), standard_error(gaps)


def summarise(
    documents: Sequence[Document], settings: Sequence[Setting], runs: Sequence[dict[str, str]]
) -> list[Row]:
    """A row per setting, over at least two documents.

    Args:
        runs: With what the documents were measured; where runs differ, a row names all.
    """

    def all_of(name: str) -> str:
        return " + ".join(sorted({run[name] for run in runs}))

    facts = {name: all_of(name) for name in ("device", "torch", "transformers", "commit")}
    facts["date"] = max(run["date"] for run in runs)
    rows = []
    for setting in settings:
        own = [each.found[setting.name] for each in documents]
        gaps = [each.gap for each in own]
        correlations = [each.rank_correlation for each in own]
        difference = error = None
        if REFERENCE in settings:
            difference, error = (round(v, 4) for v in paired(documents, setting, REFERENCE))
        rows.append(
            Row(
                method=setting.method,
                level=setting.level,
                mode=setting.mode,
                documents=len(documents),
                prompt_tokens=round(fmean(each.prompt_tokens for each in documents), 1),
                forwards=round(fmean(each.forwards for each in own), 2),
                gap=round(fmean(gaps), 4),
                gap_se=round(standard_error(gaps), 4),
                difference=difference,
                difference_se=error,
                rank_correlation=round(fmean(correlations), 4),
                rank_correlation_se=round(standard_error(correlations), 4),
                **facts,
            )
        )
    return rows


def supported(rows: Sequence[Row], documents: Sequence[Document]) -> str:
    """The cheapest settings whose gap is not clearly below the largest one, and the largest.

    Clearly: by more than two standard errors of the difference, document by document. Modes of a
    method often cost the same, and then all are named: their order means nothing.
    """
    ours = [row for row in rows if row.mode]
    best = max(ours, key=lambda row: row.gap)
    behind = {row.setting: paired(documents, row.setting, best.setting) for row in ours}
    near = [row for row in ours if behind[row.setting][0] >= -2 * behind[row.setting][1]]
    least = min(row.forwards for row in near)
    names = [
        f"{row.setting.name} ({difference:+.3f} ± {error:.3f})"
        for row in near
        if row.forwards == least
        for difference, error in [behind[row.setting]]
    ]
    return (
        f"largest gap: {best.setting.name} ({best.gap:.3f}, {best.forwards:.1f} forwards); "
        f"cheapest not clearly below: {' and '.join(names)}, {least:.1f} forwards"
    )


def write(rows: Sequence[Row], path: Path) -> None:
    """Write rows in place of those of an earlier run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(Row)])
        writer.writeheader()
        writer.writerows(dataclasses.asdict(row) for row in rows)


def table(rows: Sequence[Row]) -> Table:
    """All rows, for people."""
    first = rows[0]
    title = f"{first.documents} documents of {first.prompt_tokens:.0f} tokens, {first.device}"
    result = Table(title=title)
    for name in ("method", "mode", "forwards", "gap, nats", "minus exact min_shift", "rank corr."):
        result.add_column(name, justify="left" if name in ("method", "mode") else "right")
    for row in rows:
        difference = ""
        if row.difference is not None:
            difference = f"{row.difference:+.3f} ± {row.difference_se:.3f}"
        result.add_row(
            dataclasses.replace(row.setting, mode="").name,
            row.mode,
            f"{row.forwards:.1f}",
            f"{row.gap:.3f} ± {row.gap_se:.3f}",
            difference,
            f"{row.rank_correlation:.3f} ± {row.rank_correlation_se:.3f}",
        )
    return result


# --- the picture ------------------------------------------------------------------------------

_COLOURS = {
    "exact": "#2166ac",
    "direct": "#1b7837",
    "hybrid": "#762a83",
    "path": "#b2182b",
    "score_gradient": "#e08214",
}
_TICKS = (1, 2, 5, 10, 20, 50, 100, 200)


def draw(rows: Sequence[Row], path: Path) -> None:
    """Gap and rank correlation over cost, logarithmic; a line through the levels of a method.

    Random, which costs nothing, is a line, and leave-one-out has no rank correlation with itself.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    figure = Figure(figsize=(11, 4.8), layout="constrained")
    panels: Any = figure.subplots(1, 2, sharex=True)
    for axes, value in zip(panels, ("gap", "rank_correlation"), strict=True):
        for row in rows:
            y, error = getattr(row, value), getattr(row, f"{value}_se")
            if row.setting == RANDOM:
                axes.axhline(y, color="grey", linestyle=":")
                axes.axhspan(y - error, y + error, color="grey", alpha=0.15, linewidth=0)
            elif row.setting == LEAVE_ONE_OUT and value == "gap":
                axes.errorbar(row.forwards, y, error, fmt="*", color="black", capsize=3)
        for (method, mode), line in _lines(rows).items():
            axes.errorbar(
                [row.forwards * _BESIDE[mode] for row in line],
                [getattr(row, value) for row in line],
                [getattr(row, f"{value}_se") for row in line],
                color=_COLOURS[method],
                marker=_MARKERS[mode],
                markersize=5,
                linewidth=1,
                capsize=2,
            )
        axes.set_xscale("log")
        axes.set_xticks(_TICKS, [str(tick) for tick in _TICKS])
        axes.minorticks_off()
        axes.set_xlabel("cost, forwards of the whole input")
        axes.grid(alpha=0.2)
    panels[0].set_ylabel("removal gap, nats per answer token")
    panels[1].set_ylabel("rank correlation with leave-one-out")
    levels = {"hybrid": "budget", "path": "steps"}
    handles = []
    for method in dict.fromkeys(row.method for row in rows if row.mode):
        own = dict.fromkeys(row.level for row in rows if row.method == method)
        note = f", {levels[method]} {', '.join(map(str, own))}" if method in levels else ""
        handles.append(Line2D([], [], color=_COLOURS[method], label=method + note))
    handles += [
        Line2D([], [], color="0.3", marker=_MARKERS[mode], linestyle="", label=mode)
        for mode in MODES
    ]
    handles.append(Line2D([], [], color="black", marker="*", linestyle="", label="leave-one-out"))
    handles.append(Line2D([], [], color="grey", linestyle=":", label="random (no forwards)"))
    figure.legend(handles=handles, fontsize=8, loc="outside lower center", ncols=5)
    first = rows[0]
    title = f"{first.documents} documents of {first.prompt_tokens:.0f} tokens on average"
    figure.suptitle(
        f"{title}; bars: one standard error; modes of one cost side by side", fontsize=10
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _lines(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    """The rows that one line goes through, cheapest first."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.mode:
            found.setdefault((row.method, row.mode), []).append(row)
    return {key: sorted(line, key=lambda row: row.forwards) for key, line in found.items()}
