"""Fig. 16: how good a method is over a grid of its options, such as factor and threshold."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from ..bootstrap import Interval
from .collected import FAITHFUL, NothingToDraw, sentences
from .style import INK, LINE, SIZE, SMALL, framed

_PANELS = {"mAP": ("mAP, %", 100.0), "removal_gap": (FAITHFUL["removal_gap"], 1.0)}
_WORDS = {"factor": "suppression factor", "similarity": "similarity threshold κ"}
_ROW = 0.52  # inches
_DARK = 0.55  # of the colours; letters on darker ones are white
_FRAME = "#D55E00"


class Cell(Protocol):
    """What of a ``sweep.Cell`` is read."""

    @property
    def options(self) -> dict[str, str]:
        """Its place, value by option as it is written; one option or two, the same in all."""
        ...

    @property
    def values(self) -> dict[str, Interval]:
        """By measure; mAP as a fraction."""
        ...


def sweep(cells: Sequence[Cell], title: str) -> Figure:
    """A heat map with its numbers for mAP, and one for the removal gap.

    Args:
        cells: Of the grid; the first option runs to the right, the second one downwards.
        title: Method, data and model, for the caption.
    Raises: NothingToDraw: if no cell has a value. ValueError: if a cell comes twice.
    Source: AtMan, Fig. 16.
    """
    grids = {measure: _grid(cells, measure) for measure in _PANELS}
    panels = {
        measure: found
        for measure, found in grids.items()
        if any(math.isfinite(each.value) for each in found.values())
    }
    if not panels:
        raise NothingToDraw("no cell of the sweep has a mAP or a removal gap")
    across, down = _axes(cells)
    counts = [each.count for found in panels.values() for each in found.values()]
    figure, _ = framed(
        len(panels) * (0.8 + _ROW * len(down[1])),
        f"A sweep over {' and '.join(_WORDS.get(each, each) for each in cells[0].options)} "
        "(after Fig. 16 of the paper)",
        sentences(
            f"{title}; {max(counts)} examples",
            "Small: 95% bootstrap interval; framed: the highest; grey: not measured; colours span "
            "no less than the widest interval",
            "Factor 0 suppresses a unit altogether" if "factor" in cells[0].options else "",
            "Without κ (none) units are suppressed one at a time"
            if "similarity" in cells[0].options
            else "",
        ),
    )
    axes_of: Any = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    for axes, (measure, found) in zip(axes_of, panels.items(), strict=True):
        words, scale = _PANELS[measure]
        _heat(axes, found, (len(down[1]), len(across[1])), scale)
        axes.set_xticks(range(len(across[1])), across[1], fontsize=SIZE)
        axes.set_yticks(range(len(down[1])), down[1], fontsize=SIZE)
        axes.set_xlabel(_WORDS.get(across[0], across[0]), fontsize=SIZE)
        axes.set_ylabel(_WORDS.get(down[0], down[0]), fontsize=SIZE)
        axes.set_title(words, fontsize=SIZE, loc="left", color=INK)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    return figure


def _axes(cells: Sequence[Cell]) -> tuple[tuple[str, list[str]], tuple[str, list[str]]]:
    """Name and values of what runs to the right, and of what runs downwards."""
    values = {
        name: list(dict.fromkeys(cell.options[name] for cell in cells)) for name in cells[0].options
    }
    across, *down = values.items()
    return across, down[0] if down else ("", [""])


def _grid(cells: Sequence[Cell], measure: str) -> dict[tuple[int, int], Interval]:
    """The intervals by row and column."""
    (first, across), (second, down) = _axes(cells)
    found = {}
    for cell in cells:
        row = down.index(cell.options.get(second, ""))
        place = row, across.index(cell.options[first])
        if place in found:
            raise ValueError(f"cells must differ in their options, but {cell.options} comes twice.")
        found[place] = cell.values.get(measure, Interval(math.nan, math.nan, math.nan, 0))
    return found


def _heat(
    axes: Any, found: Mapping[tuple[int, int], Interval], shape: tuple[int, int], scale: float
) -> None:
    values = np.full(shape, math.nan)
    for place, interval in found.items():
        values[place] = scale * interval.value
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    spans = [scale * (each.high - each.low) for each in found.values() if each.count]
    wide = max([high - low, *(each for each in spans if math.isfinite(each))]) or 1.0
    axes.imshow(
        values,
        cmap=colormaps["Blues"].with_extremes(bad=LINE),
        vmin=low,
        vmax=low + wide,
        aspect="auto",
    )
    for (row, column), interval in found.items():
        if not math.isfinite(interval.value):
            continue
        ink = "white" if (values[row, column] - low) / wide > _DARK else INK
        alike = {"ha": "center", "va": "center", "color": ink}
        number = _number(scale * interval.value)
        axes.text(column, row - 0.14, number, fontsize=SIZE + 1, weight="bold", **alike)
        if math.isfinite(interval.low):
            ends = f"{_number(scale * interval.low)} to {_number(scale * interval.high)}"
            axes.text(column, row + 0.24, ends, fontsize=SMALL - 0.5, **alike)
    known = {place: _number(value) for place, value in np.ndenumerate(values) if value == value}
    best = [place for place, shown in known.items() if shown == _number(high)]
    for row, column in best if len(best) < len(known) else []:
        corner = (column - 0.5, row - 0.5)
        axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor=_FRAME, linewidth=2.2))


def _number(value: float) -> str:
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"
