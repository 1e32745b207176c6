"""Where each image token of a prompt stands on its picture.

How pictures are resized, cropped, padded, cut into tiles, pooled and merged is a rule of each
family; this module asks the family's, and numbers what it says by the prompt's tokens.

Legend: P prompt tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..stacks import UnsupportedModelError
from . import anyres, single, tiled
from .geometry import Box, Cell
from .prompt import Family, Prompt, is_one_of

_FAMILIES = {**single.FAMILIES, **anyres.FAMILIES, **tiled.FAMILIES}


@dataclass(frozen=True)
class ImageToken:
    """A token that stands for a part of a picture.

    Args:
        token: Its position in the prompt.
        image: Which of the prompt's pictures, from 0.
        box: Left, top, width and height of the part, in pixels of the original picture; None if the
            token stands for no part of its own.
        view: ``grid`` where the model is shown the picture once, else ``overview`` for the whole of
            it at a low resolution and ``crop`` for a part at a higher one. Without a box:
            ``newline`` ends a row of tokens, ``class`` is of a whole view, ``padding`` is beside
            the picture.
    """

    token: int
    image: int
    box: Box | None
    view: str


def image_tokens(
    model: Any, processor: Any, encoding: Mapping[str, Any], sizes: Sequence[tuple[int, int]]
) -> list[ImageToken]:
    """Every token of a prompt that an image embedding takes the place of, in order.

    Markers around images are text to the model and not among them.

    Args:
        model: A vision-language model of transformers.
        processor: What prepared the prompt, with the settings that it has; settings given for one
            call cannot be seen here.
        encoding: What it returned, tensors (``return_tensors="pt"``) of one prompt, with
            ``input_ids`` ``[1, P]``.
        sizes: Width and height of the original pictures, in order.
    Raises:
        UnsupportedModelError: naming the family, if its layout is not known.
        ValueError: if ``encoding``, ``sizes`` and the settings do not fit each other.
        TypeError: if ``processor`` has no image processor.
    """
    ids = _ids(encoding)
    family = _family(model, processor, _FAMILIES)
    places = (ids == model.config.image_token_id).nonzero()[:, 0].tolist()
    if not places and not sizes:
        return []
    prompt = _prompt(model, processor, encoding, sizes, len(places))
    cells = family.cells(prompt)
    if not prompt.fits([len(each) for each in cells]):
        raise ValueError(
            f"input_ids must hold {sum(map(len, cells))} image tokens for pictures of "
            f"{_listed(sizes)} pixels by the processor's settings, got {len(places)}; do sizes "
            "fit the pictures, and is the prompt whole?"
        )
    return _numbered(cells, places)


def cross_image_tokens(
    model: Any, processor: Any, encoding: Mapping[str, Any], sizes: Sequence[tuple[int, int]]
) -> list[ImageToken]:
    """What each key of the cross-attention to images stands for, in order.

    For models that read images beside the prompt (Mllama) instead of in it: ``token`` is a column
    of the cross-attention. Arguments and errors are those of :func:`image_tokens`.
    """
    family = _family(model, processor, tiled.CROSS)
    if not sizes and "pixel_values" not in encoding:
        return []
    cells = family.cells(_prompt(model, processor, encoding, sizes, 0))
    return _numbered(cells, range(sum(map(len, cells))))


def _numbered(cells: Iterable[Iterable[Cell]], places: Iterable[int]) -> list[ImageToken]:
    """The cells of each picture as tokens at places in the prompt."""
    place = iter(places)
    return [
        ImageToken(next(place), image, cell.box, cell.view)
        for image, each in enumerate(cells)
        for cell in each
    ]


def _ids(encoding: Mapping[str, Any]) -> Tensor:
    """``[P]``."""
    ids = encoding.get("input_ids")
    if not isinstance(ids, Tensor) or ids.dim() != 2 or len(ids) != 1:
        found = list(ids.shape) if isinstance(ids, Tensor) else type(ids).__name__
        raise ValueError(f"encoding must hold input_ids of shape [1, tokens], got {found}.")
    return ids[0]


def _family(model: Any, processor: Any, known: Mapping[str, Family]) -> Family:
    """The family of a model, if its pictures are prepared as that family's are."""
    kind = str(getattr(getattr(model, "config", None), "model_type", None))
    if kind not in known:
        beside = " It reads images beside the prompt: see cross_image_tokens."
        raise UnsupportedModelError(
            f"{type(model).__name__} is a {kind}; where its image tokens stand is not known. "
            f"Known families: {', '.join(sorted(known))}.{beside if kind in tiled.CROSS else ''}"
        )
    images = getattr(processor, "image_processor", None)
    if images is None:
        raise TypeError(
            "processor must prepare images and text, as AutoProcessor.from_pretrained loads it, "
            f"got {type(processor).__name__}."
        )
    if not is_one_of(images, known[kind].processors):
        raise UnsupportedModelError(
            f"{type(images).__name__} prepares the pictures of this {kind}; where its image tokens "
            f"then stand is not known. Known: {', '.join(known[kind].processors)}."
        )
    return known[kind]


def _prompt(
    model: Any,
    processor: Any,
    encoding: Mapping[str, Any],
    sizes: Sequence[tuple[int, int]],
    tokens: int,
) -> Prompt:
    if any(min(size) < 1 for size in sizes):
        raise ValueError(f"sizes must be widths and heights of at least 1, got {list(sizes)}.")
    config = model.config
    return Prompt(config.model_type, config, processor, encoding, sizes, tokens)


def _listed(sizes: Sequence[tuple[int, int]]) -> str:
    return ", ".join(f"{width}x{height}" for width, height in sizes) or "no size"
