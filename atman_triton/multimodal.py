"""Prompts with pictures, read as a model's processor prepares them.

The processor expands the placeholder of each picture and tokenises; what it hands its tokenizer,
and what the tokenizer records of it, say where every token stands in the user's own text.

Legend: P prompt tokens; T is a prompt's text with the placeholders of its pictures, E what T
becomes in front of the tokenizer.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from .branches import Branches
from .capabilities import device_of, dtype_of, vocabulary_size
from .chat import Content, Span, is_chat, is_image, message_numbers, parts_of, render_chat
from .images import ImageToken, cross_image_tokens, image_tokens, readable
from .pictures import Picture
from .pieces import Area
from .placing import owners
from .replay import Replay
from .stacks import UnsupportedModelError
from .tokens import TEMPLATE, Tokens, check_vocabulary, describe, spans_of_encoding

MARKUP = "written by the processor"
PADDING = "beside the picture"
CLASS_TOKEN = "class token of a tile"
_WITHOUT_BOX = {"padding": PADDING, "class": CLASS_TOKEN}

# `model_type` -> what stands around a picture's placeholder where no chat template writes it.
_QWEN = ("<|vision_start|>", "<|vision_end|>")
_AROUND: dict[str, tuple[str, str]] = {
    "qwen2_vl": _QWEN,
    "qwen2_5_vl": _QWEN,
    "qwen3_vl": _QWEN,
    "qwen3_vl_moe": _QWEN,
}
_LOAD = "load its processor with AutoProcessor.from_pretrained(...) and pass that"
_OPEN = "open it with PIL.Image.open(path)"


class Read(NamedTuple):
    """A prompt as the model reads it: see ``tasks.Prompt``."""

    words: Tokens
    inputs: dict[str, Any]
    pictures: list[Picture]


@dataclass(frozen=True)
class _Written:
    """A prompt before its placeholders are expanded.

    Args:
        pieces: What the user or the chat template wrote in front of each picture and behind the
            last one.
        marks: Of each picture, what stands for it in T: before, placeholder, behind.
        images: The pictures.
        contents: Of chat messages, where their texts stand among the pieces put together.
        messages: Chat messages with nothing but parts in them; empty if it is no chat.
    """

    pieces: list[str]
    marks: list[tuple[str, str, str]]
    images: list[Image.Image]
    contents: list[Content]
    messages: list[dict[str, Any]]

    @property
    def text(self) -> str:
        """T."""
        return self.pieces[0] + "".join(
            "".join(mark) + piece for mark, piece in zip(self.marks, self.pieces[1:], strict=True)
        )

    @property
    def starts(self) -> list[int]:
        """Where the pieces start when they are put together."""
        return list(accumulate(map(len, self.pieces), initial=0))[:-1]


def has_pictures(prompt: Any) -> bool:
    """Whether a prompt is a picture, or a list or chat messages that hold one."""
    if is_chat(prompt):
        return any(
            is_image(part)
            for message in prompt
            if isinstance(message, Mapping) and isinstance(message.get("content"), (list, tuple))
            for part in message["content"]
        )
    several = prompt if isinstance(prompt, (list, tuple)) else [prompt]
    return any(isinstance(item, Image.Image) for item in several)


def is_processor(processor: Any) -> bool:
    """Whether it prepares pictures and text."""
    return getattr(processor, "image_processor", None) is not None


def is_for_processor(prompt: Any, processor: Any) -> bool:
    """Whether a prompt is read by ``read_pictures`` rather than as text.

    Pictures always are. Lists with text in them are, and chat messages, if the processor is one of
    pictures; chat messages only if it has a template.
    """
    if has_pictures(prompt):
        return True
    if not is_processor(processor):
        return False
    if is_chat(prompt):
        return getattr(processor, "chat_template", None) is not None
    return isinstance(prompt, (list, tuple)) and any(isinstance(item, str) for item in prompt)


def read_pictures(prompt: Any, model: Any, processor: Any, *, beside: bool = False) -> Read:
    """A prompt with pictures as the model reads it.

    Its text is the user's (of chat messages, what the template made of them), without anything
    that stands for a picture.

    Args:
        prompt: A picture | ``[picture | str, ...]`` | chat messages with pictures in their parts.
        model: A vision-language model of transformers.
        processor: Its processor.
        beside: The model attends to its pictures beside the prompt (Mllama); their tokens are put
            in front of those of the text.
    Raises:
        TypeError: if an item is neither text nor a picture.
        ValueError: if the processor is none, cannot say what stands for a picture, or refuses the
            prompt.
        UnsupportedModelError: if where its image tokens stand is not known.
    """
    written, recording, encoding = _encoded(prompt, model, processor)
    words, shown = _words(written, recording)
    sizes = [image.size for image in written.images]
    areas: list[Area | None] = [None] * len(words)
    own = [] if beside or not sizes else image_tokens(model, processor, encoding, sizes)
    for found in own:
        areas[found.token] = Area(found.image, found.box, found.view)
    text_ids = [token for token, area in zip(words.ids, areas, strict=True) if area is None]
    check_vocabulary("prompt", text_ids, vocabulary_size(model))
    inside = owners(words.text, words.spans, [content[:2] for content in written.contents])
    reasons = []
    for why, area, seen, owner in zip(words.reasons, areas, shown, inside, strict=True):
        other = MARKUP if not seen else TEMPLATE if written.messages and owner is None else None
        reasons.append(None if area is not None else why or other)
    words = Tokens(
        words.ids,
        words.text,
        words.spans,
        words.names,
        reasons,
        written.contents,
        areas if sizes else [],
    )
    if beside and sizes:
        others = cross_image_tokens(model, processor, encoding, sizes)
        words = _in_front(words, others, model.config.image_token_id, written.marks[0][1])
    return Read(words, _inputs(written, encoding, model), _pictures(written))


def prepared(prompt: Any, model: Any, processor: Any) -> dict[str, Any]:
    """The ``inputs`` of ``read_pictures`` alone, for much less work; it takes and raises the same.

    For a prompt whose tokens are known, with other pictures.
    """
    written, _, encoding = _encoded(prompt, model, processor)
    return _inputs(written, encoding, model)


def _encoded(
    prompt: Any, model: Any, processor: Any
) -> tuple[_Written, _Recording, Mapping[str, Any]]:
    """A prompt as it was written, and what its processor makes of it."""
    if not is_processor(processor):
        raise ValueError(
            "prompt holds a picture, for which a vision-language model and its processor are "
            f"needed, got {type(model).__name__} and {type(processor).__name__}; {_LOAD}."
        )
    placeholder = getattr(processor, "image_token", None)
    if not isinstance(placeholder, str) or not placeholder:
        raise ValueError(
            f"{type(processor).__name__} does not say what stands for a picture in a prompt: it "
            "has no image_token."
        )
    around = _AROUND.get(str(getattr(model.config, "model_type", "")), ("", ""))
    mark = (around[0], placeholder, around[1])
    written = _messages(prompt, processor, mark) if is_chat(prompt) else _items(prompt, mark)
    texts = _texts(written.messages) if written.messages else written.pieces
    refuse_placeholders(texts, model, processor)
    recording = _Recording(processor)
    encoding = recording.encode(written)
    return written, recording, encoding


def _inputs(written: _Written, encoding: Mapping[str, Any], model: Any) -> dict[str, Any]:
    return moved(encoding, model) if written.images else {"input_ids": encoding["input_ids"]}


def _in_front(words: Tokens, shown: Sequence[ImageToken], token: int, name: str) -> Tokens:
    """Tokens of pictures and those of a text."""
    count = len(shown)
    return Tokens(
        [token] * count + words.ids,
        words.text,
        [None] * count + words.spans,
        [name] * count + words.names,
        [None if each.box is not None else _WITHOUT_BOX[each.view] for each in shown]
        + words.reasons,
        words.contents,
        [Area(each.image, each.box, each.view) for each in shown] + [None] * len(words),
    )


def embeddings(model: Any, inputs: Mapping[str, Any]) -> Tensor:
    """What a decoder reads of one prompt, pictures included: ``[P, D]``."""
    with torch.no_grad():
        return Replay(model, inputs, Branches(inputs["input_ids"].shape[1], ((0,),))).embeddings()


def refuse_placeholders(texts: Sequence[str], model: Any, processor: Any) -> None:
    """Refuse what stands for a picture in the user's own text, where there is no picture for it.

    Raises: ValueError: naming it.
    """
    token = getattr(getattr(model, "config", None), "image_token_id", None)
    tokenizer = getattr(processor, "tokenizer", processor)
    known = [getattr(processor, "image_token", None)] if is_processor(processor) else []
    if isinstance(token, int) and tokenizer is not None:
        known.append(tokenizer.convert_ids_to_tokens(token))
    for placeholder in known:
        if placeholder and any(placeholder in text for text in texts):
            raise ValueError(
                f"prompt holds {placeholder!r}, which stands for a picture, but no picture for "
                "it; put the picture itself there: [image, 'text']."
            )


def refuse_image_ids(ids: Sequence[int], model: Any) -> None:
    """Refuse token ids that stand for a picture.

    Raises: ValueError: if one does.
    """
    token = getattr(getattr(model, "config", None), "image_token_id", None)
    if token in ids:
        raise ValueError(
            f"prompt holds token {token}, which stands for a picture, but no picture for it; give "
            "pictures and text instead of ids: [image, 'text']."
        )


# --- what the user wrote --------------------------------------------------------------------------


def _items(prompt: Any, mark: tuple[str, str, str]) -> _Written:
    """A picture, or a list of pictures and texts."""
    items = list(prompt) if isinstance(prompt, (list, tuple)) else [prompt]
    pieces, images = [""], []
    for index, item in enumerate(items):
        if isinstance(item, str):
            pieces[-1] += item
        elif isinstance(item, Image.Image):
            images.append(_readable(item, f"prompt[{index}]"))
            pieces.append("")
        else:
            raise TypeError(
                f"prompt[{index}] must be a str or a PIL.Image, got {type(item).__name__}."
            )
    if not images and not any(pieces):
        raise ValueError("prompt must not be empty.")
    return _Written(pieces, [mark] * len(images), images, [], [])


def _messages(messages: Any, processor: Any, mark: tuple[str, str, str]) -> _Written:
    """Chat messages through the processor's template."""
    if getattr(processor, "chat_template", None) is None:
        raise ValueError(
            f"{type(processor).__name__} has no chat template; set processor.chat_template, or "
            "pass pictures and text in a list: [image, 'text']."
        )
    images: list[Image.Image] = []
    whole = [_in_parts(message, number, images) for number, message in enumerate(messages)]
    rendered, spans = render_chat(whole, processor, images=True)
    before, placeholder, behind = map(re.escape, mark)
    found = list(re.finditer(f"((?:{before})?)({placeholder})((?:{behind})?)", rendered))
    if len(found) != len(images):
        raise ValueError(
            f"the chat template writes {mark[1]!r} {len(found)} times for {len(images)} pictures; "
            "pass pictures and text in a list: [image, 'text']."
        )
    edges = [0, *(edge for each in found for edge in each.span()), len(rendered)]
    pieces = [rendered[a:b] for a, b in zip(edges[::2], edges[1::2], strict=True)]
    contents = []
    for (start, stop), number in zip(spans, message_numbers(whole), strict=True):
        gone = sum(len(each[0]) for each in found if each.start() < start)
        contents.append(Content(start - gone, stop - gone, number))
    marks = [(each[1], each[2], each[3]) for each in found]
    return _Written(pieces, marks, images, contents, whole)


