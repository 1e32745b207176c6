"""Pictures of the sets of ``bench/gpu.py``, drawn from their rows, so that a CSV is enough.

Where a number was measured several times, the last row counts. Colours are those of Okabe and Ito
and one of Tol's, which colour-blind eyes can tell apart; every provider also has a marker of its
own.
"""

from __future__ import annotations

import csv
import dataclasses
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.gpu_explain import WHAT as EXPLAINED
from bench.gpu_live import COMPILED
from bench.harness import Row
from bench.live import LIVE, PLAIN
from bench.live import WHAT as LIVE_WHAT
from bench.rivals import EAGER, FLEX, OURS, OURS_HOPPER, OURS_PORTABLE

WINE = "#882255"
BLACK, ORANGE, SKY, GREEN, YELLOW, BLUE, RED, PINK = (
    "#000000", "#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7",
)  # fmt: skip
STYLES = {
    OURS: (BLACK, "o"),
    OURS_HOPPER: (WINE, "*"),
    OURS_PORTABLE: ("0.5", "o"),
    "cuDNN": (BLUE, "s"),
    "FLASH": (GREEN, "^"),
    "EFFICIENT": (SKY, "v"),
    "MATH": (YELLOW, "<"),
    "FlashAttention-4": (PINK, "D"),
    FLEX: (RED, "P"),
    EAGER: (ORANGE, "X"),
}
"""Colour and marker by a provider's name, or the last word of it."""

MODES = {"multiplicative": (BLUE, "s"), "min_shift": (BLACK, "o"), "log_additive": (RED, "^")}
_KERNEL = re.compile(r"attention (forward|forward \+ backward), (causal|full), one key per row, ")
_CALL = re.compile(r"attention forward, causal, long, ")
_CHUNKS = re.compile(r"direct, (\d+) chunks in a batch, prefix (shared|copied)")
_HEADS = re.compile(r"Hq(\d+)-Hk(\d+)-T(\d+)-D(\d+)")


def read_rows(path: Path) -> list[Row]:
    """The rows of a file that :func:`bench.harness.write_rows` wrote; none of another file."""
    names = [field.name for field in dataclasses.fields(Row)]
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != names:
            return []
        numbers = ("median", "p20", "p80")
        return [
            Row(**line | {name: float(line[name]) for name in numbers})  # pyright: ignore[reportArgumentType]
            for line in reader
        ]


def latest(rows: Iterable[Row]) -> list[Row]:
    """Of rows about the same, the last."""
    last = {(r.what, r.provider, r.shape, r.dtype, r.metric): r for r in rows}
    return list(last.values())


def draw_all(rows: Sequence[Row], folder: Path) -> list[Path]:
    """The pictures of every set that has rows; devices apart."""
    drawn = []
    for device in dict.fromkeys(row.device for row in rows):
        own = latest(row for row in rows if row.device == device)
        chip = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
        for name, figure in (*kernels(own), *explain(own), *long(own)):
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"{name}-{chip}.png"
            figure.savefig(path, dpi=110)
            drawn.append(path)
    return drawn


Pictures = Iterator[tuple[str, Any]]
"""Names and figures."""


# --- kernels --------------------------------------------------------------------------------------


def kernels(rows: Sequence[Row]) -> Pictures:
    """TFLOP/s over length by provider, a picture for each direction and mode."""
    pictures: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.metric == "TFLOP/s" and (found := _KERNEL.match(row.what)):
            place = found[1], row.what[found.end() :]
            pictures.setdefault(place, []).append(row)
    peak = next((r.median for r in rows if (r.what, r.metric) == ("matrix product", "TFLOP/s")), 0)
    for (direction, mode), own in pictures.items():
        name = f"kernels-{direction.replace(' + ', '-')}-{mode}"
        yield name, _kernel_picture(own, f"{direction}, {mode}", peak)


