"""The relevance of one result, drawn: over its picture, or in strips below its text.

Orange supports the answer, blue opposes it; every method has its own scale, as relevances of
different methods have different units.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from rich.cells import cell_len

from ...render.fonts import families, known
from ...render.heat import overlay, resized, spread
from ...render.palette import LIGHT, hexadecimal
from ..examples import Example
from ..results import Result
from .style import FAINT, INK, SMALL, WIDTH, short

SCALE = (
    "Orange supports the answer, blue opposes it, dark grey was not measured; "
    "a scale for each method"
)
STRIPS = (
    "Lines on which no method has 5% of its strongest relevance stand alone; longer texts are cut "
    "around their label"
)

CELL = 5.0  # points of a character; a whole number of pixels at the resolution that is written
COLUMNS = 102  # characters in a line of text
_ADVANCE = 0.602  # width of a character of the font, in font sizes
_TEXT = 0.18  # inches of a line
_STRIP = 0.105
_GAP = 0.09
_HEAD = 0.3
_NAMES = 1.83  # inches of the methods' names
_LINES = 9  # of text; a longer one is cut around its label
_SIDE = 220  # pixels of a picture's longer side
_GREY = (0.68, 0.68, 0.68)
_NONE = (243, 243, 241)
_LEAST = 0.05


def strongest(values: Sequence[float]) -> float:
    """The largest absolute value; 1 if there is none but 0 and NaN."""
    return max((abs(value) for value in values if math.isfinite(value)), default=0.0) or 1.0


# --- pictures ---------------------------------------------------------------------------------


def picture(axes: Any, example: Example) -> None:
    """The picture itself, with the outline of what is labelled."""
    image = _image(example)
    size = _size(image)
    axes.imshow(np.asarray(resized(image.convert("RGB"), size)), interpolation="nearest")
    if example.mask is not None:
        rows = np.linspace(0, example.mask.shape[0] - 1, size[1]).round().astype(int)
        columns = np.linspace(0, example.mask.shape[1] - 1, size[0]).round().astype(int)
        shown = example.mask[rows][:, columns]
        if shown.any() and not shown.all():
            axes.contour(shown.astype(float), [0.5], colors="white", linewidths=2.2)
            axes.contour(shown.astype(float), [0.5], colors="black", linewidths=0.9)
    axes.axis("off")


def over_picture(axes: Any, example: Example, result: Result) -> None:
    """The picture under a method's relevance; a unit is a list of its boxes, in pixels."""
    image = _image(example)
    size, whole = _size(image), (image.width, image.height)
    units, values = result.heat["units"], map(_number, result.heat["values"])
    pairs = [(tuple(box), value) for unit, value in zip(units, values, strict=True) for box in unit]
    known = [(box, value) for box, value in pairs if math.isfinite(value)]
    pixels = spread([box for box, _ in known], [value for _, value in known], whole, size)
    shown = overlay(
        image, size, pixels / strongest(pixels.ravel().tolist()), (LIGHT.oppose, LIGHT.support)
    )
    unknown = [box for box, value in pairs if not math.isfinite(value)]
    if unknown:
        grey = spread(unknown, [1.0] * len(unknown), whole, size) > 0.5
        shown[grey] = np.array(_GREY) * 255
    axes.imshow(shown, interpolation="nearest")
    axes.axis("off")


def _image(example: Example) -> Any:
    return next(part for part in example.prompt if not isinstance(part, str))


def _size(image: Any) -> tuple[int, int]:
    scale = _SIDE / max(image.width, image.height)
    return max(1, round(image.width * scale)), max(1, round(image.height * scale))


# --- text -------------------------------------------------------------------------------------


