"""Pictures of every kind read as models are shown them, and image tokens grouped by tiles."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from PIL import Image

from atman_triton.images import ImageToken, readable, tiles

RED = (200, 30, 40)


def pixels_of(image):
    found: Any = image.convert("RGB").get_flattened_data()
    return list(found)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr"])
@pytest.mark.parametrize("size", [(1, 1), (5, 3), (3, 7)])
def test_an_opaque_picture_keeps_its_colours(mode, size):
    drawn = Image.new("RGB", size, RED).convert(mode)
    found = readable(drawn)
    assert found.mode == "RGB" and found.size == size
    assert pixels_of(found) == pixels_of(drawn)


@pytest.mark.parametrize("mode", ["RGBA", "PA", "RGBa"])
def test_what_is_transparent_is_white(mode):
    drawn = Image.new("RGBA", (3, 1), (*RED, 255))
    drawn.putpixel((1, 0), (*RED, 0))
    drawn.putpixel((2, 0), (*RED, 128))
    found = pixels_of(readable(drawn.convert(mode) if mode != "PA" else _with_palette(drawn)))
    assert found[0] == RED and found[1] == (255, 255, 255)
    assert found[2] == pytest.approx([255 + (c - 255) * 128 / 255 for c in RED], abs=1)


def _with_palette(drawn):
    colours = Image.new("P", drawn.size, 1)
    colours.putpalette([0, 0, 0, *RED])
    layered = colours.convert("PA")
    layered.putalpha(drawn.getchannel("A"))
    assert layered.mode == "PA"
    return layered


def test_greys_and_palettes_can_be_transparent():
    grey = Image.new("LA", (2, 1), (90, 255))
    grey.putpixel((1, 0), (90, 0))
    assert pixels_of(readable(grey)) == [(90, 90, 90), (255, 255, 255)]
    palette = Image.new("P", (2, 1), 1)
    palette.putpalette([9, 9, 9, *RED])
    palette.putpixel((0, 0), 0)
    palette.info["transparency"] = 0
    assert pixels_of(readable(palette)) == [(255, 255, 255), RED]


@pytest.mark.parametrize("mode", ["I;16", "I;16B"])
def test_sixteen_bits_become_eight(mode):
    values = [0, 257 * 7, 257 * 128 + 3, 65535]
    order = "big" if mode.endswith("B") else "little"
    drawn = Image.frombytes(mode, (4, 1), b"".join(v.to_bytes(2, order) for v in values))
    assert [pixel[0] for pixel in pixels_of(readable(drawn))] == [0, 7, 128, 255]


def test_a_picture_stands_upright():
    """A camera's note of how it was held, as in a file."""
    drawn = Image.new("RGB", (4, 2), "black")
    drawn.putpixel((0, 0), (255, 255, 255))
    note = Image.Exif()
    note[0x0112] = 6  # held so that the file's left edge is the top
    file = io.BytesIO()
    drawn.save(file, "PNG", exif=note)
    found = readable(Image.open(file))
    assert found.size == (2, 4)
    assert found.getpixel((1, 0)) == (255, 255, 255) and sum(map(sum, pixels_of(found))) == 765


@pytest.mark.parametrize("wrong", ["picture.png", torch.zeros(3, 4, 4), b"", None], ids=repr)
def test_what_is_no_picture_is_named(wrong):
    with pytest.raises(TypeError, match=rf"PIL\.Image, got {type(wrong).__name__}; open"):
        readable(wrong)


@pytest.mark.parametrize("size", [(0, 0), (0, 4), (4, 0)])
def test_a_picture_without_pixels_is_refused(size):
    with pytest.raises(ValueError, match=rf"must have pixels, got {size[0]}x{size[1]}\."):
        readable(Image.new("RGB", size))


@pytest.mark.parametrize("mode", ["I", "F"])
def test_numbers_without_a_range_are_refused(mode):
    with pytest.raises(ValueError, match=f"mode {mode} does not say which number is white"):
        readable(Image.new(mode, (2, 2)))


# --- tiles ----------------------------------------------------------------------------------------

SIZE = (60, 30)


def gridded(columns, rows, view="grid", first=0):
    """Tokens of a grid over the whole picture."""
    width, height = SIZE[0] / columns, SIZE[1] / rows
    return [
        ImageToken(first + row * columns + column, 0, box, view)
        for row in range(rows)
        for column in range(columns)
        for box in [(column * width, row * height, width, height)]
    ]


def places(found):
    return [[token.token for token in tile] for tile in found]


def test_tiles_run_by_rows_and_hold_what_stands_in_them():
    assert places(tiles(gridded(4, 4), SIZE, (2, 2))) == [
        [0, 1, 4, 5],
        [2, 3, 6, 7],
        [8, 9, 12, 13],
        [10, 11, 14, 15],
    ]
    assert places(tiles(gridded(4, 2), SIZE, (2, 1))) == [[0, 1, 4, 5], [2, 3, 6, 7]]


def test_the_grid_of_the_tokens_gives_each_its_own_tile():
    tokens = gridded(12, 12)
    assert places(tiles(tokens, SIZE, (12, 12))) == [[token.token] for token in tokens]


def test_an_overview_and_crops_of_one_place_go_together():
    tokens = gridded(2, 2, "overview") + gridded(4, 4, "crop", first=4)
    assert places(tiles(tokens, SIZE, (2, 2))) == [
        [0, 4, 5, 8, 9],
        [1, 6, 7, 10, 11],
        [2, 12, 13, 16, 17],
        [3, 14, 15, 18, 19],
    ]


@pytest.mark.parametrize("count", [3, 5, 7, 11])
def test_a_middle_on_an_edge_goes_to_the_later_tile_everywhere(count):
    """Of an odd number of tokens the middle one stands on the edge between two halves."""
    for shape, grid in (((count, 1), (2, 1)), ((1, count), (1, 2))):
        first, second = places(tiles(gridded(*shape), SIZE, grid))
        assert first == list(range(count // 2)) and second == list(range(count // 2, count))


def test_tiles_without_a_token_are_left_out():
    found = tiles(gridded(2, 2), SIZE, (3, 3))
    assert places(found) == [[0], [1], [2], [3]]


def test_tokens_without_a_place_are_only_in_the_whole_image():
    tokens = [*gridded(2, 1), ImageToken(2, 0, None, "newline"), ImageToken(3, 0, None, "padding")]
    assert places(tiles(tokens, SIZE, (2, 1))) == [[0], [1]]
    assert places(tiles(tokens, SIZE, (1, 1))) == [[0, 1, 2, 3]]
    assert tiles([], SIZE, (1, 1)) == []


def test_wrong_tiles_are_refused():
    with pytest.raises(ValueError, match="at least one column and row, got 0x2"):
        tiles(gridded(2, 2), SIZE, (0, 2))
    with pytest.raises(ValueError, match="must be those of one image"):
        tiles([*gridded(1, 1), ImageToken(1, 1, (0.0, 0.0, 1.0, 1.0), "grid")], SIZE, (2, 2))
