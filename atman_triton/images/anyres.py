"""LLaVA-NeXT and LLaVA-OneVision: the whole picture, then tiles of it, without their padding.

The picture is fitted into the best of some canvases, which is cut into tiles. Their patches make
one large grid; rows or columns of padding are taken off, and each row ends with a learnt token.
Sources: the image processors and ``pack_image_features`` of the classes in transformers.
"""

from __future__ import annotations

from math import ceil, sqrt

from transformers.image_processing_utils import select_best_resolution

from .geometry import NEWLINE, Axis, Cell, Span, cells_of, resampled, rows_of
from .prompt import Family, Prompt


def llava_next(prompt: Prompt) -> list[list[Cell]]:
    """An overview first, then the tiles."""
    return [
        [*_overview(size, prompt), *_lines(*_patches(size, prompt), size, "crop")]
        for size in prompt.sizes
    ]


def llava_onevision(prompt: Prompt) -> list[list[Cell]]:
    """The same with fewer, averaged tokens of large pictures; several in a prompt are not cut."""
    tower = prompt.config.vision_config
    most = int(prompt.config.vision_aspect_ratio.rpartition("_")[2])  # tiles' worth of tokens
    most *= (tower.image_size // tower.patch_size) ** 2
    together = _given_together(prompt)
    found = []
    for size, whole in zip(prompt.sizes, together, strict=True):
        if whole:
            columns, rows = (Axis.whole(length).padded(max(size)) for length in size)
            columns, rows = prompt.matched(columns, rows)
            found.append([*cells_of(*prompt.patches(columns, rows), size, "grid"), NEWLINE])
            continue
        columns, rows = _patches(size, prompt)
        ratio = sqrt(len(columns) * len(rows) / most)
        if ratio > 1.1:
            columns, rows = (resampled(each, int(len(each) // ratio)) for each in (columns, rows))
        found.append([*_overview(size, prompt), *_lines(columns, rows, size, "crop")])
    return found


def _given_together(prompt: Prompt) -> list[bool]:
    """Of each picture, whether it came in a list of several, as those of one chat message do."""
    counts = prompt.encoding.get("batch_num_images")
    if counts is None:
        return [False] * len(prompt.sizes)
    together = [int(count) != 1 for count in counts for _ in range(int(count))]
    if len(together) != len(prompt.sizes):
        raise ValueError(
            f"batch_num_images must count {len(prompt.sizes)} pictures, got {len(together)}."
        )
    return together


def _overview(size: tuple[int, int], prompt: Prompt) -> list[Cell]:
    width, height = _tile(prompt)
    columns, rows = Axis.whole(size[0]).resized(width), Axis.whole(size[1]).resized(height)
    columns, rows = prompt.matched(columns, rows)
    return prompt.selected(cells_of(*prompt.patches(columns, rows), size, "overview"))


def _tile(prompt: Prompt) -> tuple[int, int]:
    """Width and height that the whole picture is resized to."""
    size = prompt.edges("size")
    edge = size.get("shortest_edge", 0)
    return size.get("width", edge), size.get("height", edge)


def _patches(size: tuple[int, int], prompt: Prompt) -> tuple[list[Span], list[Span]]:
    """Columns and rows of patches of all tiles, without those that the model takes off."""
    width, height = size
    canvases = [tuple(each) for each in prompt.setting("image_grid_pinpoints")]
    if canvases != [tuple(each) for each in prompt.config.image_grid_pinpoints]:
        raise prompt.unknown("image_grid_pinpoints of the processor and the model differ")
    across, down = reversed(select_best_resolution((height, width), canvases))
    if across / width < down / height:
        fitted = across, min(ceil(height * (across / width)), down)
    else:
        fitted = min(ceil(width * (down / height)), across), down
    columns = Axis.whole(width).resized(fitted[0]).padded(across)
    rows = Axis.whole(height).resized(fitted[1]).padded(down)
    edge = prompt.edges("crop_size").get("height") or _tile(prompt)[1]
    tiles, lines = columns.tiles(edge), rows.tiles(edge)
    ready = [prompt.matched(tile, lines[0]) for tile in tiles]
    columns_of = [span for pair in ready for span in prompt.patches(*pair)[0]]
    ready = [prompt.matched(tiles[0], line) for line in lines]
    rows_of_ = [span for pair in ready for span in prompt.patches(*pair)[1]]
    return _unpadded(columns_of, rows_of_, size)


def _unpadded(
    columns: list[Span], rows: list[Span], size: tuple[int, int]
) -> tuple[list[Span], list[Span]]:
    """Without the patches that would be padding if the picture filled the grid the other way."""
    width, height = size
    if width / height > len(columns) / len(rows):
        fitted = int(round(height * (len(columns) / width), 7))
        off = (len(rows) - fitted) // 2
        return columns, rows[off : len(rows) - off]
    fitted = int(round(width * (len(rows) / height), 7))
    off = (len(columns) - fitted) // 2
    return columns[off : len(columns) - off], rows


def _lines(columns: list[Span], rows: list[Span], size: tuple[int, int], view: str) -> list[Cell]:
    """The cells of a grid, each row with its end."""
    return [cell for row in rows_of(columns, rows, size, view) for cell in (*row, NEWLINE)]


FAMILIES = {
    "llava_next": Family(llava_next, ("LlavaNextImageProcessor",)),
    "llava_onevision": Family(llava_onevision, ("LlavaOnevisionImageProcessor",)),
}
