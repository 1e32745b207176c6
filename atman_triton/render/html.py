"""The explanation as one HTML page that needs nothing else: no network, no other file.

``page.html``, ``page.css`` and ``page.js`` hold structure, looks and behaviour; this module fills
in text, numbers and the first colouring: the colours are there even where scripts are not run.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import fields
from html import escape
from importlib import resources
from typing import TYPE_CHECKING, Any

from torch import Tensor

from . import layout
from .palette import DARK, LIGHT, Theme

if TYPE_CHECKING:
    from ..explanation import Explanation

ASSETS = __name__.rpartition(".")[0]
WEAK = 0.02  # of the strongest: below it nothing is coloured
FAINT = 0.15  # the same where several explanations lie over each other
STRONG = 0.35  # of the strongest: what is marked besides by a line or listed as opposing
TELLING = 0.01  # of the strongest: what is listed at first
SHARED = 0.5  # of every prompt, at least: less in common, and the documents are different ones
INFINITY = 1e30  # stands for an infinite number of nats in the page's JSON


def to_html(explanations: Sequence[Explanation]) -> str:
    """The page for one explanation, or for several of one document laid over each other.

    Raises: ValueError: if several explanations do not share most of their prompts.
    """
    first, several = explanations[0], len(explanations) > 1
    placed = [layout.place(explanation) for explanation in explanations]
    if several:
        starts, length = shared(
            [e.text for e in explanations], [e.prompt_stop for e in explanations]
        )
        text = placed[0].text[starts[0] : starts[0] + length]
        prompt_stop = first.prompt_stop - starts[0]
        targets: list[layout.Span | None] = []
    else:
        starts, text, length = [0], placed[0].text, len(placed[0].text)
        prompt_stop, targets = first.prompt_stop, placed[0].targets
    spans = [
        [(begin - start, end - start) for begin, end in place.units]
        for place, start in zip(placed, starts, strict=True)
    ]
    labels = [
        _label(explanation, start, length)
        for explanation, start in zip(explanations, starts, strict=True)
    ]
    marked, pieces = _marked_text(explanations, text, prompt_stop, spans, targets)
    script, style = _asset("page.js"), _asset("page.css")
    heading = (
        f"{len(explanations)} explanations of one text" if several else layout.visible(first.answer)
    )
    data = {
        "explanations": [
            _numbers(explanation, place) | {"letter": _letter(index)}
            for index, (explanation, place) in enumerate(zip(explanations, placed, strict=True))
        ],
        "pieces": pieces,
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
        subtitle=escape(_subtitle(explanations, length)),
        controls=_cards(explanations, labels) if several else _chips(first),
        text=marked,
        legend="" if several else LEGEND,
        notes="".join(map(_notes, explanations)),
        data=_json(data),
        script=script,
    )


LEGEND = (
    '<div class="scale"><div class="ramp" role="img" aria-label="Colour scale: blue opposes, '
    'orange supports"></div><div class="ends" id="scale"><span>opposes</span>'
    "<span>supports</span></div></div>"
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
) -> tuple[str, list[list[list[int]]]]:
    """The text as spans, one per piece, and for each the units of every explanation over it."""
    cuts = layout.cut(len(text), *spans, targets)
    strength = []
    for index, explanation in enumerate(explanations):
        # Colours are scaled by what is in sight: a question outside the shared text takes no part.
        seen = {unit for piece in cuts for unit in piece.covers[index]}
        values = explanation.relevance.tolist()
        strength.append(
            layout.strengths(v if unit in seen else math.nan for unit, v in enumerate(values))
        )
    html: list[str] = []
    pieces: list[list[list[int]]] = []
    for piece in cuts:
        *units, chosen = piece.covers
        part = text[piece.start : piece.stop]
        if not any(units) and not chosen:
            html.append(escape(part))
            continue
        # The space that opens a token stays outside, so that colours sit on words.
        core = part.lstrip(" ") or part
        html.append(part[: len(part) - len(core)])
        levels = [layout.strongest(s, u) for s, u in zip(strength, units, strict=True)]
        classes, style = _layers(levels) if len(levels) > 1 else _colour(levels[0])
        if any(units):
            classes.insert(0, "u")
        if chosen:
            classes.append("t")
        if piece.start >= prompt_stop:
            classes.append("answer")
        mark = '<i class="nl" aria-hidden="true"></i>' if "\n" in core else ""
        html.append(
            f'<span class="{" ".join(classes)}" data-p="{len(pieces)}"'
            + (f' data-t="{chosen[0]}"' if chosen else "")
            + (f' style="{style}"' if style else "")
            + f">{mark}{escape(core)}</span>"
        )
        pieces.append([list(members) for members in units])
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


def _chips(explanation: Explanation) -> str:
    """Radio buttons that choose a target token."""
    if len(explanation.targets) == 1:
        return ""
    chips = [_chip(0, f"all ({explanation.reduction})", None)]
    for index, target in enumerate(explanation.targets):
        probability = math.exp(float(explanation.base_logprobs[index]))
        chips.append(_chip(index + 1, layout.visible(target.text), probability))
    return (
        "<fieldset><legend>Which target token to explain</legend>"
        f'<div class="chips">{"".join(chips)}</div></fieldset>'
    )


def _chip(value: int, text: str, probability: float | None) -> str:
    shown = "" if probability is None else f"<small>{100 * probability:.3g}%</small>"
    checked = "" if value else " checked"
    return (
        f'<label><input type="radio" name="target" value="{value}"{checked}>'
        f"<span>{escape(text)}{shown}</span></label>"
    )


def _cards(explanations: Sequence[Explanation], labels: list[str]) -> str:
    """One card per explanation: its colour, question and answer, on or off, which target token."""
    cards = []
    for index, (explanation, label) in enumerate(zip(explanations, labels, strict=True)):
        options = [f"all target tokens ({explanation.reduction})"]
        options += [layout.visible(target.text) for target in explanation.targets]
        choices = "".join(
            f'<option value="{i}">{escape(o)}</option>' for i, o in enumerate(options)
        )
        colour = f"background-color:rgb(var(--overlay{index % len(LIGHT.overlays)}))"
        cards.append(
            f'<li><label><input type="checkbox" data-k="{index}" checked autocomplete="off">'
            f'<span class="letter" style="{colour}">{_letter(index)}</span>'
            f'<span class="question">{escape(label)}</span></label>'
            f'<p class="answer">{escape(layout.visible(explanation.answer))}</p>'
            f'<select data-k="{index}" aria-label="Target token of {_letter(index)}" '
            f'autocomplete="off">{choices}</select></li>'
        )
    return f'<ul class="cards">{"".join(cards)}</ul>'


def _label(explanation: Explanation, start: int, length: int) -> str:
    """What this explanation asks: the part of its prompt that is not shared."""
    own = explanation.prompt[:start] + explanation.prompt[start + length :]
    words = " ".join(layout.printable(own).split())
    return words if len(words) <= 160 else words[:80] + " … " + words[-76:]


def _letter(index: int) -> str:
    return chr(ord("A") + index) if index < 26 else str(index + 1)


def _subtitle(explanations: Sequence[Explanation], length: int) -> str:
    if len(explanations) > 1:
        colours = (
            "Each colour shows what supports one answer; the deeper, the more its loss rises when "
            "that piece is suppressed."
        )
        if all(length >= explanation.prompt_stop for explanation in explanations):
            return colours
        return (
            f"{colours} Only the text that all prompts share is shown; where they differ (the "
            "questions), their text and its colours are not."
        )
    probability = math.exp(float(explanations[0].base_logprobs.sum()))
    return (
        f"Probability {probability:.3g}. The colour of a piece shows how much the loss of this "
        "answer rises (orange) or falls (blue) when the model's attention to it is suppressed."
    )


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
    line = escape(layout.settings(explanation))
    return f"<details><summary>{line}</summary><table>{table}</table></details>"


def _numbers(explanation: Explanation, place: layout.Placed) -> dict[str, Any]:
    """What the page's script needs: text, spans, and one row of values per view of them."""
    return {
        "text": place.text,
        "units": place.units,
        "targets": [layout.visible(target.text) for target in explanation.targets],
        "base": _row(explanation.base_logprobs),
        "rows": [_row(explanation.relevance), *map(_row, explanation.scores)],
    }


def _row(values: Tensor) -> list[float | None]:
    return [
        None if math.isnan(value) else float(f"{max(-INFINITY, min(INFINITY, value)):.5g}")
        for value in values.tolist()
    ]


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
