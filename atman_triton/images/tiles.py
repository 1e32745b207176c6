"""Image tokens grouped by the part of the picture that they stand in."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from .layout import ImageToken


def tiles(
    tokens: Sequence[ImageToken], size: tuple[int, int], grid: tuple[int, int]
) -> list[list[ImageToken]]:
    """The tokens of each tile of a picture, row by row from the top left, without empty tiles.

    A token belongs to the tile that the middle of its box stands in, whatever its view: what an
    overview and a crop show of one place is suppressed together. Tokens without a box (row ends,
    padding, class tokens) belong to no tile, but to the only tile of grid (1, 1), which is the
    whole image.

    Args:
        tokens: Of one picture.
        size: Its width and height.
        grid: Columns and rows of tiles.
    Raises: ValueError: if there are tokens of several pictures, or a grid has no tiles.
    """
    columns, rows = grid
    if min(grid) < 1:
        raise ValueError(f"grid must have at least one column and row, got {columns}x{rows}.")
    if len({token.image for token in tokens}) > 1:
        raise ValueError("tokens must be those of one image; divide them by their image first.")
    if grid == (1, 1):
        return [list(tokens)] if tokens else []
    found: defaultdict[tuple[int, int], list[ImageToken]] = defaultdict(list)
    for token in tokens:
        if token.box is not None:
            left, top, width, height = token.box
            row = _part((top + height / 2) / size[1], rows)
            column = _part((left + width / 2) / size[0], columns)
            found[row, column].append(token)
    return [found[place] for place in sorted(found)]


def _part(share: float, parts: int) -> int:
    """Which of equal parts a share of the length is in; on an edge, whatever rounding made of it,
    the later one."""
    return min(int(round(share * parts, 9)), parts - 1)
