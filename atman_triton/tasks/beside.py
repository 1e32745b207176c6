"""Decoders that attend to pictures beside their prompt: Mllama."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from .. import multimodal
from ..answers import Answers
from ..beside_engine import BesideEngine
from ..chat import Span
from ..perturbations import Settings
from ..reduction import Quantity
from ..sites import find_sites
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
        return getattr(getattr(model, "config", None), "model_type", None) == "mllama"

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
    ) -> Any:
        """Perturbations of the whole text, and of the pictures that it attends to."""
        if not prompt.pictures:
            return super().measures(prompt, answers, layout, settings, quantity, expect, advance)
        inputs = self._continued(prompt, layout.prompt_ids[len(prompt.words) :])
        images = _shown(prompt)
        return BesideEngine(
            self.model, inputs, images, layout.target_ids, settings, expect, advance
        )

    def by_source(self, prompt: Prompt, factors: Tensor) -> Mapping[str, Tensor]:
        """Those of the pictures, and of the text."""
        if not prompt.pictures:
            return super().by_source(prompt, factors)
        shown = _shown(prompt)
        return {"image": factors[:, :shown], "decoder": factors[:, shown:]}

    def embeddings(self, prompt: Prompt) -> Tensor:
        """Refused with pictures, which have no place among the embeddings."""
        if prompt.pictures:
            raise ValueError(
                "similarity is of input embeddings, but this model attends to pictures beside its "
                "prompt; leave similarity out."
            )
        return super().embeddings(prompt)

    def negative_share(self, prompt: Prompt, layout: Layout, settings: Settings) -> float | None:
        """Not known with pictures."""
        return None if prompt.pictures else super().negative_share(prompt, layout, settings)


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