def _kernel_picture(rows: Sequence[Row], title: str, peak: float) -> Any:
    """A panel per head counts and head dim, and causal or full."""
    points: dict[tuple[str, tuple[int, ...]], dict[str, list[tuple[int, Row]]]] = {}
    for row in rows:
        found = _HEADS.search(row.shape)
        assert found is not None, f"a row of the kernels has no shape: {row.shape}"
        heads, key_heads, tokens, dim = map(int, found.groups())
        panel = row.what.split(", ")[1], (dim, heads, key_heads)
        points.setdefault(panel, {}).setdefault(row.provider, []).append((tokens, row))
    kinds = [kind for kind in ("causal", "full") if any(panel[0] == kind for panel in points)]
    columns = sorted({panel[1] for panel in points})
    figure, panels = _figure(len(kinds), len(columns), 3.1, 2.7, title, rows[0], sharey=True)
    lengths = sorted(
        {tokens for by in points.values() for some in by.values() for tokens, _ in some}
    )
    for line, kind in zip(panels, kinds, strict=True):
        for axes, column in zip(line, columns, strict=True):
            for provider, some in points.get((kind, column), {}).items():
                _curve(axes, some, *_style(provider))
            if peak:
                axes.axhline(peak, color="0.6", linewidth=1, linestyle=":")
            dim, heads, key_heads = column
            axes.set_title(f"D {dim}, Hq {heads}, Hk {key_heads}, {kind}", fontsize=9)
            _lengths(axes, lengths)
            axes.set_ylim(bottom=0)
        line[0].set_ylabel("TFLOP/s")
    names = list(dict.fromkeys(row.provider for row in rows))
    _legend(figure, {name: _style(name) for name in names}, "torch.mm" if peak else None)
    return figure


def _style(provider: str) -> tuple[str, str]:
    """Colour and marker."""
    return STYLES.get(provider) or STYLES.get(provider.split()[-1]) or ("0.3", "*")


# --- explain --------------------------------------------------------------------------------------


def explain(rows: Sequence[Row]) -> Pictures:
    """Seconds by provider, and tokens per second while generating; a line of panels per model."""
    models: dict[str, list[Row]] = {}
    for row in rows:
        if (row.what, row.metric) == (EXPLAINED, "s"):
            models.setdefault(row.shape, []).append(row)
    if not models:
        return
    first = next(iter(models.values()))[0]
    figure, panels = _figure(
        len(models), 2, 5.4, 2.9, "explanations", first, width_ratios=(2.4, 1), sharex="col"
    )
    for (left, right), (shape, own) in zip(panels, models.items(), strict=True):
        for place, row in enumerate(own):
            colour = BLACK if row.provider.split(" (")[0] in ("exact", "direct") else ORANGE
            colour = BLUE if row.provider.startswith("eager") else colour
            _bar(left, place, row, colour, f"{row.median:.3g}")
        left.set_xscale("log")
        left.set_xlabel("seconds")
        _names(left, [row.provider.replace(" (", "\n(") for row in own])
        left.set_title(shape, fontsize=9)
        left.margins(x=0.15)
        model = shape.split("-prompt")[0]
        speeds = [
            row
            for row in rows
            if (row.what, row.metric) == (LIVE_WHAT, "tokens/s")
            and row.shape.startswith(f"{model}-prompt")
        ]
        for place, row in enumerate(speeds):
            _bar(right, place, row, BLACK if row.provider == LIVE else BLUE, f"{row.median:.3g}")
        right.set_xlabel("tokens/s")
        right.margins(x=0.2)
        names = {
            PLAIN: "plain generation",
            LIVE: "live citations",
            COMPILED: "plain, compiled",
        }
        _names(right, [names.get(row.provider, row.provider) for row in speeds])
    yield "explain", figure


def _bar(axes: Any, place: int, row: Row, colour: str, text: str) -> None:
    """A horizontal bar with the 20% and 80% quantiles, and its number behind it."""
    spread = [[row.median - row.p20], [row.p80 - row.median]]
    axes.barh(place, row.median, color=colour, height=0.6, xerr=spread, ecolor="0.6")
    offset = {"xytext": (4, 0), "textcoords": "offset points", "va": "center", "fontsize": 8}
    axes.annotate(text, (row.p80, place), **offset)


def _names(axes: Any, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)


# --- long -----------------------------------------------------------------------------------------


