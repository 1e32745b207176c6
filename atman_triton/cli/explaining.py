"""``atman explain``: which words of a text made a model give its answer."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Annotated

import typer

from ..loading import BadUsage, load_model, pick_device
from .controls import (
    WRITTEN,
    Controls,
    Overlap,
    split_control,
)
from .demo import Demo, pick_demo, print_pointing
from .live import explain_live, refuse_with_live
from .prompt import Audio, Pictures, check_read, read_asked
from .run import check_settings, explain_once
from .shared import (
    AsJson,
    Debug,
    Device,
    Dtype,
    File,
    Html,
    Model,
    Plot,
    Quiet,
    TopK,
    check_outputs,
    print_explanation,
    write_files,
)
from .values import (
    parse_batch_size,
    parse_budget,
    parse_granularity,
    parse_passage,
    parse_similarity,
    read_documents,
)

EXPLAIN = (
    "Show which parts of a text, a picture or a sound made a model give its answer.\n\n"
    "Every token of the prompt is suppressed in turn inside the model's attention: the more the "
    "loss of the answer rises, the more that token supported it. Without a prompt the shipped "
    "model answers a question about the shipped contract, and with --demo shapes names what the "
    "shipped picture shows. The --target of a classifier is the name or number of a class.\n\n"
    "With --control, what the model says while parts of the prompt are suppressed or amplified is "
    "explained:\n\n"
) + WRITTEN


def explain(
    prompt: Annotated[
        str | None,
        typer.Argument(
            help="The text to explain; - reads standard input, nothing takes the shipped contract.",
            show_default=False,
        ),
    ] = None,
    file: File = None,
    image: Pictures = None,
    audio: Audio = None,
    model: Model = None,
    demo: Demo = None,
    target: Annotated[
        list[str] | None,
        typer.Option(
            help="The answer to explain; generated if not given. Give several, one --target each, "
            "to explain all of them in one pass."
        ),
    ] = None,
    contrast_target: Annotated[
        str | None, typer.Option(help="Why the answer, rather than this one?", show_default=False)
    ] = None,
    target_span: Annotated[
        str | None,
        typer.Option(
            help="The only passage of the answer to explain: its words, or its characters as "
            "START:STOP. Of a model that classifies every token, the passage of the prompt.",
            show_default=False,
        ),
    ] = None,
    target_granularity: Annotated[
        str, typer.Option(help="What the answer is read in: complete | token | word | sentence")
    ] = "complete",
    granularity: Annotated[
        str | None,
        typer.Option(
            show_default="token, preset aleph_alpha: auto",
            help="What one unit is: token | word | sentence | paragraph | document | auto (of the "
            "first four the one that gives about --max-units); of a sound frame, or seconds such "
            "as 0.5s.",
        ),
    ] = None,
    image_granularity: Annotated[
        str | None,
        typer.Option(
            show_default="patch",
            help="What one unit of a picture is: patch (one image token) | image (all of it) | a "
            "grid over it such as 6x6.",
        ),
    ] = None,
    max_units: Annotated[
        int | None,
        typer.Option(min=1, show_default="30", help="About how many units auto aims at."),
    ] = None,
    delimiter: Annotated[
        list[str] | None,
        typer.Option(
            help="Units end with this text, such as '###'; several, one --delimiter each.",
            show_default=False,
        ),
    ] = None,
    delimiter_regex: Annotated[
        list[str] | None,
        typer.Option(help="The same with a regular expression.", show_default=False),
    ] = None,
    explain_only: Annotated[
        list[str] | None,
        typer.Option(
            help="A passage of the prompt to explain, its words or its characters as START:STOP, "
            "or {image} for its pictures; several, one --explain-only each.",
            show_default=False,
        ),
    ] = None,
    document: Annotated[
        list[Path] | None,
        typer.Option(
            help="A text file that the answer may rest on, named in the result; several, one "
            "--document each. They stand where the prompt says {documents}, or in front of it.",
            show_default=False,
        ),
    ] = None,
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
    preset: Annotated[
        str, typer.Option(help="default | paper | released | aleph_alpha")
    ] = "default",
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
    score: Annotated[
        str | None,
        typer.Option(
            show_default="logprob; output of a regression",
            help="What is scored: logprob | logit, of a classifier | output, of a regression.",
        ),
    ] = None,
    attention: Annotated[
        str | None,
        typer.Option(
            show_default="both",
            help="Of an encoder with a decoder, where the prompt is suppressed: encoder (its own "
            "attention) | cross (the decoder's) | both.",
        ),
    ] = None,
    postprocessing: Annotated[
        str | None,
        typer.Option(
            show_default="none, preset released: square",
            help="What is done to every score before the ranking: none | absolute | square.",
        ),
    ] = None,
    normalize: Annotated[
        bool, typer.Option("--normalize", help="Scale the ranking's values to 0 to 1.")
    ] = False,
    control: Controls = None,
    overlap: Overlap = "complete",
    device: Device = "auto",
    dtype: Dtype = "auto",
    batch_size: Annotated[str, typer.Option(help="auto, or perturbations per pass.")] = "auto",
    max_new_tokens: Annotated[
        int | None,
        typer.Option(min=1, show_default="32", help="The longest answer to generate, in tokens."),
    ] = None,
    live: Annotated[
        bool,
        typer.Option(
            "--live",
            help="Score every token of the answer while it is generated, and colour the prompt as "
            "it appears (method direct, units of the prompt only).",
        ),
    ] = False,
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
    """Show which parts of a text, a picture or a sound made a model give its answer."""
    check_outputs(save=save, html=html, plot=plot)
    size = parse_batch_size(batch_size)
    if target and max_new_tokens is not None:
        raise BadUsage("--max-new-tokens is for an answer to generate, but --target gives one.")
    if target_span is not None and (len(target or ()) > 1 or contrast_target is not None):
        raise BadUsage("--target-span is of one answer, without --contrast-target.")
    if contrast_target is not None and len(target or ()) > 1:
        raise BadUsage("--contrast-target is beside one answer; give one --target, or none.")
    if live:
        refuse_with_live(
            target=target,
            contrast_target=contrast_target,
            target_span=target_span,
            target_granularity=target_granularity != "complete",
            max_units=max_units,
            document=document,
            method=method not in (None, "direct"),
            budget=budget,
            steps=steps,
            similarity=similarity,
            rule=rule,
            postprocessing=postprocessing,
            normalize=normalize,
            control=control,
            score=score,
            attention=attention,
        )
    check_settings(
        preset=preset,
        mode=mode,
        rule=rule,
        dtype=dtype,
        method=method,
        target_granularity=target_granularity,
        postprocessing=postprocessing,
        overlap=overlap,
        score=score,
        attention=attention,
    )
    asked = parse_granularity(granularity, delimiter or (), delimiter_regex or ())
    if explain_only:
        asked["explain_only"] = [parse_passage(text) for text in explain_only]
    if image_granularity is not None:
        asked["image_granularity"] = image_granularity
    if document:
        asked["documents"] = read_documents(document)
    if target_span is not None:
        asked["target_span"] = parse_passage(target_span)
    controls = [split_control(given) for given in control or ()]
    shipped = pick_demo(demo, model, pictures=bool(image))
    given = read_asked(prompt, file, image or (), audio, shipped)
    free = (live, contrast_target, target_span, max_new_tokens)
    answers = target or ([] if any(free) else given.offered)
    place = pick_device(device)
    # What libraries print belongs to the notes, never to the result.
    with contextlib.redirect_stdout(sys.stderr):
        reader, processor = load_model(model, place, dtype, shipped or "contract")
        check_read(reader, processor, given)
        if live:
            explanation = explain_live(
                reader,
                processor,
                given.prompt,
                settings={"preset": preset, "factor": factor, "mode": mode, "batch_size": size},
                granularity=asked.get("granularity", "token"),
                image_granularity=image_granularity,
                explain_only=asked.get("explain_only"),
                max_new_tokens=max_new_tokens,
                watch=not quiet,
            )
        else:
            explanation = explain_once(
                reader,
                processor,
                given,
                answers,
                settings={
                    "preset": preset,
                    "factor": factor,
                    "mode": mode,
                    "similarity": parse_similarity(similarity),
                    "rule": rule,
                    "method": method,
                    "budget": parse_budget(budget),
                    "steps": steps,
                    "batch_size": size,
                    **({} if attention is None else {"attention": attention}),
                },
                controls=controls,
                overlap=overlap,
                progress=not quiet,
                target_granularity=target_granularity,
                max_units=max_units,
                contrast_target=contrast_target,
                score=score,
                postprocessing=postprocessing,
                normalize=normalize,
                max_new_tokens=max_new_tokens,
                **asked,
            )
    write_files([explanation], html=html, plot=plot, save=save, quiet=quiet)
    print_explanation(explanation, as_json=as_json, top_k=top_k)
    if given.shown is not None and not as_json:
        print_pointing(explanation, given.shown)
