"""Pictures as models are shown them: upright, opaque, in colour."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # Pillow is asked for where there is a picture
    from PIL import Image

_16_BITS = frozenset({"I;16", "I;16L", "I;16B", "I;16N"})
_NO_SCALE = frozenset({"I", "F"})


def readable(image: Any) -> Image.Image:
    """A picture in RGB, turned as its camera says, on white where it is transparent.

    Left to themselves, processors read a picture as it lies in its file, and 16 bits as white.

    Args:
        image: A picture of Pillow; of an animation, the frame that it stands at.
    Raises:
        TypeError: naming what came, if it is no picture of Pillow.
        ValueError: if it has no pixels, or numbers of no known range (modes I and F).
    """
    from PIL import Image, ImageOps

    if not isinstance(image, Image.Image):
        raise TypeError(
            f"an image must be a PIL.Image, got {type(image).__name__}; open files with "
            "PIL.Image.open(path), make arrays into one with PIL.Image.fromarray(array)."
        )
    if min(image.size) < 1:
        raise ValueError(f"an image must have pixels, got {image.width}x{image.height}.")
    if image.mode in _NO_SCALE:
        raise ValueError(
            f"an image of mode {image.mode} does not say which number is white; convert it to "
            "mode L or RGB first."
        )
    image = ImageOps.exif_transpose(image)
    if image.mode in _16_BITS:
        whole = image.convert("I").point(lambda value: value / 257 + 0.5)
        return whole.convert("L").convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
