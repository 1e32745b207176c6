"""Causal language models, with pictures or without: a prompt, and answers that continue it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import multimodal
from ..answers import Answers, generated_answer, given_answers
from ..capabilities import check_causal, vocabulary_size
from ..chat import Span
from ..encoded_once import EncodedOnce
from ..engine import Engine
from ..inputs import continued
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
        self.encoded = EncodedOnce()
        """Of the pictures of the prompt that was read last."""

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
        """As ``encode_prompt`` does, or ``read_pictures`` where there may be any."""
        self.encoded = EncodedOnce()
        if multimodal.is_for_processor(raw, self.processor):
            return Prompt(raw, *multimodal.read_pictures(raw, self.model, self.processor))
        if isinstance(raw, str):
            multimodal.refuse_placeholders([raw], self.model, self.processor)
        words = encode_prompt(raw, self.tokenizer, vocabulary_size(self.model))
        multimodal.refuse_image_ids(words.ids, self.model)
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
        with self.encoded.on(self.model):
            return generated_answer(
                self.model,
                self.tokenizer,
                prompt.words,
                max_new_tokens,
                generation_kwargs,
                target_span,
                inputs=prompt.inputs,
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
        inputs = self._continued(prompt, layout.prompt_ids[len(prompt.words) :])
        with self.encoded.on(self.model):
            return Engine(self.model, inputs, layout.target_ids, settings, expect, advance)

    def embeddings(self, prompt: Prompt) -> Tensor:
        """Pictures as the vision tower encodes them, text as the model embeds it."""
        if not prompt.pictures:
            return super().embeddings(prompt)
        with self.encoded.on(self.model):
            return multimodal.embeddings(self.model, prompt.inputs)

    def negative_share(self, prompt: Prompt, layout: Layout, settings: Settings) -> float | None:
        """Of the prompt and the first target."""
        ids = layout.prompt_ids + layout.target_ids[0][:-1]
        inputs = self._continued(prompt, ids[len(prompt.words) :])
        with self.encoded.on(self.model):
            return negative_share(
                self.model, inputs, settings.layers, settings.heads, settings.backend
            )

    def _continued(self, prompt: Prompt, ids: Sequence[int]) -> dict[str, Any]:
        """What the model's forward takes for a prompt with text behind it."""
        return continued(prompt.inputs, ids, str(getattr(self.model.config, "model_type", "")))
