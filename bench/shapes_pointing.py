"""Does the relevance of a name stand on the object that bears it? Two objects, both named.

Every picture shows two objects of balanced areas (the larger at most 1.2 times the smaller), and is
explained for both names. *Right*, of a target: more of the positive relevance stands on the pixels
of the object that it names than on those of the other one. *Both*: so it is for either target on
the same picture. *On it*: the share of the positive relevance that stands there; a patch's
relevance is spread evenly over its pixels. *Top on it*: the patch with the largest relevance
overlaps the named object.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

import atman_triton as atman
from atman_triton.demo.shapes import DEMO_PROMPT, Picture, make_picture
from atman_triton.images.pointing import covered, share_inside
from bench.shapes_rows import Row, Setting, average, rate, row

SETTINGS: tuple[Setting, ...] = (
    Setting("direct"),
    *(Setting("direct", similarity=kappa) for kappa in (0.4, 0.6, 0.8)),
    *(Setting("direct", mode) for mode in ("multiplicative", "log_additive")),
    *(Setting("direct", mode, 0.6) for mode in ("multiplicative", "log_additive")),
    Setting("direct", units="6x6"),
    Setting("exact"),
    Setting("exact", similarity=0.6),
    *(Setting("exact", mode) for mode in ("multiplicative", "log_additive")),
    Setting("exact", units="6x6"),
)


class Pointed(NamedTuple):
    """What one explanation of a picture gave, target by target.

    Attributes:
        on: Share of the positive relevance on the named object.
        off: The same on the other one.
        top: Whether the patch with the largest relevance overlaps the named object.
        forwards: Of the whole explanation, in passes over the prompt.
    """

    on: tuple[float, ...]
    off: tuple[float, ...]
    top: tuple[bool, ...]
    forwards: float

    @property
    def right(self) -> list[bool]:
        """Of each target."""
        return [on > off for on, off in zip(self.on, self.off, strict=True)]


def picture_of(number: int) -> Picture:
    """One of the pictures, from 0."""
    return make_picture(f"pointing-{number}", 2, balanced=True)


def explained(model: Any, processor: Any, picture: Picture, setting: Setting) -> atman.Explanation:
    """Both names of a picture at once."""
    explainer = atman.Explainer(
        model,
        processor,
        method=setting.method,  # pyright: ignore[reportArgumentType]
        mode=setting.mode,
        similarity=setting.similarity,
        progress=False,
    )
    return explainer.explain(
        [picture.image, DEMO_PROMPT],
        targets=[f" {shape.name}" for shape in picture.objects],
        image_granularity=setting.units,
    )


def pointed(explanation: atman.Explanation, picture: Picture) -> Pointed:
    """Where the relevance of each target stands; nowhere if none is positive."""
    masks = [torch.from_numpy(shape.mask) for shape in picture.objects]
    on, off, top = [], [], []
    seen = [place for place, unit in enumerate(explanation.units) if unit.boxes]
    for index, values in enumerate(explanation.relevances):
        shares = [share_inside(explanation.units, values, mask) for mask in masks]
        shares = [0.0 if share != share else share for share in shares]
        on.append(shares[index])
        off.append(max(share for other, share in enumerate(shares) if other != index))
        best = max(seen, key=lambda place, values=values: float(values[place]))
        top.append(covered(explanation.units[best], masks[index]) > 0)
    return Pointed(tuple(on), tuple(off), tuple(top), explanation.provenance["forwards"])


def examine(model: Any, processor: Any, number: int) -> dict[Setting, Pointed]:
    """One picture by all settings."""
    picture = picture_of(number)
    return {
        setting: pointed(explained(model, processor, picture, setting), picture)
        for setting in SETTINGS
    }


def summarise(found: Sequence[dict[Setting, Pointed]]) -> list[Row]:
    """Rows over pictures."""
    rows = []
    for setting in found[0]:
        own = [each[setting] for each in found]
        numbers = {
            "right": (len(own) * 2, rate([right for each in own for right in each.right])),
            "both": (len(own), rate([all(each.right) for each in own])),
            "top on it": (len(own) * 2, rate([top for each in own for top in each.top])),
            "on it": (len(own) * 2, average([share for each in own for share in each.on])),
            "on the other": (len(own) * 2, average([share for each in own for share in each.off])),
            "forwards": (len(own), average([each.forwards for each in own])),
        }
        rows += [
            row("pointing", "two objects", setting, measure, count, values)
            for measure, (count, values) in numbers.items()
        ]
    return rows
