"""Chat messages as the model reads them, and where each message's content stands.

Legend: a span is ``(start, stop)`` in characters of the rendered text, ``stop`` exclusive.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

Span = tuple[int, int]
Messages = Sequence[Mapping[str, Any]]


class Content(NamedTuple):
    """Where the content of a message stands, or one part of it.

    Args:
        start: First character of the rendered text.
        stop: One past the last one.
        message: Which message it belongs to, from 0.
    """

    start: int
    stop: int
    message: int


def is_chat(prompt: Any) -> bool:
    """Whether a prompt is chat messages."""
    return isinstance(prompt, (list, tuple)) and bool(prompt) and isinstance(prompt[0], Mapping)


def render_chat(
    messages: Messages, tokenizer: Any, *, images: bool = False
) -> tuple[str, list[Span]]:
    """Messages through the tokenizer's template, the opening of the answer behind them.

    Args:
        messages: ``[{"role": ..., "content": ...}, ...]``; a content is a str or a list of text
            parts ``{"type": "text", "text": ...}``.
        tokenizer: A transformers tokenizer or processor with a chat template.
        images: Whether there may be pictures among the parts.
    Returns: the rendered text and the span of each content of text in it.
    Raises:
        TypeError, ValueError: if a message is malformed or holds anything but text, or the
            tokenizer has no template, or the template refuses or rewrites the messages.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError(
            f"{type(tokenizer).__name__} has no chat template; set tokenizer.chat_template or "
            "pass the prompt as a str."
        )
    contents = contents_of(messages, images=images)
    if not any(contents) and not any(is_image(p) for each in messages for p in parts_of(each)):
        raise ValueError("prompt must not be empty: no message has any content.")
    rendered = _render(messages, tokenizer)
    return rendered, _content_spans(messages, contents, rendered, tokenizer)


def is_image(part: Any) -> bool:
    """Whether a part of a message's content is a picture, under any of the names that are used."""
    return isinstance(part, Mapping) and part.get("type") in ("image", "image_url")


def parts_of(message: Mapping[str, Any]) -> list[Any]:
    """The parts of a message's content; a str is one."""
    content = message["content"]
    return [content] if isinstance(content, str) else list(content)


def contents_of(messages: Messages, *, images: bool = False) -> list[str]:
    """The text of every message, part by part.

    Args:
        messages: As in ``render_chat``.
        images: Pass over pictures instead of refusing them.
    Raises: TypeError, ValueError: if a message is malformed or holds anything but text.
    """
    contents = []
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise ValueError(
                f"prompt[{index}] must have a 'role' and a 'content', got {message!r}."
            )
        content = message["content"]
        parts = [content] if isinstance(content, str) else content
        if not isinstance(parts, (list, tuple)):
            raise TypeError(f"prompt[{index}]['content'] must be a str, got {content!r}.")
        for part in parts:
            if images and is_image(part):
                continue
            text = part.get("text") if isinstance(part, Mapping) else part
            if not isinstance(text, str):
                raise ValueError(f"prompt[{index}] holds something that is not text: {part!r}.")
            contents.append(text)
    return contents


def message_numbers(messages: Messages) -> list[int]:
    """Of every text of ``contents_of``, which message it belongs to."""
    return [
        index
        for index, message in enumerate(messages)
        for part in parts_of(message)
        if not is_image(part)
    ]


def replaced(messages: Messages, texts: Iterator[str]) -> list[dict[str, Any]]:
    """The same messages with other contents, in order."""
    others = []
    for message in messages:
        content = message["content"]
        if isinstance(content, str):
            new: Any = next(texts)
        else:
            new = [_with_text(part, texts) for part in content]
        others.append({**message, "content": new})
    return others


def _with_text(part: Any, texts: Iterator[str]) -> Any:
    """A part of a content with the next text, or a picture as it is."""
    if is_image(part):
        return part
    return {**part, "text": next(texts)} if isinstance(part, Mapping) else next(texts)


def _render(messages: Messages, tokenizer: Any) -> str:
    from jinja2.exceptions import TemplateError

    try:
        return tokenizer.apply_chat_template(
            [dict(message) for message in messages], tokenize=False, add_generation_prompt=True
        )
    except TemplateError as error:
        raise ValueError(f"the chat template refuses these messages: {error}") from error


def _content_spans(
    messages: Messages, contents: list[str], rendered: str, tokenizer: Any
) -> list[Span]:
    """Where each content stands in the rendered text.

    The template is rendered once more with marks for contents; between the marks stands what the
    template writes, so that a content which equals a role's name is not taken for it.
    """
    marks = [f"\ue000{index}\ue001" for index in range(len(contents))]
    frame = _render(replaced(messages, iter(marks)), tokenizer)
    spans: list[Span] = []
    position, rest = 0, frame
    for mark, content in zip(marks, contents, strict=True):
        written, found, rest = rest.partition(mark)
        following = rest.partition("\ue000")[0]
        start = position + len(written)
        fits = found and rendered.startswith(written, position)
        for candidate in (content, content.strip(), content.rstrip(), content.lstrip()):
            if fits and rendered.startswith(candidate + following, start):
                position = start + len(candidate)
                spans.append((start, position))
                break
        else:
            return find_contents(contents, rendered)
    return spans


def find_contents(contents: list[str], rendered: str) -> list[Span]:
    """Where each content stands, for templates that write different things around each."""
    spans: list[Span] = []
    position = 0
    for index, content in enumerate(contents):
        content = content.strip()
        start = rendered.find(content, position)
        if start < 0:
            raise ValueError(
                f"the chat template changes the content of message {index}, so its place is "
                "unknown; pass the rendered text as a str prompt."
            )
        position = start + len(content)
        spans.append((start, position))
    return spans
