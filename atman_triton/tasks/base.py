"""What every kind of model must tell to be explained."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..answers import Answers
from ..chat import Span
from ..methods import Measures
from ..perturbations import Settings
from ..pictures import Picture, Sound
from ..reduction import Quantity
from ..sites import own_source
from ..tokens import Tokens
from ..units import Layout


@dataclass(frozen=True)
class Prompt:
    """A prompt as the model reads it.

    Args:
        raw: As it was given.
        words: Its tokens; image tokens have an area, those of a sound have seconds.
        inputs: What the model's forward takes for it, without any answer.
        pictures: Those that it holds, in order.
        sound: What it is, if it is one.
    """

    raw: Any
    words: Tokens
    inputs: dict[str, Any]
    pictures: list[Picture] = field(default_factory=list)
    sound: Sound | None = None


class Task(ABC):
    """How one kind of model is read, asked and perturbed.

    Args:
        model: A transformers model.
        processor: Its tokenizer or processor, or None.
    Raises:
        TypeError: if it is no transformers model.
        UnsupportedModelError: if it cannot be explained.
    """

    quantities: tuple[Quantity, ...] = ("logprob",)
    """What ``score`` may ask for, the default first."""
    classifies: ClassVar[bool] = False
    """Whether targets are classes, by name or index, and ``target_span`` is one of the prompt."""

    attends: ClassVar[bool] = False
    """Whether there is a choice between an encoder's self-attention and cross-attention to it."""

    def __init__(self, model: Any, processor: Any) -> None:
        self.model = model
        self.processor = processor
        self.tokenizer = getattr(processor, "tokenizer", processor)

    @classmethod
    @abstractmethod
    def serves(cls, model: Any) -> bool:
        """Whether the model is of this kind."""

    @property
    @abstractmethod
    def layers(self) -> Sequence[int]:
        """Indices of layers that can be named."""

    @property
    @abstractmethod
    def heads(self) -> int:
        """How many query heads each has."""

    @property
    def is_text(self) -> bool:
        """Whether a prompt's characters are what was written, rather than a list of ids."""
        return self.tokenizer is not None

    @abstractmethod
    def read(self, raw: Any) -> Prompt:
        """A prompt as the model reads it.

        Raises: TypeError, ValueError: if it is none, naming what is wrong.
        """

    @abstractmethod
    def given(
        self,
        prompt: Prompt,
        targets: Sequence[Any],
        separator: str | None,
        *,
        alone: bool,
        target_span: str | Span | None,
    ) -> Answers:
        """The answers that the user gives; see ``answers.given_answers``."""

    @abstractmethod
    def generated(
        self,
        prompt: Prompt,
        max_new_tokens: int | None,
        generation_kwargs: dict[str, Any],
        target_span: str | Span | None,
    ) -> Answers:
        """What the model itself answers; see ``answers.generated_answer``."""

    @abstractmethod
    def measures(
        self,
        prompt: Prompt,
        answers: Answers,
        layout: Layout,
        settings: Settings,
        quantity: Quantity,
        expect: Callable[[int], None],
        advance: Callable[[int], None],
    ) -> Measures:
        """The engine that suppresses units, its base run done."""

    def by_source(self, prompt: Prompt, factors: Tensor) -> Mapping[str, Tensor]:
        """A prompt's factors ``[1, P]``, as ``manipulate`` takes them."""
        return {own_source(self.model): factors}

    def embeddings(self, prompt: Prompt) -> Tensor:
        """What the model reads of a prompt's tokens, ``[P, D]``: by default their own."""
        table: Any = self.model.get_input_embeddings()
        with torch.no_grad():
            return table(torch.tensor(prompt.words.ids, device=table.weight.device))

    def negative_share(self, prompt: Prompt, layout: Layout, settings: Settings) -> float | None:
        """Share of attention scores that are negative with nothing suppressed; None: not known."""
        return None

    def facts(self, settings: Settings, method: str) -> dict[str, Any]:
        """More of how the numbers came about, as JSON values."""
        return {}
