"""Pictures of a prompt, copied, painted over and put back where they stood."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from ..chat import is_image
from ..images import readable
from ..pieces import Box

if TYPE_CHECKING:
    from PIL.Image import Image


def images_of(prompt: Any) -> list[Image]:
    """The pictures of a prompt, in order, as the model is shown them."""
    found: list[Image] = []
    _walk(prompt, lambda image: found.append(readable(image)))
    return found


def with_images(prompt: Any, images: Iterator[Image]) -> Any:
    """The prompt with other pictures in the place of its own, in order."""
    return _walk(prompt, lambda _: next(images))


def mean_colour(image: Image) -> tuple[int, int, int]:
    """Of all pixels of a picture in RGB."""
    import numpy as np

    red, green, blue = np.asarray(image, np.float64).reshape(-1, 3).mean(0).round().astype(int)
    return int(red), int(green), int(blue)


def painted(image: Image, boxes: Iterable[Box], colour: tuple[int, int, int]) -> Image:
    """A picture in RGB, the pixels whose centre lies in a box painted, at least one of each."""
    import numpy as np
    from PIL.Image import fromarray

    pixels = np.array(image)
    for left, top, width, height in boxes:
        columns, rows = _pixels(left, width, image.width), _pixels(top, height, image.height)
        pixels[rows, columns] = colour
    return fromarray(pixels)


@lru_cache(maxsize=4096)
def _pixels(start: float, length: float, size: int) -> slice:
    first = min(max(0, math.ceil(start - 0.5)), size - 1)
    return slice(first, min(size, max(first + 1, math.ceil(start + length - 0.5))))


def _walk(item: Any, change: Callable[[Image], Any]) -> Any:
    """A prompt, every picture in it changed."""
    from PIL.Image import Image

    if isinstance(item, Image):
        return change(item)
    if isinstance(item, Mapping):
        if is_image(item):
            return {**item, "image": change(item["image"])}
        return {**item, "content": _walk(item["content"], change)} if "content" in item else item
    if isinstance(item, (list, tuple)):
        return [_walk(each, change) for each in item]
    return item
