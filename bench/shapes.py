"""The shipped model of shapes: where relevance stands on pictures, in four parts.

- ``pointing``: does the relevance of a name stand on the object that bears it?
- ``redundancy``: the same object twice, as in Fig. 5 of the paper;
- ``questions``: yes or no over picture and text together, as in Fig. 20;
- ``cost``: 144 patches, beside a loop of forward passes.

What is measured exactly, ``bench.shapes_pointing``, ``bench.shapes_redundancy``,
``bench.shapes_questions`` and ``bench.shapes_cost`` say. Pictures are fresh: drawn from seeds that
training never sees. One command::

    python -m bench.shapes                       # 100 pictures each
    python -m bench.shapes questions figure      # some parts again, and the pictures

Rows of a part take the place of its earlier ones in ``bench/results/shapes.csv``, so parts may be
run one by one. ``figure`` draws ``bench/results/shapes.png`` from that file, with some explanations
and failures, and one of the 100 pictures as ``docs/explain-image.png``.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from atman_triton.demo.shapes import load_shapes_model
from bench.harness import RESULTS, ROOT
from bench.shapes_rows import Row, Setting, put, read

SAMPLED = ("pointing", "redundancy", "questions")
PARTS = (*SAMPLED, "cost", "figure")

_worker: dict[str, Any] = {}


def _start() -> None:
    torch.set_num_threads(1)
    _worker["model"], _worker["processor"] = load_shapes_model()


@contextmanager
def _mapping(processes: int) -> Iterator[Callable[..., Iterable[Any]]]:
    """``map`` over some processes of one thread each, or in this one."""
    if not processes:
        yield map
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, _start) as pool:
        yield pool.map


def examine(job: tuple[str, int]) -> Any:
    """One picture of a part."""
    part, number = job
    module = importlib.import_module(f"bench.shapes_{part}")
    return module.examine(_worker["model"], _worker["processor"], number)


def sampled(part: str, pictures: int, processes: int) -> list[Row]:
    """Rows of a part over pictures."""
    jobs = [(part, number) for number in range(pictures)]
    with _mapping(processes) as mapped:
        done = mapped(examine, jobs)
        found = list(track(done, part, len(jobs), console=Console(stderr=True)))
    return importlib.import_module(f"bench.shapes_{part}").summarise(found)


def table(rows: list[Row]) -> Table:
    """The rows of one part: a line for each setting and kind, a column for each measure."""
    result = Table(title=rows[0].part)
    measures = list(dict.fromkeys(each.measure for each in rows))
    for name in ("kind", "setting"):
        result.add_column(name)
    for name in measures:
        result.add_column(name, justify="right")
    lines: dict[tuple[str, Setting], dict[str, Row]] = {}
    for each in rows:
        setting = Setting(each.method, each.mode, each.similarity, each.units)
        lines.setdefault((each.kind, setting), {})[each.measure] = each
    for (kind, setting), own in lines.items():
        cells = [
            f"{own[name].value:.3g} [{own[name].low:.3g}, {own[name].high:.3g}]"
            if name in own
            else ""
            for name in measures
        ]
        result.add_row(kind, setting.name, *cells)
    return result


def _cell(row: Row) -> str:
    return f"{row.value:.3g} [{row.low:.3g}, {row.high:.3g}]"


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="part", help=f"of {', '.join(PARTS)}; or all")
    parser.add_argument("--pictures", type=int, default=100, help="of each part")
    parser.add_argument("--processes", type=int, default=2, help="0: in this one")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of rows and picture")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="folder of the example")
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.parts) - set(PARTS))
    if unknown:
        parser.error(f"parts must be among {', '.join(PARTS)}, got {', '.join(unknown)}")
    if options.pictures < 1:
        parser.error("at least 1 picture is needed")
    _start()
    console = Console(width=160)
    path = options.out / "shapes.csv"
    for part in options.parts or PARTS:
        if part == "figure":
            from bench.shapes_figure import draw, draw_example

            options.out.mkdir(parents=True, exist_ok=True)
            draw(_worker["model"], _worker["processor"], read(path), options.out / "shapes.png")
            draw_example(_worker["model"], _worker["processor"], options.docs / "explain-image.png")
            continue
        if part == "cost":
            from bench.shapes_cost import measure

            rows = measure(_worker["model"], _worker["processor"])
        else:
            rows = sampled(part, options.pictures, options.processes)
        put(rows, path)
        console.print(table(rows))


if __name__ == "__main__":
    main()
