"""Prompts and targets as token ids, each token with its place in the text.

Legend: a span is ``(start, stop)`` in characters of ``Tokens.text``, ``stop`` exclusive. Tokens
that hold parts of one character share its span.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .chat import Content, Span, find_contents, is_chat, message_numbers, render_chat
from .pieces import Area
from .placing import owners

SPECIAL = "special token"
TEMPLATE = "chat template"

# What a continuation is cut from when the tokenizer treats the start of a text specially.
_ANCHORS = ("\n", ".", "a", "0")
LONGEST_CHARACTER = 4
"""Tokens of one character at most: it has at most four bytes."""
_SPACES = "Ġ▁ "  # a space as byte-level and as sentencepiece tokens write it
# How Unicode's names of characters begin in scripts written without spaces.
_UNSPACED_SCRIPTS = (
    *("CJK", "HIRAGANA", "KATAKANA", "IDEOGRAPHIC", "FULLWIDTH", "HALFWIDTH KATAKANA"),
    *("THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN"),
)


@dataclass(frozen=True)
class Tokens:
    """Token ids and where each one stands in the text.

    Args:
        ids: Vocabulary indices.
        text: The text they make.
        spans: Each token's characters of ``text``; None where it has no place there.
        names: Each token as text, also where it has no place in ``text``.
        reasons: Why a token is left out of an explanation; None for the user's own content.
        contents: Of chat messages, where their contents stand in ``text``; else empty.
        areas: Of each token, what of a picture it stands for; None of others. Empty without any.
        seconds: Of each token of a sound, from when to when; None of others. Empty without any.
        read: Whether the model reads them; it does not read the name of a class.
    """

    ids: list[int]
    text: str
    spans: list[Span | None]
    names: list[str]
    reasons: list[str | None]
    contents: list[Content] = field(default_factory=list)
    areas: list[Area | None] = field(default_factory=list)
    seconds: list[tuple[float, float] | None] = field(default_factory=list)
    read: bool = True

    def __len__(self) -> int:
        return len(self.ids)

    def head(self, count: int) -> Tokens:
        """The first so many tokens, at least one."""
        stop = max((span[1] for span in self.spans[:count] if span is not None), default=0)
        return Tokens(
            self.ids[:count],
            self.text[:stop],
            self.spans[:count],
            self.names[:count],
            self.reasons[:count],
        )


def encode_prompt(prompt: Any, tokenizer: Any, vocabulary: int, *, closing: bool = False) -> Tokens:
    """Tokenise a prompt as the model's tokenizer does by default.

    A str gets the tokenizer's own special tokens in front, such as BOS; one that it would add
    behind the text is dropped where the target continues the prompt. Chat messages go through
    the tokenizer's template with the opening of the answer behind them. Ids are taken as they are.

    Args:
        prompt: str | chat messages (``[{"role": ..., "content": ...}, ...]``) | token ids, a
            sequence or tensor | an encoding such as ``tokenizer(text)`` returns.
        tokenizer: A transformers tokenizer; None is enough for ids.
        vocabulary: How many token ids the model knows.
        closing: Keep special tokens that the tokenizer puts behind a str.
    Raises:
        TypeError: if the prompt is none of these.
        ValueError: if it is empty, holds an id the model does not know, or needs a tokenizer or a
            chat template that is not there; if an encoding hides tokens between others, or its
            positions do not count from 0.
    """
    if isinstance(prompt, str):
        if not prompt:
            raise ValueError("prompt must not be empty.")
        _require_tokenizer(tokenizer, "a str prompt")
        tokens = _encode_text(prompt, tokenizer, special_tokens=True, closing=closing)
        check_vocabulary("prompt", tokens.ids, vocabulary)
        return tokens
    if is_chat(prompt):
        _require_tokenizer(tokenizer, "chat messages")
        tokens = _encode_chat(prompt, tokenizer)
        check_vocabulary("prompt", tokens.ids, vocabulary)
        return tokens
    if isinstance(prompt, Mapping):
        ids = _ids_of_encoding(prompt)
    else:
        ids = _checked_ids("prompt", prompt)
    check_vocabulary("prompt", ids, vocabulary)
    return tokens_of_ids(ids, tokenizer)


def encode_target(
    target: Any, prompt: Tokens, tokenizer: Any, vocabulary: int, separator: str
) -> Tokens:
    """Tokenise a target apart from its prompt, as a continuation of it.

    No special tokens are added. Spans count from the target's first character.

    Args:
        target: str | token ids.
        prompt: What it continues.
        tokenizer: A transformers tokenizer; None is enough for ids.
        vocabulary: How many token ids the model knows.
        separator: Text put in front of a str target; ids are taken as they are.
    Raises:
        TypeError: if the target is neither.
        ValueError: if it is empty, holds an id the model does not know, or cannot be tokenised
            apart from the prompt.
    """
    if not isinstance(target, str):
        ids = _checked_ids("target", target)
        check_vocabulary("target", ids, vocabulary)
        return tokens_of_ids(ids, tokenizer, after=prompt)
    if not target:
        raise ValueError("target must not be empty.")
    _require_tokenizer(tokenizer, "a str target")
    text = separator + target
    ids, spans = _continuation(text, prompt, tokenizer)
    check_vocabulary("target", ids, vocabulary)
    return describe(text, ids, spans, tokenizer)


def border(prompt: Any, words: Tokens, target: Any) -> str:
    """What ``explain`` puts between a prompt and a str target when it is not told: " " or "".

    One space where two words would run together: ``"Q: ... A:"`` and ``"23"``. Nothing where
    either side has whitespace already, after an opening bracket or quote, before closing
    punctuation, and next to a script written without spaces. Nothing after chat messages, after a
    picture, and after token ids that end with a special token.

    Args:
        prompt: As in ``encode_prompt``.
        words: The same, encoded.
        target: str | token ids.
    """
    text = prompt if isinstance(prompt, str) else words.text
    fixed = not isinstance(prompt, str) and (
        is_chat(prompt) or words.reasons[-1] == SPECIAL or words.spans[-1] is None
    )
    if fixed or not (isinstance(target, str) and text and target):
        return ""
    left, right = text[-1], target[0]
    opened = unicodedata.category(left) in ("Ps", "Pi")
    opened |= left in "\"'`" and (len(text) == 1 or text[-2].isspace())
    closed = unicodedata.category(right) in ("Pe", "Pf") or right in ",.;:!?"
    if left.isspace() or right.isspace() or opened or closed:
        return ""
    unspaced = any(unicodedata.name(c, "").startswith(_UNSPACED_SCRIPTS) for c in (left, right))
    return "" if unspaced else " "


def tokens_of_ids(ids: list[int], tokenizer: Any, after: Tokens | None = None) -> Tokens:
    """Describe ids that came without their text; without a tokenizer the text is the ids.

    Args:
        ids: Vocabulary indices.
        tokenizer: A transformers tokenizer, or None.
        after: Tokens in front of them, which some tokenizers need to decode them rightly.
    """
    if tokenizer is None:
        pieces = [str(token_id) for token_id in ids]
        text = (" " if after is not None else "") + " ".join(pieces)
        spans: list[Span | None] = []
        stop = -1 if after is None else 0
        for piece in pieces:
            spans.append((stop + 1, stop + 1 + len(piece)))
            stop += 1 + len(piece)
        return Tokens(ids, text, spans, pieces, [None] * len(ids))
    text, spans = _decoded_spans(ids, tokenizer, [] if after is None else after.ids)
    return describe(text, ids, spans, tokenizer)


# --- text → ids ---------------------------------------------------------------------------------


def _require_tokenizer(tokenizer: Any, what: str) -> None:
    if tokenizer is None:
        raise ValueError(f"{what} needs a tokenizer, got None; pass one or give token ids.")


def _encode_text(
    text: str, tokenizer: Any, *, special_tokens: bool, closing: bool = False
) -> Tokens:
    """Ids, spans and reasons of a whole text; closing special tokens dropped, or not."""
    ids, spans, added = _encode(text, tokenizer, special_tokens=special_tokens)
    while ids and added[-1] and not closing:
        ids, spans, added = ids[:-1], spans[:-1], added[:-1]
    if all(added):
        raise ValueError(f"prompt must not be empty: the tokenizer makes no token of {text!r}.")
    if not getattr(tokenizer, "is_fast", False):
        text, spans = _decoded_spans(ids, tokenizer, [], hidden=added)
    tokens = describe(text, ids, spans, tokenizer)
    reasons = [SPECIAL if mark else why for mark, why in zip(added, tokens.reasons, strict=True)]
    return Tokens(ids, text, tokens.spans, tokens.names, reasons)


def _encode(
    text: str, tokenizer: Any, *, special_tokens: bool
) -> tuple[list[int], list[Span | None], list[bool]]:
    """Ids, spans and which ids the tokenizer added by itself; no spans from a slow tokenizer."""
    fast = getattr(tokenizer, "is_fast", False)
    encoding = tokenizer(
        text,
        add_special_tokens=special_tokens,
        return_special_tokens_mask=True,
        return_offsets_mapping=fast,
        truncation=False,
        verbose=False,
    )
    ids = list(encoding["input_ids"])
    added = [special_tokens and bool(mark) for mark in encoding["special_tokens_mask"]]
    if not fast:
        return ids, [None] * len(ids), added
    spans: list[Span | None] = [
        None if mark else (start, stop)
        for (start, stop), mark in zip(encoding["offset_mapping"], added, strict=True)
    ]
    return ids, with_whitespace(text, spans, tokenizer.convert_ids_to_tokens(ids)), added


def with_whitespace(text: str, spans: list[Span | None], tokens: list[str]) -> list[Span | None]:
    """Give whitespace that the tokenizer trims from its spans back to the token that holds it."""
    filled: list[Any] = list(spans)
    previous = 0  # where the text read so far ends
    last: int | None = None
    for index, span in [*enumerate(spans), (len(spans), (len(text), len(text)))]:
        if span is None:
            continue
        start, stop = span
        gap = text[previous:start]
        if gap.isspace() and last is not None:  # spaces at the end of the token before
            trimmed = len(tokens[last]) - len(tokens[last].rstrip(_SPACES))
            blank = trimmed == len(tokens[last]) and filled[last][0] < filled[last][1]
            if trimmed and not blank:
                previous = min(start, previous + trimmed)
                filled[last] = (filled[last][0], previous)
        if index < len(spans):
            filled[index] = (previous if gap.isspace() else start, stop)
        previous, last = max(previous, stop), index
    return filled


def _continuation(text: str, prompt: Tokens, tokenizer: Any) -> tuple[list[int], list[Span | None]]:
    """Ids and spans of ``text`` behind the prompt: the first reading that decodes to just that.

    Read on its own first. Tokenizers that put a space in front of every text would then give the
    target one more, so next it is read behind an anchor that is cut off again.
    """
    before = decode(tokenizer, prompt.ids)
    whole, _, _ = _encode(prompt.text + text, tokenizer, special_tokens=False)
    opening = [token for token, span in zip(prompt.ids, prompt.spans, strict=True) if span is None]
    # What the prompt and the target decode to together, also where decoding loses something.
    wanted = (before + text, decode(tokenizer, opening + whole))
    for ids, spans in _readings(text, tokenizer):
        if ids and decode(tokenizer, prompt.ids + ids) in wanted:
            if not getattr(tokenizer, "is_fast", False):
                _, spans = _decoded_spans(ids, tokenizer, prompt.ids)
            return ids, spans
    raise ValueError(
        f"target {text!r} cannot be tokenised apart from the prompt by "
        f"{type(tokenizer).__name__}; pass its token ids."
    )


def _readings(text: str, tokenizer: Any) -> Iterator[tuple[list[int], list[Span | None]]]:
    ids, spans, _ = _encode(text, tokenizer, special_tokens=False)
    yield ids, spans
    for anchor in _ANCHORS:
        start, _, _ = _encode(anchor, tokenizer, special_tokens=False)
        ids, spans, _ = _encode(anchor + text, tokenizer, special_tokens=False)
        if ids[: len(start)] == start:
            shifted: list[Span | None] = [
                None if span is None else (max(0, span[0] - len(anchor)), span[1] - len(anchor))
                for span in spans[len(start) :]
            ]
            yield ids[len(start) :], shifted


def _encode_chat(messages: Sequence[Mapping[str, Any]], tokenizer: Any) -> Tokens:
    """Tokenise messages through the tokenizer's template; only their contents can be units."""
    rendered, contents = render_chat(messages, tokenizer)
    tokens = _encode_text(rendered, tokenizer, special_tokens=False)
    if tokens.text != rendered:  # a slow tokenizer, whose text is what its tokens decode to
        contents = find_contents([rendered[start:stop] for start, stop in contents], tokens.text)
    reasons = [
        TEMPLATE if why is None and owner is None else why
        for why, owner in zip(
            tokens.reasons, owners(tokens.text, tokens.spans, contents), strict=True
        )
    ]
    own = [
        Content(start, stop, message)
        for (start, stop), message in zip(contents, message_numbers(messages), strict=True)
    ]
    return Tokens(tokens.ids, tokens.text, tokens.spans, tokens.names, reasons, own)


