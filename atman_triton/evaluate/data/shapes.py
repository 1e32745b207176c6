"""Fresh pictures of two coloured shapes of like size, one of which is named.

The other one is as large and as much a thing to name: a heat map that marks what there is to see,
rather than what the answer rests on, is half right at best.
"""

from __future__ import annotations

import itertools
import random
from typing import Any

from ...demo.shapes import DEMO_PROMPT, make_picture
from ...demo.shapes.questions import PROMPTS
from ..examples import Example
from .asking import Asking
from .gather import Gathered, Skipped, gather

LEAST_CHANCE = 0.1
UNLIKELY = f"the model gives the name a chance below {LEAST_CHANCE:.0%}"

_PATIENCE = 200  # pictures in a row whose name the model finds unlikely


def load_shapes(
    limit: int,
    *,
    seed: int = 0,
    model: Any = None,
    processor: Any = None,
    progress: bool = False,
) -> Gathered[Example]:
    """Pictures that training never draws, with the name of one of their two objects as target.

    The prompt is ``[image, "This is a picture of a"]``, the mask that of the named object, which is
    the first or the second by chance. Either name is right, so at best the model gives both a
    chance of a half; what it gives less than a tenth is left out, as it does not see that object.
    ``facts["chance"]`` is what it gives. ``reworded`` has another of the prompts that the shipped
    model knows, where the name keeps that chance. ``group`` is the named object's kind.

    Args:
        limit: How many.
        seed: Of the pictures.
        model: Keep only names that this model finds likely; None keeps all.
        processor: Its processor.
        progress: Show a progress bar.
    Raises: ValueError: if the model finds none of the first 200 likely.
    """
    asking = None if model is None else Asking(model, processor)
    found = gather(
        "shapes",
        (_example(number, seed, asking) for number in itertools.count()),
        limit,
        patience=_PATIENCE,
        progress=progress,
    )
    alike = sum(example.reworded is None for example in found.kept)
    if alike:
        found.notes.append(f"shapes: {alike} without another prompt that keeps the name's chance")
    if asking is None:
        found.notes.append("shapes: no model was given, so the chance of the names is unknown")
    return found


def _example(number: int, seed: int, asking: Asking | None) -> Example | Skipped:
    salt = f"evaluate-shapes-{seed}-{number}"
    picture = make_picture(salt, 2, balanced=True)
    rng = random.Random(f"{salt}-named")
    index = rng.randrange(2)
    named, other = picture.objects[index], picture.objects[1 - index]
    target, prompt = f" {named.name}", [picture.image, DEMO_PROMPT]
    again: list[Any] | None = [picture.image, rng.choice([p for p in PROMPTS if p != DEMO_PROMPT])]
    facts: dict[str, Any] = {
        "class": named.name,
        "other": other.name,
        "colour": named.colour,
        "mask_share": named.area / named.mask.size,
        "width": picture.image.width,
        "height": picture.image.height,
    }
    if asking is not None:
        facts["chance"] = asking.said(prompt, target).chance
        if facts["chance"] < LEAST_CHANCE:
            return Skipped(UNLIKELY)
        if asking.said(again, target).chance < LEAST_CHANCE:
            again = None
    return Example(
        id=f"shapes-{seed}-{number}",
        prompt=prompt,
        target=target,
        mask=named.mask,
        group=named.kind,
        reworded=again,
        facts=facts,
    )