def _in_parts(message: Any, number: int, images: list[Image.Image]) -> dict[str, Any]:
    """A message whose content is parts, as templates with pictures want it."""
    if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
        raise ValueError(f"prompt[{number}] must have a 'role' and a 'content', got {message!r}.")
    if not isinstance(message["content"], (str, list, tuple)):
        raise TypeError(f"prompt[{number}]['content'] must be a str, got {message['content']!r}.")
    parts = []
    for place, part in enumerate(parts_of(message)):
        if is_image(part):
            where = f"prompt[{number}]['content'][{place}]"
            image = part.get("image")
            if not isinstance(image, Image.Image):
                raise TypeError(
                    f"{where} must hold the picture itself, {{'type': 'image', 'image': "
                    f"PIL.Image}}, got {dict(part)!r}; {_OPEN}."
                )
            part = {"type": "image", "image": _readable(image, where)}
            images.append(part["image"])
        elif isinstance(part, str):
            part = {"type": "text", "text": part}
        parts.append(part)
    return {**message, "content": parts}


def _readable(image: Image.Image, where: str) -> Image.Image:
    try:
        return readable(image)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _texts(messages: Sequence[Mapping[str, Any]]) -> list[str]:
    return [part["text"] for each in messages for part in each["content"] if not is_image(part)]


