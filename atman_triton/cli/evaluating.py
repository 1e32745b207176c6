"""``atman evaluate``: how good explanations are, of any method, as tables and figures."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..loading import BadUsage, Failed, pick_device
from .shared import DTYPES, Debug, Device, Dtype, Quiet, check_one_of, our_errors

if TYPE_CHECKING:
    from ..evaluate.session import Gathered, Session
    from ..evaluate.sweep import Sweep

SHIPPED = {"contracts": "contract", "shapes": "shapes"}
"""Data -> the shipped model that it is for."""

LIMIT = 546
"""Examples of made data: 46 to choose by, 500 to report."""

EVALUATE = (
    "Measure how good explanations are: of AtMan, and of what people use instead.\n\n"
    "Every example is explained by every method. How far the explanations agree with the labels "
    "(the paper's mAP and mAR), what happens to the answer when units are removed in their order, "
    "how stable they are when the question is reworded, and what they cost stands in a table, each "
    "number with its 95% interval: on the terminal, in table.csv (all of it) and table.md, with "
    "figures beside it; how much better each method is than the first one named, example by "
    "example, in differences.csv. Every twelfth example only chooses how each method's scores are "
    "read; the others are reported.\n\n"
    "What is done is on disk at once (DIR/journal): run the same command again to go on after an "
    "interruption, or with more methods or examples to measure only what is missing."
)


def evaluate(
    data: Annotated[
        str,
        typer.Argument(
            help="contracts | shapes (made, each for a shipped model) | squad | openimages (read "
            "from --data).",
            show_default=False,
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help="Folder or hub id of a model that writes; of contracts and shapes, the shipped "
            "one if none.",
            show_default=False,
        ),
    ] = None,
    methods: Annotated[
        str,
        typer.Option(
            help="What is compared, with commas between: all | paper | fast | baselines, or names "
            "with options behind colons, such as direct,exact:mode=multiplicative,"
            "direct:similarity=0.6,hybrid:budget=0.3,released,chefer,lime:budget=64."
        ),
    ] = "all",
    limit: Annotated[
        int | None,
        typer.Option(
            min=2, show_default=f"{LIMIT} of made data, else all", help="The most examples."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of results.", show_default="atman-DATA, here"),
    ] = None,
    data_path: Annotated[
        str | None,
        typer.Option(
            "--data",
            help="Of squad, a JSON file as SQuAD has them; of openimages, the folder of its CSV "
            "files and masks.",
            show_default=False,
        ),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(help="Of openimages, the folder of its images.", show_default=False),
    ] = None,
    sweep: Annotated[
        str | None,
        typer.Option(
            help="Run the first of --methods (direct if none is given) over a grid of one or two "
            "options instead, such as 'factor=0,0.1,0.3;similarity=none,0.5,0.6'; writes sweep.csv "
            "and a heat map.",
            show_default=False,
        ),
    ] = None,
    stability: Annotated[
        int,
        typer.Option(min=0, help="Of so many examples the reworded question is explained too."),
    ] = 30,
    gallery: Annotated[
        int, typer.Option(min=0, help="Of so many examples the relevance is kept for a gallery.")
    ] = 12,
    seed: Annotated[int, typer.Option(help="Of what is made, or the order of what is read.")] = 0,
    processes: Annotated[
        int,
        typer.Option(
            min=1,
            help="Processes on this machine that share the examples, and the processor's cores "
            "evenly. Or launch them, on several machines too if all see --out: accelerate launch "
            "--multi_gpu --num_processes 2 -m atman_triton evaluate ..., without GPUs as well "
            "(accelerate's --cpu starts one process).",
        ),
    ] = 1,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measure how good explanations are: of AtMan, and of what people use instead."""
    from ..evaluate.data import DATASETS
    from ..evaluate.run import MethodFailed
    from ..evaluate.session import Session, launched, launched_alone, run
    from ..evaluate.settings import parse_methods
    from ..evaluate.sweep import parse_sweep

    check_one_of("dtype", dtype, DTYPES)
    if data not in DATASETS:
        raise BadUsage(f"the data must be one of {', '.join(DATASETS)}, got {data!r}.")
    if model is None and data not in SHIPPED:
        raise BadUsage(f"no shipped model knows {data}; name one with --model.")
    for option, value in (("data", data_path), ("images", images)):
        if data in SHIPPED and value is not None:
            raise BadUsage(f"--{option} is for data that is read; leave it out, {data} are made.")
    with our_errors():
        grid = None
        if sweep is None:
            settings = parse_methods(methods)
        else:
            base = parse_methods("direct" if methods == "all" else methods)[0]
            grid = parse_sweep(sweep, base)
            settings = list(grid.settings.values())
    on = pick_device(device)
    session = Session(
        data=data,
        model=model,
        demo=SHIPPED.get(data, "contract"),
        device=on,
        dtype=dtype,
        folder=Path(f"atman-{data}") if out is None else out,
        settings=settings,
        options={
            "limit": LIMIT if limit is None and data in SHIPPED else limit,
            "path": data_path,
            "images": images,
            "seed": seed,
        },
        stability=stability,
        gallery=gallery,
        processes=processes,
        quiet=quiet,
    )
    if launched_alone() and not quiet:
        print(
            "accelerate launch --cpu starts one process; put --multi_gpu in its place for several, "
            "which needs no GPU here, or leave accelerate out and say --processes.",
            file=sys.stderr,
        )
    # What libraries print belongs to the notes, never to the result.
    with contextlib.redirect_stdout(sys.stderr), our_errors(), launched(on) as place:
        if place.processes > 1 and processes > 1:
            raise BadUsage(f"--processes: {place.processes} were launched already; leave it out.")
        try:
            gathered = run(session, place)
        except MethodFailed as error:
            raise Failed(str(error)) from error
    if gathered is None:  # another process gathers
        return
    if not quiet:
        for note in gathered.notes:
            print(note, file=sys.stderr)
    written = _Written(session.folder, quiet)
    if grid is None:
        _write_tables(gathered, session, written)
    else:
        _write_sweep(gathered, session, grid, written)


