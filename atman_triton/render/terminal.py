"""The explanation in a terminal: the text as a heat map, the answer, the strongest units."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING

from rich.console import Console
from rich.style import Style
from rich.text import Text

from . import layout
from .palette import Colour, hexadecimal, mix

if TYPE_CHECKING:
    from ..explanation import Explanation

# Middle tones stand out equally from a dark and a light terminal; black on them reads well.
GREY: Colour = (150, 150, 150)
SUPPORT: Colour = (255, 142, 20)
OPPOSE: Colour = (92, 164, 255)
SUPPORT_INK: Colour = (184, 98, 0)
OPPOSE_INK: Colour = (36, 116, 224)

FAINT = Style(dim=True)
WEAK = 0.08  # of the strongest: below it a unit is left uncoloured
NOTABLE = 0.35  # of the strongest: what is bracketed without colour and never elided
MAX_LINES = 60
MIN_WIDTH = 20
BAR = 14
LEFT_OUT = 8
TOP_K = 10
TELLING = 0.01  # of the strongest
OPPONENTS = 3
TARGETS = 10
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
) -> None:
    """Print the explanation; of several targets what the prompt does for all of them.

    Args:
        explanation: What to show.
        top_k: How many supporters to list; None for up to 10 that tell something.
        width: Columns to use; None for the terminal's.
        target: Show this target token's scores instead of ``relevance``; of one target only.
        console: Where to print; None for standard output.
    Raises: ValueError: if ``top_k`` or ``width`` is too small or there is no such target.
    """
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}.")
    if width is not None and width < MIN_WIDTH:
        raise ValueError(f"width must be at least {MIN_WIDTH}, got {width}.")
    values = layout.in_sight(explanation, target)
    console = console or Console(highlight=False, markup=False, emoji=False)
    width = max(width or console.width, MIN_WIDTH)
    coloured = not console.no_color and console.color_system in ("256", "truecolor")
    console.print(_heading(explanation, target), width=width, overflow="fold")
    console.print()
    # These lines are laid out: rich must neither wrap again nor crop what it believes too wide.
    for line in _heat_map(explanation, values, width, coloured):
        console.print(line, soft_wrap=True)
    console.print()
    for line in _list(explanation, values, top_k, width, target):
        console.print(line, soft_wrap=True)
    for line in [*_targets(explanation, width), *_coarser(explanation, target, width)]:
        console.print(line, soft_wrap=True)
    console.print()
    for line in _notes(explanation, coloured):
        console.print(line, width=width, overflow="fold")


def _heading(explanation: Explanation, target: int | None) -> Text:
    heading = Text()
    if layout.several(explanation):
        heading.append("Targets: ", FAINT)
        heading.append(str(len(explanation.target_stops)), "bold")
        heading.append("   the numbers are their mean; branch=k shows one", FAINT)
        return heading
    rows = [("Answer", explanation.answer, float(explanation.base_logprobs.sum()))]
    if target is not None:
        chosen = explanation.targets[target]
        rows.append(
            (f"Target token {target}", chosen.text, float(explanation.base_logprobs[target]))
        )
    for index, (label, text, logprob) in enumerate(rows):
        heading.append("\n" * (index > 0) + f"{label}: ", FAINT)
        heading.append(layout.visible(text), "bold")
        heading.append(f"   p = {math.exp(logprob):.3g}", FAINT)
    return heading


def _heat_map(
    explanation: Explanation, values: list[float], width: int, coloured: bool
) -> list[Text]:
    """The text in lines, coloured by strength; without colour strong units stand in brackets."""
    rows = layout.heat_lines(explanation, values, width if coloured else width - 6)
    draw = _coloured_line if coloured else _plain_line
    return [
        Text("⋯", FAINT) if index is None else draw(rows[index], explanation.prompt_stop)
        for index in layout.elide(layout.notable(rows, NOTABLE), MAX_LINES)
    ]


def _coloured_line(row: list[layout.Run], prompt_stop: int) -> Text:
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


def _plain_line(row: list[layout.Run], prompt_stop: int) -> Text:
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
    colour = mix(GREY, SUPPORT if supports else OPPOSE, abs(strength) ** 0.5)
    return Style(color="#000000", bgcolor=hexadecimal(colour))


def _list(
    explanation: Explanation, values: list[float], top_k: int | None, width: int, target: int | None
) -> list[Text]:
    """The strongest supporters, then the strongest opponents that stand out."""
    ranking, marked = layout.ranking(values), layout.marks(explanation)
    strength, digits = layout.strengths(values), layout.decimals(values)
    supporters = [unit for unit in ranking if values[unit] > 0]
    if top_k is None:
        # Those that tell something, but never fewer than three.
        telling = sum(strength[unit] >= TELLING for unit in supporters)
        top_k = min(TOP_K, max(3, telling))
    chosen = supporters[:top_k]
    against = [unit for unit in ranking[::-1] if strength[unit] <= -NOTABLE][:OPPONENTS]
    name = "relevance" if target is None else "score"
    numbers = [
        layout.signed(values[unit], digits) + (DIRECT_MARK if marked[unit] else " " * any(marked))
        for unit in chosen + against[::-1]
    ]
    wide = max(map(len, numbers), default=0)
    room = max(0, min(BAR, width - wide - 24))
    head = f"{name}, nats"[: room + wide + 1]
    rows = [Text(f"rank  {head:<{room + wide + 1}}  unit in its context", FAINT)]
    rank = {unit: place for place, unit in enumerate(ranking, start=1)}
    for unit, number in zip(chosen + against[::-1], numbers, strict=True):
        value = strength[unit]
        bar = "█" * max(1, round(abs(value) * room)) if value and room else ""
        row = Text(f"{rank[unit]:>4}  ")
        row.append(f"{bar:<{room}}", hexadecimal(SUPPORT if value > 0 else OPPOSE))
        row.append(f" {number:>{wide}}  ")
        before, text, after = layout.context(explanation, unit, max(4, (width - row.cell_len) // 3))
        row.append(before, FAINT)
        row.append(text, "bold")
        row.append(after, FAINT)
        rows.append(row)
    for row in rows:
        row.truncate(width, overflow="ellipsis")
    if not chosen and not against:
        rows.append(Text("      no unit supports the answer", FAINT))
    return rows


def _targets(explanation: Explanation, width: int) -> list[Text]:
    """Several targets with their probability when nothing is suppressed, the likeliest first."""
    if not layout.several(explanation):
        return []
    logprobs = explanation.answer_logprobs.tolist()
    order = sorted(range(len(logprobs)), key=lambda branch: -logprobs[branch])
    answers = explanation.answers
    rows = [Text(), Text("branch   p         target, the likeliest first", FAINT)]
    for branch in order[:TARGETS]:
        row = Text(f"{branch:>6}   {math.exp(logprobs[branch]):<8.3g}  ")
        row.append(layout.visible(answers[branch]), "bold")
        rows.append(row)
    if len(order) > TARGETS:
        rows.append(Text(f"         and {len(order) - TARGETS} more", FAINT))
    for row in rows:
        row.truncate(width, overflow="ellipsis")
    return rows


def _coarser(explanation: Explanation, target: int | None, width: int) -> list[Text]:
    """What larger units of the prompt said that were refined: the largest ones first."""
    rows = []
    for place, coarse in enumerate(layout.by_size(explanation)[:0:-1]):
        prompt = layout.of_prompt(coarse)
        values = layout.in_sight(coarse, target)
        ranking = [prompt[i] for i in layout.ranking([values[unit] for unit in prompt])]
        digits = layout.decimals(values[unit] for unit in prompt)
        kind = "direct effect" if coarse.effect == "direct" else "total effect"
        if coarse.effect == "mixed":
            kind = "total and direct effect"
        when = "Then" if place else "First"
        head = f"{when} by {layout.levels(coarse)} ({len(prompt)}, {kind}):"
        rows += [Text(), Text(head, FAINT)]
        for unit in ranking[:COARSE]:
            row = Text(f"{layout.signed(values[unit], digits):>10}  ")
            row.append(layout.visible(coarse.units[unit].text))
            rows.append(row)
    for row in rows:
        row.truncate(width, overflow="ellipsis")
    return rows


def _notes(explanation: Explanation, coloured: bool) -> list[Text]:
    """What the marks and the numbers mean, what was left out, the settings."""
    key = Text()
    if coloured:
        key.append("supports", _style(1.0))
        key.append(" ")
        key.append("opposes", _style(-1.0))
        key.append(" the answer", FAINT)
    else:
        opening, closing = SUPPORT_MARK
        against, end = OPPOSE_MARK
        key.append(f"{opening}supports{closing} {against}opposes{end} the answer", FAINT)
    if layout.several(explanation):
        key.append(" · only the prompt is shown", FAINT)
    elif any(math.isnan(value) for value in explanation.relevance.tolist()):
        key.append(" · units at or after a target were not measured for it", FAINT)
    mark = f"in italics or with {DIRECT_MARK}" if coloured else f"marked {DIRECT_MARK}"
    notes = [key, Text(f"Scores: {layout.effect(explanation, mark)}.", FAINT)]
    if explanation.effect == "mixed":
        notes.append(Text(layout.DIFFERENCE, FAINT))
    if complete := layout.completeness(explanation):
        notes.append(Text(complete, FAINT))
    if explanation.left_out:
        words = [
            f"{layout.visible(piece.text)} ({layout.printable(piece.reason)})"
            for piece in explanation.left_out[:LEFT_OUT]
        ]
        more = len(explanation.left_out) - LEFT_OUT
        notes.append(
            Text("Left out: " + ", ".join(words) + (f" and {more} more" * (more > 0)), FAINT)
        )
    notes.append(Text(layout.settings(explanation), FAINT))
    return notes
