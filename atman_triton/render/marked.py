"""The text of the page: cut into spans, and coloured as it is before anything is chosen."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from . import layout
from .boxes import Framed
from .palette import LIGHT

if TYPE_CHECKING:
    from ..explanation import Explanation

WEAK = 0.02  # of the strongest: below it nothing is coloured
FAINT = 0.15  # the same where several explanations lie over each other
STRONG = 0.35  # of the strongest: what is marked besides by a line or listed as opposing


def marked_text(
    explanations: Sequence[Explanation],
    text: str,
    prompt_stop: int,
    spans: list[list[layout.Span]],
    targets: list[layout.Span | None],
    neighbours: list[layout.Span],
    documents: list[layout.Span],
    frames: list[Framed],
    overlay: bool,
) -> tuple[str, list[list[list[int]]], list[list[int]]]:
    """The text as spans, one per piece; which units and which neighbours lie where.

    Of several targets all stand behind the prompt, hidden until one is chosen.

    Args:
        explanations: Those on the page.
        text: What is shown.
        prompt_stop: Where the prompt ends in it.
        spans: Of each explanation, where its units stand in it.
        targets: Where target tokens stand.
        neighbours: Where tokens stand that were suppressed along with some unit.
        documents: Where the first explanation's documents stand.
        frames: Pictures and sounds, in text order, and where in the text they stand.
        overlay: Whether the explanations are laid over each other.
    Returns: the HTML; of each piece, its units in every explanation; of each neighbour, its pieces.
    """
    branches: list[layout.Span] = []
    if not overlay and layout.several(explanations[0]):
        branches = list(itertools.pairwise([prompt_stop, *explanations[0].target_stops]))
    cuts = layout.cut(len(text), *spans, targets, branches, neighbours, documents)
    stop = len(explanations[0].text)
    strength = []
    for index, explanation in enumerate(explanations):
        # Colours are scaled by what is in sight: a question outside the shared text takes no part.
        seen = {unit for piece in cuts for unit in piece.covers[index]}
        seen |= {unit for each in frames for region in each.regions for unit in region.units[index]}
        values = layout.in_sight(explanation)
        strength.append(
            layout.strengths(v if unit in seen else math.nan for unit, v in enumerate(values))
        )
    marks, named = layout.marks(explanations[0]), layout.named(explanations[0])
    html: list[str] = []
    pieces: list[list[list[int]]] = []
    near: list[list[int]] = [[] for _ in neighbours]

    def look(units: list[list[int]]) -> tuple[list[str], str]:
        """Classes and style of what some units lie over."""
        levels = [layout.strongest(s, u) for s, u in zip(strength, units, strict=True)]
        classes, style = _layers(levels) if overlay else _colour(levels[0])
        top = layout.strongest_unit(strength[0], units[0])
        if style and not overlay and top is not None and marks[top]:
            classes.append("d")
        return classes, style

    def draw(shown: list[Framed]) -> None:
        """Pictures side by side, under the regions of their units."""
        html.append('<span class="pictures">')
        for each in shown:
            html.append(each.opening)
            for region in each.regions:
                classes, style = look(region.units)
                here = any(region.units) if overlay else bool(region.units[0])
                hidden = " hidden" * (not here)
                html.append(
                    f'<span class="{" ".join(["u", "box", *classes])}" data-p="{len(pieces)}" '
                    f'role="img" aria-label="{escape(region.name)}" '
                    f'style="{region.style}{style}"{hidden}></span>'
                )
                pieces.append(region.units)
            html.append("</span>")
        html.append("</span>")

    def write(
        words: str,
        units: list[list[int]],
        beside: Sequence[int],
        chosen: Sequence[int],
        answer: bool,
    ) -> None:
        classes, style = look(units)
        classes = ["u"] * any(units) + classes + ["t"] * bool(chosen) + ["answer"] * answer
        classes += ["label"] * (answer and named)
        mark = '<i class="nl" aria-hidden="true"></i>\n'
        html.append(
            f'<span class="{" ".join(classes)}" data-p="{len(pieces)}"'
            + (f' data-t="{chosen[0]}"' if chosen else "")
            + (f' style="{style}"' if style else "")
            + f">{escape(words).replace(chr(10), mark)}</span>"
        )
        for place in beside:
            near[place].append(len(pieces))
        pieces.append(units)

    inside, waiting = "", list(frames)
    for piece in cuts:
        if here := [each for each in waiting if each.start <= piece.start]:
            draw(here)
            waiting = waiting[len(here) :]
        *covers, chosen, branch, beside, owner = piece.covers
        # A document is in the prompt, so one span is open at most.
        opening = "".join(f'<span class="branch" data-b="{b}" hidden>' for b in branch)
        opening += "".join(_document(explanations[0].documents[index].id) for index in owner)
        if opening != inside:
            html.append("</span>" * bool(inside) + opening)
            inside = opening
        part = text[piece.start : piece.stop]
        if not any(covers) and not chosen and not beside:
            html.append(escape(part))
            continue
        # The space that opens a token stays outside, so that colours sit on words; within a larger
        # unit it is part of that one only.
        core = part.lstrip(" ") or part
        space = part[: len(part) - len(core)]
        within = [
            [unit for unit in members if own[unit][0] < piece.start]
            for own, members in zip(spans, covers, strict=True)
        ]
        answer = prompt_stop <= piece.start < stop
        if space and any(within):
            write(space, within, [p for p in beside if neighbours[p][0] < piece.start], (), answer)
        else:
            html.append(space)
        write(core, [list(members) for members in covers], beside, chosen, answer)
    html.append("</span>" if inside else "")
    if waiting:
        draw(waiting)
    return "".join(html), pieces, near


def _document(name: str) -> str:
    """What opens a document: a mark with its id, which is no text of the page."""
    name = escape(layout.visible(name))
    return (
        f'<span class="document"><i class="doc" role="note" data-id="{name}" '
        f'aria-label="document {name}"></i>'
    )


def _colour(level: float) -> tuple[list[str], str]:
    if abs(level) < WEAK:
        return [], ""
    return ["p" if level > 0 else "n"], f"--v:{abs(level):.3f}"


def _layers(levels: list[float]) -> tuple[list[str], str]:
    layers = [(level, index) for index, level in enumerate(levels) if level >= FAINT]
    if not layers:
        return [], ""
    share = 100 / len(layers)
    bands = ", ".join(
        f"rgb(var(--overlay{index % len(LIGHT.overlays)}) / {level:.3f}) "
        f"{place * share:.4g}% {(place + 1) * share:.4g}%"
        for place, (level, index) in enumerate(layers)
    )
    top, index = max(layers)
    return [f"m{index % 6}"] if top >= STRONG else [], f"background-image:linear-gradient({bands})"
