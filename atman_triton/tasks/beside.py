"""Decoders that attend to pictures beside their prompt: Mllama."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import multimodal
from ..answers import Answers
from ..chat import Span
from ..engine import Engine
from ..perturbations import Settings
from ..raw_scores import share_of_negative
from ..reduction import Quantity
from ..seq2seq import crossed_picture
from ..seq2seq.encoder_decoder import encoder_decoder
from ..seq2seq.engine import Seq2SeqEngine
from ..sites import find_sites, sources
from ..tokens import Tokens
from ..units import Layout
from .base import Prompt
from .decoder import DecoderTask


class BesideTask(DecoderTask):
    """A decoder whose cross-attention reads the pictures; a prompt of text alone is any decoder's.

    Of a prompt with pictures, their tokens come first, then those of the text.
    """

    @classmethod
    def serves(cls, model: Any) -> bool:
        """Whether it is an Mllama with pictures."""
        return getattr(getattr(model, "config", None), "model_type", None) in crossed_picture.KINDS

    @property
    def layers(self) -> Sequence[int]:
        """Those that attend to the text, and those that attend to pictures."""
        return sorted({layer for site in find_sites(self.model) for layer in site.layers})

    def read(self, raw: Any) -> Prompt:
        """As any decoder's, but where there are pictures."""
        if multimodal.has_pictures(raw):
            read = multimodal.read_pictures(raw, self.model, self.processor, beside=True)
            return Prompt(raw, *read)
        return super().read(raw)

    def given(
        self,
        prompt: Prompt,
        targets: Sequence[Any],
        separator: str | None,
        *,
        alone: bool,
        target_span: str | Span | None,
    ) -> Answers:
        """Behind the text."""
        return super().given(
            _text(prompt), targets, separator, alone=alone, target_span=target_span
        )

    def generated(
        self,
        prompt: Prompt,
        max_new_tokens: int | None,
        generation_kwargs: dict[str, Any],
        target_span: str | Span | None,
    ) -> Answers:
        """Behind the text."""
        return super().generated(_text(prompt), max_new_tokens, generation_kwargs, target_span)

    def measures(
        self,
        prompt: Prompt,
        answers: Answers,
        layout: Layout,
        settings: Settings,
        quantity: Quantity,
        expect: Callable[[int], None],
        advance: Callable[[int], None],
    ) -> Engine | Seq2SeqEngine:
        """Perturbations of what the text attends to; the vision tower runs once."""
        if not prompt.pictures:
            return super().measures(prompt, answers, layout, settings, quantity, expect, advance)
        inputs = _across(prompt, layout.prompt_ids[_shown(prompt) :])
        return Seq2SeqEngine(self.model, inputs, layout.target_ids, settings, expect, advance)

    def by_source(self, prompt: Prompt, factors: Tensor) -> Mapping[str, Tensor]:
        """Those of the pictures, and of the text."""
        if not prompt.pictures:
            return super().by_source(prompt, factors)
        shown = _shown(prompt)
        return {"image": factors[:, :shown], "decoder": factors[:, shown:]}

    def embeddings(self, prompt: Prompt) -> Tensor:
        """What the text attends to, and its own embeddings; neither is like the other."""
        if not prompt.pictures:
            return super().embeddings(prompt)
        given = _across(prompt, prompt.words.ids[_shown(prompt) :])
        with torch.no_grad():
            parts = encoder_decoder(self.model, multimodal.moved(given, self.model))
            return parts.embeddings([parts.stages[0].encode(1, None)[0]], [])

    def negative_share(self, prompt: Prompt, layout: Layout, settings: Settings) -> float | None:
        """Of the prompt and the first target, read by themselves and across."""
        if not prompt.pictures:
            return super().negative_share(prompt, layout, settings)
        ids = layout.prompt_ids + layout.target_ids[0][:-1]
        given = multimodal.moved(self._continued(prompt, ids[len(prompt.words) :]), self.model)
        return share_of_negative(
            self.model,
            lambda: self.model(**given, use_cache=False, logits_to_keep=1),
            sources(self.model),
            settings.layers,
            settings.heads,
            settings.backend,
        )


def _across(prompt: Prompt, ids: Sequence[int]) -> dict[str, Any]:
    """What the engine takes: the pictures, and a text."""
    names = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask", "cross_attention_mask")
    given = {name: prompt.inputs[name] for name in names}
    return given | {"decoder_input_ids": torch.tensor([list(ids)])}


def _shown(prompt: Prompt) -> int:
    """How many tokens of pictures stand in front of the text."""
    return sum(area is not None for area in prompt.words.areas)


def _text(prompt: Prompt) -> Prompt:
    """The same without the tokens of its pictures, which no decoder reads among its own."""
    words, count = prompt.words, _shown(prompt)
    text = Tokens(
        words.ids[count:],
        words.text,
        words.spans[count:],
        words.names[count:],
        words.reasons[count:],
        words.contents,
    )
    return replace(prompt, words=text)
