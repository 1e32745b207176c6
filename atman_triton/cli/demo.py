"""The shipped models on the command line: which one reads, and what the one of shapes is asked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..loading import DEMOS, BadUsage
from .shared import check_one_of

if TYPE_CHECKING:
    from rich.console import Console

    from ..demo.shapes import Picture
    from ..explanation import Explanation

Demo = Annotated[
    str | None,
    typer.Option(
        help="Which shipped model reads, in place of --model: contract, about an employment "
        "contract | shapes, which names what a picture shows; of its own picture, without a "
        "prompt, every shape is explained.",
        show_default="contract; shapes with --image",
    ),
]


def pick_demo(demo: str | None, model: str | None, *, pictures: bool) -> str | None:
    """Which shipped model reads; None if another one does."""
    if demo is not None:
        check_one_of("demo", demo, DEMOS)
        if model is not None:
            raise BadUsage("--demo and --model exclude each other; give one of them.")
    if model is not None:
        return None
    return demo or ("shapes" if pictures else "contract")


def print_pointing(
    explanation: Explanation, picture: Picture, console: Console | None = None
) -> None:
    """Print on which shape the relevance of each answer stands."""
    import torch
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from ..images.pointing import share_inside

    console = console or Console(highlight=False, markup=False, emoji=False)
    names = [shape.name for shape in picture.objects]
    masks = [torch.from_numpy(shape.mask) for shape in picture.objects]
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("Where relevance stands")
    for name in (*names, "elsewhere"):
        table.add_column(name, justify="right")
    rows: Any = zip(explanation.answers, explanation.relevances, strict=True)
    for answer, relevance in rows:
        shares = [share_inside(explanation.units, relevance, mask) for mask in masks]
        cells = [f"{share:.0%}" for share in (*shares, 1 - sum(shares))]
        table.add_row(repr(answer), *cells)
    console.print()
    console.print(table)
