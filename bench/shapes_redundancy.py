"""The same object twice (paper, Fig. 5): which suppression still finds it?

While one of two equal objects is suppressed, the model reads the other. Pictures show the same
object ``twice``, and, as the control, two of different names, of which the first is asked for
(``once``); areas are balanced in both. What is suppressed, in mode ``min_shift`` with factor 0.1:

- ``patch``: one image token at a time, alone or with all tokens like it (κ: the least cosine of the
  input embeddings that counts);
- ``object``: all tokens of an object as one unit, beside single patches elsewhere, for someone who
  knows where objects stand but not which are alike;
- ``all``: both objects together: the most that there is to see.

*Found*, of a picture: more than half of the positive relevance stands on the pixels of the named
objects (they cover about a tenth of the picture), and the unit with the largest relevance overlaps
one of them. *On it*: that share. *Strength*: the largest relevance of a unit there over that of all
tokens of the named objects suppressed together (by the same method, without κ): how much of what
the objects do is seen at all. Units are made of whole patches, about half of whose pixels belong to
the object that they overlap: even ``all`` stands on it only so far, and is *found* as rarely.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

import atman_triton as atman
from atman_triton.demo.shapes import DEMO_PROMPT, Picture, make_picture, make_redundant_picture
from atman_triton.engine import undisturbed
from atman_triton.granularity import Images
from atman_triton.images.pointing import covered, share_inside
from atman_triton.methods import Measures
from atman_triton.perturbations import Effect, Settings
from atman_triton.perturbations import Unit as Perturbation
from atman_triton.pieces import Unit
from atman_triton.units import lay_out
from bench.shapes_rows import Row, Setting, average, rate, row

EFFECTS: dict[str, Effect] = {"direct": "direct", "exact": "total"}
KAPPAS = {"direct": (None, 0.4, 0.6, 0.8), "exact": (None, 0.6)}
STANDS = ("twice", "once")
MODE, FACTOR = "min_shift", 0.1
_HALF = 0.5


class Found(NamedTuple):
    """What a setting gave for one picture; see above."""

    on: float
    top: bool
    strength: float

    @property
    def found(self) -> bool:
        """Whether the object was found."""
        return self.top and self.on > _HALF


def picture_of(stands: str, number: int) -> Picture:
    """One of the pictures, from 0."""
    if stands == "twice":
        return make_redundant_picture(f"redundancy-{number}")
    return make_picture(f"redundancy-once-{number}", 2, balanced=True)


def examine(model: Any, processor: Any, number: int) -> dict[str, dict[Setting, Found]]:
    """One picture of each kind by all settings."""
    return {stands: judged(model, processor, picture_of(stands, number)) for stands in STANDS}


def judged(model: Any, processor: Any, picture: Picture) -> dict[Setting, Found]:
    """One picture, asked for the name of its first object."""
    name = picture.objects[0].name
    masks = [torch.from_numpy(shape.mask) for shape in picture.objects]
    equal = [m for m, shape in zip(masks, picture.objects, strict=True) if shape.name == name]
    named = torch.stack(equal).any(0)
    found: dict[Setting, Found] = {}
    whole: dict[str, float] = {}
    for kappa in KAPPAS["direct"]:
        patches, engine = opened(model, processor, picture, f" {name}", kappa)
        several = {"patch": patches}
        if kappa is None:
            several = {
                "all": grouped(patches, [named]),
                "object": grouped(patches, masks),
            } | several
        with undisturbed(model):
            for method, what in itertools.product(EFFECTS, several):
                if kappa in KAPPAS[method]:
                    units, effect = several[what], EFFECTS[method]
                    flat = [Perturbation(unit.tokens) for unit in units]
                    rises = (engine.base_logprobs - engine.perturb(flat, effect)).double().mean(-1)
                    if what == "all":
                        whole[method] = float(rises[0])
                    setting = Setting(method, MODE, kappa, what)
                    found[setting] = judge(units, rises, named, whole[method])
    return found


def opened(
    model: Any, processor: Any, picture: Picture, target: str, kappa: float | None
) -> tuple[list[Unit], Measures]:
    """A picture's patches, and the engine that suppresses them."""
    task = atman.Explainer(model, processor, progress=False).task
    chosen = Settings(FACTOR, MODE, similarity=kappa)
    with undisturbed(model):
        read = task.read([picture.image, DEMO_PROMPT])
        answers = task.given(read, [target], None, alone=True, target_span=None)
        layout = lay_out(read.words, answers.tokens, explain_only=Images(), pictures=read.pictures)
        engine = task.measures(
            read, answers, layout, chosen, "logprob", lambda _: None, lambda _: None
        )
    return layout.units, engine


def grouped(patches: Sequence[Unit], masks: Sequence[Tensor]) -> list[Unit]:
    """The patches that overlap a mask as one unit, for each mask in turn; then the others."""
    rest, units = list(patches), []
    for mask in masks:
        inside = [unit for unit in rest if covered(unit, mask) > 0]
        rest = [unit for unit in rest if unit not in inside]
        units.append(
            replace(
                inside[0],
                tokens=tuple(token for unit in inside for token in unit.tokens),
                boxes=tuple(box for unit in inside for box in unit.boxes),
            )
        )
    return units + rest


def judge(units: Sequence[Unit], rises: Tensor, named: Tensor, whole: float) -> Found:
    """Whether the named objects stand out.

    Args:
        rises: ``[units]``, of the loss of the name, nats per token, each suppressed.
        named: ``[H, W]`` bool, the pixels of the objects that bear the name.
        whole: The rise when all their tokens are suppressed together.
    """
    on = share_inside(units, rises, named)
    over = torch.tensor([covered(unit, named) > 0 for unit in units])
    best = float(rises[over].max())
    return Found(
        0.0 if on != on else on,
        bool(over[rises.argmax()]),
        best / whole if whole > 0 else 0.0,
    )


def summarise(found: Sequence[dict[str, dict[Setting, Found]]]) -> list[Row]:
    """Rows over pictures."""
    rows = []
    for stands in STANDS:
        for setting in found[0][stands]:
            own = [each[stands][setting] for each in found]
            numbers = {
                "found": rate([each.found for each in own]),
                "top on it": rate([each.top for each in own]),
                "on it": average([each.on for each in own]),
                "strength": average([each.strength for each in own]),
            }
            rows += [
                row("redundancy", stands, setting, measure, len(own), values)
                for measure, values in numbers.items()
            ]
    return rows