def long(rows: Sequence[Row]) -> Pictures:
    """Time and memory: of one call over tokens, of a document over chunks in a batch."""
    calls = [row for row in rows if _CALL.match(row.what)]
    chunks = [row for row in rows if _CHUNKS.match(row.provider)]
    if not calls and not chunks:
        return
    some = (calls or chunks)[0]
    figure, panels = _figure(2, 2, 4.4, 3.0, "long inputs", some)
    for mode, style in MODES.items():
        for axes, metric in zip(panels[0], ("ms", "GiB"), strict=True):
            points = [
                (int(found[3]), row)
                for row in calls
                if row.metric == metric
                and row.what.endswith(f", {mode}")
                and (found := _HEADS.search(row.shape))
            ]
            _curve(axes, points, *style, label=mode)
    styles = {"shared": (GREEN, "D"), "copied": (ORANGE, "X")}
    for kind, style in styles.items():
        for axes, metric in zip(panels[1], ("s", "GiB"), strict=True):
            points = [
                (int(found[1]), row)
                for row in chunks
                if row.metric == metric
                and (found := _CHUNKS.match(row.provider))
                and found[2] == kind
            ]
            _curve(axes, points, *style, label=f"prefix {kind}")
    document = chunks[0].shape if chunks else "no document"
    labels = ("ms", "peak GiB"), ("seconds", "peak GiB above the weights")
    for line, names, title in zip(panels, labels, ("one call", document), strict=True):
        for axes, name in zip(line, names, strict=True):
            axes.set_ylabel(name)
            axes.set_yscale("log")
            axes.set_title(title, fontsize=9)
    for line, name, of in zip(
        panels, ("tokens", "chunks in a batch"), (calls, chunks), strict=True
    ):
        ticks = {_count(row) for row in of}
        for axes in line:
            _lengths(axes, sorted(ticks))
            axes.set_xlabel(name)
    used = {row.what.rsplit(", ", 1)[1] for row in calls}
    entries = {mode: style for mode, style in MODES.items() if mode in used}
    entries |= {f"prefix {kind}": style for kind, style in styles.items()} if chunks else {}
    _legend(figure, entries)
    yield "long", figure


def _count(row: Row) -> int:
    """Chunks in a batch, or tokens of a call."""
    if found := _CHUNKS.match(row.provider):
        return int(found[1])
    found = _HEADS.search(row.shape)
    return int(found[3]) if found else 1


# --- what they share ------------------------------------------------------------------------------


def _figure(
    rows: int, columns: int, width: float, height: float, title: str, row: Row, **options: Any
) -> tuple[Any, Any]:
    """A figure and its panels, and on what it was measured."""
    from matplotlib.figure import Figure

    size = (0.8 + width * columns, 1.2 + height * rows)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, **options)
    figure.suptitle(f"{title}\n{row.device}, {row.dtype}, {row.date}", fontsize=10)
    return figure, panels


def _curve(
    axes: Any, points: list[tuple[int, Row]], colour: str, marker: str, label: str | None = None
) -> None:
    """Medians over a count, with their 20% and 80% quantiles."""
    if not points:
        return
    points = sorted(points, key=lambda point: point[0])
    counts = [count for count, _ in points]
    axes.fill_between(
        counts, [r.p20 for _, r in points], [r.p80 for _, r in points], color=colour, alpha=0.15
    )
    axes.plot(
        counts,
        [row.median for _, row in points],
        color=colour,
        marker=marker,
        markersize=5,
        linewidth=1.4,
        label=label,
    )


def _lengths(axes: Any, counts: Sequence[int]) -> None:
    """Ticks where something was measured."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [_short(count) for count in counts], fontsize=8)
    axes.minorticks_off()
    axes.grid(alpha=0.3)


def _short(count: int) -> str:
    for unit, name in ((1 << 20, "M"), (1 << 10, "k")):
        if count >= unit and count % unit == 0:
            return f"{count // unit}{name}"
    return str(count)


def _legend(figure: Any, styles: dict[str, tuple[str, str]], dotted: str | None = None) -> None:
    """Below the panels, where it covers nothing."""
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=colour, marker=marker, label=name)
        for name, (colour, marker) in styles.items()
    ]
    if dotted is not None:
        handles.append(Line2D([], [], color="0.6", linestyle=":", label=dotted))
    columns = min(len(handles), max(2, int(figure.get_figwidth() // 2.2)))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False)
