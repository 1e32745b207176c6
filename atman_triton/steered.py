"""A plain and a steered continuation of one prompt, and the probabilities where they part."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .controls import Control
from .engine import undisturbed
from .multimodal import moved
from .steer import steer
from .tasks import Prompt, Task
from .tokens import Tokens, tokens_of_ids


@dataclass(frozen=True)
class NextToken:
    """A candidate for the token where two continuations part, with its probability in both."""

    id: int
    text: str
    plain: float
    steered: float


@dataclass(frozen=True)
class Steered:
    """What ``compare`` finds.

    Args:
        plain: The continuation without controls.
        steered: That under them.
        behind: What both begin with, where they part; empty where they are the same.
        next_tokens: The most probable tokens of both behind that, the most probable under controls
            first.
        factors: Of every token of the prompt.
    """

    plain: str
    steered: str
    behind: str
    next_tokens: list[NextToken]
    factors: list[float]


def compare(
    task: Task,
    prompt: Prompt,
    controls: Sequence[Control],
    *,
    generation: dict[str, Any],
    seed: int | None = None,
    top_k: int = 5,
    **settings: Any,
) -> Steered:
    """Continue a prompt with and without controls (paper, Fig. 4).

    Args:
        task: Of a causal language model.
        prompt: As the task reads it.
        controls: What acts on it.
        generation: For ``model.generate``, both times the same.
        seed: Of sampling, both times the same; None leaves torch's generator alone.
        top_k: How many next tokens of each case to list.
        **settings: ``mode``, ``layers``, ``heads`` and ``backend`` of ``steer``.
    """
    model, tokenizer, words = task.model, task.tokenizer, prompt.words
    asked = moved(prompt.inputs, model)
    asked.setdefault("attention_mask", torch.ones_like(asked["input_ids"]))
    asked |= {"output_logits": True, "return_dict_in_generate": True}
    read: dict[str, Any] = {"inputs": words}
    if prompt.pictures:
        read = {"inputs": prompt.raw, "processor": task.processor}
    outputs, factors = [], torch.ones(1, len(words))
    with undisturbed(model):
        for steering in (False, True):
            if seed is not None:
                torch.manual_seed(seed)
            context: Any = steer(model, controls, **read, **settings)
            with context if steering else nullcontext(factors) as factors:
                outputs.append(model.generate(**asked, **generation))
    plain, steered = (output.sequences[0, len(words) :].tolist() for output in outputs)
    same = next(
        (place for place, (a, b) in enumerate(zip(plain, steered, strict=False)) if a != b), 0
    )
    rows = [output.logits[same][0].float().softmax(-1) for output in outputs]
    return Steered(
        _continuation(plain, words, tokenizer),
        _continuation(steered, words, tokenizer),
        _continuation(plain[:same], words, tokenizer),
        _next_tokens(rows[0], rows[1], words, tokenizer, top_k),
        factors[0].tolist(),
    )


def _continuation(ids: list[int], words: Tokens, tokenizer: Any) -> str:
    """Generated tokens as text, without the end-of-text token."""
    special = set(tokenizer.all_special_ids)
    while ids and ids[-1] in special:
        ids = ids[:-1]
    return tokens_of_ids(ids, tokenizer, after=words).text if ids else ""


def _next_tokens(
    plain: Tensor, steered: Tensor, words: Tokens, tokenizer: Any, top_k: int
) -> list[NextToken]:
    """The most probable tokens of two distributions ``[V]``."""
    count = min(top_k, len(plain))
    ids = {int(token) for row in (plain, steered) for token in row.topk(count).indices}
    order = sorted(ids, key=lambda token: (-float(steered[token]), -float(plain[token]), token))
    return [
        NextToken(
            token,
            tokens_of_ids([token], tokenizer, after=words).names[0],
            float(plain[token]),
            float(steered[token]),
        )
        for token in order
    ]