def lines(example: Example) -> list[tuple[int, str]]:
    """Where each line of the region starts in the prompt, and the line.

    A region of more than 9 lines is cut around the first label.
    """
    start, stop = _region(example)
    text = example.prompt[start:stop]
    found, place = [], 0
    for line in textwrap.wrap(text, COLUMNS, drop_whitespace=False, replace_whitespace=False):
        for part in line.splitlines(keepends=True):
            found.append((start + place, part.rstrip("\n")))
            place += len(part)
    if len(found) > _LINES:
        label = example.labels[0][0] if example.labels else start
        at = max(n for n, (first, _) in enumerate(found) if first <= label)
        first = min(max(at - _LINES // 2, 0), len(found) - _LINES)
        found = found[first : first + _LINES]
    return found


def height(example: Example, results: Mapping[str, Result]) -> float:
    """Inches of an example's text with strips for methods."""
    strips = {name: _characters(example, result) for name, result in results.items()}
    return _HEAD + sum(_tall(example, line, strips) for line in lines(example))


def _tall(example: Example, line: tuple[int, str], strips: Mapping[str, list[float]]) -> float:
    room = len(strips) * _STRIP + _GAP if _telling(example, line, strips) else 0.0
    return _TEXT + room


def _telling(example: Example, line: tuple[int, str], strips: Mapping[str, list[float]]) -> bool:
    """Whether a method has something to show on a line; NaN is something."""
    return any(
        not abs(value) < _LEAST
        for values in strips.values()
        for value in _of(example, line, values)
    )


def _of(example: Example, line: tuple[int, str], values: list[float]) -> list[float]:
    """The values of a line's characters."""
    first = line[0] - _region(example)[0]
    return values[first : first + len(line[1])]


def in_strips(
    figure: Any, top: float, example: Example, results: Mapping[str, Result]
) -> list[Any]:
    """The text of an example, and below each of its lines a strip for each method.

    Args:
        figure: Whose axes are placed by hand.
        top: Where it begins, inches from the figure's lower edge.
        example: Whose text.
        results: By method.
    Returns: the image of each strip, line after line; lines that tell nothing have none.
    """
    whole = figure.get_figheight()
    shown = lines(example)
    tall = height(example, results)
    axes = figure.add_axes((0, (top - tall) / whole, 1, tall / whole))
    axes.set_xlim(0, WIDTH)
    axes.set_ylim(tall, 0)
    axes.axis("off")
    _, stop = _region(example)
    question = example.prompt[stop:].strip().replace("\n", " ")
    said = known(textwrap.shorten(f"{question} {example.target.strip()}", 110))
    axes.text(
        0.1,
        0.2,
        said,
        fontsize=SMALL,
        weight="bold",
        color=INK,
        parse_math=False,
        family=["DejaVu Sans", *families([said])],
    )
    strips = {name: _characters(example, result) for name, result in results.items()}
    at, images = _HEAD, []
    colours = LinearSegmentedColormap.from_list(
        "relevance", [hexadecimal(each) for each in (LIGHT.oppose, _NONE, LIGHT.support)]
    ).with_extremes(bad=_GREY)
    for start, line in shown:
        _write(axes, at, start, line, example)
        at += _TEXT
        if not _telling(example, (start, line), strips):
            continue
        for name, values in strips.items():
            axes.text(
                _NAMES - 0.08,
                at + _STRIP / 2,
                short(name),
                fontsize=6.3,
                ha="right",
                va="center",
                color=FAINT,
            )
            row = np.array(_of(example, (start, line), values))[None]
            right = _NAMES + len(line) * CELL / 72
            images.append(
                axes.imshow(
                    row,
                    cmap=colours,
                    vmin=-1,
                    vmax=1,
                    aspect="auto",
                    interpolation="nearest",
                    extent=(_NAMES, right, at + _STRIP - 0.015, at),
                )
            )
            at += _STRIP
        at += _GAP
    axes.set_xlim(0, WIDTH)
    axes.set_ylim(tall, 0)
    return images


def _write(axes: Any, at: float, start: int, line: str, example: Example) -> None:
    """A line in cells of one width, what is labelled underlined."""
    single = all(cell_len(each) == 1 for each in line)
    for place, text in [(0, line)] if single else enumerate(line):
        text = known(text)
        axes.text(
            _NAMES + place * CELL / 72,
            at + _TEXT * 0.78,
            text,
            fontsize=CELL / _ADVANCE,
            family=families([text]),
            color=INK,
            parse_math=False,
        )
    for label in example.labels:
        first, last = max(label[0], start), min(label[1], start + len(line))
        if first < last:
            left, right = (_NAMES + (each - start) * CELL / 72 for each in (first, last))
            axes.plot([left, right], [at + _TEXT * 0.95] * 2, color=INK, linewidth=1.4)


def _characters(example: Example, result: Result) -> list[float]:
    """Of every character of the region, the relevance of its unit, the strongest being ±1."""
    start, stop = _region(example)
    values = list(map(_number, result.heat["values"]))
    most = strongest(values)
    characters = [0.0] * (stop - start)
    for (first, last), value in zip(result.heat["units"], values, strict=True):
        for place in range(max(first, start), min(last, stop)):
            characters[place - start] = value / most
    return characters


def _region(example: Example) -> tuple[int, int]:
    if example.region is None:
        return 0, len(example.prompt)
    return example.region


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)
