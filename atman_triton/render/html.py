"""The explanation as one HTML page that needs nothing else: no network, no other file.

``page.html``, ``page.css`` and ``page.js`` hold structure, looks and behaviour; this module fills
in text, numbers and the first colouring: the colours are there even where scripts are not run.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import math
import re
from collections.abc import Sequence
from dataclasses import fields
from html import escape
from importlib import resources
from typing import TYPE_CHECKING, Any

from . import layout, wording
from .controls import cards, choices, headline, label, letter
from .numbers import INFINITY, numbers
from .palette import DARK, LIGHT, Theme

if TYPE_CHECKING:
    from ..explanation import Explanation

ASSETS = __name__.rpartition(".")[0]
WEAK = 0.02  # of the strongest: below it nothing is coloured
FAINT = 0.15  # the same where several explanations lie over each other
STRONG = 0.35  # of the strongest: what is marked besides by a line or listed as opposing
TELLING = 0.01  # of the strongest: what is listed at first
SHARED = 0.5  # of every prompt, at least: less in common, and the documents are different ones


def to_html(explanations: Sequence[Explanation]) -> str:
    """The page for one explanation, or for several of one document laid over each other.

    Of one, those by larger units from which it was refined are on the page too.

    Raises: ValueError: if several explanations do not share most of their prompts.
    """
    first, overlay = explanations[0], len(explanations) > 1
    if not overlay:
        explanations = layout.by_size(first)
    placed = [layout.place(explanation) for explanation in explanations]
    if overlay:
        # Of several targets only one or another stands behind the prompt: they are not shared.
        texts = [e.prompt if layout.several(e) else e.text for e in explanations]
        starts, length = shared(texts, [e.prompt_stop for e in explanations])
        text = placed[0].text[starts[0] : starts[0] + length]
        prompt_stop = first.prompt_stop - starts[0]
        targets: list[layout.Span | None] = []
    else:
        placed = _together(placed, len(first.text))
        starts, text, length = [0] * len(placed), placed[0].text, len(placed[0].text)
        prompt_stop, targets = first.prompt_stop, placed[0].targets
    spans = [
        [(begin - start, end - start) for begin, end in place.units]
        for place, start in zip(placed, starts, strict=True)
    ]
    labels = [
        label(explanation, start, length)
        for explanation, start in zip(explanations, starts, strict=True)
    ]
    marked, pieces = _marked_text(explanations, text, prompt_stop, spans, targets, overlay)
    script, style = _asset("page.js"), _asset("page.css")
    heading = f"{len(explanations)} explanations of one text" if overlay else headline(first)
    data = {
        "explanations": [
            numbers(explanation, place) | {"letter": letter(index)}
            for index, (explanation, place) in enumerate(zip(explanations, placed, strict=True))
        ],
        "pieces": pieces,
        "overlay": overlay,
        "weak": WEAK,
        "faint": FAINT,
        "strong": STRONG,
        "telling": TELLING,
        "infinity": INFINITY,
        "colours": len(LIGHT.overlays),
    }
    return _fill(
        _asset("page.html"),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        title=escape(f"{heading[:80]} · AtMan"),
        palette=_palette(),
        style=style,
        heading=escape(heading),
        subtitle=escape(_subtitle(explanations, length, overlay)),
        controls=cards(explanations, labels) if overlay else choices(first),
        text=marked,
        legend="" if overlay else LEGEND + _difference(explanations),
        notes="".join(map(_notes, explanations)),
        data=_json(data),
        script=script,
    )


def _together(placed: list[layout.Placed], stop: int) -> list[layout.Placed]:
    """One text for units of several sizes: each brings those that have no place in the text."""
    text, moved = placed[0].text, [placed[0]]
    for place in placed[1:]:
        by = len(text) - stop
        text += place.text[stop:]
        units = [(a + by, b + by) if a >= stop else (a, b) for a, b in place.units]
        moved.append(layout.Placed(text, units, place.targets))
    return [layout.Placed(text, place.units, place.targets) for place in moved]


LEGEND = (
    '<div class="scale"><div class="ramp" role="img" aria-label="Colour scale: blue opposes, '
    'orange supports"></div><div class="ends" id="scale"><span>opposes</span>'
    "<span>supports</span></div></div>"
)


def _difference(explanations: Sequence[Explanation]) -> str:
    """What the mark of direct effects means, where they stand among total ones."""
    if not any(explanation.effect == "mixed" for explanation in explanations):
        return ""
    return (
        f'<p class="hint key"><span class="d">Dashed line</span>: direct effect. '
        f"{escape(wording.DIFFERENCE)}</p>"
    )


def shared(texts: Sequence[str], prompt_stops: Sequence[int]) -> tuple[list[int], int]:
    """The text that all explanations have in common: where it starts in each, and its length.

    Documents stand before the question or after it, so the common start of the prompts and their
    common end are tried, and the longer one taken.

    Raises: ValueError: if it is less than half of a prompt: they are about different documents.
    """
    if all(text == texts[0] for text in texts):
        return [0] * len(texts), len(texts[0])
    prompts = [text[:stop] for text, stop in zip(texts, prompt_stops, strict=True)]
    head = _common(prompts)
    if len(set(prompts)) > 1:
        # The first words of the questions may agree by chance: go back to where a sentence ends.
        ends = [match.end() for match in re.finditer(r"\n|[.!?。](?=\s)", prompts[0][:head])]
        head = ends[-1] if ends else head
    tail = _common([prompt[::-1] for prompt in prompts])
    longest = max(map(len, prompts))
    if max(head, tail) < SHARED * longest or not longest:
        raise ValueError(
            f"others must explain the same text: their prompts share {max(head, tail)} characters "
            f"at their start or end, and the longest has {longest}; half of it is needed."
        )
    if head >= tail:
        return [0] * len(texts), head
    return [len(prompt) - tail for prompt in prompts], tail


def _common(texts: Sequence[str]) -> int:
    low, high = min(texts), max(texts)
    for index, (a, b) in enumerate(zip(low, high, strict=False)):
        if a != b:
            return index
    return len(low)


def _marked_text(
    explanations: Sequence[Explanation],
    text: str,
    prompt_stop: int,
    spans: list[list[layout.Span]],
    targets: list[layout.Span | None],
    overlay: bool,
) -> tuple[str, list[list[list[int]]]]:
    """The text as spans, one per piece, and for each the units of every explanation over it.

    Of several targets all stand behind the prompt, hidden until one is chosen.
    """
    branches: list[layout.Span] = []
    if not overlay and layout.several(explanations[0]):
        branches = list(itertools.pairwise([prompt_stop, *explanations[0].target_stops]))
    cuts = layout.cut(len(text), *spans, targets, branches)
    stop = len(explanations[0].text)
    strength = []
    for index, explanation in enumerate(explanations):
        # Colours are scaled by what is in sight: a question outside the shared text takes no part.
        seen = {unit for piece in cuts for unit in piece.covers[index]}
        values = layout.in_sight(explanation)
        strength.append(
            layout.strengths(v if unit in seen else math.nan for unit, v in enumerate(values))
        )
    marks = layout.marks(explanations[0])
    html: list[str] = []
    pieces: list[list[list[int]]] = []

    def write(words: str, units: list[list[int]], chosen: tuple[int, ...], answer: bool) -> None:
        levels = [layout.strongest(s, u) for s, u in zip(strength, units, strict=True)]
        classes, style = _layers(levels) if overlay else _colour(levels[0])
        top = layout.strongest_unit(strength[0], units[0])
        if style and not overlay and top is not None and marks[top]:
            classes.append("d")
        classes = ["u"] * any(units) + classes + ["t"] * bool(chosen) + ["answer"] * answer
        mark = '<i class="nl" aria-hidden="true"></i>\n'
        html.append(
            f'<span class="{" ".join(classes)}" data-p="{len(pieces)}"'
            + (f' data-t="{chosen[0]}"' if chosen else "")
            + (f' style="{style}"' if style else "")
            + f">{escape(words).replace(chr(10), mark)}</span>"
        )
        pieces.append(units)

    inside: tuple[int, ...] = ()
    for piece in cuts:
        *covers, chosen, branch = piece.covers
        if branch != inside:
            html.append("</span>" if inside else "")
            html += [f'<span class="branch" data-b="{b}" hidden>' for b in branch]
            inside = branch
        part = text[piece.start : piece.stop]
        if not any(covers) and not chosen:
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
            write(space, within, (), answer)
        else:
            html.append(space)
        write(core, [list(members) for members in covers], chosen, answer)
    html.append("</span>" if inside else "")
    return "".join(html), pieces


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


def _subtitle(explanations: Sequence[Explanation], length: int, overlay: bool) -> str:
    mark = "a line is dashed"
    effects = {wording.effect(explanation, mark) for explanation in explanations}
    if overlay:
        words = (
            "Each colour shows what supports one answer; the deeper, the more its loss rises when "
            "that piece is suppressed."
        )
        if any(length < explanation.prompt_stop for explanation in explanations):
            words += (
                " Only the text that all prompts share is shown; where they differ (the "
                "questions), their text and its colours are not."
            )
        return words + (f" Scores: {effects.pop()}." if len(effects) == 1 else "")
    first = explanations[0]
    if layout.several(first):
        words = (
            "The colour of a piece shows how much the loss of the chosen target, or of all targets "
            "on average, rises (orange) or falls (blue) when the model's attention to it is "
            "suppressed. Choose a target to see its own text."
        )
    else:
        probability = math.exp(float(first.base_logprobs.sum()))
        words = (
            f"Probability {probability:.3g}. The colour of a piece shows how much the loss of this "
            "answer rises (orange) or falls (blue) when the model's attention to it is suppressed."
        )
    return f"{words} Scores: {wording.effect(first, mark)}. {wording.completeness(first)}".rstrip()


def _notes(explanation: Explanation) -> str:
    """The settings in one line, then everything known about how the numbers came about."""
    rows = [
        (name, json.dumps(value, ensure_ascii=False))
        for name, value in explanation.provenance.items()
    ]
    rows += [
        ("left out", f"{layout.visible(piece.text)} ({piece.reason})")
        for piece in explanation.left_out
    ]
    table = "".join(
        f'<tr><th scope="row">{escape(layout.printable(name))}</th>'
        f"<td>{escape(layout.printable(value))}</td></tr>"
        for name, value in rows
    )
    rows.insert(0, ("scores", wording.effect(explanation, "marked direct")))
    line = escape(wording.settings(explanation))
    return f"<details><summary>{line}</summary><table>{table}</table></details>"


def _json(data: dict[str, Any]) -> str:
    """JSON that no HTML parser can mistake for the end of its script block."""
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _palette() -> str:
    dark = _variables(DARK)
    return (
        f":root{{color-scheme:light dark;{_variables(LIGHT)}}}\n"
        f'@media (prefers-color-scheme: dark){{:root:not([data-theme="light"]){{{dark}}}}}\n'
        f':root[data-theme="dark"]{{color-scheme:dark;{dark}}}\n'
        ':root[data-theme="light"]{color-scheme:light}'
    )


def _variables(theme: Theme) -> str:
    colours = {
        field.name: getattr(theme, field.name)
        for field in fields(theme)
        if field.name != "overlays"
    }
    colours |= {f"overlay{index}": colour for index, colour in enumerate(theme.overlays)}
    return "".join(f"--{name}:{' '.join(map(str, colour))};" for name, colour in colours.items())


def _asset(name: str) -> str:
    return resources.files(ASSETS).joinpath(name).read_text(encoding="utf-8")


def _fill(template: str, **values: str) -> str:
    # One pass, so that braces inside the values stay what they are.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], template)