def spans_of_encoding(encoding: Any, text: str | None = None) -> list[Span | None]:
    """Spans of the tokens in what a fast tokenizer recorded of one text: ``tokenizers.Encoding``.

    The text itself is not recorded: without it, every character between two tokens counts as
    whitespace.
    """
    spans: list[Span | None] = [
        None if mark or not seen else (start, stop)
        for (start, stop), mark, seen in zip(
            encoding.offsets, encoding.special_tokens_mask, encoding.attention_mask, strict=True
        )
    ]
    length = max((span[1] for span in spans if span is not None), default=0)
    return with_whitespace(" " * length if text is None else text, spans, encoding.tokens)


# --- ids → text ---------------------------------------------------------------------------------


def _checked_ids(name: str, value: Any) -> list[int]:
    """``value`` as a list of token ids.

    Raises:
        TypeError: if it holds anything but integers.
        ValueError: if it is empty or has more than one row.
    """
    if hasattr(value, "tolist"):  # tensors and arrays
        value = value.tolist()
    elif isinstance(value, (list, tuple, range)):
        value = list(value)
    else:
        raise TypeError(
            f"{name} must be a str, chat messages or token ids, got {type(value).__name__}."
            if name == "prompt"
            else f"{name} must be a str or token ids, got {type(value).__name__}."
        )
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], list):
        value = value[0]
    if not isinstance(value, list) or any(isinstance(item, list) for item in value):
        raise ValueError(f"{name} must be one row of token ids; explain one prompt at a time.")
    if not value:
        raise ValueError(f"{name} must not be empty.")
    for item in value:
        if isinstance(item, bool) or not isinstance(item, int):
            raise TypeError(f"{name} must hold integer token ids, got {item!r}.")
    return value


