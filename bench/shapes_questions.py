"""Questions with yes or no over a picture and a text together (paper, Fig. 20).

Of every picture with two objects four questions are asked, each with the method ``direct`` and
``exact``: whether an object is there (``present``; ``absent``: it is not, but one of its colour or
kind is), and whether somebody likes something in it, which a statement in front of the question
decides together with the picture (``liked``, ``not liked``).

The answer that is explained is the model's, the likelier one of " yes" and " no". *Answered*: it is
the right one. *On the picture*: the share of the absolute relevance that image tokens have, the
text's tokens the rest; *as one*: the same with the whole picture as one unit. *Object first*: the
image token with the largest relevance overlaps an object that the answer is about (to ``absent``,
one of the same colour or kind; where nothing in the picture is liked there is none). *Words first*:
the text token with the largest relevance stands in the words that decide: the name asked for, or
the statement on who is asked about. *Both*: object and words.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

import atman_triton as atman
from atman_triton.demo.shapes import Picture, make_picture
from atman_triton.demo.shapes.questions import Question, liking_question, presence_question
from atman_triton.images.pointing import covered
from bench.shapes_rows import Row, Setting, average, rate, row

KINDS = ("present", "absent", "liked", "not liked")
METHODS = ("direct", "exact")
ANSWERS = (" yes", " no")


class Answered(NamedTuple):
    """What one question gave; None where it does not apply."""

    answered: bool
    on_picture: float
    as_one: float
    object_first: bool | None
    words_first: bool

    @property
    def both(self) -> bool | None:
        """Whether object and words stand first."""
        return None if self.object_first is None else self.object_first and self.words_first


def asked(number: int) -> tuple[Picture, dict[str, Question]]:
    """One of the pictures, from 0, and its questions by kind."""
    rng = random.Random(f"questions-{number}")
    picture = make_picture(rng, 2, balanced=True)
    return picture, {
        "present": presence_question(rng, picture, True),
        "absent": presence_question(rng, picture, False),
        "liked": liking_question(rng, picture, True),
        "not liked": liking_question(rng, picture, False),
    }


def deciding(question: Question) -> tuple[int, int]:
    """The characters of a question's words that decide it: a statement, or the name asked for."""
    if question.fact is not None:
        return question.fact
    start = question.text.index(" a ") + 3
    return start, question.text.index("?")


def explained(
    model: Any,
    processor: Any,
    picture: Picture,
    question: Question,
    method: str,
    unit: str = "patch",
) -> atman.Explanation:
    """The likelier answer, by patches or by the picture as one unit, ``image``."""
    explainer = atman.Explainer(model, processor, method=method, progress=False)  # pyright: ignore[reportArgumentType]
    prompt = [picture.image, question.text]
    both = explainer.explain(prompt, targets=ANSWERS, image_granularity=unit)
    return both.branch(int(both.base_logprobs.argmax()))


def on_picture(explanation: atman.Explanation) -> float:
    """The share of the absolute relevance that units of the picture have."""
    units, sizes = explanation.units, explanation.relevance.abs().tolist()
    own = [(u, size) for u, size in zip(units, sizes, strict=True) if u.part == "prompt"]
    return sum(size for u, size in own if u.image is not None) / sum(size for _, size in own)


def judged(
    explanation: atman.Explanation, whole: atman.Explanation, picture: Picture, question: Question
) -> Answered:
    """Where the relevance stands, by patches and with the picture as one unit."""
    units, values = explanation.units, explanation.relevance
    seen = [place for place, unit in enumerate(units) if unit.image is not None]
    read = [p for p, unit in enumerate(units) if unit.image is None and unit.part == "prompt"]
    first, last = deciding(question)
    word = units[max(read, key=lambda place: float(values[place]))]
    patch = units[max(seen, key=lambda place: float(values[place]))]
    masks = [torch.from_numpy(picture.objects[index].mask) for index in question.about]
    start = explanation.text.index(question.text)
    return Answered(
        explanation.answer == question.answer,
        on_picture(explanation),
        on_picture(whole),
        any(covered(patch, mask) > 0 for mask in masks) if masks else None,
        (word.start or 0) - start < last and (word.stop or 0) - start > first,
    )


def examine(model: Any, processor: Any, number: int) -> dict[tuple[str, str], Answered]:
    """One picture, by kind of question and method."""
    picture, questions = asked(number)
    return {
        (kind, method): judged(
            explained(model, processor, picture, question, method),
            explained(model, processor, picture, question, method, "image"),
            picture,
            question,
        )
        for kind, question in questions.items()
        for method in METHODS
    }


def summarise(found: Sequence[dict[tuple[str, str], Answered]]) -> list[Row]:
    """Rows over pictures."""
    rows = []
    for kind, method in found[0]:
        own = [each[kind, method] for each in found]
        numbers = {
            "answered": rate([each.answered for each in own]),
            "on the picture": average([each.on_picture for each in own]),
            "as one": average([each.as_one for each in own]),
            "words first": rate([each.words_first for each in own]),
        }
        about = [each for each in own if each.object_first is not None]
        if about:
            numbers["object first"] = rate([bool(each.object_first) for each in about])
            numbers["both"] = rate([bool(each.both) for each in about])
        rows += [
            row("questions", kind, Setting(method), measure, len(own), values)
            for measure, values in numbers.items()
        ]
    return rows
