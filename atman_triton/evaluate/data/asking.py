"""What a model makes of an example before anything is explained: its length, and its answer."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import torch

from ...answers import end_tokens
from ...capabilities import context_window, device_of, keeps_logits, vocabulary_size
from ...chat import Span
from ...engine import undisturbed
from ...inputs import continued, moved
from ...stacks import UnsupportedModelError
from ...tasks import task_of
from ...tasks.decoder import DecoderTask
from ...tokens import Tokens, border, encode_target

TOO_LONG = "longer than the model's context window"

_LOOKED_BEHIND = 3  # tokens, to see whether an answer goes on
_GOES_ON = re.compile(r"\w|[.,:/'’-]\w")  # within a word or a number


class Said(NamedTuple):
    """What a model thinks of an answer.

    Args:
        chance: Probability of the whole answer.
        right: Whether the model, which always takes the likeliest token, writes this answer and
            then ends, or goes on with something that is not the rest of a word or number.
    """

    chance: float
    right: bool


class Asking:
    """A model that is asked for answers, as ``Explainer`` and ``Baseline`` read them.

    Args:
        model: A transformers decoder alone, with pictures in its prompts or without.
        processor: Its tokenizer or processor.
    Raises: UnsupportedModelError: if it is of another kind.
    """

    def __init__(self, model: Any, processor: Any) -> None:
        task = task_of(model, processor)
        if type(task) is not DecoderTask:
            raise UnsupportedModelError(
                f"examples are made for decoders alone, got {type(model).__name__}."
            )
        self.task: DecoderTask = task
        self.model = model
        self._family = str(getattr(model.config, "model_type", ""))
        self._ends = end_tokens(task.tokenizer, model.generation_config, {})

    def tokens(self, prompt: Any) -> Tokens:
        """A prompt as the model reads it."""
        return self.task.read(prompt).words

    def fits(self, prompt: Any, target: str, words: Tokens | None = None) -> bool:
        """Whether prompt and target fit into the model's context window.

        Args:
            prompt: As ``Explainer.explain`` takes it.
            target: The answer.
            words: The prompt's ``tokens``, if they are known.
        """
        limit, tokenizer = context_window(self.model), self.task.tokenizer
        words = self.tokens(prompt) if words is None else words
        between = border(prompt, words, target)
        answer = encode_target(target, words, tokenizer, vocabulary_size(self.model), between)
        return limit is None or len(words) + len(answer) - 1 <= limit

    @torch.inference_mode()
    def said(self, prompt: Any, target: str) -> Said:
        """How the model would answer a prompt.

        Args:
            prompt: As ``Explainer.explain`` takes it.
            target: The answer that is expected.
        """
        read = self.task.read(prompt)
        answers = self.task.given(read, [target], None, alone=True, target_span=None)
        answer = answers.tokens[0].ids
        logprobs = self._logprobs(read.inputs, answer, len(answer) + 1)  # [T + 1, vocabulary]
        wanted = torch.tensor(answer, device=logprobs.device)
        chance = float(logprobs[:-1].gather(-1, wanted[:, None]).sum().exp())
        greedy = logprobs.argmax(-1).tolist()
        right = greedy[:-1] == answer and self._ends_there(read.inputs, answer, greedy[-1])
        return Said(chance, right)

    def _ends_there(self, inputs: dict[str, Any], answer: list[int], following: int) -> bool:
        """Whether what the model writes behind an answer is not the rest of a word or number."""
        behind: list[int] = []
        while following not in self._ends and len(behind) < _LOOKED_BEHIND:
            behind.append(following)
            following = int(self._logprobs(inputs, answer + behind, 1).argmax())
        decode = self.task.tokenizer.decode
        whole, alone = decode(answer + behind), decode(answer)
        return not _GOES_ON.match(whole[len(alone) :])

    def _logprobs(self, inputs: dict[str, Any], behind: list[int], count: int) -> torch.Tensor:
        """``[count, vocabulary]`` of the last tokens, in float32."""
        longer = moved(continued(inputs, behind, self._family), device_of(self.model))
        keep = {"logits_to_keep": count} if keeps_logits(self.model) else {}
        with undisturbed(self.model), self.task.encoded.on(self.model):
            logits = self.model(**longer, use_cache=False, **keep).logits
        return logits[0, -count:].float().log_softmax(-1)


def lengths(text: str, region: Span, label: Span, words: Tokens | None) -> dict[str, int]:
    """How long the context and the label of a text are: facts for statistics.

    Args:
        text: The prompt.
        region: Its context, in characters.
        label: Where the answer stands.
        words: The prompt's tokens; None if no model was given, and then none are counted.
    """
    found = {
        "context_words": len(text[slice(*region)].split()),
        "label_words": len(text[slice(*label)].split()),
    }
    if words is not None:
        found["context_tokens"] = within(words, region)
        found["label_tokens"] = within(words, label)
    return found


def within(words: Tokens, span: Span) -> int:
    """How many tokens overlap a passage with more than whitespace."""
    start, stop = span
    return sum(
        bool(words.text[max(own[0], start) : min(own[1], stop)].strip())
        for own in words.spans
        if own is not None
    )
