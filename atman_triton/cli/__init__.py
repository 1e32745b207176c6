"""The command ``atman``: explain an answer, steer one, measure methods, view what was saved.

Exit codes: 0 done, 1 the run failed, 2 bad usage. Every failure is one line on standard error.
Libraries are imported where they are needed, so that ``atman --help`` is quick.
"""

from __future__ import annotations

import io
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated

import typer

from ..loading import BadUsage, Failed
from .evaluating import EVALUATE, evaluate
from .explaining import EXPLAIN, explain
from .steering import STEER, steer
from .viewing import VIEW, view

MESSAGE = 400  # characters of an error that are shown
INTERRUPTED = 130

app = typer.Typer(
    name="atman",
    help="Which parts of an input made a language model give its answer.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.command(help=EXPLAIN)(explain)
app.command(help=STEER)(steer)
app.command(help=EVALUATE)(evaluate)
app.command(help=VIEW)(view)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        arguments: Words after ``atman``; None for those of this process.
    """
    # Bars and quotation marks must not break a terminal that lacks them.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = app(words, prog_name="atman", standalone_mode=False)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader of a pipe has gone (``atman explain | head``); keep the interpreter quiet.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except typer.Abort:
        code = INTERRUPTED
    except Exception as error:  # noqa: BLE001 - the one place where failures become messages
        return _report(error, words)
    if code == INTERRUPTED:
        print("atman: interrupted", file=sys.stderr)
    return code if isinstance(code, int) else 0


@app.callback(invoke_without_command=True)
def _atman(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        from .._version import __version__

        print(f"atman {__version__}")
    elif context.invoked_subcommand is None:
        print(context.get_help().strip())


def _report(error: Exception, words: list[str]) -> int:
    """Say in one line what went wrong; return the exit code."""
    if "--debug" in words:
        traceback.print_exception(error)
    message, code = str(error) or type(error).__name__, 1
    if isinstance(error, BadUsage):
        code = 2
    elif hasattr(error, "format_message"):  # what typer raises while it reads the arguments
        message, code = error.format_message(), 2  # pyright: ignore[reportAttributeAccessIssue]
        message = message.rstrip(".") + " (see 'atman --help')"
    elif not isinstance(error, (Failed, OSError, ImportError)):
        message = f"{type(error).__name__}: {message}"
    line = " ".join(message.split())
    line = line if len(line) <= MESSAGE else line[: MESSAGE - 1] + "…"
    print(f"atman: {line}", file=sys.stderr)
    return code
