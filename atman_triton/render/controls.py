"""What a reader of the page chooses with: target, target token, level, explanations laid over."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from . import layout, wording
from .palette import LIGHT

if TYPE_CHECKING:
    from ..explanation import Explanation

FILTERED = 8  # targets from which on they can be filtered and put in order


def choices(explanation: Explanation) -> str:
    """Radio buttons that choose units of another size, a target and a target token.

    The value of a target token is its number from 1, that of a part of a target comes behind those
    of all tokens, that of a whole target is -1 minus its number, that of all 0.
    """
    parts = [_levels(explanation)]
    reduction, noun = explanation.reduction, wording.noun(explanation)
    if not layout.several(explanation):
        if len(explanation.targets) > 1:
            chips = [_chip("target", 0, f"all ({reduction})", checked=True)]
            if pieces := _parts(explanation, "target", 0):
                parts.append(_fieldset(PART, chips + pieces))
                chips = []
            chips += [_token(explanation, "target", row) for row in range(len(explanation.targets))]
            parts.append(_fieldset(f"Which {noun.row} to explain", chips))
        return "".join(parts)
    rows: list[list[int]] = [[] for _ in explanation.target_stops]
    for row, target in enumerate(explanation.targets):
        rows[target.branch].append(row)
    whole = "the difference" if explanation.contrast else "all (mean)"
    chips = [_chip("branch", 0, whole, checked=True)]
    logprobs = explanation.answer_logprobs.tolist()
    for branch, answer in enumerate(explanation.answers):
        text = layout.visible(answer)
        brief = wording.base_brief(explanation, logprobs[branch])
        chips.append(_chip("branch", -1 - branch, text, brief))
    legend = f"Which of {len(rows)} {noun.many} to explain"
    if explanation.contrast:
        legend = f"The difference between both {noun.many}, or one of them"
    parts.append(_fieldset(legend, chips, "", _tools(len(rows))))
    for branch, own in enumerate(rows):
        if len(own) > 1:
            name = f"target{branch}"
            chips = [_chip(name, -1 - branch, f"all ({reduction})", checked=True)]
            attributes = f' data-of="{branch}" hidden'
            if pieces := _parts(explanation, name, branch):
                parts.append(_fieldset(PART, chips + pieces, attributes))
                chips = []
            chips += [_token(explanation, name, row) for row in own]
            legend = f"Which token of this {noun.one} to explain"
            parts.append(_fieldset(legend, chips, attributes))
    return "".join(parts)


def pictures(explanation: Explanation) -> str:
    """How pictures are seen, shown where scripts run."""
    choices = (("plain", "Pictures as they are"), ("smooth", "Softened"))
    boxes = " ".join(
        f'<label><input type="checkbox" id="{name}" autocomplete="off"> {label}</label>'
        for name, label in choices
    )
    return f'<p class="see" id="see" hidden>{boxes}</p>' * bool(explanation.pictures)


PART = "Which part of the target to explain"


def _parts(explanation: Explanation, name: str, branch: int) -> list[str]:
    """A choice for each part of a target; none if they are its tokens, or it is only one."""
    logprobs, first = explanation.part_logprobs.tolist(), len(explanation.targets) + 1
    return [
        _chip(
            name,
            first + index,
            layout.visible(part.text),
            wording.base_brief(explanation, logprobs[index]),
        )
        for index, part in layout.parts_of(explanation, branch)
    ]


def _levels(explanation: Explanation) -> str:
    sizes = layout.by_size(explanation)
    if len(sizes) == 1:
        return ""
    chips = []
    for level, each in enumerate(sizes):
        text = f"{wording.levels(each)} ({len(layout.of_prompt(each))})"
        chips.append(_chip("level", level, text, checked=level == 0))
    legend = "By which pieces (the first ones were refined from the others)"
    return _fieldset(legend, chips)


def _tools(count: int) -> str:
    """A filter and an order for many targets, shown where scripts run."""
    if count < FILTERED:
        return ""
    return (
        '<div class="tools" id="tools" hidden><label>Filter <input type="search" id="filter" '
        'autocomplete="off"></label> <label>Order <select id="order" autocomplete="off">'
        '<option value="given">as given</option><option value="likely">likeliest first</option>'
        '</select></label> <span id="found" role="status"></span></div>'
    )


def _fieldset(legend: str, chips: Sequence[str], attributes: str = "", tools: str = "") -> str:
    return (
        f"<fieldset{attributes}><legend>{escape(legend)}</legend>{tools}"
        f'<div class="chips">{"".join(chips)}</div></fieldset>'
    )


def _token(explanation: Explanation, name: str, row: int) -> str:
    brief = wording.base_brief(explanation, float(explanation.base_logprobs[row]))
    return _chip(name, row + 1, layout.visible(explanation.targets[row].text), brief)


def _chip(name: str, value: int, text: str, brief: str = "", checked: bool = False) -> str:
    shown = f"<small>{brief}</small>" * bool(brief)
    mark = " checked" if checked else ""
    return (
        f'<label><input type="radio" name="{name}" value="{value}"{mark}>'
        f"<span><bdi>{escape(text)}</bdi>{shown}</span></label>"
    )


def cards(explanations: Sequence[Explanation], labels: list[str]) -> str:
    """One card per explanation: its colour, question and answer, on or off, which target token."""
    cards = []
    for index, (explanation, label) in enumerate(zip(explanations, labels, strict=True)):
        options = "".join(
            f'<option value="{value}">{escape(text)}</option>'
            for value, text in _options(explanation)
        )
        colour = f"background-color:rgb(var(--overlay{index % len(LIGHT.overlays)}))"
        cards.append(
            f'<li><label><input type="checkbox" data-k="{index}" checked autocomplete="off">'
            f'<span class="letter" style="{colour}">{letter(index)}</span>'
            f'<span class="question">{escape(label)}</span></label>'
            f'<p class="answer">{escape(headline(explanation))}</p>'
            f'<select data-k="{index}" aria-label="Target token of {letter(index)}" '
            f'autocomplete="off">{options}</select></li>'
        )
    return f'<ul class="cards">{"".join(cards)}</ul>'


def _options(explanation: Explanation) -> list[tuple[int, str]]:
    names = [layout.visible(target.text) for target in explanation.targets]
    if not layout.several(explanation):
        options = [(0, f"all {wording.noun(explanation).rows} ({explanation.reduction})")]
        first = len(names) + 1
        for index, part in layout.parts_of(explanation, 0):
            options.append((first + index, f"part {layout.visible(part.text)}"))
        return options + [(row + 1, name) for row, name in enumerate(names)]
    many = wording.noun(explanation).many
    options = [(0, "the difference" if explanation.contrast else f"all {many} (mean)")]
    last = -1
    for row, (target, name) in enumerate(zip(explanation.targets, names, strict=True)):
        if target.branch != last:
            last = target.branch
            options.append((-1 - last, layout.visible(explanation.answers[last])))
        options.append((row + 1, f"… {name}"))
    return options


def headline(explanation: Explanation) -> str:
    """What was explained, on one line."""
    if explanation.contrast:
        return wording.question(explanation)
    if layout.several(explanation):
        return f"{len(explanation.target_stops)} {wording.noun(explanation).many}"
    return layout.visible(explanation.answer)


def label(explanation: Explanation, start: int, length: int) -> str:
    """What this explanation asks: the part of its prompt that is not shared."""
    own = explanation.prompt[:start] + explanation.prompt[start + length :]
    words = " ".join(layout.printable(own).split())
    return words if len(words) <= 160 else words[:80] + " … " + words[-76:]


def letter(index: int) -> str:
    """The name of an explanation among several."""
    return chr(ord("A") + index) if index < 26 else str(index + 1)
