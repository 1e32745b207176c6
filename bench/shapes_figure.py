"""Pictures of ``bench.shapes``: its rows as charts, some explanations, and some failures."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import atman_triton as atman
from atman_triton.demo.shapes import DEMO_PROMPT, Picture
from atman_triton.render.heat import heat, overlay, resized
from atman_triton.render.palette import LIGHT
from bench import shapes_questions as questions
from bench.shapes_pointing import explained, picture_of, pointed
from bench.shapes_redundancy import picture_of as redundant_picture
from bench.shapes_rows import Row, Setting

EXAMPLE = 7  # of its relevance as much stands on the named objects as on the average picture
_SHADES = ("#2166ac", "#92c5de", "0.75", "0.5")
_SIDE = 384  # pixels of a picture
_WIDTH = 34  # characters of a title's line
_FAILURES = 4
_PICTURES = 100
_SHOWN_KAPPA = 0.6


def draw(model: Any, processor: Any, rows: Sequence[Row], path: Path) -> None:
    """All parts in one picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 12.5), layout="constrained")
    parts: Any = figure.subfigures(3, 1, height_ratios=(2.1, 1, 1.35))
    charts, examples, failures = parts
    first, second, third = charts.subplots(1, 3)
    _pointing(first, rows)
    _redundancy(second, rows)
    _questions(third, rows)
    _show(examples, [*_examples(model, processor), *_redundant(model, processor)])
    wrong = [*_misplaced(model, processor), *_failures(model, processor)]
    _show(failures, wrong[:_FAILURES])
    figure.savefig(path, dpi=110)


def draw_example(model: Any, processor: Any, path: Path) -> None:
    """One of the pictures, beside what its patches do for both of its names."""
    from matplotlib.figure import Figure

    picture = picture_of(EXAMPLE)
    explanation = explained(model, processor, picture, Setting("direct"))
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    panels = [("what the model is shown", np.asarray(resized(picture.image, (_SIDE, _SIDE))))]
    for branch, answer in enumerate(explanation.answers):
        title = f"{DEMO_PROMPT} {answer.strip()}"
        panels.append((title, _heated(picture, explanation, branch, smooth=True)))
    _show(figure, panels, size=11)
    figure.supxlabel(
        "orange supports the answer, blue opposes it; each picture has its own scale", fontsize=9
    )
    figure.savefig(path, dpi=130)


def _bars(axes: Any, names: Sequence[str], several: Sequence[tuple[str, Sequence[Row]]]) -> None:
    """Horizontal bars with their intervals, one group for each name."""
    thick = 0.8 / len(several)
    for index, (label, own) in enumerate(several):
        values = [each.value for each in own]
        errors = np.array([[each.value - each.low, each.high - each.value] for each in own]).T
        axes.barh(
            [place + thick * (index - (len(several) - 1) / 2) for place in range(len(own))],
            values,
            thick,
            xerr=errors.clip(0),
            label=label,
            color=_SHADES[index],
            error_kw={"linewidth": 0.8, "ecolor": "0.25"},
        )
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.02)
    axes.grid(axis="x", alpha=0.2)
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.06))


def _of(rows: Sequence[Row], part: str, measure: str, kind: str | None = None) -> list[Row]:
    return [
        each
        for each in rows
        if (each.part, each.measure) == (part, measure) and kind in (None, each.kind)
    ]


def _setting(row: Row) -> Setting:
    return Setting(row.method, row.mode, row.similarity, row.units)


def _pointing(axes: Any, rows: Sequence[Row]) -> None:
    several = [
        ("each target", _of(rows, "pointing", "right")),
        ("both targets", _of(rows, "pointing", "both")),
        ("share of relevance on it", _of(rows, "pointing", "on it")),
    ]
    _bars(axes, [_setting(each).name for each in several[0][1]], several)
    axes.set_title("Relevance stands on the named object", fontsize=10)


def _redundancy(axes: Any, rows: Sequence[Row]) -> None:
    several = [
        (label, _of(rows, "redundancy", "found", kind))
        for label, kind in (("object shown twice", "twice"), ("once", "once"))
    ]
    several.append(("strength, shown twice", _of(rows, "redundancy", "strength", "twice")))
    _bars(axes, [_setting(each).name for each in several[0][1]], several)
    axes.set_title("The object is found", fontsize=10)


