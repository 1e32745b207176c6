"""Pictures and sounds on the page: what is seen, and where units lie on it.

A region is a span like those of the text, so that hovering, keys and colours work alike; it lies
over its picture by shares of width and height.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from statistics import median
from typing import TYPE_CHECKING

from . import heat, wording

if TYPE_CHECKING:
    from ..explanation import Explanation
    from ..pictures import Picture, Sound

_SIDE = 420  # pixels of the longer side of a picture
_SEVERAL = 300  # of one of several
_MARKS = 8  # of time, about
_Shares = tuple[float, float, float, float]


@dataclass(frozen=True)
class Region:
    """A part of a picture or a sound that a unit is.

    Args:
        name: What it is called.
        shares: Left, top, width and height of the whole, 0 to 1.
        units: Of each explanation on the page, the units that lie exactly there.
    """

    name: str
    shares: _Shares
    units: list[list[int]]

    @property
    def style(self) -> str:
        """Where it lies, as CSS."""
        names = ("left", "top", "width", "height")
        pairs = zip(names, self.shares, strict=True)
        return "".join(f"{name}:{100 * share:.9g}%;" for name, share in pairs)


@dataclass(frozen=True)
class Framed:
    """A picture or a sound on the page.

    Args:
        start: Character of the explanation's text in front of which it stands.
        opening: Its HTML, in front of the regions.
        regions: In the order of the units.
    """

    start: int
    opening: str
    regions: list[Region]


def framed(explanations: Sequence[Explanation]) -> list[Framed]:
    """What the explanations see, in text order.

    Raises: ValueError: if they do not see the same.
    """
    first = explanations[0]
    if any(e.pictures != first.pictures or e.sound != first.sound for e in explanations):
        raise ValueError(
            "others must explain the same pictures and the same sound; write a page for each."
        )
    found = [
        Framed(picture.start, _picture(first, index), _on_picture(explanations, index))
        for index, picture in enumerate(first.pictures)
    ]
    if first.sound is not None:
        found.append(Framed(0, _sound(first.sound), _on_sound(explanations)))
    return sorted(found, key=lambda each: each.start)


def _on_picture(explanations: Sequence[Explanation], image: int) -> list[Region]:
    picture: Picture = explanations[0].pictures[image]
    width, height = picture.width, picture.height
    places = [
        (level, unit, (left / width, top / height, wide / width, high / height))
        for level, explanation in enumerate(explanations)
        for unit, each in enumerate(explanation.units)
        if each.image == image
        for left, top, wide, high in each.boxes
    ]
    return _regions(explanations, places)


def _on_sound(explanations: Sequence[Explanation]) -> list[Region]:
    places = []
    for level, explanation in enumerate(explanations):
        for unit, each in enumerate(explanation.units):
            if each.seconds is not None and explanation.sound is not None:
                start, stop = (share / explanation.sound.seconds for share in each.seconds)
                places.append((level, unit, (start, 0.0, min(1.0, stop) - start, 1.0)))
    return _regions(explanations, places)


def _regions(
    explanations: Sequence[Explanation], places: list[tuple[int, int, _Shares]]
) -> list[Region]:
    """One for every place, however many units lie there."""
    found: dict[_Shares, Region] = {}
    for level, unit, shares in places:
        if shares not in found:
            name = wording.place_name(explanations[level], unit)
            found[shares] = Region(name, shares, [[] for _ in explanations])
        found[shares].units[level].append(unit)
    return list(found.values())


def _picture(explanation: Explanation, image: int) -> str:
    picture = explanation.pictures[image]
    side = _SIDE if len(explanation.pictures) == 1 else _SEVERAL
    width, _ = heat.fitted(picture, side, side)
    few = " few" * (width >= 3 * picture.width)
    soft = width / picture.width * _patch(explanation, image) / 4
    data = base64.b64encode(picture.data).decode()
    name = f"{wording.image_name(explanation, image)}, {picture.width}×{picture.height} pixels"
    return (
        f'<span class="picture{few}" style="width:{width}px;--soft:{soft:.3g}px;'
        f'aspect-ratio:{picture.width}/{picture.height}">'
        f'<img alt="{escape(name)}" src="data:image/png;base64,{data}">'
    )


def _patch(explanation: Explanation, image: int) -> float:
    """The typical width of what stands on a picture, in its pixels."""
    widths = [box[2] for unit in explanation.units if unit.image == image for box in unit.boxes]
    return median(widths) if widths else 0.0


def _sound(sound: Sound) -> str:
    """Its loudness, twice as wide as there are parts, mirrored at the middle."""
    count = len(sound.envelope)
    loud = [max(1.0, 48 * peak) for peak in sound.envelope]
    upper = "".join(f"V{50 - peak:.4g}h1" for peak in loud)
    lower = "".join(f"V{50 + peak:.4g}h-1" for peak in reversed(loud))
    step = heat.step(sound.seconds / _MARKS)
    marks = "".join(
        f'<i class="mark" data-at="{mark * step:.6g} s" '
        f'style="left:{100 * mark * step / sound.seconds:.6g}%"></i>'
        for mark in range(math.ceil(sound.seconds / step * (1 - 1e-9)))
    )
    return (
        f'<span class="picture sound"><svg viewBox="0 0 {count} 100" preserveAspectRatio="none" '
        f'role="img" aria-label="sound, {sound.seconds:.4g} seconds">'
        f'<path d="M0 50{upper}{lower}Z"></path></svg>{marks}'
    )
