"""``atman steer``: what a model says while parts of its prompt are suppressed or amplified."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..loading import BadUsage, check_decoder, load_model, pick_device
from .controls import OVERLAPS, WRITTEN, Controls, Overlap, place_control, split_control
from .demo import Demo, pick_demo
from .prompt import Pictures, check_read, read_asked
from .shared import (
    DTYPES,
    AsJson,
    Debug,
    Device,
    Dtype,
    File,
    Model,
    check_one_of,
    our_errors,
    parse_indices,
)

if TYPE_CHECKING:
    from ..tokens import Tokens

STEER = (
    "Show what a model says while parts of its prompt are suppressed or amplified.\n\n"
    "A control names what to change, and the factor of its attention scores: below 1 suppresses, "
    "above 1 amplifies. The plain and the steered continuation stand side by side, with the "
    "probabilities of the next token. Without --model the shipped model reads; without a prompt, "
    "the shipped contract.\n\n"
) + WRITTEN

_NEW_TOKENS = 40


def steer(
    prompt: Annotated[
        str | None,
        typer.Option(
            help="The text to continue; - reads standard input, nothing takes the shipped "
            "contract.",
            show_default=False,
        ),
    ] = None,
    file: File = None,
    image: Pictures = None,
    model: Model = None,
    demo: Demo = None,
    control: Controls = None,
    overlap: Overlap = "complete",
    similarity: Annotated[
        float | None,
        typer.Option(
            help="Take along tokens whose embeddings are at least this similar to the controlled "
            "ones, above 0 to 1."
        ),
    ] = None,
    mode: Annotated[
        str, typer.Option(help="min_shift | multiplicative | log_additive")
    ] = "min_shift",
    layers: Annotated[
        str | None, typer.Option(help="In these layers only, such as 0,2-5.", show_default="all")
    ] = None,
    heads: Annotated[
        str | None, typer.Option(help="In these query heads only.", show_default="all")
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(min=1, show_default=str(_NEW_TOKENS), help="The longest continuation."),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(help="Sample at this temperature.", show_default="the likeliest token"),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of sampling; the same both times.", show_default="0")
    ] = None,
    top_k: Annotated[int, typer.Option(min=1, help="Next tokens to list of each.")] = 5,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Show what a model says while parts of its prompt are suppressed or amplified."""
    from ..attention import MODES

    # min_shift_full looks at future keys, so it cannot generate with a cache.
    check_one_of("mode", mode, [known for known in MODES if known != "min_shift_full"])
    check_one_of("dtype", dtype, DTYPES)
    check_one_of("overlap", overlap, OVERLAPS)
    if not control:
        raise BadUsage("give at least one --control, such as --control 'text:some words=0.1'.")
    if temperature is None and seed is not None:
        raise BadUsage("--seed is for sampling; give --temperature too.")
    if temperature is not None and not (math.isfinite(temperature) and temperature > 0):
        raise BadUsage(f"--temperature must be above 0, got {temperature}.")
    wanted = [split_control(given) for given in control]
    where = {"layers": parse_indices("layers", layers), "heads": parse_indices("heads", heads)}
    shipped = pick_demo(demo, model, pictures=bool(image))
    asked = read_asked(prompt, file, image or (), None, shipped)
    place = pick_device(device)
    with contextlib.redirect_stdout(sys.stderr):
        reader, processor = load_model(model, place, dtype, shipped or "contract")
        check_decoder("steer", reader)
        check_read(reader, processor, asked)
        with our_errors():
            from ..controls import plain_control
            from ..steered import compare
            from ..tasks import task_of

            task = task_of(reader, processor)
            read = task.read(asked.prompt)
            words, tokenizer = read.words, task.tokenizer
            controls = [place_control(words.text, one, overlap, similarity) for one in wanted]
            generation = _generation(reader, tokenizer, len(words), max_new_tokens, temperature)
            result = compare(
                task,
                read,
                controls,
                generation=generation,
                seed=None if temperature is None else seed or 0,
                top_k=top_k,
                mode=mode,
                **where,
            )
    if not as_json:
        from ..render.steered import show_steered

        said = [_said(words, one, result.factors) for one in controls]
        return show_steered(result, said)
    data = {
        "prompt": words.text,
        "controls": [plain_control(one) for one in controls],
        "settings": {"mode": mode} | where,
        "generation": generation,
        "factors": [
            {"position": position, "text": name, "factor": factor}
            for position, (name, factor) in enumerate(zip(words.names, result.factors, strict=True))
            if factor != 1
        ],
        "plain": result.plain,
        "steered": result.steered,
        "next_tokens_behind": result.behind,
        "next_tokens": [dataclasses.asdict(token) for token in result.next_tokens],
    }
    print(json.dumps(data, ensure_ascii=False, allow_nan=False))
    return None


def _generation(
    model: Any, tokenizer: Any, prompt_tokens: int, max_new_tokens: int | None, heat: float | None
) -> dict[str, Any]:
    from ..capabilities import context_window

    limit = context_window(model)
    room = None if limit is None else limit - prompt_tokens + 1
    if room is not None and room < (max_new_tokens or 1):
        raise BadUsage(
            f"the prompt's {prompt_tokens} tokens and the continuation must fit into the context "
            f"window of {limit}; "
            + (f"lower --max-new-tokens to {room}." if room > 0 else "shorten the prompt.")
        )
    count = min(_NEW_TOKENS, room or _NEW_TOKENS) if max_new_tokens is None else max_new_tokens
    generation: dict[str, Any] = {"max_new_tokens": count, "num_beams": 1, "do_sample": False}
    if heat is not None:
        generation |= {"do_sample": True, "temperature": heat}
    if model.generation_config.pad_token_id is None:
        known = (tokenizer.pad_token_id, tokenizer.eos_token_id)  # there is nothing to pad
        generation["pad_token_id"] = next((one for one in known if one is not None), 0)
    return generation


def _said(words: Tokens, control: Any, factors: list[float]) -> str:
    """One control in words."""
    if hasattr(control, "pos"):
        what = f"token {control.pos}, {words.names[control.pos]!r}"
    elif hasattr(control, "left"):
        share = f"{control.width:.0%} × {control.height:.0%}"
        what = f"{share} of picture {control.image + 1}, from {control.left:.0%}, {control.top:.0%}"
    else:
        what = repr(words.text[control.start : control.start + control.length])
    verb = "Amplified" if control.factor > 1 else "Suppressed"
    also = ""
    if control.similarity is not None:
        also = f", and what is {control.similarity:g} similar"
    return f"{verb}, factor {control.factor:g}: {what}{also}"
