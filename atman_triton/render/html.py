"""The explanation as one HTML page that needs nothing else: no network, no other file.

``page.html``, ``page.css`` and ``page.js`` hold structure, looks and behaviour; this module fills
in text, numbers and the first colouring: the colours are there even where scripts are not run.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import fields, replace
from html import escape
from importlib import resources
from typing import TYPE_CHECKING, Any

from . import layout, wording
from .boxes import framed
from .controls import cards, choices, headline, label, letter, pictures
from .marked import FAINT, STRONG, WEAK, marked_text
from .numbers import INFINITY, neighbour_spans, neighbour_tokens, numbers, pieces_of
from .palette import DARK, LIGHT, Theme

if TYPE_CHECKING:
    from ..explanation import Explanation

ASSETS = __name__.rpartition(".")[0]
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
        starts, length = shared(
            texts, [e.prompt_stop for e in explanations], bool(first.pictures or first.sound)
        )
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
    # Neighbours are outlined where one text is one explanation's.
    near = [] if overlay else neighbour_spans(explanations)
    documents = [(d.start - starts[0], d.stop - starts[0]) for d in first.documents]
    frames = [replace(each, start=each.start - starts[0]) for each in framed(explanations)]
    marked, pieces, near_pieces = marked_text(
        explanations, text, prompt_stop, spans, targets, near, documents, frames, overlay
    )
    tokens = [] if overlay else neighbour_tokens(explanations)
    near_pieces += pieces_of(explanations, pieces, tokens)
    script, style = _asset("page.js"), _asset("page.css")
    heading = f"{len(explanations)} explanations of one text" if overlay else headline(first)
    data = {
        "explanations": [
            numbers(explanation, place, [*near, *tokens]) | {"letter": letter(index)}
            for index, (explanation, place) in enumerate(zip(explanations, placed, strict=True))
        ],
        "pieces": pieces,
        "near": near_pieces,
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
        controls=(cards(explanations, labels) if overlay else choices(first)) + pictures(first),
        text=marked,
        legend="" if overlay else _legend(first) + _difference(explanations),
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


def _legend(explanation: Explanation) -> str:
    """The colour scale; the script adds its numbers."""
    scale = wording.scale(explanation)
    high, low = escape(scale.high), escape(scale.low)
    if scale.signed:
        kind, label = "ramp", f"Colour scale: blue {low}, orange {high}"
        ends = f"<span>{low}</span><span>{high}</span>"
    else:
        kind, label = "ramp single", f"Colour scale: the more orange, the more it {high}"
        ends = f"<span>0</span><span>{high}</span>"
    return (
        f'<div class="scale"><div class="{kind}" role="img" aria-label="{label}"></div>'
        f'<div class="ends" id="scale">{ends}</div></div>'
    )


def _difference(explanations: Sequence[Explanation]) -> str:
    """What the mark of direct effects means, where they stand among total ones."""
    if not any(explanation.effect == "mixed" for explanation in explanations):
        return ""
    return (
        f'<p class="hint key"><span class="d">Dashed line</span>: direct effect. '
        f"{escape(wording.DIFFERENCE)}</p>"
    )


def shared(
    texts: Sequence[str], prompt_stops: Sequence[int], seen: bool = False
) -> tuple[list[int], int]:
    """The text that all explanations have in common: where it starts in each, and its length.

    Documents stand before the question or after it, so the common start of the prompts and their
    common end are tried, and the longer one taken. Pictures and sounds may stand without a text.

    Args:
        texts: Of the explanations.
        prompt_stops: Where their prompts end.
        seen: Whether they are of pictures or a sound.
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
    if seen and not longest:
        return [0] * len(texts), 0
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


def _subtitle(explanations: Sequence[Explanation], length: int, overlay: bool) -> str:
    mark = "a line is dashed"
    effects = {wording.effect(explanation, mark) for explanation in explanations}
    if overlay:
        what, rises, _ = wording.change(explanations[0])
        verb, whole = wording.sides(explanations[0])[0], wording.noun(explanations[0]).whole
        words = (
            f"Each colour shows what {verb} one {whole}; the deeper, the more its {what} {rises} "
            "when that piece is suppressed."
        )
        if any(length < explanation.prompt_stop for explanation in explanations):
            words += (
                " Only the text that all prompts share is shown; where they differ (the "
                "questions), their text and its colours are not."
            )
        return words + (f" Scores: {effects.pop()}." if len(effects) == 1 else "")
    first = explanations[0]
    words = f"{_what(first)} Scores: {wording.effect(first, mark)}. {wording.completeness(first)}"
    return words.rstrip()


def _what(explanation: Explanation) -> str:
    """What the colours are."""
    e, measure, named = explanation, wording.scale(explanation), layout.named(explanation)
    scaled = f" Values are {wording.SCALED}." if e.normalize else ""
    noun, base = wording.noun(e), wording.base_word(e).capitalize()
    (what, rises, falls), whose = wording.change(e), f" of this {noun.whole}"
    if e.contrast:
        pairs = zip(e.answers, e.answer_logprobs.tolist(), strict=True)
        ps = [f"“{wording.name_of(t)}” {wording.base_number(e, value)}" for t, value in pairs]
        start = f"{base} of {ps[0]}, of {ps[1]}."
        if e.postprocessing == "none":
            how = "more than that of the second" + " (orange), or less (blue)" * measure.signed
            words = f"how much the {what} of the first {noun.one} {rises} {how}"
            return (
                f"{start} The colour of a piece shows {words}, when the model's attention to it is "
                f"suppressed. Choose a {noun.one} to see what supports it alone.{scaled}"
            )
        return (
            f"{start} The colour of a piece shows how differently the {what} of both {noun.many} "
            f"changes ({e.postprocessing} difference, the one way or the other) when the model's "
            f"attention to it is suppressed. Choose a {noun.one} to see it alone.{scaled}"
        )
    start, end = f"{base} {wording.base_number(e, float(e.base_logprobs.sum()))}. ", ""
    if layout.several(e):
        whose = f" of the chosen {noun.one}, or of all {noun.many} on average,"
        start, end = "", f" Choose a {noun.one} to see {'it alone' if named else 'its own text'}."
    elif what == noun.whole:
        whose = ""
    change = f"{rises} (orange) or {falls} (blue)" if measure.signed else rises
    if e.postprocessing != "none":
        change = f"changes ({e.postprocessing} change, the one way or the other)"
    return (
        f"{start}The colour of a piece shows how much the {what}{whose} {change} when the "
        f"model's attention to it is suppressed.{scaled}{end}"
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
