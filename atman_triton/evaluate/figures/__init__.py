"""Figures of an evaluation, each a function that takes results and gives a matplotlib figure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ...table import import_extra
from ..examples import Example
from ..results import Result

if TYPE_CHECKING:
    from .collected import Chosen, Described
    from .sweep import Cell

__all__ = ["draw_all", "draw_sweep"]


def draw_all(
    results: Sequence[Result],
    rows: Sequence[Chosen],
    statistics: Described | None,
    folder: Path,
    title: str,
    examples: Sequence[Example],
    *,
    grouped: bool = False,
    say: Callable[[str], object] = print,
) -> list[Path]:
    """Write every figure for which there are results.

    Args:
        results: Of every example and method.
        rows: Of the table, see ``tables.Row``: methods, the reading chosen for each, and the
            paper's numbers.
        statistics: Of the data set; None leaves them out.
        folder: Where PNGs go: ``summary``, ``pareto``, ``curves``, ``boxes``, ``histograms``,
            ``questions``, ``suppression``, ``gallery``, ``data``. One of an earlier run that cannot
            be drawn any more is deleted.
        title: Data set and model, for captions.
        examples: What the results are of, for galleries.
        grouped: As ``tables.summarise`` was told.
        say: Is told of every figure that is left out, and why.
    Returns: what was written.
    Raises: ImportError: if matplotlib is not installed.
    """
    import_extra("matplotlib", "eval")
    from .drawing import draw_all

    return draw_all(
        results,
        rows,
        statistics,
        folder,
        title,
        examples,
        grouped=grouped,
        say=say,
    )


def draw_sweep(cells: Sequence[Cell], path: Path, title: str) -> Path:
    """Write the heat map of a sweep.

    Args:
        cells: See ``sweep.Cell`` of ``atman_triton.evaluate``.
        path: Of the PNG.
        title: Method, data and model, for the caption.
    Returns: the path.
    Raises: ImportError: if matplotlib is not installed. ValueError: if no cell has a value, or one
        comes twice.
    """
    import_extra("matplotlib", "eval")
    from .style import save
    from .sweep import sweep

    save(sweep(cells, title), path)
    return path
