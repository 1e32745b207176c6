"""What ``generate`` is given, read for steering: rows of tokens and their places in the text.

Legend: B batch rows, P columns of the prompt (padding included).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .chat import Span
from .controls import ControlledRow
from .tokens import Tokens, encode_prompt, spans_of_encoding

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
    """

    ids: Tensor
    columns: list[Tensor]
    rows: list[ControlledRow]


def prompts_of(words: Tokens) -> Prompts:
    """One prompt, as it was tokenised for an explanation."""
    return Prompts(
        torch.tensor([words.ids]),
        [torch.arange(len(words))],
        [ControlledRow(len(words), words.spans, len(words.text))],
    )


def read_inputs(inputs: Any, tokenizer: Any, vocabulary: int) -> Prompts:
    """Prompts from what ``steer`` takes as ``inputs``.

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
        rows.append(ControlledRow(len(own), spans, length))
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