def _pictures(written: _Written) -> list[Picture]:
    starts = written.starts[1:]
    return [Picture.of(image, at) for image, at in zip(written.images, starts, strict=True)]


# --- what the processor makes of it ---------------------------------------------------------------


class _Listening:
    """A tokenizer that keeps what it is asked and what it answers."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.heard: list[tuple[Any, Any]] = []

    def __call__(self, text: Any = None, *args: Any, **kwargs: Any) -> Any:
        answer = self._tokenizer(text, *args, **kwargs)
        self.heard.append((text, answer))
        return answer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_tokenizer"], name)


class _Recording:
    """A copy of a processor that keeps what one prompt becomes in front of its tokenizer."""

    def __init__(self, processor: Any) -> None:
        self.processor = copy.copy(processor)
        self.tokenizer = _Listening(processor.tokenizer)
        self.processor.tokenizer = self.tokenizer
        self._expansions: list[Span] | None = None
        expand = getattr(processor, "get_text_with_replacements", None)
        if expand is not None:
            self.processor.get_text_with_replacements = self._listen_to(expand)

    def _listen_to(self, expand: Any) -> Any:
        def listened(*args: Any, **kwargs: Any) -> Any:
            answer = expand(*args, **kwargs)
            self._expansions = [each["new_span"] for row in answer[1] for each in row]
            return answer

        return listened

    def encode(self, written: _Written) -> Mapping[str, Any]:
        """What the processor returns for a prompt."""
        if written.messages:
            return self.processor.apply_chat_template(
                written.messages,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
            )
        images = [written.images] if written.images else None
        return self.processor(text=[written.text], images=images, return_tensors="pt")

    def heard(self) -> tuple[str, Any]:
        """E, and what a fast tokenizer recorded of it.

        Raises: ValueError: if the tokenizer is a slow one.
        """
        if len(self.tokenizer.heard) != 1:
            raise self._unknown("it tokenises a prompt in several parts")
        (text, answer) = self.tokenizer.heard[0]
        text = text[0] if isinstance(text, (list, tuple)) else text
        encodings = getattr(answer, "encodings", None)
        if not encodings:
            raise ValueError(
                f"{type(self.tokenizer._tokenizer).__name__} is no fast tokenizer, so the places "
                "of its tokens in a prompt with pictures are not known; load the processor with "
                "use_fast=True."
            )
        return text, encodings[0]

    def expansions(self, text: str, placeholder: str, count: int) -> list[Span]:
        """Where in E the pictures stand."""
        found = self._expansions
        if found is None:  # a processor that leaves its placeholders as they are
            found = [each.span() for each in re.finditer(re.escape(placeholder), text)]
        if len(found) != count:
            raise self._unknown(f"it expands {len(found)} placeholders of {count} pictures")
        return found

    def _unknown(self, why: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"where {type(self.processor).__name__} puts the pictures of a prompt is not known: "
            f"{why}."
        )

    def places(self, written: _Written, text: str) -> list[Span]:
        """Where in E the pieces of the user stand."""
        placeholder = written.marks[0][1] if written.marks else ""
        taken = self.expansions(text, placeholder, len(written.marks)) if placeholder else []
        edges = [0, *(edge for span in taken for edge in span), len(text)]
        behind = ["", *(mark[2] for mark in written.marks)]
        before = [*(mark[0] for mark in written.marks), ""]
        bos = self.tokenizer.bos_token or ""
        found = []
        for number, piece in enumerate(written.pieces):
            wanted = behind[number] + piece + before[number]
            gap = text[edges[2 * number] : edges[2 * number + 1]]
            skipped = 0
            if bos and gap.startswith(bos) and not wanted.startswith(bos):
                skipped = len(bos)  # some processors write it themselves
            if not gap[skipped:].startswith(wanted):
                raise self._unknown(f"it makes {gap!r} of {wanted!r}")
            start = edges[2 * number] + skipped + len(behind[number])
            found.append((start, start + len(piece)))
        return found


def _words(written: _Written, recording: _Recording) -> tuple[Tokens, list[bool]]:
    """The tokens of a prompt, and which of them stand in what the user or a template wrote."""
    expanded, encoding = recording.heard()
    places = recording.places(written, expanded)
    own: list[Span | None] = [
        None if span is None else _moved(span, places, written.starts)
        for span in spans_of_encoding(encoding, expanded)
    ]
    text = "".join(written.pieces)
    words = describe(text, list(encoding.ids), own, recording.tokenizer)
    return words, [span is not None for span in own]


def _moved(span: Span, places: Sequence[Span], starts: Sequence[int]) -> Span | None:
    """A span of E in the user's text; None if it has nothing of it."""
    for (first, last), start in zip(places, starts, strict=True):
        a, b = max(span[0], first), min(span[1], last)
        if a < b:
            return (start + a - first, start + b - first)
    return None


def moved(inputs: Mapping[str, Any], model: Any) -> dict[str, Any]:
    """What the model's forward takes of what a processor returned, on its device, in its dtype."""
    device, dtype = device_of(model), dtype_of(model)
    found = {}
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            value = value.to(device, dtype if value.is_floating_point() else None)
        if name != "labels":  # PaliGemma's processor makes some, for training
            found[name] = value
    return found
