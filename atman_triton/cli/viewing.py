"""``atman view``: saved explanations again, without a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..loading import BadUsage
from .shared import (
    AsJson,
    Debug,
    Html,
    Plot,
    Quiet,
    TopK,
    check_outputs,
    print_explanation,
    write_files,
)

VIEW = (
    "Show saved explanations again, without a model.\n\n"
    "Several explanations of one text are laid over each other on the page that --html writes."
)


def view(
    files: Annotated[list[Path], typer.Argument(help="Explanations saved by atman explain.")],
    target: Annotated[
        int | None,
        typer.Option("--target-token", min=0, help="Show this target token's scores, from 0."),
    ] = None,
    answer: Annotated[
        int | None,
        typer.Option("--answer", min=0, help="Show this one of several answers, from 0."),
    ] = None,
    html: Html = None,
    plot: Plot = None,
    top_k: TopK = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Show saved explanations again, without a model."""
    if target is not None and answer is not None:
        raise BadUsage("--target-token and --answer exclude each other; give one.")
    check_outputs(html=html, plot=plot)
    for name, path in (("html", html), ("plot", plot)):
        if path is not None and path.resolve() in [file.resolve() for file in files]:
            raise BadUsage(f"--{name}: {path} is a file to view.")
    if len(files) > 1 and (plot or as_json):
        raise BadUsage("--plot and --json take one explanation; give one file.")
    from ..explanation import load

    explanations = []
    for file in files:
        try:
            explanations.append(load(file))
        except FileNotFoundError as error:
            raise BadUsage(f"{file} does not exist.") from error
        except IsADirectoryError as error:
            raise BadUsage(f"{file} is a folder.") from error
        except OSError as error:
            raise BadUsage(f"{file} cannot be read: {error}") from error
        except ValueError as error:
            raise BadUsage(str(error)) from error
    for file, explanation in zip(files, explanations, strict=True):
        if target is not None and target >= len(explanation.targets):
            raise BadUsage(
                f"--target-token must be at most {len(explanation.targets) - 1} for {file}, "
                f"got {target}."
            )
        if answer is not None and answer >= len(explanation.answers):
            raise BadUsage(
                f"--answer must be at most {len(explanation.answers) - 1} for {file}, got {answer}."
            )
    if answer is not None:
        explanations = [explanation.branch(answer) for explanation in explanations]
    write_files(explanations, html=html, plot=plot, target=target, quiet=quiet)
    for number, explanation in enumerate(explanations):
        if number:
            print()
        print_explanation(explanation, as_json=as_json, top_k=top_k, target=target)
