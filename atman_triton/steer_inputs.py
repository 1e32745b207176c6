"""What ``generate`` is given, read for steering: rows of tokens and their places in the text.

Legend: B batch rows, P columns of the prompt (padding included).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .capabilities import vocabulary_size
from .chat import Span
from .controls import ControlledRow
from .images import image_tokens, readable
from .multimodal import embeddings, has_pictures, moved, read_pictures
from .pieces import Area
from .tokens import Tokens, encode_prompt, spans_of_encoding

_WITHOUT_PROCESSOR = (
    "inputs alone do not say where they are; pass processor= and images=, or the prompt itself as "
    "inputs, [image, 'text'], with processor=."
)
_ADVICE = (
    "pass the encoding that a fast tokenizer returned, unchanged, or the text itself with "
    "tokenizer=."
)


class Prompts(NamedTuple):
    """The prompts of one call of ``generate``.

    Args:
        ids: ``[B, P]`` int64 on the CPU.
        columns: Of each row, the columns of its tokens; the others are padding.
        rows: What is known of each row's tokens.
        embed: Of one prompt with pictures, gives what the decoder reads: ``[P, D]``.
    """

    ids: Tensor
    columns: list[Tensor]
    rows: list[ControlledRow]
    embed: Callable[[], Tensor] | None = None


def prompts_of(
    words: Tokens,
    sizes: Sequence[tuple[int, int]] = (),
    embed: Callable[[], Tensor] | None = None,
) -> Prompts:
    """One prompt, as it was tokenised for an explanation.

    Args:
        words: Its tokens.
        sizes: Width and height of its pictures.
        embed: Gives what the decoder reads, where that is not the tokens' own embeddings.
    """
    row = ControlledRow(len(words), words.spans, len(words.text), words.areas, sizes)
    return Prompts(torch.tensor([words.ids]), [torch.arange(len(words))], [row], embed)


def read_steered(inputs: Any, model: Any, tokenizer: Any, processor: Any, images: Any) -> Prompts:
    """Prompts from what ``steer`` takes.

    Raises:
        TypeError, ValueError: if they are none, naming what is wrong.
        UnsupportedModelError: if where the tokens of ``images`` stand is not known.
    """
    if has_pictures(inputs):
        if images is not None:
            raise TypeError("images are in the inputs already; leave images= out.")
        read = read_pictures(inputs, model, processor)
        sizes = [(picture.width, picture.height) for picture in read.pictures]
        return prompts_of(read.words, sizes, lambda: embeddings(model, read.inputs))
    prompts = read_inputs(inputs, tokenizer, vocabulary_size(model))
    if images is None and processor is None:
        return prompts
    return _with_images(prompts, inputs, model, processor, images)


def _with_images(prompts: Prompts, inputs: Any, model: Any, processor: Any, images: Any) -> Prompts:
    """The prompt that an encoding holds, with the places of its image tokens."""
    if images is None or processor is None:
        given, missing = ("images", "processor") if processor is None else ("processor", "images")
        raise ValueError(
            f"{given}= needs {missing}= too: the pictures that inputs were made of, in order, and "
            "what made them."
        )
    if len(prompts.rows) != 1 or not isinstance(inputs, Mapping):
        raise ValueError(
            f"images= are of one prompt, as the processor returned it, got {len(prompts.rows)} "
            "prompts; steer one at a time."
        )
    several = images if isinstance(images, (list, tuple)) else [images]
    sizes = [readable(image).size for image in several]
    areas: dict[int, Area] = {
        found.token: Area(found.image, found.box, found.view)
        for found in image_tokens(model, processor, inputs, sizes)
    }
    own = [areas.get(column) for column in prompts.columns[0].tolist()]
    row = replace(prompts.rows[0], areas=own, sizes=sizes)

    def embed() -> Tensor:
        shown = embeddings(model, moved(inputs, model))
        return shown[prompts.columns[0].to(shown.device)]

    return prompts._replace(rows=[row], embed=embed)


def read_inputs(inputs: Any, tokenizer: Any, vocabulary: int) -> Prompts:
    """Prompts from what ``steer`` takes as ``inputs``, without the places of their image tokens.

    Raises: TypeError, ValueError: if they are none, naming what is wrong.
    """
    if isinstance(inputs, Tokens):
        return prompts_of(inputs)
    texts: list[str] | None = None
    if isinstance(inputs, str):
        texts = [inputs]
    elif isinstance(inputs, (list, tuple)) and inputs and isinstance(inputs[0], str):
        texts = list(inputs)
    if texts is not None:
        inputs = _encoded(texts, tokenizer)
    elif not isinstance(inputs, Mapping):
        inputs = {"input_ids": inputs}
    if inputs.get("input_ids") is None:
        raise ValueError(f"inputs must hold input_ids, got {sorted(inputs)}.")
    ids = _table("input_ids", inputs["input_ids"])
    shown = torch.ones_like(ids)
    if inputs.get("attention_mask") is not None:
        shown = _table("attention_mask", inputs["attention_mask"])
        if shown.shape != ids.shape:
            raise ValueError(
                f"attention_mask must have the shape of input_ids, {list(ids.shape)}, got "
                f"{list(shown.shape)}."
            )
    if int(ids.min()) < 0 or int(ids.max()) >= vocabulary:
        raise ValueError(
            f"input_ids must lie within 0..{vocabulary - 1}, which the model knows, got "
            f"{int(ids.min())}..{int(ids.max())}; is this the model's tokenizer?"
        )
    columns, rows = [], []
    for row in range(len(ids)):
        own = shown[row].nonzero()[:, 0]
        if not len(own):
            raise ValueError(f"attention_mask hides every token of row {row}.")
        columns.append(own)
        own_ids = ids[row, own].tolist()
        if texts is not None and not getattr(tokenizer, "is_fast", False):
            spans = _decoded(texts[row], own_ids, tokenizer, vocabulary)
        else:
            spans = _of_encoding(inputs, row, len(ids), ids[row], own)
        length = None if texts is None else len(texts[row])
        areas = _WITHOUT_PROCESSOR if "pixel_values" in inputs else ()
        rows.append(ControlledRow(len(own), spans, length, areas))
    return Prompts(ids, columns, rows)


def _encoded(texts: Sequence[Any], tokenizer: Any) -> Mapping[str, Any]:
    """Texts as the tokenizer encodes them for ``generate``."""
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"inputs[{index}] must be a str like the others, got {text!r}.")
        if not text:
            raise ValueError(f"inputs[{index}] must not be empty.")
    if tokenizer is None:
        raise ValueError(
            "inputs as text need a tokenizer; pass tokenizer=, or the encoding that generate gets."
        )
    return tokenizer(list(texts), padding=len(texts) > 1, return_tensors="pt")


def _table(name: str, value: Any) -> Tensor:
    """``[B, P]`` int64 on the CPU."""
    try:
        table = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{name} must be integers of shape [batch, tokens]; pad the rows to one length "
            "(tokenizer(texts, padding=True, return_tensors='pt'))."
        ) from error
    if table.is_floating_point() or table.is_complex():
        raise TypeError(f"{name} must be integers, got {table.dtype}.")
    if table.dim() == 1:
        table = table[None]
    if table.dim() != 2 or 0 in table.shape:
        raise ValueError(f"{name} must have shape [batch, tokens], got {list(table.shape)}.")
    return table.cpu().long()


def _of_encoding(
    inputs: Mapping[str, Any], row: int, rows: int, ids: Tensor, own: Tensor
) -> list[Span | None] | str:
    """Spans of a row's tokens from the tokenizer's own record, or why there are none."""
    encodings = getattr(inputs, "encodings", None)
    if not encodings:
        return f"inputs hold token ids without their text; {_ADVICE}"
    if len(encodings) != rows or encodings[row].ids != ids.tolist():
        return f"input_ids are not those that the tokenizer made; {_ADVICE}"
    if any(sequence not in (None, 0) for sequence in encodings[row].sequence_ids):
        return "inputs hold pairs of texts; put each prompt into one text."
    spans = spans_of_encoding(encodings[row])
    return [spans[column] for column in own.tolist()]


def _decoded(text: str, ids: list[int], tokenizer: Any, vocabulary: int) -> list[Span | None] | str:
    """Spans of a text's tokens from a tokenizer that keeps no record, or why there are none."""
    words = encode_prompt(text, tokenizer, vocabulary)
    if words.text != text or ids[: len(words)] != words.ids:
        return (
            f"the places of its tokens are not known: {type(tokenizer).__name__} is no fast "
            "tokenizer, and its tokens do not decode to the text."
        )
    closing: list[Span | None] = [None] * (len(ids) - len(words))
    return [*words.spans, *closing]
