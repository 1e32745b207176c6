"""What every picture of an explanation needs: text cut into pieces, lines, strengths, numbers."""

from __future__ import annotations

import itertools
import math
import re
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.cells import get_character_cell_size

if TYPE_CHECKING:
    from ..explanation import Explanation, Target, Unit
    from ..pieces import TargetPart

Span = tuple[int, int]

# C0 controls have pictures of their own; the rest would move or hide text without a trace.
_PICTURES = {code: 0x2400 + code for code in range(32) if code != ord("\n")} | {
    ord("\t"): ord("⇥"),
    0x7F: 0x2421,
    **dict.fromkeys([*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)], 0xFFFD),
    **dict.fromkeys(range(0xD800, 0xE000), 0xFFFD),
}


@dataclass(frozen=True)
class Piece:
    """A stretch of text under the same spans everywhere.

    Args:
        start: First character.
        stop: One past the last character.
        covers: For each list of spans given to ``cut``, which of its spans lie over this stretch.
    """

    start: int
    stop: int
    covers: tuple[tuple[int, ...], ...]


def cut(length: int, *span_lists: Sequence[Span | None]) -> list[Piece]:
    """Cut ``[0, length)`` wherever a span starts or stops; spans may overlap, be empty or None."""
    opens: dict[int, list[tuple[int, int]]] = {}
    closes: dict[int, list[tuple[int, int]]] = {}
    for which, spans in enumerate(span_lists):
        for index, span in enumerate(spans):
            if span is None:
                continue
            start, stop = max(span[0], 0), min(span[1], length)
            if start < stop:
                opens.setdefault(start, []).append((which, index))
                closes.setdefault(stop, []).append((which, index))
    active: list[set[int]] = [set() for _ in span_lists]
    pieces = []
    edges = sorted({0, length, *opens, *closes})
    for start, stop in itertools.pairwise(edges):
        for which, index in closes.get(start, []):
            active[which].remove(index)
        for which, index in opens.get(start, []):
            active[which].add(index)
        pieces.append(Piece(start, stop, tuple(tuple(sorted(members)) for members in active)))
    return pieces


@dataclass(frozen=True)
class Placed:
    """Printable text in which every unit has a place.

    Args:
        text: The explanation's text, then the units that have no characters of their own in it.
        units: The span of each unit.
        targets: The span of each target, None for those without a place.
    """

    text: str
    units: list[Span]
    targets: list[Span | None]


def place(explanation: Explanation, *, overview: bool = False) -> Placed:
    """Give every unit a place, behind the text where it has none in it.

    Units that are drawn elsewhere, on a picture or along a sound, have empty spans.

    Args:
        explanation: Whose units.
        overview: Leave out the targets' text; their units then have empty spans.
    """
    text = printable(explanation.prompt if overview else explanation.text)
    kept = [not (drawn(unit) or (overview and unit.part == "target")) for unit in explanation.units]
    spans = [_span(unit) for unit in explanation.units]
    if any(keep and span is None for keep, span in zip(kept, spans, strict=True)):
        text += ("\n" if text else "") + "Not in the text:"
    units: list[Span] = []
    for unit, keep, span in zip(explanation.units, kept, spans, strict=True):
        if not keep:
            span = (0, 0)
        elif span is None:
            start = len(text) + 1
            text += " " + visible(unit.text)
            span = (start, len(text))
        units.append(span)
    targets = [None if overview else _span(target) for target in explanation.targets]
    return Placed(text, units, targets)


@dataclass(frozen=True)
class Run:
    """A stretch of one line under one colour.

    Args:
        text: What stands there.
        start: Its first character.
        strength: In [-1, 1].
        direct: Whether it is a direct effect among total ones.
        note: Whether it is no text, but a remark about it.
    """

    text: str
    start: int
    strength: float
    direct: bool = False
    note: bool = False


def heat_lines(explanation: Explanation, values: Iterable[float], width: int) -> list[list[Run]]:
    """The text in lines of at most ``width`` cells, cut into runs. A line break ends its run.

    Of several targets only the prompt is shown: behind it stands one or another of them, and of
    classes, which are not read, nothing does. Every document starts a line, and so does what comes
    behind it.
    """
    overview = several(explanation) or named(explanation)
    placed, strength = place(explanation, overview=overview), strengths(values)
    pieces = cut(len(placed.text), placed.units)
    top = [strongest_unit(strength, piece.covers[0]) for piece in pieces]
    level = [0.0 if unit is None else strength[unit] for unit in top]
    marked = marks(explanation)
    direct = [unit is not None and marked[unit] for unit in top]
    rows, first = [], 0
    for start, stop in lines(placed.text, width, _breaks(explanation)):
        while first < len(pieces) and pieces[first].stop <= start:
            first += 1
        row, at = [], first
        while at < len(pieces) and pieces[at].start < stop:
            low, high = max(start, pieces[at].start), min(stop, pieces[at].stop)
            row.append(Run(placed.text[low:high], low, level[at], direct[at]))
            at += 1
        rows.append(row)
    return rows


