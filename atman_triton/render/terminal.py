"""The explanation in a terminal: the text as a heat map, the answer, the strongest units."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING

from rich.console import Console
from rich.style import Style
from rich.text import Text

from . import layout, wording
from .blocks import AGAINST, NOTABLE, RAMP, WEAK, highlight, pictures, sound
from .palette import OPPOSE, OPPOSE_INK, SUPPORT, SUPPORT_INK, hexadecimal
from .shown import chosen

if TYPE_CHECKING:
    from ..explanation import Explanation

FAINT = Style(dim=True)
MAX_LINES = 60
MIN_WIDTH = 20
BAR = 14
LEFT_OUT = 8
TOP_K = 10
TELLING = 0.01  # of the strongest
OPPONENTS = 3
TARGETS = 10
NEAR = 5  # tokens suppressed along with a unit
SOURCE = 14  # cells of a document's id
COARSE = 3  # units of every coarser explanation
SUPPORT_MARK = "⟦⟧"
OPPOSE_MARK = "⟪⟫"
DIRECT_MARK = "°"


def show(
    explanation: Explanation,
    top_k: int | None = None,
    width: int | None = None,
    target: int | None = None,
    console: Console | None = None,
    part: int | None = None,
) -> None:
    """Print the explanation; of several targets what the prompt does for all of them.

    Pictures are drawn once for each target, each on a scale of its own.

    Args:
        explanation: What to show.
        top_k: How many supporters to list; None for up to 10 that tell something.
        width: Columns to use; None for the terminal's.
        target: Show this target token's scores instead of ``relevance``; of one target only.
        console: Where to print; None for standard output.
        part: Show what supports this part of the target; of one target only.
    Raises: ValueError: if ``top_k`` or ``width`` is too small or there is no such target.
    """
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}.")
    if width is not None and width < MIN_WIDTH:
        raise ValueError(f"width must be at least {MIN_WIDTH}, got {width}.")
    values = layout.in_sight(explanation, target, part)
    console = console or Console(highlight=False, markup=False, emoji=False)
    width = max(width or console.width, MIN_WIDTH)
    coloured = not console.no_color and console.color_system in ("256", "truecolor")
    console.print(_heading(explanation, target, part), width=width, overflow="fold")
    console.print()
    # These lines are laid out: rich must neither wrap again nor crop what it believes too wide.
    seen = pictures(explanation, chosen(explanation, values, ""), width, coloured)
    heard = sound(explanation, values, width, coloured) if explanation.sound else []
    for line in [*seen, *heard, *_heat_map(explanation, values, width, coloured)]:
        console.print(line, soft_wrap=True)
    tables = [*_list(explanation, values, top_k, width, target), *_targets(explanation, width)]
    if target is None and part is None:
        tables += _parts(explanation, width)
    for line in [*tables, *_coarser(explanation, target, part, width)]:
        console.print(line, soft_wrap=True)
    console.print()
    for line in _notes(explanation, coloured):
        console.print(line, width=width, overflow="fold")


def _heading(explanation: Explanation, target: int | None, part: int | None) -> Text:
    e, heading = explanation, Text()
    if layout.several(e) and not e.contrast:
        heading.append(f"{wording.noun(e).many.capitalize()}: ", FAINT)
        heading.append(str(len(e.target_stops)), "bold")
        heading.append("   the numbers are their mean; branch=k shows one", FAINT)
        return heading
    names = ["Why", "Rather than"] if e.contrast else [wording.noun(e).whole.capitalize()]
    rows = list(zip(names, e.answers, e.answer_logprobs.tolist(), strict=True))
    if target is not None:
        scored = e.targets[target]
        name = f"{wording.noun(e).row.capitalize()} {target}"
        rows.append((name, scored.text, float(e.base_logprobs[target])))
    if part is not None:
        rows.append((f"Part {part}", e.parts[part].text, float(e.part_logprobs[part])))
    for index, (label, text, value) in enumerate(rows):
        heading.append("\n" * (index > 0) + f"{label}: ", FAINT)
        heading.append(layout.visible(text), "bold")
        heading.append(f"   {wording.base(e, value)}", FAINT)
    return heading


def _heat_map(
    explanation: Explanation, values: list[float], width: int, coloured: bool
) -> list[Text]:
    """The text in lines, coloured by strength; without colour strong units stand in brackets."""
    cells = width if coloured else width - 6
    draw = coloured_line if coloured else plain_line
    found = []
    for row in layout.shown_lines(explanation, values, cells, MAX_LINES, NOTABLE):
        remark = any(run.note for run in row)
        line = Text(row[0].text, FAINT) if remark else draw(row, explanation.prompt_stop)
        line.truncate(width) if remark else None
        found.append(line)
    return [*found, Text()] if any(line.plain.strip() for line in found) else []


def coloured_line(row: list[layout.Run], prompt_stop: int) -> Text:
    """A line of the heat map in colours."""
    line, before = Text(), Style()
    for run in row:
        text, style = run.text, _style(run.strength)
        if style and run.direct:
            style += Style(italic=True)
        if text.endswith("\n"):
            text = text[:-1] + ("↵" if style else "")
        if not before and text.strip():
            # The space that opens a token would make a coloured word look shifted.
            line.append(text[: len(text) - len(text.lstrip(" "))])
            text = text.lstrip(" ")
        before = style
        line.append(text, style + Style(bold=True) if run.start >= prompt_stop else style)
    return line


def plain_line(row: list[layout.Run], prompt_stop: int) -> Text:
    """The same with brackets around what is strong."""
    line = Text()
    for bracket, runs in itertools.groupby(row, key=_bracket):
        text = "".join(run.text for run in runs).rstrip("\n")
        core = text.strip(" ")
        if bracket and core:
            lead = len(text) - len(text.lstrip(" "))
            text = text[:lead] + bracket[0] + core + bracket[1:] + text[lead + len(core) :]
        line.append(text)
    return line


def _bracket(run: layout.Run) -> str:
    """What opens and what closes a strong unit."""
    if abs(run.strength) < NOTABLE:
        return ""
    mark = SUPPORT_MARK if run.strength > 0 else OPPOSE_MARK
    return mark + DIRECT_MARK * run.direct


def _style(strength: float) -> Style:
    supports = strength > 0
    if abs(strength) < WEAK:
        return Style()
    if abs(strength) < NOTABLE:
        return Style(underline=True, color=hexadecimal(SUPPORT_INK if supports else OPPOSE_INK))
    return highlight(strength)


def _list(
    explanation: Explanation, values: list[float], top_k: int | None, width: int, target: int | None
) -> list[Text]:
    """The strongest supporters, then the strongest opponents that stand out."""
    ranking, marked = layout.ranking(values), layout.marks(explanation)
    strength, digits = layout.strengths(values), wording.decimals(values)
    supporters = [unit for unit in ranking if values[unit] > 0]
    if top_k is None:
        # Those that tell something, but never fewer than three.
        telling = sum(strength[unit] >= TELLING for unit in supporters)
        top_k = min(TOP_K, max(3, telling))
    chosen = supporters[:top_k]
    against = [unit for unit in ranking[::-1] if strength[unit] <= -NOTABLE][:OPPONENTS]
    name, measure = "relevance" if target is None else "score", wording.scale(explanation)
    numbers = [
        measure.number(values[unit], digits) + (DIRECT_MARK if marked[unit] else " " * any(marked))
        for unit in chosen + against[::-1]
    ]
    wide = max(map(len, numbers), default=0)
    room = max(0, min(BAR, width - wide - 24))
    head = f"{name}, {measure.unit}"
    head = (head if len(head) <= room + wide + 1 else name)[: room + wide + 1]
    rows = [Text(f"rank  {head:<{room + wide + 1}}  unit in its context", FAINT)]
    rank = {unit: place for place, unit in enumerate(ranking, start=1)}
    for unit, number in zip(chosen + against[::-1], numbers, strict=True):
        value = strength[unit]
        bar = "█" * max(1, round(abs(value) * room)) if value and room else ""
        row = Text(f"{rank[unit]:>4}  ")
        row.append(f"{bar:<{room}}", hexadecimal(SUPPORT if value > 0 else OPPOSE))
        row.append(f" {number:>{wide}}  ")
        source = Text(wording.source(explanation, unit), FAINT)
        source.truncate(SOURCE, overflow="ellipsis")
        row.append_text(source)
        row.append(" " * bool(source))
        indent = row.cell_len
        before, text, after = layout.context(explanation, unit, max(4, (width - indent) // 3))
        row.append(before, FAINT)
        row.append(text, "bold")
        row.append(after, FAINT)
        rows.append(row)
        if near := wording.near(explanation, unit, NEAR):
            rows.append(Text(" " * indent + near, FAINT))
    for row in rows:
        row.truncate(width, overflow="ellipsis")
    if not chosen and not against:
        rows.append(Text(f"      no unit {measure.high}{measure.object}", FAINT))
    return rows


def _targets(explanation: Explanation, width: int) -> list[Text]:
    """Several targets with what the model gives when nothing is suppressed, the largest first."""
    if not layout.several(explanation) or explanation.contrast:
        return []
    logprobs = explanation.answer_logprobs.tolist()
    order = sorted(range(len(logprobs)), key=lambda branch: -logprobs[branch])
    answers = explanation.answers
    name, what = wording.base_name(explanation), wording.noun(explanation).one
    most = "likeliest" if explanation.quantity == "logprob" else "highest"
    rows = [Text(), Text(f"branch   {name:<8}  {what}, the {most} first", FAINT)]
    for branch in order[:TARGETS]:
        row = Text(f"{branch:>6}   {wording.base_number(explanation, logprobs[branch]):<8}  ")
        row.append(layout.visible(answers[branch]), "bold")
        rows.append(row)
    if len(order) > TARGETS:
        rows.append(Text(f"         and {len(order) - TARGETS} more", FAINT))
    for row in rows:
        row.truncate(width, overflow="ellipsis")
    return rows


def _parts(explanation: Explanation, width: int) -> list[Text]:
    """The parts of the target, if they are more than whole targets, and what supports each most."""
    if len(explanation.parts) == len(explanation.target_stops):
        return []
    logprobs = explanation.part_logprobs.tolist()
    rows = [Text(), Text("part   p         part of the target ← what supports it most", FAINT)]
    for index, part in list(enumerate(explanation.parts))[:TARGETS]:
        row = Text(f"{index:>4}   {wording.base_number(explanation, logprobs[index]):<8}  ")
        row.append(layout.visible(part.text), "bold")
        values = layout.in_sight(explanation, part=index)
        best = layout.ranking(values)[:1]
        if best and values[best[0]] > 0:
            source = wording.source(explanation, best[0])
            row.append(f" ← {layout.in_word(explanation, best[0])} {source}".rstrip(), FAINT)
        rows.append(row)
    if len(explanation.parts) > TARGETS:
        rows.append(Text(f"       and {len(explanation.parts) - TARGETS} more", FAINT))
    for row in rows:
        row.truncate(width, overflow="ellipsis")
    return rows


def _coarser(
    explanation: Explanation, target: int | None, part: int | None, width: int
) -> list[Text]:
    """What larger units of the prompt said that were refined: the largest ones first."""
    rows = []
    for place, coarse in enumerate(layout.by_size(explanation)[:0:-1]):
        prompt = layout.of_prompt(coarse)
        values = layout.in_sight(coarse, target, part)
        ranking = [prompt[i] for i in layout.ranking([values[unit] for unit in prompt])]
        digits = wording.decimals(values[unit] for unit in prompt)
        kind = "direct effect" if coarse.effect == "direct" else "total effect"
        if coarse.effect == "mixed":
            kind = "total and direct effect"
        when = "Then" if place else "First"
        measure = wording.scale(coarse)
        head = f"{when} by {wording.levels(coarse)} ({len(prompt)}, {kind}):"
        rows += [Text(), Text(head, FAINT)]
        for unit in ranking[:COARSE]:
            row = Text(f"{measure.number(values[unit], digits):>10}  ")
            row.append(layout.name(coarse.units[unit]))
            rows.append(row)
    for row in rows:
        row.truncate(width, overflow="ellipsis")
    return rows


def _notes(explanation: Explanation, coloured: bool) -> list[Text]:
    """What the marks and the numbers mean, what was left out, the settings."""
    key, measure = Text(), wording.scale(explanation)
    if coloured:
        key.append(measure.high, _style(1.0))
        key.append(" " * measure.signed)
        key.append(measure.low, _style(-1.0))
        key.append(measure.object, FAINT)
    else:
        opening, closing = SUPPORT_MARK
        against, end = OPPOSE_MARK
        low = f" {against}{measure.low}{end}" if measure.signed else ""
        key.append(f"{opening}{measure.high}{closing}{low}{measure.object}", FAINT)
        if explanation.pictures or explanation.sound:
            where = "pictures" if explanation.pictures else "sound"
            key.append(f" · {where}: {RAMP!r} from 0 to the strongest", FAINT)
            key.append(f", {AGAINST} {measure.low}" * measure.signed, FAINT)
    if explanation.normalize:
        key.append(f" · {wording.SCALED}", FAINT)
    if layout.several(explanation):
        key.append(" · only the prompt is shown", FAINT)
    elif any(math.isnan(value) for value in explanation.relevance.tolist()):
        key.append(" · units at or after a target were not measured for it", FAINT)
    mark = f"in italics or with {DIRECT_MARK}" if coloured else f"marked {DIRECT_MARK}"
    notes = [key, Text(f"Scores: {wording.effect(explanation, mark)}.", FAINT)]
    if explanation.effect == "mixed":
        notes.append(Text(wording.DIFFERENCE, FAINT))
    if complete := wording.completeness(explanation):
        notes.append(Text(complete, FAINT))
    if explanation.left_out:
        pieces = [
            f"{layout.visible(piece.text)} ({layout.printable(piece.reason)})"
            for piece in explanation.left_out[:LEFT_OUT]
        ]
        more = len(explanation.left_out) - LEFT_OUT
        notes.append(
            Text("Left out: " + ", ".join(pieces) + (f" and {more} more" * (more > 0)), FAINT)
        )
    notes.append(Text(wording.settings(explanation), FAINT))
    return notes
