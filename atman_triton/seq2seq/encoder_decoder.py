"""A model with an encoder as a chain of stages: each one reads a source, the decoder the last one.

T5, BART and Whisper have one stage. BLIP captions an image that its vision tower reads; asked a
question, it has two: the vision tower reads the image, and the question's encoder reads the
question and, across, the image. Mllama has one, its vision tower, and a decoder that reads the
whole prompt.

Legend: B rows, E tokens of a source, D width, T decoder tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from ..prefix import PrefixCache
from ..stacks import UnsupportedModelError
from . import crossed_picture

_MAIN = {"input_ids": "text", "input_features": "audio", "pixel_values": "image"}
_LAYER_LISTS = ("layers", "layer", "block")


@dataclass(frozen=True)
class Stage:
    """What reads one source.

    Args:
        source: Its name, as in ``sites.sources``.
        module: The encoder.
        encode: States ``[B, E, D]`` of so many rows, from those of the stage before (or one row).
        ids: ``[1, E]`` of a text; None of other sources.
        padding: Bool ``[1, E]``, True where there is no padding; None if there is none.
        inside: Whether its own attention is manipulated too, so that it can be suppressed there.
    """

    source: str
    module: nn.Module
    encode: Callable[[int, Tensor | None], Tensor]
    ids: Tensor | None = None
    padding: Tensor | None = None
    inside: bool = True


def _apart(decoder: nn.Module, crossing: DynamicCache) -> Cache:
    """Crossed keys in a cache of their own, as most models keep them."""
    return EncoderDecoderCache(PrefixCache(0, len(layers_of(decoder))), crossing)


@dataclass(frozen=True)
class EncoderDecoder:
    """A model and one prompt.

    Args:
        stages: In the order in which they run.
        start: Tokens that the decoder reads before the answer, at least one.
        decoder: Whose layers attend to the last stage.
        head: What makes logits of the decoder's states; None if that is not known.
        embedding: The decoder's embedding of tokens.
        decode: Logits ``[B, T, V]`` of ids ``[B, T]``, from the last stage's states ``[B|1, E, D]``
            and a cache that holds the keys and values made of them, or None.
        keep: A cache for the decoder that keeps nothing of its own, and in another one what it
            crosses to.
    """

    stages: list[Stage]
    start: list[int]
    decoder: nn.Module
    head: nn.Module | None
    embedding: Any
    decode: Callable[[Tensor, Tensor, Cache | None], Tensor]
    keep: Callable[[nn.Module, DynamicCache], Cache] = _apart

    @property
    def chooses(self) -> bool:
        """Whether the prompt is manipulated in encoders as well as across."""
        return all(stage.inside for stage in self.stages)

    def cache(self, crossing: DynamicCache) -> Cache:
        """A cache that keeps nothing of the decoder's own, and in ``crossing`` what it crosses to.

        ``crossing`` is filled by the first pass, and read in place by later ones.
        """
        return self.keep(self.decoder, crossing)

    def embeddings(self, read: Sequence[Tensor], ids: Sequence[int]) -> Tensor:
        """Vectors of all columns whose cosines say how alike they are: ``[S, D]``.

        Text counts by its embeddings, as one set where tables are shared; images and sound by what
        the first layer reads. Nothing of one set is like anything of another.

        Args:
            read: Of each stage, what its first layer read, ``[E, D]``.
            ids: What the decoder reads behind the start tokens.
        """
        device = read[0].device
        sets: list[tuple[object, Tensor]] = []
        for stage, own in zip(self.stages, read, strict=True):
            if stage.ids is None:
                sets.append((stage, own))
            else:
                table: Any = stage.module.get_input_embeddings()  # pyright: ignore
                sets.append((table.weight, table(stage.ids)[0]))
        written = torch.tensor([*self.start, *ids], device=device)
        sets.append((self.embedding.weight, self.embedding(written)))
        tables = list({id(table): None for table, _ in sets})
        widths = [max(len(own[0]) for table, own in sets if id(table) == key) for key in tables]
        edges = [0, *accumulate(widths)]
        vectors = read[0].new_zeros(sum(len(own) for _, own in sets), edges[-1])
        row = 0
        for table, own in sets:
            first = edges[tables.index(id(table))]
            vectors[row : row + len(own), first : first + own.shape[1]] = own
            row += len(own)
        return vectors


def encoder_decoder(model: nn.Module, inputs: Mapping[str, Any]) -> EncoderDecoder:
    """The parts of a model, with what it reads.

    Args:
        model: With an encoder, or a vision tower, and a decoder that attends to it.
        inputs: What its forward takes for the prompt, one row of each, on its device;
            ``decoder_input_ids`` ``[1, T]`` where the answer does not begin behind the model's one
            start token.
    Raises:
        ValueError: if something that the model reads is missing, or has several rows.
        UnsupportedModelError: if the model's parts are not known.
    """
    kind = str(getattr(model.config, "model_type", ""))
    make = _KINDS.get(kind, _plain)
    if make is _plain and not getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{type(model).__name__} has no encoder and decoder.")
    return make(model, inputs)


@contextmanager
def first_input(module: nn.Module) -> Iterator[list[Tensor]]:
    """Collects what an encoder's first layer reads, ``[B, E, D]`` of each pass."""
    found: list[Tensor] = []

    def keep(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(args[0] if args else kwargs["hidden_states"])

    hook = layers_of(module)[0].register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield found
    finally:
        hook.remove()


def layers_of(module: nn.Module) -> nn.ModuleList:
    """The attention layers of an encoder or a decoder.

    Raises: UnsupportedModelError: if they are not found.
    """
    for owner in (module, *module.children()):
        for name in _LAYER_LISTS:
            found = getattr(owner, name, None)
            if isinstance(found, nn.ModuleList):
                return found
    raise UnsupportedModelError(f"the layers of {type(module).__name__} are not found.")


def _plain(model: Any, inputs: Mapping[str, Any]) -> EncoderDecoder:
    """One encoder, whose states the model's own forward takes."""
    encoder, decoder = model.get_encoder(), model.get_decoder()
    name = encoder.main_input_name
    if name not in _MAIN:
        raise UnsupportedModelError(
            f"{type(model).__name__} reads {name}, but only models that read "
            f"{', '.join(_MAIN)} are supported."
        )
    read = _one_row(model, inputs, name)
    text = _MAIN[name] == "text"
    padding = _padding(inputs) if text else None
    mask = {} if padding is None else {"attention_mask": padding}

    def encode(rows: int, before: Tensor | None) -> Tensor:
        masks = {name: value.expand(rows, -1) for name, value in mask.items()}
        own = {name: read.expand(rows, *[-1] * (read.dim() - 1))}
        return encoder(**own, **masks, return_dict=True).last_hidden_state

    def decode(ids: Tensor, states: Tensor, cache: Cache | None) -> Tensor:
        return model(
            encoder_outputs=BaseModelOutput(last_hidden_state=states),  # pyright: ignore
            decoder_input_ids=ids,
            past_key_values=cache,
            use_cache=cache is not None,
            return_dict=True,
            **mask,
        ).logits

    stage = Stage(_MAIN[name], encoder, encode, read if text else None, padding)
    return EncoderDecoder(
        [stage],
        _start(inputs, default_start(model)),
        decoder,
        model.get_output_embeddings(),
        decoder.get_input_embeddings(),
        decode,
    )


def _blip(model: Any, inputs: Mapping[str, Any]) -> EncoderDecoder:
    """BLIP, which writes about an image, or answers a question about it."""
    pixels = _one_row(model, inputs, "pixel_values")
    tower, head = model.vision_model, model.text_decoder
    text = getattr(model, "text_encoder", None)

    def see(rows: int, before: Tensor | None) -> Tensor:
        return tower(pixel_values=pixels.expand(rows, -1, -1, -1)).last_hidden_state

    stages = [Stage("image", tower, see)]
    crossed: dict[str, Tensor] = {}
    if text is not None:
        question, padding = _one_row(model, inputs, "input_ids"), _padding(inputs)
        shown = torch.ones_like(question, dtype=torch.bool) if padding is None else padding
        crossed = {"encoder_attention_mask": shown}

        def ask(rows: int, before: Tensor | None) -> Tensor:
            assert before is not None  # the second stage
            return text(
                input_ids=question.expand(rows, -1),
                attention_mask=shown.expand(rows, -1),
                encoder_hidden_states=before,
                encoder_attention_mask=shown.new_ones(before.shape[:2]),
            ).last_hidden_state

        stages.append(Stage("text", text, ask, question, padding))

    def decode(ids: Tensor, states: Tensor, cache: Cache | None) -> Tensor:
        return head(
            input_ids=ids,
            encoder_hidden_states=states,
            past_key_values=cache,
            use_cache=cache is not None,
            return_dict=True,
            **crossed,
        ).logits

    return EncoderDecoder(
        stages,
        _start(inputs, default_start(model)),
        head.bert,
        head.get_output_embeddings(),
        head.get_input_embeddings(),
        decode,
    )


def _mllama(model: Any, inputs: Mapping[str, Any]) -> EncoderDecoder:
    """Mllama, whose decoder reads a text, and across it what the tower made of the pictures."""
    names = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask", "cross_attention_mask")
    given = {name: _one_row(model, inputs, name) for name in names}
    decoder = model.get_decoder()
    crossed = decoder.config.get_text_config().cross_attention_layers
    layers = len(decoder.layers)
    tower = Stage(
        "image",
        model.model.vision_model,
        lambda rows, before: crossed_picture.seen(model, given, rows),
        inside=False,
    )
    return EncoderDecoder(
        [tower],
        _start(inputs, None),
        decoder,
        model.get_output_embeddings(),
        model.get_input_embeddings(),
        lambda ids, states, cache: crossed_picture.logits(model, given, ids, states, cache),
        lambda _, crossing: crossed_picture.CrossedCache(layers, crossed, crossing),
    )


_KINDS: dict[str, Callable[[Any, Mapping[str, Any]], EncoderDecoder]] = {
    "blip": _blip,
    **dict.fromkeys(crossed_picture.KINDS, _mllama),
}


def default_start(model: Any) -> int | None:
    """The id of the token that every answer begins behind; None if the model names none."""
    if str(model.config.model_type) == "blip":
        return model.config.text_config.bos_token_id
    for config in (model.generation_config, model.config):
        found = getattr(config, "decoder_start_token_id", None)
        if found is not None:
            return int(found)
    return None


def _start(inputs: Mapping[str, Any], default: int | None) -> list[int]:
    given = inputs.get("decoder_input_ids")
    if given is None:
        if default is None:
            raise ValueError(
                "inputs must hold decoder_input_ids, because the model's configuration has no "
                "decoder_start_token_id."
            )
        return [default]
    if not isinstance(given, Tensor) or given.dim() != 2 or len(given) != 1 or not given.numel():
        raise ValueError("decoder_input_ids must have shape [1, tokens], at least one token.")
    return given[0].tolist()


def _one_row(model: nn.Module, inputs: Mapping[str, Any], name: str) -> Tensor:
    value = inputs.get(name)
    if not isinstance(value, Tensor):
        raise ValueError(f"inputs of {type(model).__name__} must hold {name}, got {list(inputs)}.")
    if value.dim() < 2 or len(value) != 1:
        raise ValueError(f"{name} must have one row, got shape {list(value.shape)}.")
    return value


def _padding(inputs: Mapping[str, Any]) -> Tensor | None:
    """Bool ``[1, E]``; None if nothing is padded."""
    given = inputs.get("attention_mask")
    if given is None or bool(given.bool().all()):
        return None
    return given.bool()
