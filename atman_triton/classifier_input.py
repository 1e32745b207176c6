"""What a classifier reads: a text, a pair of texts, token ids, or a picture.

Legend: S tokens; a span is ``(start, stop)`` in characters of ``Tokens.text``.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .capabilities import context_window, vocabulary_size
from .chat import Span, is_chat
from .embedded import encoder_config, entry_of, special_tokens
from .images import readable
from .images.classifiers import patch_cells
from .pictures import Picture
from .pieces import Area
from .tokens import SPECIAL, Tokens, describe, encode_prompt, tokens_of_ids, with_whitespace

PADDING = "padding"
BETWEEN = "\n"
"""What stands between the two texts of a pair in ``Tokens.text``."""


def read_text(raw: Any, tokenizer: Any, model: Any) -> tuple[Tokens, dict[str, Any]]:
    """A prompt's tokens, special ones around it included, and what the model's forward takes.

    Args:
        raw: str | ``(first, second)``, a pair of str | token ids | an encoding of one text, such as
            ``tokenizer(text)`` returns, padding included.
        tokenizer: A transformers tokenizer; None is enough for ids.
        model: What reads it.
    Raises:
        TypeError, ValueError: as ``encode_prompt`` does, and if the model cannot read so much.
    """
    if is_chat(raw):
        raise TypeError(
            "prompt must be a text to a classifier, but it is chat messages; render them with "
            "tokenizer.apply_chat_template(messages, tokenize=False)."
        )
    vocabulary = vocabulary_size(model)
    if isinstance(raw, tuple) and len(raw) == 2 and all(isinstance(part, str) for part in raw):
        words, inputs = _pair(*raw, tokenizer)
    elif isinstance(raw, Mapping):
        words, inputs = _encoding(raw, tokenizer, vocabulary, model)
    else:
        words = encode_prompt(raw, tokenizer, vocabulary, closing=True)
        inputs = {"input_ids": torch.tensor([words.ids])}
    limit = longest(model)
    if limit is not None and len(words) > limit:
        raise ValueError(
            f"prompt must fit into the {limit} tokens that the model can read, got {len(words)}: "
            f"{len(words) - limit} too many; shorten it."
        )
    return words, inputs


def longest(model: Any) -> int | None:
    """The most tokens that the model can read; None if it names no limit."""
    limit = context_window(model)
    table = getattr(entry_of(model), "position_embeddings", None)
    unread = getattr(table, "padding_idx", None)  # RoBERTa counts positions from behind it
    return limit if limit is None or unread is None else limit - unread - 1


def _pair(first: str, second: str, tokenizer: Any) -> tuple[Tokens, dict[str, Any]]:
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"a pair of texts needs a fast tokenizer, got {type(tokenizer).__name__}; pass "
            "what it returns for the pair."
        )
    for part in (first, second):
        if not part:
            raise ValueError("prompt must be a pair of texts that are not empty.")
    encoding = tokenizer(first, second, truncation=False, verbose=False)
    ids: list[int] = list(encoding["input_ids"])
    row, owners = encoding.encodings[0], encoding.sequence_ids(0)
    spans: list[Span | None] = [None] * len(ids)
    start = 0
    for number, part in enumerate((first, second)):
        own = [index for index, owner in enumerate(owners) if owner == number]
        held = [row.offsets[index] for index in own]
        placed = with_whitespace(part, held, [row.tokens[index] for index in own])
        for index, span in zip(own, placed, strict=True):
            spans[index] = None if span is None else (span[0] + start, span[1] + start)
        start += len(part) + len(BETWEEN)
    words = describe(first + BETWEEN + second, ids, spans, tokenizer)
    words.reasons[:] = [
        SPECIAL if owner is None else why for owner, why in zip(owners, words.reasons, strict=True)
    ]
    names = [name for name in ("input_ids", "token_type_ids") if name in encoding]
    return words, {name: torch.tensor([encoding[name]]) for name in names}


def _encoding(
    raw: Mapping[str, Any], tokenizer: Any, vocabulary: int, model: Any
) -> tuple[Tokens, dict[str, Any]]:
    """An encoding as it is, its padding left out of the explanation."""
    if "input_ids" not in raw:
        raise ValueError(f"prompt must hold input_ids, got {sorted(raw)}.")
    encode_prompt(raw["input_ids"], None, vocabulary)  # refuses what is no row of ids
    known = inspect.signature(getattr(model, "_orig_mod", model).forward).parameters
    inputs = {name: _row(name, raw[name]) for name in raw if name in known}
    ids: list[int] = inputs["input_ids"][0].tolist()
    for name, value in inputs.items():
        if list(value.shape) != [1, len(ids)]:
            raise ValueError(
                f"{name} must have one value for each of the {len(ids)} input_ids, got shape "
                f"{list(value.shape)}."
            )
    words = tokens_of_ids(ids, tokenizer)
    if "attention_mask" in inputs:
        shown = inputs["attention_mask"][0].bool().tolist()
        words.reasons[:] = [
            why if seen else PADDING for why, seen in zip(words.reasons, shown, strict=True)
        ]
    return words, inputs


def _row(name: str, value: Any) -> Tensor:
    try:
        row = torch.as_tensor(value)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"{name} must be one row of numbers, got {value!r}.") from error
    return row[None] if row.dim() == 1 else row


def read_picture(
    raw: Any, processor: Any, model: Any
) -> tuple[Tokens, dict[str, Any], list[Picture]]:
    """The tokens of a picture, what the model's forward takes for it, and the picture.

    Args:
        raw: A picture of Pillow, or a list that holds one.
        processor: The model's image processor, or a processor that has one.
        model: What reads it.
    Raises:
        TypeError: if it is none, or there is no image processor.
        UnsupportedModelError: if where the patches stand is not known.
    """
    processor = getattr(processor, "image_processor", processor)
    if not hasattr(processor, "image_mean"):
        raise TypeError(
            "pictures need the model's image processor, as AutoImageProcessor.from_pretrained "
            f"loads it, got {type(processor).__name__}."
        )
    if isinstance(raw, (list, tuple)) and len(raw) == 1:
        raw = raw[0]
    image = readable(raw)
    encoding = processor(images=image, return_tensors="pt")
    known = inspect.signature(getattr(model, "_orig_mod", model).forward).parameters
    inputs = {name: value for name, value in encoding.items() if name in known}
    cells = patch_cells(encoder_config(model), processor, encoding, image.size)
    front = special_tokens(model)
    names = [f"<{reason}>" for reason in front] + ["<patch>"] * len(cells)
    beside: list[str | None] = [PADDING if cell.view == PADDING else None for cell in cells]
    words = Tokens(
        ids=[0] * len(names),
        text="",
        spans=[None] * len(names),
        names=names,
        reasons=[*front, *beside],
        areas=[*[None] * len(front), *(Area(0, cell.box, cell.view) for cell in cells)],
    )
    return words, inputs, [Picture.of(image, 0)]
