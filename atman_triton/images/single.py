"""Families that show the vision tower each picture once, whole or its middle.

Sources: the image processors and ``get_image_features`` of the classes in transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

from .geometry import CLASS, Axis, Cell, cells_of
from .prompt import Prompt

# Vision towers -> whether the first of their tokens is a class token.
_HAS_CLASS = {"clip_vision_model": True, "siglip_vision_model": False, "internvl_vision": True}


def prepared(columns: Axis, rows: Axis, prompt: Prompt) -> tuple[Axis, Axis]:
    """What resizing and a centre crop make of a picture or a tile of one.

    Raises: UnsupportedModelError: if the processor resizes in another way.
    """
    if prompt.setting("do_resize", True):
        size = prompt.edges("size")
        if set(size) == {"shortest_edge"}:
            edge, short, long = size["shortest_edge"], *sorted((columns.pixels, rows.pixels))
            longer = int(edge * long / short)
            width, height = (edge, longer) if columns.pixels <= rows.pixels else (longer, edge)
        elif set(size) == {"height", "width"}:
            width, height = size["width"], size["height"]
        else:
            raise prompt.unknown(f"its processor resizes to {size}")
        columns, rows = columns.resized(width), rows.resized(height)
    if prompt.setting("do_center_crop", False):
        crop = prompt.edges("crop_size")
        columns, rows = columns.centred(crop["width"]), rows.centred(crop["height"])
    return columns, rows


def selected(cells: list[Cell], prompt: Prompt) -> list[Cell]:
    """The cells of a tower's tokens that go on to the language model.

    Raises: UnsupportedModelError: if the tower is of another kind.
    """
    tower = prompt.config.vision_config.model_type
    if tower not in _HAS_CLASS:
        raise prompt.unknown(
            f"its vision tower is a {tower}; known are {', '.join(sorted(_HAS_CLASS))}"
        )
    tokens = [CLASS, *cells] if _HAS_CLASS[tower] else cells
    return tokens[1:] if prompt.config.vision_feature_select_strategy == "default" else tokens


def llava(prompt: Prompt) -> list[list[Cell]]:
    """Resized, its middle cut out (CLIP) or all of it (SigLIP), one token a patch."""
    patch = prompt.config.vision_config.patch_size
    found = []
    for size in prompt.sizes:
        columns, rows = map(Axis.whole, size)
        if prompt.setting("do_pad", False):
            columns, rows = columns.padded(max(size)), rows.padded(max(size))
        columns, rows = prepared(columns, rows, prompt)
        if (columns.pixels, rows.pixels) != prompt.shown():
            raise ValueError(
                f"pixel_values of a picture of {size[0]}x{size[1]} pixels must show "
                f"{columns.pixels}x{rows.pixels} by the processor's settings, got "
                f"{'x'.join(map(str, prompt.shown()))}; do sizes fit the pictures?"
            )
        cells = cells_of(columns.patches(patch), rows.patches(patch), size, "grid")
        found.append(selected(cells, prompt))
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
    side = int(vision.image_size // vision.patch_size)
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
    patch = prompt.config.vision_config.patch_size * pooled
    columns, rows = columns.resized(width), rows.resized(height)
    return cells_of(columns.patches(patch), rows.patches(patch), size, view)


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


FAMILIES: dict[str, Callable[[Prompt], list[list[Cell]]]] = {
    "llava": llava,
    "qwen2_5_vl": qwen,
    "qwen3_vl": qwen,
    "gemma3": gemma3,
    "paligemma": paligemma,
}
