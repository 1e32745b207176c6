"""What encoder-decoders read: texts, sounds, pictures with or without a text.

A prompt's tokens are those of every encoder, one after the other, then those that the decoder reads
before the answer.

Legend: P tokens of the prompt.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin

from ..audio import frame_seconds, waveform
from ..capabilities import dtype_of
from ..grouping import seconds_text
from ..images import readable
from ..images.geometry import Axis, cells_of
from ..pictures import Picture, Sound
from ..pieces import Area
from ..seq2seq.encoder_decoder import default_start
from ..stacks import UnsupportedModelError
from ..tokens import Tokens, decode, describe, encode_prompt, tokens_of_ids, with_whitespace
from .base import Prompt

START = "read by the decoder before the answer"
SILENCE = "silence that pads the sound"
CLASS_TOKEN = "class token of the picture"


class Reader(ABC):
    """Makes a prompt of what the user gives, and lets the model answer it.

    Args:
        model: An encoder-decoder.
        processor: Its tokenizer or processor, or None.
    """

    def __init__(self, model: Any, processor: Any) -> None:
        self.model = model
        self.processor = processor
        self.tokenizer = getattr(processor, "tokenizer", processor)

    @property
    def vocabulary(self) -> int:
        """How many token ids the decoder knows."""
        head: Any = getattr(self.model, "text_decoder", self.model)
        return int(head.get_output_embeddings().weight.shape[0])

    @abstractmethod
    def read(self, raw: Any) -> Prompt:
        """A prompt as the model reads it; TypeError or ValueError if it is none."""

    def generate(self, prompt: Prompt, arguments: dict[str, Any]) -> Tensor:
        """What the model itself writes behind the start tokens: ``[1, tokens]``."""
        start = prompt.inputs["decoder_input_ids"]
        inputs = {name: value.to(self.model.device) for name, value in prompt.inputs.items()}
        # Not the generate of Whisper, which cuts long sounds and finds start tokens by itself.
        mixin: Any = GenerationMixin
        output = mixin.generate(self.model, **inputs, **arguments)
        sequences = output if isinstance(output, Tensor) else output.sequences
        return sequences[:, start.shape[1] :]

    def label(self, text: str) -> tuple[list[int], Tokens]:
        """An answer as the model learnt it: start tokens, and tokens without the closing ones."""
        fast = bool(getattr(self.tokenizer, "is_fast", False))
        encoding = self.tokenizer(
            text_target=text,
            return_special_tokens_mask=True,
            return_offsets_mapping=fast,
            truncation=False,
            verbose=False,
        )
        ids, added = list(encoding["input_ids"]), list(map(bool, encoding["special_tokens_mask"]))
        first = added.index(False) if False in added else len(ids)
        stop = len(ids) - added[::-1].index(False) if False in added else first
        own = ids[first:stop]
        if not fast:
            return ids[:first], tokens_of_ids(own, self.tokenizer)
        names = self.tokenizer.convert_ids_to_tokens(own)
        spans = with_whitespace(text, list(encoding["offset_mapping"][first:stop]), names)
        return ids[:first], describe(text, own, spans, self.tokenizer)

    def start(self) -> list[int]:
        """Tokens that the decoder reads before every answer."""
        first = default_start(self.model)
        named = [] if self.tokenizer is None else self.label("a")[0]
        if first is not None and named[:1] != [first]:
            named = [first, *named]
        if not named:
            raise ValueError(
                f"{type(self.model).__name__} does not say what its decoder starts with: set "
                "decoder_start_token_id in model.generation_config."
            )
        return named


class TextReader(Reader):
    """Of T5, BART, Marian and the like."""

    def read(self, raw: Any) -> Prompt:
        """A text, its token ids, or an encoding, closing tokens included."""
        embedding: Any = self.model.get_encoder().get_input_embeddings()
        size = int(embedding.weight.shape[0])
        words = encode_prompt(raw, self.tokenizer, size, closing=True)
        _check_window(self.model, words)
        ids, start = torch.tensor([words.ids]), self.start()
        inputs = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "decoder_input_ids": torch.tensor([start]),
        }
        return Prompt(raw, joined([words, unspoken(start, self.tokenizer)]), inputs)


class SoundReader(Reader):
    """Of Whisper."""

    def read(self, raw: Any) -> Prompt:
        """A waveform."""
        extractor = getattr(self.processor, "feature_extractor", None)
        if extractor is None:
            raise ValueError(
                f"{type(self.model).__name__} hears sounds, for which its processor is needed, "
                f"got {type(self.processor).__name__}; load it with AutoProcessor."
            )
        rate = int(extractor.sampling_rate)
        samples = waveform(raw, rate, extractor.n_samples / rate)
        features = extractor(samples, sampling_rate=rate, return_tensors="pt")["input_features"]
        inputs = {"input_features": features.to(dtype_of(self.model))}
        start = self._start_of(inputs["input_features"])
        frames = int(self.model.config.max_source_positions)
        step = extractor.n_samples / rate / frames
        seconds = frame_seconds(frames, step, len(samples) / rate)
        words = _frames(seconds, step)
        return Prompt(
            raw,
            joined([words, unspoken(start, self.tokenizer)]),
            inputs | {"decoder_input_ids": torch.tensor([start])},
            sound=Sound.of(samples, rate),
        )

    def _start_of(self, features: Tensor) -> list[int]:
        """With the language, found by the model itself where neither it nor the tokenizer names it.

        The tokenizer's ``set_prefix_tokens(language=..., task=...)`` names both.
        """
        start, config = self.start(), self.model.generation_config
        languages = getattr(config, "lang_to_id", None)
        if not languages or set(start) & set(languages.values()):
            return start
        named = getattr(config, "language", None)
        found = next((i for name, i in languages.items() if named in (name, name[2:-2])), None)
        if found is None:
            found = int(self.model.detect_language(features.to(self.model.device))[0])
        tasks = getattr(config, "task_to_id", None) or {}
        task = getattr(config, "task", None) or "transcribe"
        chosen = [found] + [i for name, i in tasks.items() if name == task]
        return [start[0], *chosen, *[token for token in start[1:] if token not in chosen]]


class PictureReader(Reader):
    """Of BLIP, for captions and for questions."""

    @property
    def _asks(self) -> bool:
        """Whether the model answers questions."""
        return hasattr(self.model, "text_encoder")

    def read(self, raw: Any) -> Prompt:
        """A picture, or a picture and a text: a question, or how the caption begins."""
        image, text = self._parts(raw)
        shown = readable(image)
        processor = getattr(self.processor, "image_processor", None)
        if processor is None:
            raise ValueError(
                f"{type(self.model).__name__} reads pictures, for which its processor is needed, "
                f"got {type(self.processor).__name__}; load it with AutoProcessor."
            )
        pixels = processor(images=shown, return_tensors="pt")["pixel_values"]
        inputs = {"pixel_values": pixels.to(dtype_of(self.model))}
        parts = [self._patches(pixels, shown.size, processor)]
        start = [int(self.model.config.text_config.bos_token_id)]
        size = int(self.model.get_input_embeddings().weight.shape[0])
        if text is None:
            parts.append(unspoken(start, self.tokenizer))
        elif self._asks:
            question = encode_prompt(text, self.tokenizer, size, closing=True)
            inputs["input_ids"] = torch.tensor([question.ids])
            parts += [question, unspoken(start, self.tokenizer)]
        else:  # the decoder reads it behind its own start token, in place of the tokenizer's
            begun = encode_prompt(text, self.tokenizer, size)
            own = sum(reason is not None for reason in begun.reasons[:1])
            start += begun.ids[own:]
            parts += [unspoken(start[:1], self.tokenizer), _tail(begun, own)]
        inputs["decoder_input_ids"] = torch.tensor([start])
        return Prompt(raw, joined(parts), inputs, pictures=[Picture.of(shown, 0)])

    def generate(self, prompt: Prompt, arguments: dict[str, Any]) -> Tensor:
        """As the model's own method does, which drops a closing token of the text."""
        inputs = {name: value.to(self.model.device) for name, value in prompt.inputs.items()}
        start = inputs.pop("decoder_input_ids")
        if not self._asks:
            inputs["input_ids"] = torch.cat([start, start[:, :1]], 1)
        output = self.model.generate(**inputs, **arguments)
        sequences = output if isinstance(output, Tensor) else output.sequences
        return sequences[:, start.shape[1] :]

    def _parts(self, raw: Any) -> tuple[Any, str | None]:
        """The picture and the text."""
        items = list(raw) if isinstance(raw, (list, tuple)) else [raw]
        texts = [item for item in items if isinstance(item, str)]
        images = [item for item in items if not isinstance(item, str)]
        wanted = "[image, question]" if self._asks else "an image, or [image, text]"
        if len(images) != 1:
            raise ValueError(
                f"prompt must hold one image, got {len(images)}; {type(self.model).__name__} "
                f"reads {wanted}."
            )
        if len(texts) > 1 or (self._asks and not texts):
            raise ValueError(
                f"prompt must be {wanted} for {type(self.model).__name__}, got {len(texts)} texts."
            )
        return images[0], texts[0] if texts else None

    def _patches(self, pixels: Tensor, size: tuple[int, int], processor: Any) -> Tokens:
        """The vision tower's tokens: one for the class, then the patches, row by row."""
        if getattr(processor, "do_center_crop", False) or getattr(processor, "do_pad", False):
            raise UnsupportedModelError(
                f"{type(processor).__name__} crops or pads pictures, and where patches then stand "
                f"is not known for {type(self.model).__name__}."
            )
        patch = int(self.model.config.vision_config.patch_size)
        height, width = pixels.shape[-2:]
        columns = Axis.whole(size[0]).resized(width).patches(patch)
        rows = Axis.whole(size[1]).resized(height).patches(patch)
        cells = cells_of(columns, rows, size, "grid")
        count = len(cells) + 1
        return Tokens(
            ids=[0] * count,
            text="",
            spans=[None] * count,
            names=["class token", *["patch"] * len(cells)],
            reasons=[CLASS_TOKEN, *[None] * len(cells)],
            areas=[Area(0, None, "class"), *[Area(0, cell.box, "grid") for cell in cells]],
        )


