"""All figures of one evaluation, written into a folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from ..examples import Example
from ..results import Result
from .collected import Chosen, Collected, Described, NothingToDraw
from .curves import curves
from .dataset import dataset
from .gallery import gallery
from .pareto import pareto
from .questions import by_questions
from .spread import boxes, histograms
from .style import save
from .summary import summary
from .suppression import suppression


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
    """See ``atman_triton.evaluate.figures.draw_all``."""
    collected = Collected.of(results, rows, title, grouped=grouped)
    data = "OpenImages" if any(example.is_picture for example in examples) else "SQuAD"
    figures: dict[str, Callable[[], Figure]] = {
        "summary": lambda: summary(collected, data),
        "pareto": lambda: pareto(collected),
        "curves": lambda: curves(collected),
        "boxes": lambda: boxes(collected),
        "histograms": lambda: histograms(collected),
        "questions": lambda: by_questions(collected),
        "suppression": lambda: suppression(collected, examples),
        "gallery": lambda: gallery(results, examples, title),
        "data": lambda: dataset(statistics.values if statistics else {}, title),
    }
    written = []
    for name, draw in figures.items():
        path = folder / f"{name}.png"
        try:
            figure = draw()
        except NothingToDraw as reason:
            path.unlink(missing_ok=True)  # of an earlier run, which had it
            say(f"{path.name} is left out: {reason}.")
            continue
        save(figure, path)
        written.append(path)
    return written
