"""Pictures of every kind read as models are shown them."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from PIL import Image

from atman_triton.images import readable

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
