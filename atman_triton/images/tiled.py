"""Families that stretch a picture to whole tiles: Idefics 3, SmolVLM and InternVL; Mllama pads it.

Sources: the image processors and ``pixel_shuffle`` of the classes in transformers.
"""

from __future__ import annotations

from math import ceil, floor, inf

from .geometry import CLASS, PADDING, Axis, Cell, cells_of
from .prompt import Family, Prompt

_LARGEST = 4096  # pixels of an edge, to Idefics 3


def idefics3(prompt: Prompt) -> list[list[Cell]]:
    """Tiles row by row, then an overview; small pictures are shown once."""
    grids = [_idefics_grid(size, prompt) for size in prompt.sizes]
    return _tiled(grids, prompt.config.scale_factor, prompt)


def internvl(prompt: Prompt) -> list[list[Cell]]:
    """Tiles row by row, then an overview; what needs one tile only is shown once."""
    grids = [_internvl_grid(size, prompt) for size in prompt.sizes]
    return _tiled(grids, round(1 / prompt.config.downsample_ratio), prompt)


def _tiled(grids: list[tuple[int, int]], merged: int, prompt: Prompt) -> list[list[Cell]]:
    """Cells of pictures stretched to columns and rows of tiles.

    Args:
        grids: Of each picture; of one tile it has no overview.
        merged: A token is made of a square of so many by so many patches.
    """
    width, height = prompt.shown()

    def grid(columns: Axis, rows: Axis, size: tuple[int, int], view: str) -> list[Cell]:
        ready = columns.resized(width), rows.resized(height)
        return cells_of(*prompt.patches(*ready, merged), size, view)

    def whole(size: tuple[int, int], view: str) -> list[Cell]:
        return grid(Axis.whole(size[0]), Axis.whole(size[1]), size, view)

    once = [whole(size, "grid") for size in prompt.sizes]
    if prompt.fits([len(cells) for cells in once]):  # tiles may have been turned off for this call
        return once
    found = []
    for size, (across, down), single in zip(prompt.sizes, grids, once, strict=True):
        if across * down == 1:
            found.append(single)
            continue
        columns = Axis.whole(size[0]).resized(across).tiles(1)
        rows = Axis.whole(size[1]).resized(down).tiles(1)
        tiles = [grid(column, row, size, "crop") for row in rows for column in columns]
        found.append([cell for tile in (*tiles, whole(size, "overview")) for cell in tile])
    return found


def _idefics_grid(size: tuple[int, int], prompt: Prompt) -> tuple[int, int]:
    """Columns and rows of tiles that a picture is stretched to."""
    tile = prompt.edges("max_image_size")["longest_edge"]
    width, height = size
    if prompt.setting("do_resize", True):
        width, height = _fitted(size, prompt.edges("size")["longest_edge"])
    # The longer edge goes up to whole tiles, the shorter one after it.
    if width >= height:
        columns = ceil(width / tile)
        return columns, ceil(int(columns * tile / (width / height)) / tile)
    rows = ceil(height / tile)
    return ceil(int(rows * tile * (width / height)) / tile), rows


def _fitted(size: tuple[int, int], longest: int) -> tuple[int, int]:
    """A size with its longer edge of a length, the other one even, neither too large."""
    ratio = size[0] / size[1]
    if size[0] >= size[1]:
        width, height = longest, max(_even(int(longest / ratio)), 1)
    else:
        width, height = max(_even(int(longest * ratio)), 1), longest
    if max(width, height) <= _LARGEST:
        return width, height
    ratio = width / height
    if width >= height:
        return _LARGEST, max(int(_LARGEST / ratio), 1)
    return max(int(_LARGEST * ratio), 1), _LARGEST


def _even(number: int) -> int:
    return number + number % 2


def _internvl_grid(size: tuple[int, int], prompt: Prompt) -> tuple[int, int]:
    """Columns and rows of tiles whose ratio is closest to the picture's."""
    least, most = prompt.setting("min_patches", 1), prompt.setting("max_patches", 12)
    tile = prompt.edges("size")
    area = tile["width"] * tile["height"]
    edges = range(1, most + 1)
    grids = [(across, down) for across in edges for down in edges if least <= across * down <= most]
    best, smallest = (1, 1), inf
    for across, down in sorted(grids, key=lambda grid: grid[0] * grid[1]):
        difference = abs(size[0] / size[1] - across / down)
        # Of equals the larger, as long as it does not more than double the picture's pixels.
        worth = size[0] * size[1] > 0.5 * area * across * down
        if difference < smallest or (difference == smallest and worth):
            best, smallest = (across, down), difference
    return best


def mllama(prompt: Prompt) -> list[list[Cell]]:
    """Padded tiles row by row, each behind a class token, up to as many as any picture may have."""
    edge, _ = prompt.shown()
    ratios = prompt.tensor("aspect_ratio_ids")[0].tolist()
    slots = prompt.tensor("pixel_values").shape[2]
    if len(ratios) != len(prompt.sizes):
        raise ValueError(
            f"aspect_ratio_ids must hold an id for each of {len(prompt.sizes)} pictures, got "
            f"{len(ratios)}."
        )
    found = []
    for size, ratio in zip(prompt.sizes, ratios, strict=True):
        down, across = prompt.config.vision_config.supported_aspect_ratios[ratio - 1]
        columns, rows = _on_canvas(size, (across * edge, down * edge), edge)
        view = "grid" if across * down == 1 else "crop"
        tiles = [
            [CLASS, *cells_of(*prompt.patches(column, row), size, view)]
            for row in rows.tiles(edge)
            for column in columns.tiles(edge)
        ]
        unused = (slots - len(tiles)) * len(tiles[0])
        found.append([cell for tile in tiles for cell in tile] + [PADDING] * unused)
    return found


def _on_canvas(size: tuple[int, int], canvas: tuple[int, int], tile: int) -> tuple[Axis, Axis]:
    """A picture as large as a canvas lets it be, but not enlarged beyond a tile; padding behind."""
    most = [min(max(length, tile), limit) for length, limit in zip(size, canvas, strict=True)]
    scale = [limit / length for limit, length in zip(most, size, strict=True)]
    if scale[0] < scale[1]:
        fitted = most[0], min(floor(size[1] * scale[0]) or 1, most[1])
    else:
        fitted = min(floor(size[0] * scale[1]) or 1, most[0]), most[1]
    columns, rows = (
        Axis.whole(length).resized(pixels).window(0, limit)
        for length, pixels, limit in zip(size, fitted, canvas, strict=True)
    )
    return columns, rows


FAMILIES = {
    "idefics3": Family(idefics3, ("Idefics3ImageProcessor",)),
    "smolvlm": Family(idefics3, ("SmolVLMImageProcessor", "Idefics3ImageProcessor")),
    "internvl": Family(internvl, ("GotOcr2ImageProcessor",)),
}
CROSS = {"mllama": Family(mllama, ("MllamaImageProcessor",))}
