"""Where a model reads what: its sources of tokens, and the attention layers that have them as keys.

A *source* is a sequence of tokens, a *site* a group of attention layers, all in one stack, whose
keys are the tokens of one source. Each site is an encoder's self-attention, a decoder's own, or a
cross-attention.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import Tensor, nn

from .stacks import (
    MODALITIES,
    Stack,
    UnsupportedModelError,
    checked_model,
    find_stack,
    looks_both_ways,
    stack_of,
    unwrap,
)

Kind = Literal["encoder", "cross", "decoder"]
Attention = Literal["encoder", "cross", "both"]
"""Which sites of sources other than the decoder's are manipulated."""
DECODER = "decoder"
"""The source that is a decoder's own tokens."""


@dataclass(frozen=True)
class Site:
    """Attention layers of one stack that read one source."""

    source: str
    kind: Kind
    module: nn.Module
    stack: Stack

    @property
    def crossing(self) -> bool:
        """Whether it is the stack's cross-attention."""
        return self.kind == "cross"

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that have this kind of attention."""
        return self.stack.places.all(self.crossing)

    def places(self, layers: set[int]) -> tuple[int, ...]:
        """The places, among those of the stack, of some layers."""
        first = self.stack.places.depth if self.crossing else 0
        return tuple(first + layer for layer in self.layers if layer in layers)


def sources(model: Any) -> tuple[str, ...]:
    """What a model reads, in the order of its prompt: "image", "audio", "text", "decoder".

    "decoder" are a decoder's own tokens, the image tokens among them where a vision-language model
    has them there.

    Raises:
        TypeError: if ``model`` is no module.
        UnsupportedModelError: if its attention layers cannot be found.
    """
    return tuple(dict.fromkeys(site.source for site in find_sites(model)))


def own_source(model: Any) -> str:
    """The source of a model that reads one text: a decoder's own tokens, or an encoder's alone.

    Raises: UnsupportedModelError: if it has an encoder besides.
    """
    sites = find_sites(model)
    known = list(dict.fromkeys(site.source for site in sites))
    if len(known) > 1 and any(site.kind == "encoder" for site in sites):
        raise UnsupportedModelError(
            f"{sites[0].stack.model_name} reads {' and '.join(known)}, each by its own layers, so "
            "what acts on the tokens of one text, as controls do, cannot be used on it."
        )
    return known[-1]


def find_sites(model: Any) -> tuple[Site, ...]:
    """The sites of a model; the first source's come first.

    Raises:
        TypeError: if ``model`` is no module.
        UnsupportedModelError: if its attention layers cannot be found.
    """
    found = checked_model(model)
    rules: tuple[tuple[Callable[[Any], bool], Callable[[Any], list[Site]]], ...] = (
        (lambda m: m.config.model_type == "blip", _blip),
        (lambda m: m.config.is_encoder_decoder, _encoder_decoder),
        (_has_two_encoders, _two_encoders),
    )
    for applies, sites_of in rules:
        if applies(found):
            return tuple(sites_of(found))
    module, stack = find_stack(found)
    if stack.role == "encoder":
        return (Site(_modality(found), "encoder", module, stack),)
    own = Site(DECODER, "decoder", module, stack)
    if not stack.places.crossing:
        return (own,)
    return (Site("image", "cross", module, stack), own)


def named_sites(
    model: Any, given: Tensor | Mapping[str, Any] | None, attention: str | None
) -> tuple[tuple[Site, ...], list[tuple[Site, Any]]]:
    """The sites of a model, and those that factors are for, each with what is given for it.

    Args:
        given: A tensor is the first source's; a mapping names sources; None is given for every
            self-attention, so also of a model whose cross-attention does not run.
        attention: Where sources other than the decoder's are manipulated; None is both.
    Raises:
        TypeError, ValueError: if a source is unknown, or there is nothing to choose.
    """
    sites = find_sites(model)
    name = sites[0].stack.model_name
    known = tuple(dict.fromkeys(site.source for site in sites))
    if given is None:
        return sites, [(site, None) for site in sites if not site.crossing]
    by_source = {known[0]: given} if isinstance(given, Tensor) else given
    if not isinstance(by_source, Mapping):
        or_several = f", or one for each of {', '.join(known)}" if len(known) > 1 else ""
        raise TypeError(f"key_factor must be a tensor{or_several}, got {type(given).__name__}.")
    unknown = [source for source in by_source if source not in known]
    if unknown or not by_source:
        raise ValueError(
            f"key_factor must name sources of {name}, {', '.join(known)}, got {list(by_source)}."
        )
    _check_choice(name, sites, attention)
    kinds = {"encoder", "cross", "decoder"} - {
        "encoder": {"cross"},
        "cross": {"encoder"},
    }.get(attention or "both", set())
    named = [
        (site, by_source[site.source])
        for site in sites
        if site.source in by_source and site.kind in kinds
    ]
    return sites, named


def _check_choice(name: str, sites: tuple[Site, ...], attention: str | None) -> None:
    """Whether there is a choice between an encoder and cross-attention."""
    if attention is None:
        return
    if attention not in get_args(Attention):
        choices = ", ".join(get_args(Attention))
        raise ValueError(f"attention must be one of {choices}, got {attention!r}.")
    if not {"encoder", "cross"} <= {site.kind for site in sites}:
        raise ValueError(
            f"attention is for models with an encoder and cross-attention, which {name} is not, "
            f"got {attention!r}; leave it out."
        )


def _modality(module: Any) -> str:
    return MODALITIES.get(getattr(module, "main_input_name", "input_ids"), "text")


def _encoder_decoder(model: Any) -> list[Site]:
    """An encoder, and a decoder that attends to its tokens; or the encoder of one alone."""
    encoder, decoder = unwrap(model.get_encoder()), unwrap(model.get_decoder())
    source = _modality(model)
    behind = stack_of(encoder, "encoder", model)
    sites = [Site(source, "encoder", encoder, behind)]
    if decoder is encoder or decoder is model:
        return sites
    answering = stack_of(decoder, "answering", model)
    if not answering.places.crossing:
        raise UnsupportedModelError(
            f"{type(model).__name__}: the cross-attention of {type(decoder).__name__} cannot be "
            "found, so its scores cannot be manipulated."
        )
    return [
        *sites,
        Site(source, "cross", decoder, answering),
        Site(DECODER, "decoder", decoder, answering),
    ]


def _blip(model: Any) -> list[Site]:
    """An image encoder, and text stacks of which each attends to the one before it."""
    image = model.vision_model
    sites = [Site("image", "encoder", image, stack_of(image, "encoder", model))]
    before = "image"
    encoder = getattr(model, "text_encoder", None)  # of a question, reads the image
    if encoder is not None:
        stack = stack_of(encoder, "encoder", model)
        sites += [Site(before, "cross", encoder, stack), Site("text", "encoder", encoder, stack)]
        before = "text"
    if hasattr(model, "text_decoder"):
        decoder = model.text_decoder.bert
        stack = stack_of(decoder, "answering", model)
        sites += [Site(before, "cross", decoder, stack), Site(DECODER, "decoder", decoder, stack)]
    if hasattr(model, "text_model"):  # compares a text with the image
        text = model.text_model
        sites.append(Site("text", "encoder", text, stack_of(text, "encoder", model)))
    return sites


def _has_two_encoders(model: Any) -> bool:
    """Whether a model compares an image with a text, as CLIP does."""
    towers = [getattr(model, name, None) for name in ("vision_model", "text_model")]
    return all(isinstance(tower, nn.Module) and looks_both_ways(tower) for tower in towers)


def _two_encoders(model: Any) -> list[Site]:
    """One of images and one of texts."""
    image, text = model.vision_model, model.text_model
    return [
        Site("image", "encoder", image, stack_of(image, "encoder", model)),
        Site("text", "encoder", text, stack_of(text, "encoder", model)),
    ]
