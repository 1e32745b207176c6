"""Documents in a prompt, as retrieval gives them: where each one stands.

Legend: positions and spans are characters of the prompt as the model reads it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .chat import contents_of, is_chat, replaced
from .pieces import Document
from .tokens import Tokens

PLACEHOLDER = "{documents}"
"""Where the documents are put in a prompt."""

BETWEEN = "\n\n"
"""What is put between two of them."""

_ANOTHER = f"write {PLACEHOLDER} in the prompt where they are to stand"


@dataclass(frozen=True)
class Given:
    """A document as the user gives it.

    Args:
        id: Its name.
        text: What it says.
    """

    id: str
    text: str


@dataclass(frozen=True)
class Filled:
    """A prompt with documents where the placeholder was.

    Args:
        prompt: As in ``encode_prompt``.
        part: Of chat messages, in which part of the contents they stand; of a str 0; None where
            there was no placeholder.
        text: That part's text.
        offset: Character of ``text`` where the first document starts.
    """

    prompt: Any
    part: int | None = None
    text: str = ""
    offset: int = 0


def checked_documents(documents: Any) -> list[Given]:
    """Documents with their names; none if None.

    Raises:
        TypeError: if one is neither a str nor a mapping with a text.
        ValueError: if there is none, one is blank, or two have the same name.
    """
    if documents is None:
        return []
    if isinstance(documents, (str, bytes, Mapping)) or not isinstance(documents, Iterable):
        raise TypeError(
            f"documents must be a list of str or of {{'id': ..., 'text': ...}}, got {documents!r}."
        )
    found = [_document(index, document) for index, document in enumerate(documents)]
    if not found:
        raise ValueError("documents must hold at least one document, or be None.")
    names = [document.id for document in found]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"documents must have different ids, but {name!r} comes twice.")
    return found


def _document(index: int, given: Any) -> Given:
    where = f"documents[{index}]"
    name, text = str(index), given
    if isinstance(given, Mapping):
        unknown = sorted(map(str, given.keys() - {"id", "text"}))
        if unknown or "text" not in given:
            raise ValueError(
                f"{where} must hold 'text' and may hold 'id', got {sorted(map(str, given))}."
            )
        name, text = given.get("id", name), given["text"]
    if isinstance(name, int) and not isinstance(name, bool):
        name = str(name)
    if not isinstance(name, str):
        raise TypeError(f"{where}['id'] must be a str, got {name!r}.")
    if not isinstance(text, str):
        raise TypeError(f"{where} must be a str or a mapping, got {type(text).__name__}.")
    if not text.strip():
        raise ValueError(f"{where} must not be blank, got {text!r}.")
    return Given(name, text)


def filled(prompt: Any, documents: Sequence[Given]) -> Filled:
    """The prompt with the documents in place of its placeholder, if it has one.

    Args:
        prompt: As in ``encode_prompt``, or pictures and texts; a str, a text among pictures or the
            contents of chat messages may hold ``{documents}``.
        documents: What to put there; without any, the prompt stays as it is.
    Raises: ValueError: if there is more than one placeholder.
    """
    if not documents or not isinstance(prompt, (str, list, tuple)):
        return Filled(prompt)
    if isinstance(prompt, str):
        texts = [prompt]
    elif is_chat(prompt):
        texts = contents_of(prompt, images=True)
    else:
        texts = [item for item in prompt if isinstance(item, str)]
    places = sum(text.count(PLACEHOLDER) for text in texts)
    if places > 1:
        raise ValueError(f"prompt must hold {PLACEHOLDER} once, got {places} times.")
    if not places:
        return Filled(prompt)
    part = next(index for index, text in enumerate(texts) if PLACEHOLDER in text)
    offset = texts[part].index(PLACEHOLDER)
    body = BETWEEN.join(document.text for document in documents)
    texts[part] = texts[part].replace(PLACEHOLDER, body)
    if isinstance(prompt, str):
        return Filled(texts[0], part, texts[part], offset)
    if is_chat(prompt):
        return Filled(replaced(prompt, iter(texts)), part, texts[part], offset)
    several = iter(texts)  # the processor may write between them, so the documents are searched
    return Filled([next(several) if isinstance(item, str) else item for item in prompt])


def located(documents: Sequence[Given], filled: Filled, words: Tokens) -> list[Document]:
    """Where the documents stand in a prompt.

    Args:
        documents: As given, in the order in which they stand there.
        filled: The prompt.
        words: The same, encoded.
    Raises: ValueError: if one does not stand there as it is, or might stand in two places.
    """
    first = _first(filled, words)
    if first is None:
        return _searched(documents, words.text)
    found = []
    for document in documents:
        # A chat template may strip whitespace from the end of a message.
        shown = next(
            (
                text
                for text in (document.text, document.text.rstrip())
                if words.text.startswith(text, first)
            ),
            None,
        )
        if shown is None:
            raise ValueError(
                f"document {document.id!r} does not stand in the prompt as it is: the chat "
                "template or the tokenizer changes it; strip whitespace from its ends, or pass "
                "the rendered text as a str prompt."
            )
        found.append(Document(document.id, first, first + len(shown)))
        first += len(document.text) + len(BETWEEN)
    return found


def _first(filled: Filled, words: Tokens) -> int | None:
    """Where the first document starts; None if that must be searched."""
    if filled.part is None:
        return None
    if isinstance(filled.prompt, str):
        return filled.offset if words.text == filled.text else None
    start, stop, _ = words.contents[filled.part]
    stripped = filled.text.find(words.text[start:stop])  # so much is missing at its start
    if stripped < 0 or stripped > filled.offset:
        return None
    return start + filled.offset - stripped


def _searched(documents: Sequence[Given], text: str) -> list[Document]:
    """Each one behind the one before, where there is only one way to find them all."""
    found, place = [], 0
    for document in documents:
        start = text.find(document.text, place)
        if start < 0:
            where = "" if document.text not in text else " behind the one before it"
            raise ValueError(
                f"document {document.id!r} does not occur in the prompt{where}; each must stand "
                f"there character by character, in the order given, or {_ANOTHER}."
            )
        place = start + len(document.text)
        found.append(Document(document.id, start, place))
    place = len(text)
    for document, placed in zip(reversed(documents), reversed(found), strict=True):
        start = text.rfind(document.text, 0, place)
        if start != placed.start:
            raise ValueError(
                f"document {document.id!r} occurs more than once in the prompt, so its place is "
                f"unclear; {_ANOTHER}."
            )
        place = start
    return found
