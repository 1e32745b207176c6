"""Token ids that come one at a time, as text."""

from __future__ import annotations

from typing import Any

from .tokens import LONGEST_CHARACTER, Tokens, decode


class TokenReader:
    """Says what each new token adds to a text.

    Args:
        tokenizer: A transformers tokenizer; None gives ids with spaces between them.
        prompt: What stands in front.
    """

    def __init__(self, tokenizer: Any, prompt: Tokens) -> None:
        self._tokenizer = tokenizer
        # Some tokenizers need the tokens in front to decode rightly; the latest few will do.
        self._context = list(prompt.ids)
        self._finished: list[int] = []
        self._waiting: list[int] = []

    def read(self, token_id: int) -> str:
        """The characters that are finished with this token; empty where one is not yet."""
        if self._tokenizer is None:
            return f" {token_id}"
        self._waiting.append(token_id)
        known = len(decode(self._tokenizer, self._context))
        piece = decode(self._tokenizer, self._context + self._waiting)[known:]
        unfinished = not piece or piece.endswith("\ufffd")
        if unfinished and len(self._waiting) < LONGEST_CHARACTER:
            return ""
        self._context, self._finished = self._finished + self._waiting, self._waiting
        self._waiting = []
        return piece
