"""Families that show the vision tower a picture once, whole or its middle.

Gemma 3, which may add crops of long pictures, does the same with each crop. Sources: the image
processors and ``get_image_features`` of the classes in transformers.
"""

from __future__ import annotations

from itertools import product

from .geometry import Axis, Cell, cells_of
from .prompt import Family, Prompt, is_one_of


def llava(prompt: Prompt) -> list[list[Cell]]:
    """Resized, its middle cut out (CLIP) or all of it (SigLIP), one token a patch."""
    images = prompt.processor.image_processor
    squared = prompt.setting("do_pad", False) and is_one_of(images, ["LlavaImageProcessor"])
    found = []
    for size in prompt.sizes:
        columns, rows = map(Axis.whole, size)
        if squared:
            columns, rows = columns.padded(max(size)), rows.padded(max(size))
        columns, rows = prompt.matched(columns, rows)
        found.append(prompt.selected(cells_of(*prompt.patches(columns, rows), size, "grid")))
    return found


def qwen(prompt: Prompt) -> list[list[Cell]]:
    """Stretched to whole patches, a token for each square of merged ones."""
    merge = prompt.config.vision_config.spatial_merge_size
    grids = prompt.tensor("image_grid_thw").tolist()
    if len(grids) != len(prompt.sizes):
        raise ValueError(
            f"image_grid_thw must hold a row for each of {len(prompt.sizes)} pictures, got "
            f"{len(grids)}."
        )
    found = []
    for size, (_, height, width) in zip(prompt.sizes, grids, strict=True):
        columns, rows = Axis.whole(size[0]).resized(width), Axis.whole(size[1]).resized(height)
        found.append(cells_of(columns.patches(merge), rows.patches(merge), size, "grid"))
    return found


def paligemma(prompt: Prompt) -> list[list[Cell]]:
    """Stretched to a square, one token a patch."""
    return [_stretched(Axis.whole(w), Axis.whole(h), (w, h), prompt) for w, h in prompt.sizes]


def gemma3(prompt: Prompt) -> list[list[Cell]]:
    """Stretched to a square, a token for each square of patches; crops of long pictures behind."""
    vision = prompt.config.vision_config
    side = vision.image_size // vision.patch_size
    pooled = side // int(prompt.config.mm_tokens_per_image**0.5)

    def whole(size: tuple[int, int], view: str) -> list[Cell]:
        return _stretched(Axis.whole(size[0]), Axis.whole(size[1]), size, prompt, pooled, view)

    plain = [whole(size, "grid") for size in prompt.sizes]
    if prompt.fits([len(cells) for cells in plain]):
        return plain
    found = []
    for size in prompt.sizes:
        crops = [
            _stretched(columns, rows, size, prompt, pooled, "crop")
            for rows, columns in product(*_panned(size, prompt))
        ]
        first = whole(size, "overview" if crops else "grid")
        found.append([cell for part in (first, *crops) for cell in part])
    return found


def _stretched(
    columns: Axis,
    rows: Axis,
    size: tuple[int, int],
    prompt: Prompt,
    pooled: int = 1,
    view: str = "grid",
) -> list[Cell]:
    """A part of a picture stretched to what the tower is shown."""
    width, height = prompt.shown()
    columns, rows = columns.resized(width), rows.resized(height)
    return cells_of(*prompt.patches(columns, rows, pooled), size, view)


def _panned(size: tuple[int, int], prompt: Prompt) -> tuple[list[Axis], list[Axis]]:
    """Rows and columns of the crops of a long picture by pan and scan; none of any other."""
    least = prompt.setting("pan_and_scan_min_crop_size", 256)
    most = prompt.setting("pan_and_scan_max_num_crops", 4)
    long, short = max(size), min(size)
    if long / short < prompt.setting("pan_and_scan_min_ratio_to_activate", 1.2):
        return [], []
    count = min(most, max(2, min(int(long / least), int(long / short + 0.5))))
    length = -(-long // count)
    if min(length, short) < least:
        return [], []
    whole = [Axis.whole(min(size))]
    parts = [
        Axis.whole(long).window(first, min(length, long - first))
        for first in range(0, length * count, length)
    ]
    return (whole, parts) if size[0] >= size[1] else (parts, whole)


FAMILIES = {
    "llava": Family(llava, ("CLIPImageProcessor", "LlavaImageProcessor", "SiglipImageProcessor")),
    "qwen2_vl": Family(qwen, ("Qwen2VLImageProcessor",)),
    "qwen2_5_vl": Family(qwen, ("Qwen2VLImageProcessor",)),
    "qwen3_vl": Family(qwen, ("Qwen2VLImageProcessor",)),
    "gemma3": Family(gemma3, ("Gemma3ImageProcessor",)),
    "paligemma": Family(paligemma, ("SiglipImageProcessor",)),
}