def shown_lines(
    explanation: Explanation, values: Iterable[float], width: int, limit: int, least: float
) -> list[list[Run]]:
    """The lines of the heat map that are shown, with remarks among them.

    Args:
        explanation: Whose text.
        values: Of each unit.
        width: Cells in a line.
        limit: The most lines, besides remarks; those around strong units are kept.
        least: The strength from which on a unit is strong.
    """
    rows = heat_lines(explanation, values, width)
    shown: list[list[Run]] = []
    inside: int | None = None
    for index in elide(notable(rows, least), limit):
        row = [Run("⋯", 0, 0.0, note=True)] if index is None else rows[index]
        words = "" if index is None else "".join(run.text for run in row)
        if words.strip():
            owner = document_at(explanation, row[0].start)
            if owner != inside:
                name = "" if owner is None else f" {visible(explanation.documents[owner].id)} ──"
                shown.append([Run(f"──{name}", 0, 0.0, note=True)])
            inside = owner
        shown.append(row)
    return shown


def document_at(explanation: Explanation, character: int) -> int | None:
    """Which document holds a character of the text; None outside of them."""
    starts = [document.start for document in explanation.documents]
    index = bisect_right(starts, character) - 1
    return index if index >= 0 and character < explanation.documents[index].stop else None


def _breaks(explanation: Explanation) -> list[int]:
    """Where lines start besides: documents, and the first word behind each of them."""
    found = []
    for document in explanation.documents:
        behind = explanation.text[document.stop :]
        found += [document.start, document.stop + len(behind) - len(behind.lstrip())]
    return found


def strengths(values: Iterable[float]) -> list[float]:
    """Values scaled to [-1, 1] by the largest magnitude; NaN stays NaN, infinities are ±1."""
    values = list(values)
    peak = max((abs(value) for value in values if math.isfinite(value)), default=0.0)
    return [
        value if math.isnan(value) else max(-1.0, min(1.0, value / peak)) if peak else _sign(value)
        for value in values
    ]


def strongest(strength: Sequence[float], units: Iterable[int]) -> float:
    """The strength of largest magnitude among ``units``; 0 if none was measured."""
    unit = strongest_unit(strength, units)
    return 0.0 if unit is None else strength[unit]


def strongest_unit(strength: Sequence[float], units: Iterable[int]) -> int | None:
    """Which of ``units`` has the largest magnitude; None if none was measured."""
    measured = [unit for unit in units if not math.isnan(strength[unit])]
    return max(measured, key=lambda unit: abs(strength[unit]), default=None)


def drawn(unit: Unit) -> bool:
    """Whether a unit has a place on a picture or in a sound, rather than in the text."""
    return bool(unit.boxes) or unit.seconds is not None


def several(explanation: Explanation) -> bool:
    """Whether it explains more than one target."""
    return len(explanation.target_stops) > 1


def named(explanation: Explanation) -> bool:
    """Whether the targets are classes or outputs: their text is a name, which no model reads."""
    return explanation.quantity != "logprob" or "classes" in explanation.provenance


def in_sight(
    explanation: Explanation, target: int | None = None, part: int | None = None
) -> list[float]:
    """The values to picture: those of one target; of several, what the prompt does for all.

    Units of one of several targets say nothing about the others, and are NaN here.
    """
    values = explanation.values(target, part=part).tolist()
    if not several(explanation):
        return values
    pairs = zip(values, explanation.units, strict=True)
    return [math.nan if unit.part == "target" else value for value, unit in pairs]


def ranking(values: Sequence[float]) -> list[int]:
    """Indices of the measured values, the largest first; ties stay in order."""
    return sorted((i for i, v in enumerate(values) if not math.isnan(v)), key=lambda i: -values[i])


def marks(explanation: Explanation) -> list[bool]:
    """For each unit, whether its effect is direct among others whose effect is total."""
    mixed = explanation.effect == "mixed"
    return [mixed and unit.effect == "direct" for unit in explanation.units]


def of_prompt(explanation: Explanation) -> list[int]:
    """Which units are pieces of the prompt."""
    return [index for index, unit in enumerate(explanation.units) if unit.part == "prompt"]


def parts_of(explanation: Explanation, branch: int) -> list[tuple[int, TargetPart]]:
    """The numbered parts of a target, if they are neither its single tokens nor only one."""
    own = [(i, part) for i, part in enumerate(explanation.parts) if part.branch == branch]
    return own if len(own) > 1 and any(len(part.rows) > 1 for _, part in own) else []


def by_size(explanation: Explanation) -> list[Explanation]:
    """The explanation, then those by ever larger units from which it was refined."""
    found = [explanation]
    while found[-1].coarse is not None:
        found.append(found[-1].coarse)
    return found


def printable(text: str) -> str:
    """The text, as long as before, with control and direction characters made visible."""
    return text.translate(_PICTURES)


def visible(text: str) -> str:
    """The text on one line, with white space at its ends and line breaks made visible."""
    text = printable(text).replace("\n", "↵")
    core = text.strip(" ")
    if not core:
        return "␣" * len(text) or "∅"
    lead = len(text) - len(text.lstrip(" "))
    tail = len(text) - len(text.rstrip(" "))
    # One leading space is how most tokenizers write "a new word starts here".
    return ("" if lead == 1 else "␣" * lead) + core + "␣" * tail


