"""``atman explain``: which words of a text made a model give its answer."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .cli_shared import (
    DTYPES,
    AsJson,
    Debug,
    Html,
    Plot,
    Quiet,
    TopK,
    check_one_of,
    check_outputs,
    our_errors,
    print_explanation,
    read_prompt,
    write_files,
)
from .loading import BadUsage, load_model, pick_device

if TYPE_CHECKING:
    from .explanation import Explanation

EXPLAIN = (
    "Show which words of a text made a model give its answer.\n\n"
    "Every token of the prompt is suppressed in turn inside the model's attention: the more the "
    "loss of the answer rises, the more that token supported it. Without a prompt the shipped "
    "model answers a question about the shipped contract."
)


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
        typer.Option(
            "--model",
            "-m",
            help="Folder or hub id of a causal language model; the shipped one if none.",
        ),
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
            show_default="direct; exact of the other presets",
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
    preset: Annotated[str, typer.Option(help="default | paper | released")] = "default",
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
    similarity: Annotated[
        str | None,
        typer.Option(
            show_default="off, preset released: 0.6",
            help="Suppress tokens along with a unit whose input embeddings are at least so similar "
            "to one of its own: 0.6 | preset (the preset's) | off.",
        ),
    ] = None,
    rule: Annotated[
        str | None,
        typer.Option(
            show_default="released, preset paper: paper",
            help="By how much: released (in proportion to the similarity) | paper (its formula to "
            "the letter, which suppresses what is unlike the unit too).",
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
    check_outputs(save=save, html=html, plot=plot)
    size = _batch_size(batch_size)
    if target and max_new_tokens is not None:
        raise BadUsage("--max-new-tokens is for an answer to generate, but --target gives one.")
    _check_settings(
        preset=preset, mode=mode, rule=rule, dtype=dtype, method=method, granularity=granularity
    )
    words = read_prompt(prompt, file, shipped=model is None)
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
                "similarity": _similarity(similarity),
                "rule": rule,
                "method": method,
                "budget": _budget(budget),
                "steps": steps,
                "batch_size": size,
            },
            progress=not quiet,
            granularity=granularity,
            max_new_tokens=max_new_tokens,
        )
    write_files([explanation], html=html, plot=plot, save=save, quiet=quiet)
    print_explanation(explanation, as_json=as_json, top_k=top_k)


def _check_settings(**given: str | None) -> None:
    from .attention import MODES
    from .explain import GRANULARITIES, METHODS, PRESETS
    from .suppression import RULES

    known = {
        "preset": PRESETS,
        "mode": MODES,
        "rule": RULES,
        "dtype": DTYPES,
        "method": METHODS,
        "granularity": GRANULARITIES,
    }
    for name, value in given.items():
        if value is not None:
            check_one_of(name, value, known[name])


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


def _similarity(text: str | None) -> float | bool | None:
    if text is None or text in ("preset", "off"):
        return None if text is None else text == "preset"
    try:
        return float(text)
    except ValueError as error:
        raise BadUsage(
            f"--similarity must be a number in (0, 1], preset or off, got {text!r}."
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
    from .explain import Explainer

    with our_errors():
        explainer = Explainer(model, tokenizer, progress=progress, **settings)
        given: dict[str, Any] = {"target": targets[0] if targets else None}
        if len(targets) > 1:
            given = {"targets": targets}
        return explainer.explain(
            prompt, granularity=granularity, max_new_tokens=max_new_tokens, **given
        )
