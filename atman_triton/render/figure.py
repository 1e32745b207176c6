"""The explanation as a matplotlib figure: heat map, strongest units, targets against units."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from rich.cells import cell_len, get_character_cell_size
from torch import Tensor

from . import gallery, layout, wording
from .fonts import families, known
from .palette import LIGHT, WHITE, hexadecimal, mix
from .shown import chosen, remark

if TYPE_CHECKING:
    from ..explanation import Explanation

COLUMNS = 92  # characters in a line of the heat map
CELL = 7.0  # points; a whole number of pixels at 144 dpi, to which glyph widths are rounded
MARGIN = 0.35  # inches
WIDTH = COLUMNS * CELL / 72 + 2 * MARGIN
MAX_LINES = 44
TOP = 14  # bars
FEW = 8  # bars below pictures and sounds, which show where the others are
MATRIX_TARGETS = 16
MATRIX_UNITS = 48
TELLING = 0.01  # of the strongest; weaker units get no bar, but three bars there always are
ROOM = 0.027  # of an axis for a character of a number beside a bar
LABEL = 29  # cells of a bar's label
SOURCE = 12  # of them, those of a document's id
ADVANCE = 0.602  # width of a character of the font, in font sizes
LINE = 1.55  # distance of lines, in font sizes
LISTED = 12  # targets that have no matrix
WEAK = 0.02
NOTABLE = 0.35


def plot(
    explanation: Explanation,
    path: str | os.PathLike[str] | None = None,
    target: int | None = None,
    part: int | None = None,
    smooth: bool = True,
) -> Figure:
    """Draw the explanation: its pictures and sound, its text, the strongest units.

    Args:
        explanation: What to draw.
        path: Also write the figure there; the file's ending says the format.
        target: Draw this target token's scores instead of ``relevance``.
        part: Draw what supports this part of the target.
        smooth: Whether colours on pictures run over into each other, or keep to their patches.
    Raises: ValueError: if there is no such target, or the ending names no format.
    """
    values = layout.in_sight(explanation, target, part)
    rows = layout.shown_lines(explanation, values, COLUMNS, MAX_LINES, NOTABLE)
    elsewhere = bool(explanation.pictures) or explanation.sound is not None
    bars = _bars(values, FEW if elsewhere else TOP)
    names, table = _table(explanation)
    with_matrix = 1 < len(names) <= MATRIX_TARGETS and table.shape[1] <= MATRIX_UNITS
    with_matrix = with_matrix and not explanation.pictures
    title = _title(explanation, target, part)
    shown = chosen(explanation, values, title.name)
    panels, seen = gallery.arranged(explanation, shown, WIDTH - 2 * MARGIN)
    named = {each.branch for each in shown}
    listed = [] if with_matrix else _likeliest(explanation, named)
    family = families([explanation.text, *(unit.text for unit in explanation.units)])

    size = CELL / ADVANCE
    written = any(run.text.strip() for row in rows for run in row)
    heat = len(rows) * size * LINE / 72 if written else 0.0
    heard = 0.0 if explanation.sound is None else gallery.SOUND
    chart = max(1.6, 0.25 * len(bars) + 0.5)
    matrix = 0.26 * len(names) if with_matrix else 0.0
    more = [wording.DIFFERENCE] if explanation.effect == "mixed" else []
    more += [line] if (line := wording.completeness(explanation)) else []
    if explanation.normalize:
        more.append(f"Values are {wording.SCALED}.")
    if len(shown) > 1:
        more.append(remark(explanation))
    head, foot = 0.7 if elsewhere else 0.8, 0.63 + 0.17 * len(more)
    # A matrix has its title above and its labels below.
    below = matrix + 1.4 if with_matrix else 0.4 + 0.22 * len(listed) if listed else 0.0
    height = head + seen + heard + heat + 0.5 + chart + below + foot
    figure = Figure(figsize=(WIDTH, height), facecolor="white", dpi=144)

    def box(left: float, top: float, width: float, tall: float) -> Axes:
        return figure.add_axes(
            (left / WIDTH, 1 - (top + tall) / height, width / WIDTH, tall / height)
        )

    def from_top(start: float) -> gallery.Box:
        return lambda left, top, width, tall: box(MARGIN + left, start + top, width, tall)

    def write(axes: Axes, title: str, strong: bool) -> None:
        room = int(axes.get_position().width * WIDTH * 72 / (9 * ADVANCE))
        weight = "bold" if strong else "normal"
        ink = _ink("ink" if strong else "faint")
        axes.set_title(
            _short(title, room),
            fontsize=9,
            loc="left",
            pad=4,
            color=ink,
            weight=weight,
            family=family,
            parse_math=False,
        )

    _draw_title(figure, title, height, family)
    gallery.draw(explanation, panels, from_top(head), smooth, write)
    top = head + seen
    if heard:
        gallery.draw_sound(explanation, values, from_top(top), WIDTH - 2 * MARGIN)
        top += heard
    if written:
        text = box(MARGIN, top, WIDTH - 2 * MARGIN, heat)
        _draw_text(text, rows, explanation.prompt_stop, size, family)
    top += heat + 0.5
    _draw_bars(box(2.6, top, WIDTH - 2.6 - MARGIN, chart), explanation, values, bars, family)
    if with_matrix:
        area = box(1.4, top + chart + 0.4, WIDTH - 1.4 - MARGIN, matrix)
        _draw_matrix(area, explanation, names, table, family)
    caption = [f"Scores: {wording.effect(explanation, 'a line is dashed')}.", *more]
    caption.append(wording.settings(explanation))
    lines = [(line, 9.0, 0.22) for line in listed] + [(line, 7.5, 0.17) for line in caption]
    if listed:
        lines.insert(len(listed), ("", 7.5, 0.12))
    bottom = 0.16
    for line, points, tall in lines[::-1]:
        figure.text(
            MARGIN / WIDTH,
            bottom / height,
            known(line),
            color=_ink("ink" if points > 8 else "faint"),
            fontsize=points,
            family=family,
            parse_math=False,
        )
        bottom += tall
    if path is not None:
        figure.savefig(Path(path))
    return figure


@dataclass(frozen=True)
class _Title:
    """What a figure is of.

    Args:
        question: What it shows.
        name: What it shows it of.
        base: What the model gives for that with nothing suppressed; nothing of several targets.
    """

    question: str
    name: str
    base: str


def _title(explanation: Explanation, target: int | None, part: int | None) -> _Title:
    e, scale, noun = explanation, wording.scale(explanation), wording.noun(explanation)
    plain = e.postprocessing == "none"
    verb = wording.sides(e)[0] if plain else "matters for"
    question, text = f"What {verb} the {noun.whole}", layout.visible(e.answer)
    value: float | None = float(e.base_logprobs.sum())
    if e.contrast:
        verb = "speaks" if plain else scale.high
        question = f"What {verb} for it rather than “{layout.visible(e.answers[1])}”"
        text, value = layout.visible(e.answers[0]), float(e.answer_logprobs[0])
    elif layout.several(e):
        question = f"What {verb} the {noun.many}, on average"
        text, value = f"{len(e.target_stops)} {noun.many}", None
    elif target is not None:
        text, value = layout.visible(e.targets[target].text), float(e.base_logprobs[target])
        question = f"What {verb} {noun.row} {target}"
    elif part is not None:
        text, value = layout.visible(e.parts[part].text), float(e.part_logprobs[part])
        question = f"What {verb} part {part} of the {noun.whole}"
    return _Title(question, text, "" if value is None else wording.base(e, value))


def _draw_title(figure: Figure, title: _Title, height: float, family: list[str]) -> None:
    left, name = MARGIN / WIDTH, _short(title.name, 70)
    name += f"   ({title.base})" * bool(title.base)
    for text, down, points, ink, weight in (
        (_short(title.question, COLUMNS), 0.22, 9, "faint", "normal"),
        (name, 0.42, 12, "ink", "bold"),
    ):
        figure.text(
            left,
            1 - down / height,
            text,
            color=_ink(ink),
            fontsize=points,
            weight=weight,
            va="top",
            family=family,
            parse_math=False,
        )


def _draw_text(
    axes: Axes,
    rows: list[list[layout.Run]],
    prompt_stop: int,
    size: float,
    family: list[str],
) -> None:
    """The text on a grid of character cells, a coloured box behind every unit."""
    axes.set_xlim(0, COLUMNS)
    axes.set_ylim(len(rows), 0)
    axes.set_axis_off()
    for line, runs in enumerate(rows):
        column = 0
        for run in runs:
            text = run.text.removesuffix("\n")
            if run.text.endswith("\n") and abs(run.strength) >= WEAK:
                text += "↵"
            cells = cell_len(text)
            lead = len(text) - len(text.lstrip(" ")) if text.strip() else 0
            if abs(run.strength) >= WEAK:
                axes.add_patch(
                    Rectangle(
                        (column + lead, line + 0.08),
                        cells - lead,
                        0.84,
                        facecolor=_shade(run.strength),
                        linewidth=0,
                    )
                )
                if run.direct:
                    axes.plot(
                        (column + lead, column + cells),
                        (line + 0.94, line + 0.94),
                        color=_ink("ink"),
                        linewidth=1,
                        dashes=(3, 2),
                    )
            weight = "bold" if run.start >= prompt_stop and not run.note else "normal"
            for at, part in _chunks(text):
                wide = cell_len(part) == 2 * len(part)
                axes.text(
                    column + at + wide,
                    line + 0.5,
                    known(part),
                    fontsize=size,
                    ha="center" if wide else "left",
                    va="center_baseline",
                    color=_ink("faint" if run.note else "ink"),
                    weight=weight,
                    family=family,
                    parse_math=False,
                )
            column += cells


def _chunks(text: str) -> list[tuple[int, str]]:
    """Words, and wide characters one by one (their glyphs do not fill two cells), with columns."""
    chunks, column, joined = [], 0, False
    for character in text:
        size = get_character_cell_size(character)
        if character == " ":
            joined = False
        elif joined and size < 2:
            chunks[-1] = (chunks[-1][0], chunks[-1][1] + character)
        else:
            chunks.append((column, character))
            joined = size < 2
        column += size
    return chunks


def _bars(values: list[float], most: int) -> list[int]:
    """The units to draw as bars: the strongest by magnitude, the highest first."""
    ranking = layout.ranking(values)
    strength = layout.strengths(values)
    strong = sorted(ranking, key=lambda unit: -abs(values[unit]))
    telling = sum(abs(strength[unit]) >= TELLING for unit in ranking)
    return sorted(strong[: min(most, max(3, telling))], key=ranking.index)


def _table(explanation: Explanation) -> tuple[list[str], Tensor]:
    """What the rows of the matrix are called, and the matrix: target tokens, or whole targets."""
    e = explanation
    if not layout.several(e):
        names = [layout.visible(target.text) for target in e.targets]
        if len(names) > MATRIX_TARGETS:
            return names, e.scores  # not drawn
        return names, torch.stack([e.values(target) for target in range(len(names))])
    logprobs = e.answer_logprobs.tolist()
    names = [
        f"{_short(layout.visible(answer), 10)} {wording.base_brief(e, logprob, 2)}"
        for answer, logprob in zip(e.answers, logprobs, strict=True)
    ]
    return names, e.relevances


def _likeliest(explanation: Explanation, named: set[int | None]) -> list[str]:
    """Several targets with what the model gives them, the likeliest first.

    Args:
        named: Targets that are named elsewhere; where all are, there is no list.
    """
    if not layout.several(explanation) or named >= set(range(len(explanation.target_stops))):
        return []
    logprobs = explanation.answer_logprobs.tolist()
    order = sorted(range(len(logprobs)), key=lambda branch: -logprobs[branch])
    answers = explanation.answers
    lines = [
        f"{wording.base_number(explanation, logprobs[branch]):<8} "
        + _short(layout.visible(answers[branch]), 70)
        for branch in order[:LISTED]
    ]
    more = len(order) - LISTED
    head = f"{wording.base_name(explanation):<8} {wording.noun(explanation).one}"
    return [head, *lines, *([f"         and {more} more"] if more > 0 else [])]


def _draw_bars(
    axes: Axes,
    explanation: Explanation,
    values: list[float],
    bars: list[int],
    family: list[str],
) -> None:
    strength, digits = layout.strengths(values), wording.decimals(values)
    measure = wording.scale(explanation)
    colours = [_shade(math.copysign(1.0, strength[unit])) for unit in bars]
    drawn = axes.barh(
        range(len(bars)), [strength[unit] for unit in bars], color=colours, height=0.7
    )
    marks = layout.marks(explanation)
    for bar, unit in zip(drawn, bars, strict=True):
        if marks[unit]:
            bar.set(edgecolor=_ink("ink"), linestyle=(0, (3, 2)), linewidth=1)
    sources = [wording.source(explanation, unit) for unit in bars]
    sources = [f"{_short(source, SOURCE)} " if source else "" for source in sources]
    labels = [
        source + _short(layout.in_word(explanation, unit), LABEL - cell_len(source))
        for source, unit in zip(sources, bars, strict=True)
    ]
    axes.set_yticks(range(len(bars)), labels, family=family, fontsize=9, parse_math=False)
    axes.set_ylim(max(len(bars), 1) - 0.4, -0.6)
    for place, unit in enumerate(bars):
        positive = strength[unit] >= 0
        axes.annotate(
            measure.number(values[unit], digits),
            (strength[unit], place),
            xytext=(4 if positive else -4, 0),
            textcoords="offset points",
            ha="left" if positive else "right",
            va="center",
            fontsize=8,
            color=_ink("ink"),
        )
    lengths = [strength[unit] for unit in bars]
    low, high = min(lengths, default=0.0), max(lengths, default=0.0)
    wide = max((len(measure.number(values[unit], digits)) for unit in bars), default=0)
    room = ROOM * wide if low < 0 else 0.16  # numbers of negative bars stand on their left
    axes.set_xlim(min(low, 0.0) * 1.02 - room, 1.16 if high > 0 else 0.16)
    axes.axvline(0, color=_ink("faint"), linewidth=0.8)
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(f"strongest units, {measure.unit}", fontsize=9, color=_ink("faint"), loc="left")


def _draw_matrix(
    axes: Axes, explanation: Explanation, names: list[str], scores: Tensor, family: list[str]
) -> None:
    finite = scores[scores.isfinite()]
    peak = float(finite.abs().max()) if len(finite) else 0.0
    colours = [hexadecimal(c) for c in (LIGHT.oppose, WHITE, LIGHT.support)]
    colormap = LinearSegmentedColormap.from_list("atman", colours)
    colormap = colormap.with_extremes(bad=hexadecimal(LIGHT.line))
    axes.imshow(
        scores.nan_to_num(math.nan, 1e30, -1e30).numpy(),
        cmap=colormap,
        norm=TwoSlopeNorm(0.0, -(peak or 1.0), peak or 1.0),
        aspect="auto",
        interpolation="nearest",
    )
    units = [_short(layout.visible(unit.text), 14) for unit in explanation.units]
    targets = [_short(name, 14) for name in names]
    noun = wording.noun(explanation)
    rows = noun.one if layout.several(explanation) else noun.row
    axes.set_xticks(
        range(len(units)), units, rotation=90, family=family, fontsize=7, parse_math=False
    )
    axes.set_yticks(range(len(targets)), targets, family=family, fontsize=8, parse_math=False)
    axes.tick_params(length=0)
    axes.spines[:].set_color(_ink("line"))
    axes.set_title(
        f"{rows} × unit (grey: not measured)", fontsize=9, color=_ink("faint"), loc="left"
    )


def _shade(strength: float) -> str:
    return hexadecimal(mix(WHITE, LIGHT.support if strength > 0 else LIGHT.oppose, abs(strength)))


def _ink(name: str) -> str:
    return hexadecimal(getattr(LIGHT, name))


def _short(text: str, cells: int) -> str:
    """At most so many cells of text, all of it in fonts that are there."""
    text = known(text)
    if cell_len(text) <= cells:
        return text
    kept, used = "", 1
    for character in text:
        used += get_character_cell_size(character)
        if used > cells:
            break
        kept += character
    return kept + "…"