def name(unit: Unit) -> str:
    """A unit on its own on one line: its text, or where its corner lies on its picture."""
    if len(unit.boxes) != 1 or unit.level == "image":
        return visible(unit.text)
    left, top, *_ = unit.boxes[0]
    return f"{unit.level} at {left:.0f},{top:.0f}"


def context(explanation: Explanation, unit: int, size: int = 24) -> tuple[str, str, str]:
    """The unit and up to ``size`` characters of text on either side, each on one line."""
    piece = explanation.units[unit]
    text, span = _read(explanation, piece)
    if span is None:
        return "", name(piece), ""
    text, (start, stop) = text.replace("\n", " "), span
    low, high = max(0, start - size), min(len(text), stop + size)
    before, after = text[low:start], text[stop:high]
    # Cut at whole words.
    if low:
        before = "…" + re.sub(r"^\S*\s+(?=\S)", "", before)
    if high < len(text):
        after = re.sub(r"(\S)\s+\S*$", r"\1", after) + "…"
    core = text[start:stop]
    if core.strip():
        # The space that opens a token belongs to what stands before it.
        before += core[: len(core) - len(core.lstrip())]
        after = core[len(core.rstrip()) :] + after
        return before, core.strip(), after
    return before, visible(piece.text), after


def in_word(explanation: Explanation, unit: int, size: int = 12) -> str:
    """The unit; if it is only part of a word then that word, with brackets around the unit."""
    piece = explanation.units[unit]
    text, span = _read(explanation, piece)
    if span is None or not piece.text.strip():
        return name(piece)
    core = text[span[0] : span[1]]
    before = "" if core[0].isspace() else re.split(r"\s", text[: span[0]][-size:])[-1]
    after = "" if core[-1].isspace() else re.split(r"\s", text[span[1] :][:size])[0]
    return f"{before}[{visible(core)}]{after}" if before or after else visible(core)


def lines(text: str, width: int, breaks: Iterable[int] = ()) -> list[Span]:
    """Break printable text into lines of at most ``width`` cells, after spaces if it can.

    ``breaks`` are characters that start a line besides.
    """
    spans: list[Span] = []
    start = used = 0
    break_at = -1
    must = set(breaks)
    for index, character in enumerate(text):
        if index in must and index > start:
            spans.append((start, index))
            start, used, break_at = index, 0, -1
        if character == "\n":
            spans.append((start, index + 1))
            start, used, break_at = index + 1, 0, -1
            continue
        size = get_character_cell_size(character)
        # A space may hang over the edge: it is not seen there.
        if used + size > width and character != " " and index > start:
            stop = break_at if break_at > start else index
            spans.append((start, stop))
            start, break_at = stop, -1
            used = sum(map(get_character_cell_size, text[start:index]))
        used += size
        if character == " " or size == 2:
            break_at = index + 1
    if start < len(text) or not spans:
        spans.append((start, len(text)))
    return spans


def notable(rows: Sequence[Sequence[Run]], least: float) -> list[float]:
    """For each line the largest magnitude in it, 0 where that is less than ``least``."""
    peaks = [max((abs(run.strength) for run in row), default=0.0) for row in rows]
    return [peak if peak >= least else 0.0 for peak in peaks]


def elide(marked: Sequence[float], limit: int) -> list[int | None]:
    """Which lines to show of more than ``limit``: the first, the last and those around marks.

    Where marks are too many for the limit, the largest are kept.

    Returns: line numbers in order; None stands for a stretch that is left out.
    """
    total = len(marked)
    if total <= limit:
        return list(range(total))
    keep = {0, 1, *range(total - 4, total)}
    for index in sorted(range(total), key=lambda index: -marked[index]):
        around = {index - 1, index, index + 1}
        if not marked[index] or len(keep | around) > limit:
            break
        keep |= around
    shown: list[int | None] = []
    for index in sorted(keep & set(range(total))):
        if shown and shown[-1] is not None and index > shown[-1] + 1:
            shown.append(None)
        shown.append(index)
    return shown


def _read(explanation: Explanation, unit: Unit) -> tuple[str, Span | None]:
    """The printable text in which the model read a unit, its own target only, and its span."""
    span = _span(unit)
    if not several(explanation) and not named(explanation):
        return printable(explanation.text), span
    text = printable(explanation.prompt)
    if unit.branch is None:
        return text, span
    start, stop = [explanation.prompt_stop, *explanation.target_stops][unit.branch :][:2]
    by = start - explanation.prompt_stop
    text += printable(explanation.text[start:stop])
    return text, None if span is None else (span[0] - by, span[1] - by)


def _span(piece: Unit | Target) -> Span | None:
    if piece.start is None or piece.stop is None or piece.start == piece.stop:
        return None
    return piece.start, piece.stop


def _sign(value: float) -> float:
    return math.copysign(1.0, value) if value else 0.0
