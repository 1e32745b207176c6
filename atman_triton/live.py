"""Live citations: every new token of a generation with the score of every unit of the prompt.

Legend: U units, T new tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from .answers import END_OF_TEXT, check_length, default_new_tokens, end_tokens
from .arguments import check_generation, check_one_of, plain
from .asked import Reading
from .capabilities import check_causal, device_of, why_not_prefix
from .engine import undisturbed
from .explain import Explainer
from .explanation import Explanation
from .granularity import (
    Granularity,
    ImageGranularity,
    Images,
    Tiles,
    checked_granularity,
    checked_image_granularity,
    described,
    tiles_of,
)
from .live_run import Ambient, LiveRun, Scored, check_options, unsupported
from .lockstep import Lockstep
from .methods import METHODS, Outcome
from .perturbations import Record, RunFailed
from .pieces import LeftOut, Unit
from .presets import PRESETS
from .provenance import provenance
from .reduction import Reduction
from .selection import checked_explain_only
from .tasks import Prompt
from .tasks.decoder import DecoderTask
from .token_reader import TokenReader
from .tokens import Span, tokens_of_ids
from .units import Layout, lay_out

# Tokens that are scored at a time. Tokens per second with 20 units, as a share of plain generation
# (`python -m bench.live` on 2 threads): 0.26 with 1, 0.49 with 8, not more with 12 and 16.
EVERY = {"cpu": 8}

OF_THE_ANSWER = "of the answer, of which live scores measure nothing"


@dataclass(frozen=True)
class LiveToken:
    """A new token and what supported it.

    Args:
        text: The characters that it adds to the text; empty where it ends amid a character (the
            token that completes it has them all) or ends the text.
        token_id: Its index in the vocabulary.
        logprob: Nats, of the model's own distribution: before temperature, penalties and the like.
        scores: ``[U]`` float32, nats: by how much each unit's direct effect raises ``logprob``;
            positive means that the unit supports the token.
    """

    text: str
    token_id: int
    logprob: float
    scores: Tensor


@dataclass(frozen=True)
class _How:
    """What an explanation of the tokens needs to know.

    Args:
        prompt: What is continued.
        granularity: How large a unit is.
        images: How large one of a picture is.
        only: What ``explain_only`` names; None is all of the prompt.
        generation: Keyword arguments of ``generate``.
        ends: Token ids that end a text.
        stops: Those of them at which ``generate`` stops.
    """

    prompt: Prompt
    granularity: Granularity
    images: ImageGranularity
    only: list[Any] | None
    generation: dict[str, Any]
    ends: set[int]
    stops: set[int]


class LiveExplanation(Iterator[LiveToken]):
    """Generates while it is iterated over; see :func:`generate_explained`.

    The model runs only while the next token is waited for. Between tokens it is in evaluation
    mode, and other threads (or this one) may use it. It is as it was before once the iteration has
    come to its end or failed, or was ended by ``close``, by leaving ``with`` or by dropping this
    object, as a ``for`` over the call does on ``break``.
    """

    def __init__(self, explainer: Explainer, layout: Layout, run: LiveRun, how: _How) -> None:
        self.units: list[Unit] = layout.units
        """``U`` units of the prompt, in text order."""
        self.tokens: list[LiveToken] = []
        """What came so far."""
        self._explainer = explainer
        self._words = how.prompt.words
        self._record = run.record
        self._how = how
        self._reader = TokenReader(explainer.tokenizer, self._words)
        self._rows: list[Tensor] = []  # [1 + U] log-probabilities of each token
        self._steps: Lockstep[Scored] = Lockstep(run)

    def __next__(self) -> LiveToken:
        """The next token.

        Raises:
            UnsupportedModelError: if the model has no direct effects, or its attention cannot be
                manipulated.
            torch.OutOfMemoryError: if a step does not fit in memory.
            RunFailed: if the model gives NaN.
        """
        token_id, logprobs = next(self._steps)
        self._rows.append(logprobs)
        text = "" if token_id in self._how.stops else self._reader.read(token_id)
        token = LiveToken(text, token_id, float(logprobs[0]), logprobs[0] - logprobs[1:])
        self.tokens.append(token)
        return token

    @property
    def text(self) -> str:
        """The answer so far, without the token that ends it."""
        ids = self._answer_ids()
        if not ids:
            return ""
        return tokens_of_ids(ids, self._explainer.tokenizer, after=self._words).text

    def explanation(self, reduction: Reduction = "mean") -> Explanation:
        """All that came so far as one explanation.

        It is what ``Explainer(method="direct")`` gives for these tokens as the target, of the units
        of the prompt: units of the answer itself are not measured.

        Args:
            reduction: As in ``Explainer.explain``.
        Raises: RunFailed: if there is no token yet, or only one that ends the text.
        """
        check_one_of("reduction", reduction, get_args(Reduction))
        explainer, how = self._explainer, self._how
        ids = self._answer_ids()
        if not ids:
            raise RunFailed("the model's answer is empty so far: nothing to explain.")
        answer = tokens_of_ids(ids, explainer.tokenizer, after=self._words)
        only = list(range(len(self.units))) if how.only is None else how.only
        layout = lay_out(
            self._words,
            [answer],
            how.granularity,
            only,
            is_text=explainer.tokenizer is not None,
            image_granularity=how.images,
            pictures=how.prompt.pictures,
        )
        rows = torch.stack(self._rows[: len(ids)])  # [T, 1 + U]
        rest = [token.token_id for token in self.tokens[len(ids) :]]
        left_out = [
            piece if piece.branch is None else replace(piece, reason=OF_THE_ANSWER)
            for piece in layout.left_out
        ]
        if rest:
            names = tokens_of_ids(rest, explainer.tokenizer, after=self._words).names
            left_out.append(LeftOut("".join(names), (), END_OF_TEXT))
        facts: dict[str, Any] = {
            "target": "generated",
            "generation": {name: plain(value) for name, value in how.generation.items()},
            "method_choice": "given",
            "live": True,
        }
        if explainer.settings.mode == "multiplicative":
            with undisturbed(explainer.model):
                facts["negative_scores"] = explainer.task.negative_share(
                    how.prompt, layout, explainer.settings
                )
        known = provenance(
            explainer, "direct", self._record, described(how.granularity), len(layout.prompt_ids)
        )
        return explainer._explanation(
            layout,
            Outcome([_direct(unit) for unit in layout.units], rows[:, 1:].contiguous()),
            rows[:, 0].contiguous(),
            Reading(reduction, PRESETS[explainer.preset].postprocessing, False, False),
            left_out,
            known | facts,
        )

    def close(self) -> None:
        """End the generation here; what came stays."""
        self._steps.close()

    def __enter__(self) -> LiveExplanation:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _answer_ids(self) -> list[int]:
        """The new tokens without those at the end that end the text."""
        ids = [token.token_id for token in self.tokens]
        while ids and ids[-1] in self._how.ends:
            ids.pop()
        return ids


def generate_explained(
    model: Any,
    inputs: Any,
    *,
    tokenizer: Any = None,
    units: Granularity | Tiles | Sequence[Span] | str = "token",
    image_granularity: ImageGranularity | str | None = None,
    explain_only: (
        str | Span | Images | Sequence[int] | Sequence[str | Span | Images] | None
    ) = None,
    method: str = "direct",
    preset: str = "default",
    factor: float | None = None,
    mode: str | None = None,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    batch_size: int | Literal["auto"] = "auto",
    every: int | Literal["auto"] = "auto",
    backend: str = "auto",
    max_new_tokens: int | None = None,
    streamer: Any = None,
    **generation_kwargs: Any,
) -> LiveExplanation:
    """Generate, and get each new token together with what every unit of the prompt did for it.

    ::

        for token in atman.generate_explained(model, prompt, tokenizer=tokenizer):
            print(token.text, token.scores)

    The text is that of ``model.generate`` with the same options: greedy, sampled, or whatever the
    model's generation config says. Nothing is run twice: beside the plain row there is one per
    unit with that unit suppressed, all of them fed the plain row's token. They read the prompt's
    keys and values in one place and keep their own of the new tokens only, so the scores are
    *direct* effects. (Sums are rounded otherwise in another batch or by another kernel: where the
    model gives two tokens the same probability to the last bits, the other one may win.)

    ``generate`` runs in a thread of its own, but only while the next token is waited for.
    Streamers, logits processors and stopping criteria are called there. What is around the call
    counts: ``manipulate``, autocast, the current CUDA stream.

    Args:
        model: A transformers causal language model.
        inputs: The prompt: str | chat messages | token ids | an encoding | pictures and text, as
            ``Explainer.explain`` takes it. Pictures are encoded once; text must follow the last.
        tokenizer: Its tokenizer, or its processor for pictures; None is enough for token ids.
        units: What one unit is, as ``granularity`` in ``Explainer.explain``.
        image_granularity: What one unit of a picture is, as in ``Explainer.explain``.
        explain_only: The part of the prompt to score, as in ``Explainer.explain``; None is all.
        method: ``direct``, the only one that needs no second pass over the prompt.
        preset, factor, mode, layers, heads, backend: As in ``Explainer``.
        batch_size: Units per forward pass. ``"auto"`` takes what memory holds: usually all.
        every: With 1, every step is one batch of the plain row and all units, which a GPU runs in
            about the time of the plain row. With more, the plain row goes ahead by itself, and the
            units follow with so many tokens at a time: tokens come in bursts, but a CPU, which
            multiplies few rows badly, takes less time. ``"auto"`` is 8 on a CPU, else 1.
        max_new_tokens: The most tokens. None is 32, or what the context window has room for, where
            ``generation_kwargs`` set no other end.
        streamer: A streamer of transformers that is to get the tokens too.
        **generation_kwargs: Passed on to ``model.generate``.
    Returns: an iterator of :class:`LiveToken`, which also has ``units``, ``text`` and
        ``explanation()``.
    Raises:
        TypeError: if an argument is not of the type above.
        ValueError: if the prompt is empty or too long, a name or index is unknown, or an option of
            ``generate`` leaves no one plain row: beams, several sequences, assisted decoding.
        UnsupportedModelError: if the model has no direct effects, or its attention cannot be
            manipulated; some models only tell when the first token is asked for.
    Source: AtMan, Eq. 3, measured at every step of a generation.
    """
    if method != "direct":
        check_one_of("method", method, METHODS)
        raise ValueError(
            f"method must be 'direct', got {method!r}: any other runs the prompt again for the "
            "finished text; generate first and give the text to Explainer.explain as target."
        )
    if mode == "min_shift_full":
        raise ValueError(
            "mode='min_shift_full' looks at future keys, so it has no direct effects; take "
            "mode='min_shift'."
        )
    check_causal(model)
    explainer = Explainer(
        model,
        tokenizer,
        preset=preset,
        factor=factor,
        mode=mode,
        method="direct",
        layers=layers,
        heads=heads,
        batch_size=batch_size,
        progress=False,
        backend=backend,
    )
    if explainer.settings.similarity is not None:
        raise ValueError(
            f"preset={preset!r} suppresses similar tokens of the answer too, which are not known "
            "before they are written; take preset='default'."
        )
    if (tiles := tiles_of(units)) is not None:
        if image_granularity is not None:
            raise TypeError(
                f"units={units!r} and image_granularity={image_granularity!r} both say how "
                "pictures are divided; give one."
            )
        units, image_granularity = "token", tiles
    granularity = checked_granularity(units, "units")
    images = checked_image_granularity(image_granularity)
    only = checked_explain_only(explain_only)
    check_generation(None, max_new_tokens, generation_kwargs)
    check_options(model, generation_kwargs)
    every = _checked_every(every, model)
    task = explainer.task
    assert isinstance(task, DecoderTask)  # check_causal has refused all others
    prompt = task.read(inputs)
    words, tokenizer = prompt.words, task.tokenizer
    if image_granularity is not None and not prompt.pictures:
        raise ValueError(
            f"image_granularity={described(images)!r} is of pictures, but the prompt holds none."
        )
    if words.areas and words.areas[-1] is not None:
        raise ValueError(
            "inputs must end with text, got a picture at the end; put some behind it, or generate "
            "first and give the text to Explainer.explain as target."
        )
    if prompt.inputs["input_ids"].shape[1] != len(words):
        raise unsupported(f"{type(model).__name__} attends to pictures beside its prompt")
    ended = any(generation_kwargs.get(name) for name in ("max_length", "generation_config"))
    if max_new_tokens is None and not ended:
        max_new_tokens = default_new_tokens(model, len(words))
    generation = dict(generation_kwargs)
    if max_new_tokens is not None:
        check_length(model, len(words), max_new_tokens, "max_new_tokens")
        generation["max_new_tokens"] = max_new_tokens
    reason = why_not_prefix(model, len(words) + (max_new_tokens or 1) - 1)
    if reason is not None:
        raise unsupported(reason)
    layout = lay_out(
        words,
        [],
        granularity,
        only,
        is_text=tokenizer is not None,
        image_granularity=images,
        pictures=prompt.pictures,
    )
    config = generation.get("generation_config") or model.generation_config
    ends = end_tokens(tokenizer, config, generation)
    quiet: dict[str, Any] = {}
    if config.pad_token_id is None and "pad_token_id" not in generation and ends:
        quiet["pad_token_id"] = min(ends)  # there is nothing to pad; spares a warning
    run = LiveRun(
        model,
        words.ids,
        [unit.tokens for unit in layout.units],
        explainer.settings,
        every,
        quiet | generation,
        streamer,
        Record(runs={"total": 0, "direct": len(layout.units)}),
        Ambient.of_this_thread(model),
        prompt.inputs,
        task.encoded.on,
    )
    how = _How(
        prompt,
        granularity,
        images,
        only,
        generation,
        ends,
        end_tokens(None, config, generation),
    )
    return LiveExplanation(explainer, layout, run, how)


def _direct(unit: Unit) -> Unit:
    return replace(unit, effect="direct")


def _checked_every(every: Any, model: Any) -> int:
    if every == "auto":
        return EVERY.get(device_of(model).type, 1)
    if isinstance(every, bool) or not isinstance(every, int):
        raise TypeError(f"every must be 'auto' or an int, got {every!r}.")
    if every < 1:
        raise ValueError(f"every must be at least 1, got {every}.")
    return every