def _questions(axes: Any, rows: Sequence[Row]) -> None:
    several = [
        ("relevance on the picture, by patches", _of(rows, "questions", "on the picture")),
        ("the same, the picture as one unit", _of(rows, "questions", "as one")),
        ("answered right", _of(rows, "questions", "answered")),
        ("words stand first", _of(rows, "questions", "words first")),
    ]
    _bars(axes, [f"{each.kind}, {each.method}" for each in several[0][1]], several)
    axes.set_title("Yes or no over picture and text", fontsize=10)


Panel = tuple[str, Any]
"""A title, and pixels ``[H, W, 3]``."""


def _show(figure: Any, panels: Sequence[Panel], size: int = 8) -> None:
    """Pictures side by side, under their titles."""
    for axes, (title, image) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        lines = [textwrap.fill(line, _WIDTH) for line in title.splitlines()]
        axes.imshow(image, interpolation="nearest")
        axes.set_title("\n".join(lines), fontsize=size)
        axes.axis("off")


def _heated(
    picture: Picture, explanation: atman.Explanation, branch: int = 0, *, smooth: bool = False
) -> Any:
    values = explanation.relevances[branch].tolist()
    size = (_SIDE, _SIDE)
    pixels = heat(explanation, values, 0, size, smooth=smooth)
    strength = pixels / max(float(abs(pixels).max()), 1e-9)
    return overlay(picture.image, size, strength, (LIGHT.oppose, LIGHT.support))


def _examples(model: Any, processor: Any) -> Iterator[Panel]:
    picture = picture_of(EXAMPLE)
    explanation = explained(model, processor, picture, Setting("direct"))
    yield f"picture {EXAMPLE} of 100", picture.image
    for branch, answer in enumerate(explanation.answers):
        yield f"“{DEMO_PROMPT}{answer}”", _heated(picture, explanation, branch)


def _redundant(model: Any, processor: Any) -> Iterator[Panel]:
    picture = redundant_picture("twice", 0)
    name = picture.objects[0].name
    yield f"the same object twice: {name}", picture.image
    for kappa in (None, _SHOWN_KAPPA):
        explainer = atman.Explainer(
            model, processor, method="exact", similarity=kappa, progress=False
        )
        explanation = explainer.explain([picture.image, DEMO_PROMPT], f" {name}")
        most = float(explanation.relevance.nan_to_num().max())
        how = "single patches" if kappa is None else f"with similar ones, κ {kappa}"
        yield f"{how}: at most {most:.2g} nats", _heated(picture, explanation)


def _misplaced(model: Any, processor: Any) -> Iterator[Panel]:
    """The first picture whose relevance stands on the wrong object, if there is one."""
    for number in range(_PICTURES):
        picture = picture_of(number)
        explanation = explained(model, processor, picture, Setting("direct"))
        right = pointed(explanation, picture).right
        if not all(right):
            branch = right.index(False)
            name = picture.objects[branch].name
            title = f"failure (picture {number}): most does not stand on the {name}"
            yield title, _heated(picture, explanation, branch)
            return


def _failures(model: Any, processor: Any) -> Iterator[Panel]:
    """The first questions that are answered wrongly, or whose evidence does not stand first."""
    found = number = 0
    while found < _FAILURES and number < _PICTURES:
        picture, asked = questions.asked(number)
        number += 1
        for kind, question in asked.items():
            explanation = questions.explained(model, processor, picture, question, "exact")
            judged = questions.judged(explanation, explanation, picture, question)
            right = judged.answered and judged.words_first and judged.object_first is not False
            if right or found == _FAILURES:
                continue
            found += 1
            wrong = [
                name
                for name, fine in (
                    ("answer", judged.answered),
                    ("object not first", judged.object_first is not False),
                    ("words not first", judged.words_first),
                )
                if not fine
            ]
            text = question.text.replace(". ", ".\n")
            yield (
                f"failure ({kind}): {', '.join(wrong)}\n{text}{explanation.answer}",
                _heated(picture, explanation),
            )
            break