def check_vocabulary(name: str, ids: Sequence[int], vocabulary: int) -> None:
    """Refuse, by a ValueError, ids that the model does not know."""
    for token_id in ids:
        if not 0 <= token_id < vocabulary:
            raise ValueError(
                f"{name} holds token id {token_id}, but the model knows ids 0 to "
                f"{vocabulary - 1}; is this the model's tokenizer?"
            )


def _ids_of_encoding(encoding: Mapping[str, Any]) -> list[int]:
    """The one row of ids in what a tokenizer returns, without its padding."""
    if "input_ids" not in encoding:
        raise ValueError(f"prompt must hold input_ids, got {sorted(encoding)}.")
    known = {"input_ids", "attention_mask", "token_type_ids", "special_tokens_mask"}
    unknown = sorted(set(encoding) - known - {"offset_mapping", "length", "position_ids"})
    if unknown:
        raise ValueError(
            f"prompt must be text alone, but it holds {', '.join(unknown)}; give pictures "
            "themselves, [image, 'text'], with the model's processor."
        )
    ids = _checked_ids("prompt", encoding["input_ids"])
    visible = _row_of("attention_mask", encoding, len(ids)) or [1] * len(ids)
    shown = [index for index, seen in enumerate(visible) if seen]
    if not shown:
        raise ValueError("prompt must not be empty: its attention_mask hides every token.")
    start, stop = shown[0], shown[-1] + 1
    if any(seen != 1 for seen in visible[start:stop]):
        raise ValueError(
            f"attention_mask must be one block of ones with padding around it, got {visible}."
        )
    positions = _row_of("position_ids", encoding, len(ids))
    if positions is not None and positions[start:stop] != list(range(stop - start)):
        raise ValueError(
            f"position_ids must be 0 to {stop - start - 1} for the tokens that attention_mask "
            f"shows, got {positions[start:stop]}."
        )
    return ids[start:stop]


