"""The command ``atman``: explain an answer, view a saved explanation.

Exit codes: 0 done, 1 the run failed, 2 bad usage. Every failure is one line on standard error.
Libraries are imported where they are needed, so that ``atman --help`` is quick.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import stat
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .loading import BadUsage, Failed, load_model, pick_device

if TYPE_CHECKING:
    from .explanation import Explanation

PLOT_FORMATS = (".png", ".svg", ".pdf")
DTYPES = ("auto", "float32", "bfloat16", "float16")
MESSAGE = 400  # characters of an error that are shown
INTERRUPTED = 130

EXPLAIN = (
    "Show which words of a text made a model give its answer.\n\n"
    "Every token of the prompt is suppressed in turn inside the model's attention: the more the "
    "loss of the answer rises, the more that token supported it. Without a prompt the shipped "
    "model answers a question about the shipped contract."
)
VIEW = (
    "Show saved explanations again, without a model.\n\n"
    "Several explanations of one text are laid over each other on the page that --html writes."
)

app = typer.Typer(
    name="atman",
    help="Which parts of an input made a language model give its answer.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


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
        from ._version import __version__

        print(f"atman {__version__}")
    elif context.invoked_subcommand is None:
        print(context.get_help().strip())


@app.command(help=EXPLAIN)
def explain(
    prompt: Annotated[
        str | None,
        typer.Argument(
            help="The text to explain; - reads standard input, nothing takes the shipped contract.",
            show_default=False,
        ),
    ] = None,
    file: Annotated[Path | None, typer.Option(help="Read the prompt from this file.")] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Folder or hub id of a causal language model; the shipped one if none."),
    ] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(
            help="The answer to explain; generated if not given. Give several, one --target each, "
            "to explain all of them in one pass."
        ),
    ] = None,
    granularity: Annotated[
        str, typer.Option(help="What one unit is: token | sentence | paragraph")
    ] = "token",
    method: Annotated[
        str | None,
        typer.Option(
            show_default="direct, preset paper: exact",
            help="exact: total effects, a run per unit | direct: direct effects, for the price of "
            "a few forward passes | hybrid: direct, then exact for the best | hierarchical: pieces "
            "by direct effects, tokens of the best exactly | path: gradients summed while all "
            "units are suppressed together | score_gradient: one gradient, a poor estimate.",
        ),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            show_default="0.2, hierarchical 0.25",
            help="Exact runs of hybrid and hierarchical: a share such as 0.2, or a number.",
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            min=1, show_default="8", help="Parts of the way at which path takes gradients."
        ),
    ] = None,
    preset: Annotated[str, typer.Option(help="default | paper")] = "default",
    factor: Annotated[
        float | None,
        typer.Option(
            help="What a suppressed unit's scores are scaled with, 0 to 1 (the preset's)."
        ),
    ] = None,
    mode: Annotated[
        str | None,
        typer.Option(
            help="min_shift | min_shift_full | multiplicative | log_additive (the preset's)."
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="auto | cpu | cuda | cuda:1 | mps")] = "auto",
    dtype: Annotated[str, typer.Option(help=" | ".join(DTYPES))] = "auto",
    batch_size: Annotated[str, typer.Option(help="auto, or perturbations per pass.")] = "auto",
    max_new_tokens: Annotated[
        int | None,
        typer.Option(min=1, show_default="32", help="The longest answer to generate, in tokens."),
    ] = None,
    html: Html = None,
    plot: Plot = None,
    save: Annotated[
        Path | None, typer.Option(help="Save the explanation as JSON, for atman view.")
    ] = None,
    top_k: TopK = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Show which words of a text made a model give its answer."""
    _check_outputs(save=save, html=html, plot=plot)
    size = _batch_size(batch_size)
    if target and max_new_tokens is not None:
        raise BadUsage("--max-new-tokens is for an answer to generate, but --target gives one.")
    _check_settings(preset=preset, mode=mode, dtype=dtype, method=method, granularity=granularity)
    words = _prompt(prompt, file, shipped=model is None)
    place = pick_device(device)
    # What libraries print belongs to the notes, never to the result.
    with contextlib.redirect_stdout(sys.stderr):
        reader, tokenizer = load_model(model, place, dtype)
        explanation = _explain(
            reader,
            tokenizer,
            words,
            target or [],
            settings={
                "preset": preset,
                "factor": factor,
                "mode": mode,
                "method": method,
                "budget": _budget(budget),
                "steps": steps,
                "batch_size": size,
            },
            progress=not quiet,
            granularity=granularity,
            max_new_tokens=max_new_tokens,
        )
    _write([explanation], html=html, plot=plot, save=save, quiet=quiet)
    _print(explanation, as_json=as_json, top_k=top_k)


