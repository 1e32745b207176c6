"""Explanations of pictures, sounds and classes made by hand: no model, known numbers."""

import torch
from PIL import Image

from atman_triton.explanation import Explanation, Target, Unit
from atman_triton.pictures import Picture, Sound

GREY = (128, 128, 128)


def patch(image, box, level="patch", text=None):
    """A unit of a picture."""
    left, top, width, height = (f"{value:.4g}" for value in box)
    text = text or f"{level} at {left},{top}, {width}×{height}"
    return Unit(text, (0,), None, None, "prompt", level=level, image=image, boxes=(box,))


def grid(size, columns, rows, image=0):
    """Patches all over a picture, row by row."""
    width, height = size[0] / columns, size[1] / rows
    return [
        patch(image, (width * column, height * row, width, height))
        for row in range(rows)
        for column in range(columns)
    ]


def explained(units, scores, prompt="", answers=(" cat",), sizes=((40, 20),), **changes):
    """An explanation of pictures of these sizes in front of a prompt, with a row per answer.

    Args:
        units: Those of pictures or a sound; every word of the prompt is one more, behind them.
        scores: Of each answer, of each unit.
        answers: Of one token each.
    """
    at = 0
    words = []
    for word in prompt.split(" ") if prompt else []:
        start = max(0, at - 1)
        words.append(Unit(prompt[start : at + len(word)], (0,), start, at + len(word), "prompt"))
        at += len(word) + 1
    units = [*units, *words]
    text, targets, stops = prompt, [], []
    for branch, answer in enumerate(answers):
        start, stop = len(text), len(text) + len(answer)
        targets.append(Target(answer, 1000, branch, start, stop, branch))
        text += answer
        stops.append(stop)
    base = torch.tensor([-0.5 * (branch + 1) for branch in range(len(answers))])
    fields = {
        "text": text,
        "prompt_stop": len(prompt),
        "units": units,
        "targets": targets,
        "base_logprobs": base,
        "suppressed_logprobs": base[:, None] - torch.tensor(scores, dtype=torch.float32),
        "target_stops": stops,
        "pictures": [Picture.of(Image.new("RGB", size, GREY), 0) for size in sizes],
        "provenance": {"model": "toy"},
    }
    return Explanation(**fields | changes)


def corner(size=(40, 20), columns=4, rows=2, **changes):
    """A picture whose patch at the top left supports, and that at the bottom right opposes."""
    units = grid(size, columns, rows)
    scores = [2.0, *[0.0] * (len(units) - 2), -1.0]
    return explained(units, [scores], sizes=(size,), **changes)


def seen(prompt="A picture of a", answers=(" cat", " dog")):
    """Two answers about one picture and a prompt: the left half is the cat, the right the dog."""
    units = grid((40, 20), 4, 2)
    cat = [1.0, 0.5, 0.0, -0.25] * 2
    words = [0.0, 0.25, 0.0, 0.0]
    scores = [cat + words, [0.5 * value for value in cat[::-1]] + words]
    return explained(units, scores[: len(answers)], prompt, answers)


def heard(**changes):
    """A sound of two seconds in quarters, of which the third supports and the first opposes."""
    units = []
    for start in (0.0, 0.5, 1.0, 1.5):
        span = (start, start + 0.5)
        name = f"{start:.2f}–{start + 0.5:.2f} s"
        units.append(Unit(name, (0,), None, None, "prompt", level="frame", seconds=span))
    fields = {"sound": Sound.of([0.0, 1.0, 0.5, 0.0], 2)} | changes
    return explained(units, [[-1.0, 0.0, 2.0, 0.0]], sizes=(), **fields)


def classified(quantity="logprob", answers=("POSITIVE", "NEGATIVE"), **changes):
    """A text and its classes, or what a regression makes of it."""
    scores = [[0.1, 1.5, 0.3, -0.9], [-0.1, -1.1, 0.0, 0.8]][: len(answers)]
    facts = {"provenance": {"model": "toy", "classes": list(answers)}}
    fields = facts | {"quantity": quantity} | changes
    return explained([], scores, "a great film, slow", answers, sizes=(), **fields)
