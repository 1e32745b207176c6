"""Where the patches that an image classifier reads stand on its picture.

Sources: the image processors of transformers, whose resizing and cropping is laid back.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from ..stacks import UnsupportedModelError
from .geometry import PADDING, Axis, Cell, cells_of
from .prompt import Prompt

_STRETCHED_FROM = 384
"""From this edge on, ConvNeXT's processor stretches a picture to a square; else it crops."""


def patch_cells(
    config: Any, processor: Any, encoding: Mapping[str, Any], size: tuple[int, int]
) -> list[Cell]:
    """One cell for each patch, row by row.

    Args:
        config: Of the encoder.
        processor: The image processor, with its settings.
        encoding: What it returned for one picture.
        size: Width and height of the picture.
    Raises:
        UnsupportedModelError: if what the processor does to a picture is not known.
        ValueError: if ``encoding`` and the settings do not fit each other.
    """
    holder = SimpleNamespace(image_processor=processor)
    prompt = Prompt(config.model_type, config, holder, encoding, [size], 0)
    if "spatial_shapes" in encoding:
        return _packed(prompt, size)
    patch = _patch(prompt)
    columns, rows = _shown(prompt, Axis.whole(size[0]), Axis.whole(size[1]))
    if (columns.pixels, rows.pixels) != prompt.shown():
        raise ValueError(
            f"pixel_values of a picture of {size[0]}x{size[1]} pixels must show "
            f"{columns.pixels}x{rows.pixels} by the settings of {type(processor).__name__}, got "
            f"{'x'.join(map(str, prompt.shown()))}."
        )
    return cells_of(columns.patches(patch), rows.patches(patch), size, "grid")


def _packed(prompt: Prompt, size: tuple[int, int]) -> list[Cell]:
    """SigLIP 2's: stretched to whole patches, padded to a number of them."""
    height, width = prompt.tensor("spatial_shapes")[0].tolist()
    columns, rows = Axis.whole(size[0]).resized(width), Axis.whole(size[1]).resized(height)
    cells = cells_of(columns.patches(1), rows.patches(1), size, "grid")
    return cells + [PADDING] * (prompt.tensor("pixel_values").shape[1] - len(cells))


def _patch(prompt: Prompt) -> int:
    patch = getattr(prompt.config, "patch_size", None)
    if isinstance(patch, int):
        return patch
    raise UnsupportedModelError(
        f"where the image tokens of this {prompt.model_type} stand is not known: its configuration "
        f"has patch_size {patch!r}, and one number is needed."
    )


def _shown(prompt: Prompt, columns: Axis, rows: Axis) -> tuple[Axis, Axis]:
    """What is left of a picture after resizing and cropping."""
    if prompt.setting("crop_pct") is None or not prompt.setting("do_resize", True):
        return prompt.prepared(columns, rows)
    name = type(prompt.processor.image_processor).__name__
    if not name.startswith("ConvNext"):
        raise prompt.unknown(f"{name} crops by crop_pct in a way of its own")
    edge = prompt.edges("size")["shortest_edge"]
    if edge >= _STRETCHED_FROM:
        return columns.resized(edge), rows.resized(edge)
    shortest, pixels = int(edge / prompt.setting("crop_pct")), (columns.pixels, rows.pixels)
    longest = int(shortest * max(pixels) / min(pixels))
    width, height = (shortest, longest) if pixels[0] <= pixels[1] else (longest, shortest)
    return columns.resized(width).centred(edge), rows.resized(height).centred(edge)
