"""What several commands of ``atman`` share: options, the prompt's sources, output files."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import stat
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..loading import BadUsage, Failed

if TYPE_CHECKING:
    from ..explanation import Explanation

PLOT_FORMATS = (".png", ".svg", ".pdf")
DTYPES = ("auto", "float32", "bfloat16", "float16")

File = Annotated[Path | None, typer.Option(help="Read the prompt from this file.")]
Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        help="Folder or hub id of a model that writes, speaks of pictures or classifies; a shipped "
        "one if none.",
    ),
]
Device = Annotated[str, typer.Option(help="auto | cpu | cuda | cuda:1 | mps")]
Dtype = Annotated[str, typer.Option(help=" | ".join(DTYPES))]
Html = Annotated[Path | None, typer.Option(help="Write the interactive page to this file.")]
Plot = Annotated[Path | None, typer.Option(help="Write a figure: .png, .svg or .pdf.")]
TopK = Annotated[
    int | None,
    typer.Option(min=1, help="Units in the list; up to 10 that tell something if not given."),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of a failure.")]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print JSON and nothing else to standard output.")
]
Quiet = Annotated[
    bool,
    typer.Option(
        "--quiet", "-q", "--no-progress", help="No progress bar and no notes on standard error."
    ),
]


def read_prompt(prompt: str | None, file: Path | None) -> str | None:
    """The text to explain, from the one place where it was given; None if it was not."""
    if prompt not in (None, "-") and file is not None:
        raise BadUsage("give the prompt as an argument or with --file, not both.")
    if file is not None:
        text = read_file("file", file)
    elif prompt == "-" or (prompt is None and _stdin_waits()):
        try:
            text = sys.stdin.read()
        except UnicodeDecodeError as error:
            raise BadUsage(f"standard input is no {error.encoding} text.") from error
    elif prompt is not None:
        text = prompt
    else:
        return None
    if not text.strip():
        raise BadUsage("the prompt is empty: give a text to explain.")
    # The line end that editors and echo put behind a text is no part of the question.
    return text if text is prompt else text.removesuffix("\n")


def read_file(option: str, file: Path) -> str:
    """The text of a file that an option names."""
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise BadUsage(f"--{option}: {file} does not exist.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise BadUsage(f"--{option}: {file} cannot be read as UTF-8 text: {error}") from error


def _stdin_waits() -> bool:
    """Whether a text was piped in; a terminal or /dev/null is none."""
    try:
        kind = os.fstat(sys.stdin.fileno()).st_mode
    except (AttributeError, OSError, ValueError):
        return sys.stdin is not None and not sys.stdin.closed
    return stat.S_ISFIFO(kind) or stat.S_ISREG(kind) or stat.S_ISSOCK(kind)


def check_outputs(**paths: Path | None) -> None:
    """Refuse what could not be written before the long run, not after it."""
    for name, path in paths.items():
        if path is None:
            continue
        if path.is_dir() or not path.absolute().parent.is_dir():
            what = "is a folder" if path.is_dir() else "lies in a folder that does not exist"
            raise BadUsage(f"--{name}: {path} {what}.")
    given = [(name, path) for name, path in paths.items() if path is not None]
    for (one, path), (other, again) in itertools.combinations(given, 2):
        if path.resolve() == again.resolve():
            raise BadUsage(f"--{one} and --{other} name the same file, {path}.")
    plot = paths.get("plot")
    if plot is not None:
        if plot.suffix.lower() not in PLOT_FORMATS:
            raise BadUsage(f"--plot: {plot} must end in {', '.join(PLOT_FORMATS)}.")
        from ..table import import_extra

        import_extra("matplotlib", "plot")


def check_one_of(name: str, value: str, known: Iterable[str]) -> None:
    """Refuse a value of an option that is not among the known ones."""
    if value not in known:
        option = name.replace("_", "-")
        raise BadUsage(f"--{option} must be one of {', '.join(known)}, got {value!r}.")


def parse_indices(name: str, text: str | None) -> list[int] | None:
    """Numbers and ranges of them, ends included: ``0,2-5``; None is None, for all."""
    if text is None:
        return None
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        last = last if dash else first
        if not (first.isdecimal() and last.isdecimal()) or int(last) < int(first):
            raise BadUsage(f"--{name} must be numbers and ranges such as 0,2-5, got {text!r}.")
        found += range(int(first), int(last) + 1)
    return found


@contextlib.contextmanager
def our_errors() -> Iterator[None]:
    """Tell apart what the user gave wrongly, which this package finds, and runs that fail."""
    import torch

    from ..engine import RunFailed

    try:
        yield
    except RunFailed as error:
        raise Failed(str(error)) from error
    except (TypeError, ValueError) as error:
        if not _is_ours(error):
            raise
        raise BadUsage(str(error)) from error
    except torch.OutOfMemoryError as error:
        raise Failed(
            "the device has not enough memory, even for one perturbation at a time; shorten the "
            "prompt, or try --dtype bfloat16 or --device cpu."
        ) from error


def _is_ours(error: Exception) -> bool:
    """Whether this package found the error, as it does with wrong arguments, or a library did."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    package = __name__.partition(".")[0]
    return frame is not None and frame.tb_frame.f_globals.get("__name__", "").startswith(package)


def write_files(
    explanations: list[Explanation],
    *,
    html: Path | None,
    plot: Path | None,
    save: Path | None = None,
    target: int | None = None,
    quiet: bool,
) -> None:
    """Write the files asked for, and say so."""
    first, *others = explanations
    if save is not None:
        first.save(save)
    if html is not None:
        try:
            first.to_html(html, others=others)
        except ValueError as error:
            raise BadUsage(str(error)) from error
    if plot is not None:
        first.plot(plot, target=target)
    for path in (save, html, plot):
        if path is not None and not quiet:
            print(f"Wrote {path}", file=sys.stderr)


def print_explanation(
    explanation: Explanation, *, as_json: bool, top_k: int | None, target: int | None = None
) -> None:
    """Print an explanation for people, or as JSON with its ranking."""
    if not as_json:
        explanation.show(top_k=top_k, target=target)
        return
    from ..explanation import to_json

    data = to_json(explanation)
    values = explanation.values(target).tolist()
    data["ranking"] = [
        {"unit": unit, "text": explanation.units[unit].text, "value": number(values[unit])}
        for unit in explanation.ranking(target)[:top_k]
    ]
    if explanation.documents:
        data["sources"] = explanation.sources(top_k)
    if (complete := explanation.completeness) is not None:
        data["completeness"] = {
            "score_sums": complete.sums.tolist(),
            "loss_rises": complete.rises.tolist(),
            "error": number(complete.error),
        }
    print(json.dumps(data, ensure_ascii=False, allow_nan=False))


def number(value: float) -> float | str:
    """A value as JSON has it, which knows no infinity."""
    return value if abs(value) != float("inf") else str(value)