class _Written:
    """Files of a folder, told of as they are written."""

    def __init__(self, folder: Path, quiet: bool) -> None:
        self.folder, self.quiet = folder, quiet

    def path(self, name: str) -> Path:
        return self.say(self.folder / name)

    def note(self, text: str) -> None:
        if not self.quiet:
            print(text, file=sys.stderr)

    def say(self, path: Path) -> Path:
        if not self.quiet:
            print(f"Wrote {path}", file=sys.stderr)
        return path


def _write_tables(gathered: Gathered, session: Session, written: _Written) -> None:
    """All methods: table.csv, table.md, figures, and the table on standard output."""
    from rich.console import Console

    from ..evaluate.data import GROUPED
    from ..evaluate.differences import differences, differences_markdown, write_differences
    from ..evaluate.paper import OPEN_IMAGES, SQUAD
    from ..evaluate.statistics import statistics
    from ..evaluate.tables import summarise
    from ..evaluate.written import terminal_table, write_csv, write_markdown, write_statistics

    paper = OPEN_IMAGES if session.data in ("openimages", "shapes") else SQUAD
    grouped = session.data in GROUPED
    rows = summarise(gathered.results, session.settings, paper, grouped=grouped)
    title = f"{session.data}, {gathered.facts['model']}"
    found = statistics(gathered.examples)
    write_csv(rows, written.path("table.csv"), gathered.facts)
    write_statistics(found, written.path("statistics.csv"))
    between = differences(gathered.results, rows, grouped=grouped)
    write_differences(between, written.path("differences.csv"), gathered.facts)
    below = differences_markdown(between)
    write_markdown(rows, written.path("table.md"), gathered.facts, title, below)
    console = Console(highlight=False, emoji=False)
    console.print(terminal_table(rows, title, console.width))
    try:
        from ..evaluate.figures import draw_all

        drawn = draw_all(
            gathered.results,
            rows,
            found,
            session.folder,
            title,
            gathered.examples,
            grouped=grouped,
            say=written.note,
        )
    except ImportError as error:
        written.note(f"No figures: {error}")
    else:
        for path in drawn:
            written.say(path)


def _write_sweep(gathered: Gathered, session: Session, grid: Sweep, written: _Written) -> None:
    """One method: sweep.csv, its heat map, and the table on standard output."""
    from rich.console import Console

    from ..evaluate.data import GROUPED
    from ..evaluate.sweep import cells, terminal_sweep, write_sweep
    from ..evaluate.tables import summarise

    rows = summarise(gathered.results, session.settings, {}, grouped=session.data in GROUPED)
    found = cells(grid, rows)
    write_sweep(grid, found, written.path("sweep.csv"), gathered.facts)
    title = f"{grid.method}; {session.data}, {gathered.facts['model']}"
    Console(highlight=False, emoji=False).print(terminal_sweep(grid, found, title))
    try:
        from ..evaluate.figures import draw_sweep

        written.say(draw_sweep(found, session.folder / "sweep.png", title))
    except ImportError as error:
        written.note(f"No figure: {error}")
