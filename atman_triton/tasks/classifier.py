"""Classifiers of texts, tokens and pictures: a prompt, and classes of which one is asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..answers import Answers
from ..chat import Span
from ..classes import Problem, Readout, class_of, kind_of, label_of, problem_of
from ..classifier_engine import ClassifierEngine, arguments_of
from ..classifier_input import read_picture, read_text
from ..perturbations import Settings
from ..placing import owners, passage
from ..raw_scores import share_of_negative
from ..reduction import Quantity
from ..sites import own_source
from ..stacks import UnsupportedModelError, find_stack
from ..tokens import Tokens
from ..units import Layout
from .base import Prompt, Task


class ClassifierTask(Task):
    """A head over an encoder (or a decoder) that gives classes numbers.

    A prompt is a text, a pair of texts, token ids or an encoding; of an image classifier, a
    picture. Targets are class names or indices. Attention of the head's own, such as that which
    pools in SigLIP's ``pooler_output``, is not manipulated; image classifiers of transformers do
    not read it.
    """

    classifies = True

    def __init__(self, model: Any, processor: Any) -> None:
        super().__init__(model, processor)
        name = type(getattr(model, "_orig_mod", model)).__name__
        if getattr(model.config, "is_encoder_decoder", False):
            raise UnsupportedModelError(
                f"model must be a classifier over one encoder or decoder, but {name} has both."
            )
        self._kind = kind_of(model)
        wanted = "pixel_values" if self._kind == "image" else "input_ids"
        if (read := getattr(model, "main_input_name", wanted)) != wanted:
            raise UnsupportedModelError(
                f"model must classify texts or pictures, but {name} reads {read}."
            )
        if self._kind == "image":
            self.tokenizer = None
        self.problem: Problem = "single_label" if self._is_token else problem_of(model.config)
        regression = self.problem == "regression"
        self.quantities = ("output",) if regression else ("logprob", "logit")
        self._stack = find_stack(model)[1]

    @classmethod
    def serves(cls, model: Any) -> bool:
        """Whether it is a classifier."""
        return kind_of(model) is not None

    @property
    def layers(self) -> Sequence[int]:
        """Those with attention."""
        return self._stack.layers

    @property
    def heads(self) -> int:
        """Query heads of a layer."""
        return self._stack.heads

    @property
    def is_text(self) -> bool:
        """Pictures have no characters, which then are not ids either."""
        return self._kind == "image" or super().is_text

    @property
    def _is_token(self) -> bool:
        return self._kind == "token"

    def read(self, raw: Any) -> Prompt:
        """As ``read_text`` and ``read_picture`` do."""
        if self._kind == "image":
            return Prompt(raw, *read_picture(raw, self.processor, self.model))
        return Prompt(raw, *read_text(raw, self.tokenizer, self.model))

    def given(
        self,
        prompt: Prompt,
        targets: Sequence[Any],
        separator: str | None,
        *,
        alone: bool,
        target_span: str | Span | None,
    ) -> Answers:
        """Classes by name or index.

        Args:
            prompt: What is classified.
            targets: Of each, its name as in ``config.id2label``, or its index.
            separator: What stands between the text and a class; None is one space.
            alone: Whether it is one target, which errors then call so.
            target_span: Of token classification, the passage of the prompt whose tokens are scored.
        """
        names = ["target"] if alone else [f"targets[{k}]" for k in range(len(targets))]
        pairs = zip(names, targets, strict=True)
        classes = [class_of(name, target, self.model.config) for name, target in pairs]
        return self._answers(prompt, classes, "given", separator, target_span)

    def generated(
        self,
        prompt: Prompt,
        max_new_tokens: int | None,
        generation_kwargs: dict[str, Any],
        target_span: str | Span | None,
    ) -> Answers:
        """The class that the model predicts; of several scored tokens, the likeliest for all.

        Raises: ValueError: if it is a regression with several outputs.
        """
        names = [*(["max_new_tokens"] if max_new_tokens is not None else []), *generation_kwargs]
        if names:
            raise TypeError(f"{', '.join(names)} would go to model.generate, but it classifies.")
        if self.problem == "regression" and self.model.config.num_labels > 1:
            raise ValueError(
                f"target must name one of the {self.model.config.num_labels} outputs of this "
                "regression, by its name or index."
            )
        places = self._places(prompt, target_span)
        logits = self._logits(prompt)  # [C], or [T, C]
        if places is not None:
            logits = logits[places].sum(0)  # a normaliser is the same for all classes
        return self._answers(prompt, [int(logits.argmax())], "predicted", None, target_span)

    def measures(
        self,
        prompt: Prompt,
        answers: Answers,
        layout: Layout,
        settings: Settings,
        quantity: Quantity,
        expect: Callable[[int], None],
        advance: Callable[[int], None],
    ) -> ClassifierEngine:
        """Perturbations in full batches."""
        places = answers.facts.get("target_tokens")
        readout = Readout(
            tuple(tokens.ids[0] for tokens in answers.tokens),
            self.problem,
            quantity,
            None if places is None else tuple(places),
        )
        return ClassifierEngine(
            self.model, prompt.inputs, len(prompt.words), readout, settings, expect, advance
        )

    def negative_share(self, prompt: Prompt, layout: Layout, settings: Settings) -> float:
        """Of one plain pass."""

        def run() -> None:
            self._logits(prompt)

        how = (settings.layers, settings.heads, settings.backend)
        return share_of_negative(self.model, run, [own_source(self.model)], *how)

    def _logits(self, prompt: Prompt) -> Tensor:
        """Of one plain pass: ``[C]``, or ``[T, C]``."""
        logits = self.model(**arguments_of(self.model, prompt.inputs)).logits[0]
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def _answers(
        self,
        prompt: Prompt,
        classes: Sequence[int],
        origin: str,
        separator: str | None,
        target_span: str | Span | None,
    ) -> Answers:
        words, places = prompt.words, self._places(prompt, target_span)
        if separator is None:
            separator = " " if words.text and not words.text[-1].isspace() else ""
        facts: dict[str, Any] = {
            "target": origin,
            "classes": [label_of(self.model.config, index) for index in classes],
            "problem": self.problem,
            "separator": separator,
        }
        if places is not None:
            facts["target_tokens"] = places
        return Answers(
            [self._answer(index, separator, words, places) for index in classes], facts=facts
        )

    def _answer(
        self, index: int, separator: str, words: Tokens, places: Sequence[int] | None
    ) -> Tokens:
        """A class, as many times as tokens are scored."""
        label = label_of(self.model.config, index)
        names = [label]
        if places is not None and len(places) > 1:
            names = [f"{label} ({words.names[place].strip()})" for place in places]
        span = (len(separator), len(separator) + len(label))
        return Tokens(
            ids=[index] * len(names),
            text=separator + label,
            spans=[span] * len(names),
            names=names,
            reasons=[None] * len(names),
            read=False,
        )

    def _places(self, prompt: Prompt, target_span: str | Span | None) -> list[int] | None:
        """Tokens whose class is scored; None where there is one answer for the whole input.

        Raises:
            TypeError: if a passage is given for no use.
            ValueError: if one is needed, or holds no token.
        """
        if not self._is_token:
            if target_span is None:
                return None
            raise TypeError(
                "target_span is for models that classify every token, but this one classifies the "
                "whole prompt; leave it out."
            )
        name = type(getattr(self.model, "_orig_mod", self.model)).__name__
        if target_span is None:
            raise ValueError(
                f"target_span must say which tokens' class is scored, because {name} classifies "
                "every token: a passage of the prompt that occurs once, or (start, stop)."
            )
        if not super().is_text:
            raise ValueError(
                "target_span needs text, but without a tokenizer the prompt is token ids; pass the "
                "tokenizer."
            )
        words = prompt.words
        place = passage("target_span", target_span, words.text, None, "the prompt")
        inside = owners(words.text, words.spans, [place])
        found = [
            index
            for index, (owner, why) in enumerate(zip(inside, words.reasons, strict=True))
            if owner is not None and why is None
        ]
        if not found:
            raise ValueError(f"target_span {target_span!r} holds no token of the prompt.")
        return found