def _frames(seconds: list[tuple[float, float] | None], step: float) -> Tokens:
    """The encoder's frames; those of the silence behind the sound share one name."""
    count, heard = len(seconds), sum(each is not None for each in seconds)
    names = [seconds_text(*each) if each is not None else "" for each in seconds]
    if heard < count:
        names[heard] = seconds_text(heard * step, count * step)
    return Tokens(
        ids=[0] * count,
        text="",
        spans=[None] * count,
        names=names,
        reasons=[SILENCE if each is None else None for each in seconds],
        seconds=seconds,
    )


def unspoken(ids: Sequence[int], tokenizer: Any) -> Tokens:
    """Start tokens, which have no place in the text."""
    names = [str(i) if tokenizer is None else decode(tokenizer, [i]) or f"<{i}>" for i in ids]
    count = len(names)
    return Tokens(list(ids), "", [None] * count, names, [START] * count)


def joined(parts: Sequence[Tokens]) -> Tokens:
    """Tokens one after the other, and their texts too."""
    areas = any(part.areas for part in parts)
    seconds = any(part.seconds for part in parts)
    found = replace(parts[0])
    for part in parts[1:]:
        shift = len(found.text)
        found = Tokens(
            found.ids + part.ids,
            found.text + part.text,
            found.spans
            + [None if span is None else (span[0] + shift, span[1] + shift) for span in part.spans],
            found.names + part.names,
            found.reasons + part.reasons,
            found.contents or part.contents,
            (found.areas or [None] * len(found)) + (part.areas or [None] * len(part))
            if areas
            else [],
            (found.seconds or [None] * len(found)) + (part.seconds or [None] * len(part))
            if seconds
            else [],
        )
    return found


def _tail(tokens: Tokens, first: int) -> Tokens:
    """Without the first tokens, which have no place in the text."""
    return Tokens(
        tokens.ids[first:],
        tokens.text,
        tokens.spans[first:],
        tokens.names[first:],
        tokens.reasons[first:],
    )


def _check_window(model: Any, words: Tokens) -> None:
    """Refuse, by a ValueError, a text that is longer than the encoder has positions for."""
    limit = getattr(model.get_encoder().config, "max_position_embeddings", None)
    if isinstance(limit, int) and len(words) > limit:
        raise ValueError(
            f"prompt must fit into the {limit} tokens that {type(model).__name__} can read, got "
            f"{len(words)}: shorten it."
        )