def _row_of(name: str, encoding: Mapping[str, Any], length: int) -> list[Any] | None:
    """One value for each of ``length`` ids, or None if the encoding does not hold any."""
    value = encoding.get(name)
    if value is None:
        return None
    wanted = f"{name} must have one value for each of the {length} input_ids"
    try:
        row = torch.as_tensor(value).flatten().tolist()
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"{wanted}, got {value!r}.") from error
    if len(row) != length:
        raise ValueError(f"{wanted}, got {len(row)}.")
    return row


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """What ids decode to, nothing skipped or cleaned up."""
    return tokenizer.decode(
        list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
    )


def _decoded_spans(
    ids: list[int],
    tokenizer: Any,
    before: list[int],
    hidden: Sequence[bool] | None = None,
) -> tuple[str, list[Span | None]]:
    """The text of ids, decoded token by token, with each token's span in it.

    A token that ends inside a character waits for the next ones; they share the character.
    """
    text = ""
    spans: list[Span | None] = []
    context, finished, waiting = before, [], []
    for index, token_id in enumerate(ids):
        if hidden is not None and hidden[index]:
            spans.append(None)
            continue
        waiting.append(token_id)
        known = len(decode(tokenizer, context))
        piece = decode(tokenizer, context + waiting)[known:]
        unfinished = not piece or piece.endswith("\ufffd")
        if unfinished and len(waiting) < LONGEST_CHARACTER and index + 1 < len(ids):
            continue
        for count in range(len(waiting)):
            read = decode(tokenizer, context + waiting[:count])[known:].rstrip("\ufffd")
            spans.append((len(text) + min(len(read), len(piece)), len(text) + len(piece)))
        text += piece
        # Whole characters only: half of one would spoil what follows it.
        context, finished, waiting = finished + waiting, waiting, []
    return text, spans


def describe(text: str, ids: list[int], spans: list[Span | None], tokenizer: Any) -> Tokens:
    """Name every token and mark the special ones."""
    special = _special_ids(tokenizer)
    names = []
    for token_id, span in zip(ids, spans, strict=True):
        shown = "" if span is None else text[span[0] : span[1]]
        # An id beyond the tokenizer's own vocabulary decodes to nothing.
        names.append(shown or decode(tokenizer, [token_id]) or f"<{token_id}>")
    reasons: list[str | None] = [SPECIAL if token_id in special else None for token_id in ids]
    return Tokens(ids, text, spans, names, reasons)


def _special_ids(tokenizer: Any) -> set[int]:
    """Ids of control tokens. The unknown token stands for the user's own text, so it is none."""
    special = set(tokenizer.all_special_ids)
    special |= {
        token_id
        for token_id, token in getattr(tokenizer, "added_tokens_decoder", {}).items()
        if token.special
    }
    roles = ("bos", "eos", "pad", "sep", "cls", "mask")
    others = {getattr(tokenizer, f"{role}_token_id", None) for role in roles}
    unknown = getattr(tokenizer, "unk_token_id", None)
    return special if unknown in others else special - {unknown}
