"""Causal language models: a prompt, and answers that continue it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..answers import Answers, generated_answer, given_answers
from ..capabilities import check_causal, vocabulary_size
from ..chat import Span
from ..engine import Engine
from ..perturbations import Settings
from ..raw_scores import negative_share
from ..reduction import Quantity
from ..stacks import find_stack
from ..tokens import encode_prompt
from ..units import Layout
from .base import Prompt, Task


class DecoderTask(Task):
    """A decoder alone, which reads the prompt and writes on."""

    def __init__(self, model: Any, processor: Any) -> None:
        check_causal(model)
        super().__init__(model, processor)
        self._stack = find_stack(model)[1]

    @classmethod
    def serves(cls, model: Any) -> bool:
        """Whether it is a causal language model."""
        can_generate: Any = getattr(model, "can_generate", None)
        return bool(can_generate and can_generate())

    @property
    def layers(self) -> Sequence[int]:
        """Those with attention."""
        return self._stack.layers

    @property
    def heads(self) -> int:
        """Query heads of a layer."""
        return self._stack.heads

    def read(self, raw: Any) -> Prompt:
        """As ``encode_prompt`` does."""
        words = encode_prompt(raw, self.tokenizer, vocabulary_size(self.model))
        return Prompt(raw, words, {"input_ids": torch.tensor([words.ids])})

    def given(
        self,
        prompt: Prompt,
        targets: Sequence[Any],
        separator: str | None,
        *,
        alone: bool,
        target_span: str | Span | None,
    ) -> Answers:
        """As ``given_answers`` does."""
        return given_answers(
            self.model,
            self.tokenizer,
            prompt.raw,
            prompt.words,
            targets,
            separator,
            alone=alone,
            target_span=target_span,
        )

    def generated(
        self,
        prompt: Prompt,
        max_new_tokens: int | None,
        generation_kwargs: dict[str, Any],
        target_span: str | Span | None,
    ) -> Answers:
        """As ``generated_answer`` does."""
        return generated_answer(
            self.model,
            self.tokenizer,
            prompt.words,
            max_new_tokens,
            generation_kwargs,
            target_span,
        )

    def measures(
        self,
        prompt: Prompt,
        answers: Answers,
        layout: Layout,
        settings: Settings,
        quantity: Quantity,
        expect: Callable[[int], None],
        advance: Callable[[int], None],
    ) -> Engine:
        """Perturbations behind a shared prefix, where the model allows it."""
        inputs = {"input_ids": torch.tensor([layout.prompt_ids])}
        return Engine(self.model, inputs, layout.target_ids, settings, expect, advance)

    def negative_share(self, prompt: Prompt, layout: Layout, settings: Settings) -> float | None:
        """Of the prompt and the first target."""
        return negative_share(
            self.model,
            layout.prompt_ids + layout.target_ids[0][:-1],
            settings.layers,
            settings.heads,
            settings.backend,
        )