@app.command(help=VIEW)
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
    _check_outputs(html=html, plot=plot)
    for name, path in (("html", html), ("plot", plot)):
        if path is not None and path.resolve() in [file.resolve() for file in files]:
            raise BadUsage(f"--{name}: {path} is a file to view.")
    if len(files) > 1 and (plot or as_json):
        raise BadUsage("--plot and --json take one explanation; give one file.")
    from .explanation import load

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
    _write(explanations, html=html, plot=plot, target=target, quiet=quiet)
    for number, explanation in enumerate(explanations):
        if number:
            print()
        _print(explanation, as_json=as_json, top_k=top_k, target=target)


def _prompt(prompt: str | None, file: Path | None, *, shipped: bool) -> str:
    """The text to explain, from the one place where it was given."""
    if prompt not in (None, "-") and file is not None:
        raise BadUsage("give the prompt as an argument or with --file, not both.")
    if file is not None:
        try:
            text = file.read_text(encoding="utf-8")
        except FileNotFoundError as error:
            raise BadUsage(f"--file: {file} does not exist.") from error
        except (OSError, UnicodeDecodeError) as error:
            raise BadUsage(f"--file: {file} cannot be read as UTF-8 text: {error}") from error
    elif prompt == "-" or (prompt is None and _stdin_waits()):
        try:
            text = sys.stdin.read()
        except UnicodeDecodeError as error:
            raise BadUsage(f"standard input is no {error.encoding} text.") from error
    elif prompt is not None:
        text = prompt
    elif shipped:
        from .demo import demo_prompt

        return demo_prompt()
    else:
        raise BadUsage("no prompt: give it as an argument, with --file, or on standard input.")
    if not text.strip():
        raise BadUsage("the prompt is empty: give a text to explain.")
    # The line end that editors and echo put behind a text is no part of the question.
    return text if text is prompt else text.removesuffix("\n")


def _stdin_waits() -> bool:
    """Whether a text was piped in; a terminal or /dev/null is none."""
    try:
        kind = os.fstat(sys.stdin.fileno()).st_mode
    except (AttributeError, OSError, ValueError):
        return sys.stdin is not None and not sys.stdin.closed
    return stat.S_ISFIFO(kind) or stat.S_ISREG(kind) or stat.S_ISSOCK(kind)


def _check_outputs(**paths: Path | None) -> None:
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
        from .table import import_extra

        import_extra("matplotlib", "plot")


def _check_settings(**given: str | None) -> None:
    from .attention import MODES
    from .explain import GRANULARITIES, METHODS, PRESETS

    known = {
        "preset": PRESETS,
        "mode": MODES,
        "dtype": DTYPES,
        "method": METHODS,
        "granularity": GRANULARITIES,
    }
    for name, value in given.items():
        if value is not None and value not in known[name]:
            raise BadUsage(f"--{name} must be one of {', '.join(known[name])}, got {value!r}.")


def _budget(text: str | None) -> float | int | None:
    """A share or a number of runs; whether it fits the method is for the explainer to say."""
    if text is None:
        return None
    try:
        return int(text) if text.isdecimal() else float(text)
    except ValueError as error:
        raise BadUsage(
            f"--budget must be a share such as 0.2, or a number of runs, got {text!r}."
        ) from error


def _batch_size(text: str) -> Any:
    if text == "auto":
        return text
    if not text.isdecimal() or int(text) < 1:
        raise BadUsage(f"--batch-size must be auto or a number from 1 up, got {text!r}.")
    return int(text)


def _explain(
    model: Any,
    tokenizer: Any,
    prompt: str,
    targets: list[str],
    *,
    settings: dict[str, Any],
    progress: bool,
    granularity: Any,
    max_new_tokens: int | None,
) -> Explanation:
    import torch

    from .engine import RunFailed
    from .explain import Explainer

    try:
        explainer = Explainer(model, tokenizer, progress=progress, **settings)
        given: dict[str, Any] = {"target": targets[0] if targets else None}
        if len(targets) > 1:
            given = {"targets": targets}
        return explainer.explain(
            prompt, granularity=granularity, max_new_tokens=max_new_tokens, **given
        )
    except RunFailed as error:
        raise Failed(str(error)) from error
    except ValueError as error:
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
    package = __name__.rpartition(".")[0]
    return frame is not None and frame.tb_frame.f_globals.get("__name__", "").startswith(package)


def _write(
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


def _print(
    explanation: Explanation, *, as_json: bool, top_k: int | None, target: int | None = None
) -> None:
    if not as_json:
        explanation.show(top_k=top_k, target=target)
        return
    from .explanation import to_json

    data = to_json(explanation)
    values = explanation.values(target).tolist()
    data["ranking"] = [
        {"unit": unit, "text": explanation.units[unit].text, "value": _number(values[unit])}
        for unit in explanation.ranking(target)[:top_k]
    ]
    if (complete := explanation.completeness) is not None:
        data["completeness"] = {
            "score_sums": complete.sums.tolist(),
            "loss_rises": complete.rises.tolist(),
            "error": _number(complete.error),
        }
    print(json.dumps(data, ensure_ascii=False, allow_nan=False))


def _number(value: float) -> float | str:
    return value if abs(value) != float("inf") else str(value)


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
