"""Encoder-decoders: T5, BART, Marian, Whisper and BLIP write an answer to what they read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..answers import END_OF_TEXT, Answers, end_tokens, limited
from ..arguments import plain
from ..chat import Span
from ..perturbations import Attention, RunFailed, Settings
from ..pieces import LeftOut
from ..raw_scores import share_of_negative
from ..reduction import Quantity
from ..seq2seq.encoder_decoder import encoder_decoder, first_input
from ..seq2seq.engine import Seq2SeqEngine
from ..sites import find_sites, sources
from ..tokens import Tokens, border, check_vocabulary, encode_target, tokens_of_ids
from ..units import Layout
from .base import Prompt, Task
from .readers import PictureReader, Reader, SoundReader, TextReader, unspoken

_NEW_TOKENS = 32  # how many are generated where there is room and nothing else is said
_READERS: dict[str, type[Reader]] = {
    "text": TextReader,
    "audio": SoundReader,
    "image": PictureReader,
}
_WHERE: dict[Attention, str] = {
    "both": "encoder self-attention and cross-attention",
    "encoder": "encoder self-attention",
    "cross": "cross-attention",
}


class Seq2SeqTask(Task):
    """An encoder, or several, and a decoder that attends to what the last one made."""

    attends = True

    def __init__(self, model: Any, processor: Any) -> None:
        super().__init__(model, processor)
        self._sites = find_sites(model)
        self._reader = _READERS[sources(model)[0]](model, processor)

    @classmethod
    def serves(cls, model: Any) -> bool:
        """Whether it has an encoder and a decoder that writes."""
        config = getattr(model, "config", None)
        writes = getattr(model, "get_output_embeddings", None)
        if getattr(config, "model_type", None) == "blip":
            return hasattr(model, "text_decoder")
        return bool(getattr(config, "is_encoder_decoder", False)) and bool(writes and writes())

    @property
    def layers(self) -> Sequence[int]:
        """Those of any encoder or decoder."""
        return sorted({layer for site in self._sites for layer in site.layers})

    @property
    def heads(self) -> int:
        """The most query heads of a layer."""
        return max(site.stack.heads for site in self._sites)

    def read(self, raw: Any) -> Prompt:
        """What the model's encoders read, and the decoder's start tokens."""
        return self._reader.read(raw)

    def given(
        self,
        prompt: Prompt,
        targets: Sequence[Any],
        separator: str | None,
        *,
        alone: bool,
        target_span: str | Span | None,
    ) -> Answers:
        """Texts as the model learnt them, without closing tokens, or token ids as they are.

        A separator is only shown, unless the decoder has read how the answer begins.
        """
        answers, separators, cut = [], [], Answers([])
        for target in targets:
            answer, between = self._answer(prompt, target, separator)
            if isinstance(target, str):
                separators.append(between)
            if target_span is not None:
                cut = limited(answer, target_span, self.tokenizer, len(between))
                answer = cut.tokens[0]
            self._check_length(prompt, len(answer), "the target's")
            answers.append(answer)
        facts: dict[str, Any] = {"target": "given"}
        if separators:
            facts["separator"] = separators[0] if alone else separators
        return Answers(answers, cut.left_out, facts | cut.facts, cut.context)

    def generated(
        self,
        prompt: Prompt,
        max_new_tokens: int | None,
        generation_kwargs: dict[str, Any],
        target_span: str | Span | None,
    ) -> Answers:
        """What the model writes behind its start tokens, greedily, without closing tokens."""
        room = self._room(prompt)
        if max_new_tokens is None:
            max_new_tokens = _NEW_TOKENS if room is None else max(1, min(_NEW_TOKENS, room))
        self._check_length(prompt, max_new_tokens, "max_new_tokens")
        arguments = {"max_new_tokens": max_new_tokens} | generation_kwargs
        defaults: dict[str, Any] = {}
        if "generation_config" not in arguments:
            defaults = {"do_sample": False, "num_beams": 1}
        sequences = self._reader.generate(prompt, defaults | arguments)
        if len(sequences) != 1:
            raise ValueError(
                f"one completion is explained at a time, got {len(sequences)}; "
                "leave num_return_sequences at 1."
            )
        written = sequences[0].tolist()
        ends = self._ends(arguments)
        kept = len(written)
        while kept and written[kept - 1] in ends:
            kept -= 1
        if not kept:
            raise RunFailed("the model's completion is empty: it ended at once; give a target.")
        answer = tokens_of_ids(written[:kept], self.tokenizer)
        between = self._border(prompt, answer.text, None)
        answer = answer if _continues(prompt) else _behind(between, answer)
        end = []
        if kept < len(written):
            rest = tokens_of_ids(written[kept:], self.tokenizer)
            # Generated, but never read again: it has no position in the model input.
            end = [LeftOut("".join(rest.names), (), END_OF_TEXT)]
        given = {name: plain(value) for name, value in arguments.items()}
        facts = {"target": "generated", "generation": given}
        if target_span is None:
            return Answers([answer], end, facts)
        cut = limited(answer, target_span, self.tokenizer, len(between))
        return Answers(cut.tokens, cut.left_out + end, facts | cut.facts, cut.context)

    def measures(
        self,
        prompt: Prompt,
        answers: Answers,
        layout: Layout,
        settings: Settings,
        quantity: Quantity,
        expect: Callable[[int], None],
        advance: Callable[[int], None],
    ) -> Seq2SeqEngine:
        """Perturbations of the encoders, of cross-attention, or of both."""
        context = layout.prompt_ids[len(prompt.words) :]  # of the answer, read but not scored
        start = prompt.inputs["decoder_input_ids"]
        start = torch.cat([start, start.new_tensor(context)[None]], 1)
        inputs = prompt.inputs | {"decoder_input_ids": start}
        return Seq2SeqEngine(self.model, inputs, layout.target_ids, settings, expect, advance)

    def facts(self, settings: Settings, method: str) -> dict[str, Any]:
        """Where the prompt was suppressed."""
        where: Attention = "cross" if method == "direct" else settings.attention or "both"
        return {"attention": _WHERE[where]}

    def by_source(self, prompt: Prompt, factors: Tensor) -> Mapping[str, Tensor]:
        """Those of each source, and of the decoder's start tokens."""
        sizes = self._sizes(prompt)
        return dict(zip(sources(self.model), factors.split(sizes, 1), strict=True))

    def embeddings(self, prompt: Prompt) -> Tensor:
        """What tokens are compared by, see ``EncoderDecoder.embeddings``: ``[P, D]``."""
        device = self.model.device
        inputs = {name: value.to(device) for name, value in prompt.inputs.items()}
        parts = encoder_decoder(self.model, inputs)
        read, states = [], None
        for stage in parts.stages:
            with first_input(stage.module) as found:
                states = stage.encode(1, states)
            read.append(found[0][0])
        return parts.embeddings(read, [])

    def negative_share(self, prompt: Prompt, layout: Layout, settings: Settings) -> float:
        """Of the prompt and the first answer, wherever the prompt is suppressed."""
        device = self.model.device
        inputs = {name: value.to(device) for name, value in prompt.inputs.items()}
        parts = encoder_decoder(self.model, inputs)
        behind = layout.prompt_ids[len(prompt.words) :] + layout.target_ids[0][:-1]
        ids = torch.tensor([[*parts.start, *behind]], device=device)

        def run() -> None:
            states = None
            for stage in parts.stages:
                states = stage.encode(1, states)
            assert states is not None  # there is a stage
            parts.decode(ids, states, None)

        return share_of_negative(
            self.model,
            run,
            sources(self.model),
            settings.layers,
            settings.heads,
            settings.backend,
            settings.attention,
        )

    def _sizes(self, prompt: Prompt) -> list[int]:
        """Tokens of each source, the decoder's start tokens last."""
        names = ("input_ids", "decoder_input_ids")
        known = [prompt.inputs[name].shape[1] for name in names if name in prompt.inputs]
        first = len(prompt.words) - sum(known)
        return [first, *known] if first else known

    # --- answers ---------------------------------------------------------------------------------

    def _border(self, prompt: Prompt, text: str, separator: str | None) -> str:
        """What stands between a prompt and an answer."""
        if separator is not None or self.tokenizer is None:
            return separator or ""
        return border(prompt.words.text, prompt.words, text)

    def _answer(self, prompt: Prompt, target: Any, separator: str | None) -> tuple[Tokens, str]:
        """An answer with its separator."""
        if _continues(prompt) and isinstance(target, str):
            between = self._border(prompt, target, separator)
            return self._encoded(between + target if target else target), between
        answer = self._encoded(target)
        given = separator if isinstance(target, str) else None  # ids are taken as they are
        between = self._border(prompt, answer.text, given)
        return _behind(between, answer), between

    def _encoded(self, target: Any) -> Tokens:
        """The tokens of an answer; spans count from its first character.

        Raises:
            TypeError: if it is neither a str nor token ids.
            ValueError: if it is empty, or holds an id that the model does not know.
        """
        size = self._reader.vocabulary
        if not isinstance(target, str):
            begun = unspoken(self._reader.start(), self.tokenizer)
            return encode_target(target, begun, self.tokenizer, size, "")
        if not target:
            raise ValueError("target must not be empty.")
        if self.tokenizer is None:
            raise ValueError("a str target needs a tokenizer, got None; pass one or token ids.")
        answer = self._reader.label(target)[1]
        if not len(answer):
            raise ValueError(f"target must not be empty: {target!r} makes no token.")
        check_vocabulary("target", answer.ids, size)
        return answer

    def _ends(self, arguments: dict[str, Any]) -> set[int]:
        """Ids that end an answer."""
        config = arguments.get("generation_config") or self.model.generation_config
        found = end_tokens(self.tokenizer, config, arguments)
        separator = getattr(getattr(self.model.config, "text_config", None), "sep_token_id", None)
        return found | ({int(separator)} if separator is not None else set())

    def _room(self, prompt: Prompt) -> int | None:
        """The most tokens of an answer; None where positions have no limit."""
        config = self.model.config
        text = getattr(config, "text_config", None) or config
        for name in ("max_target_positions", "max_position_embeddings"):
            limit = getattr(text, name, None)
            if isinstance(limit, int) and limit > 0:
                # the last token is never read
                return limit - prompt.inputs["decoder_input_ids"].shape[1] + 1
        return None

    def _check_length(self, prompt: Prompt, tokens: int, whose: str) -> None:
        room = self._room(prompt)
        if room is not None and tokens > room:
            raise ValueError(
                f"the decoder has room for {room} tokens of an answer behind its start tokens, got "
                f"{whose} {tokens}; shorten it."
            )


def _continues(prompt: Prompt) -> bool:
    """Whether an answer goes on where the decoder's own text of the prompt ends."""
    return prompt.words.spans[-1] is not None


def _behind(between: str, answer: Tokens) -> Tokens:
    """An answer whose text begins with something that is shown, but not read."""
    by = len(between)
    spans = [None if span is None else (span[0] + by, span[1] + by) for span in answer.spans]
    return replace(answer, text=between + answer.text, spans=spans)
