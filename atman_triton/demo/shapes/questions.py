"""What the model is asked about a picture, and the answers."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import NamedTuple

from .pictures import COLOURS, KINDS, Picture, Shape

DEMO_PROMPT = "This is a picture of a"
PROMPTS: tuple[str, ...] = (DEMO_PROMPT, "Here is a", "The picture shows a")

_PRESENT = ("Is there a {}? A:", "Do you see a {}? A:", "Does the picture show a {}? A:")
_LIKED = ("Does {} like something in the picture? A:", "Is there something that {} likes? A:")
_COLOUR = ("What colour is the {}? A:", "Which colour does the {} have? A:")
_PEOPLE = ("Tom", "Ann", "Ben", "Eve")


class Question(NamedTuple):
    """A question about a picture.

    Attributes:
        text: what stands behind the image, without a space at its end.
        answer: how the model should go on; begins with a space.
        about: indices of the picture's objects that the answer names or that decide it. What is
            not there has none, but for an object asked for those of its colour or its kind.
        fact: character span ``(start, stop)`` of the statement that decides it with the picture,
            ``None`` where the picture alone does.
    """

    text: str
    answer: str
    about: tuple[int, ...]
    fact: tuple[int, int] | None = None


def name_question(picture: Picture, index: int, prompt: str = DEMO_PROMPT) -> Question:
    """The prompt to name an object, with one of the objects as the answer."""
    name = picture.objects[index].name
    about = tuple(i for i, shape in enumerate(picture.objects) if shape.name == name)
    return Question(prompt, f" {name}", about)


def presence_question(rng: random.Random, picture: Picture, answer: bool) -> Question:
    """Whether an object is there, such as "Is there a red circle? A:".

    What is not there shares its colour with one of the objects, or its kind, as often.
    """
    near = rng.choice(picture.objects)
    asked = near.name
    if not answer:
        names = {shape.name for shape in picture.objects}
        others = (
            [f"{near.colour} {kind}" for kind in KINDS],
            [f"{colour} {near.kind}" for colour in COLOURS],
        )
        asked = rng.choice([name for name in rng.choice(others) if name not in names])
    words = asked.split()
    about = _where(
        picture,
        (lambda shape: shape.name == asked)
        if answer
        else (lambda shape: shape.colour == words[0] or shape.kind == words[1]),
    )
    return Question(rng.choice(_PRESENT).format(asked), _yes_or_no(answer), about)


def liking_question(
    rng: random.Random, picture: Picture, answer: bool, *, people: int = 1
) -> Question:
    """Whether the picture shows what somebody likes: neither text nor picture alone decides it.

    Such as "Tom likes red things. Does Tom like something in the picture? A:".

    Args:
        rng: the generator to draw from.
        picture: what is asked about.
        answer: whether it shows what the person asked for likes.
        people: up to 4, with a statement each, of whom one is asked for.
    """
    asked, *others = rng.sample(_PEOPLE, people)
    liked = _liked(rng, picture, answer)
    decides = f"{asked} likes {_in_general(liked)}."
    statements = [decides]
    for person in others:
        value = _liked(rng, picture, rng.random() < 0.5)
        statements.append(f"{person} likes {_in_general(value)}.")
    rng.shuffle(statements)
    text = " ".join([*statements, rng.choice(_LIKED).format(asked)])
    start = text.index(decides)
    about = _where(picture, lambda shape: liked in (shape.colour, shape.kind))
    return Question(text, _yes_or_no(answer), about, (start, start + len(decides)))


def _liked(rng: random.Random, picture: Picture, there: bool) -> str:
    """A colour or a kind that the picture shows, or does not."""
    shown = {value for shape in picture.objects for value in (shape.colour, shape.kind)}
    values = rng.choice((tuple(COLOURS), KINDS))
    return rng.choice([value for value in values if (value in shown) == there])


def colour_question(rng: random.Random, picture: Picture) -> Question | None:
    """The colour of an object whose kind nothing else in the picture has; ``None`` without one."""
    kinds = [shape.kind for shape in picture.objects]
    single = [index for index, kind in enumerate(kinds) if kinds.count(kind) == 1]
    if not single:
        return None
    index = rng.choice(single)
    text = rng.choice(_COLOUR).format(kinds[index])
    return Question(text, f" {picture.objects[index].colour}", (index,))


def _in_general(value: str) -> str:
    """``"red"`` as "red things", ``"cross"`` as "crosses"."""
    return f"{value} things" if value in COLOURS else value + ("es" if value[-1] == "s" else "s")


def _yes_or_no(answer: bool) -> str:
    return " yes" if answer else " no"


def _where(picture: Picture, holds: Callable[[Shape], bool]) -> tuple[int, ...]:
    return tuple(index for index, shape in enumerate(picture.objects) if holds(shape))
