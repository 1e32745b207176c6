"""The words and numbers that every picture of an explanation shares."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from ..pieces import LEVELS, Neighbour
from .layout import drawn, name, named, of_prompt, printable, several, visible

if TYPE_CHECKING:
    from ..explanation import Explanation

_PLURALS = {"delimited": "delimited pieces"}
NAME = 24  # characters of a target in a phrase


@dataclass(frozen=True)
class Noun:
    """What is explained, in words.

    Args:
        whole: One of them, where it is the only one: ``answer``.
        one: One of several: ``target``.
        many: Several: ``targets``.
        row: What a row of scores is about: ``target token``.
    """

    whole: str
    one: str
    many: str
    row: str

    @property
    def rows(self) -> str:
        """Several rows."""
        return self.many if self.row == self.one else f"{self.row}s"


_NAMED = (("class", "classes"), ("output", "outputs"))
_BASES = {"logprob": "probability", "logit": "logit", "output": "output"}
_UNITS = {"logprob": "nats", "logit": "logits", "output": "change of the output"}


def noun(explanation: Explanation) -> Noun:
    """What is explained: an answer's tokens, a class or the output of a regression."""
    if not named(explanation):
        return Noun("answer", "target", "targets", "target token")
    one, many = _NAMED[explanation.quantity == "output"]
    alone = len(explanation.targets) == len(explanation.target_stops)
    return Noun(one, one, many, one if alone else "scored token")


def base(explanation: Explanation, value: float) -> str:
    """What the model gives with nothing suppressed: ``p = 0.472``, ``logit 1.5``, ``output 1.5``.

    Args:
        value: As in ``base_logprobs``, of whatever is read as one.
    """
    name = base_name(explanation)
    return f"{name} = {base_number(explanation, value)}"


def base_name(explanation: Explanation) -> str:
    """``p``, ``logit`` or ``output``."""
    return "p" if explanation.quantity == "logprob" else explanation.quantity


def base_word(explanation: Explanation) -> str:
    """``probability``, ``logit`` or ``output``."""
    return _BASES[explanation.quantity]


def base_number(explanation: Explanation, value: float) -> str:
    """A probability, or what the model gives instead."""
    return f"{math.exp(value) if explanation.quantity == 'logprob' else value:.3g}"


def base_brief(explanation: Explanation, value: float, digits: int = 3) -> str:
    """The same where there is little room: ``47.2%``, ``1.5``."""
    if explanation.quantity == "logprob":
        return f"{100 * math.exp(value):.{digits}g}%"
    return f"{value:.3g}"


@dataclass(frozen=True)
class Scale:
    """What the numbers in sight are.

    Args:
        unit: ``nats``, ``nats²``, or ``0 to 1``; of logits and of outputs their own.
        suffix: The unit behind a number; nothing where there is none.
        signed: Whether some may lie below 0.
        high: What the largest do.
        low: What the smallest do; empty where none does the opposite.
        object: What they do it to.
    """

    unit: str
    suffix: str
    signed: bool
    high: str
    low: str
    object: str

    def number(self, value: float, digits: int) -> str:
        """With its sign, where there are both; NaN is a dash."""
        text = signed(value, digits)
        return text if self.signed else text.removeprefix("+")


def scale(explanation: Explanation) -> Scale:
    """What ``relevance`` and its like are."""
    how, what = explanation.postprocessing, noun(explanation).whole
    output = explanation.quantity == "output"
    unit = _UNITS[explanation.quantity] + (", squared" if output else "²") * (how == "square")
    suffix = "" if output else f" {unit}"
    if explanation.effect == "baseline":  # whose numbers have no unit in common
        unit, suffix = "units of its own", ""
    if explanation.normalize:
        unit, suffix = "0 to 1", ""
    if how != "none":
        what = "choice" if explanation.contrast else what
        object = f" for the {what}, one way or the other"
        return Scale(unit, suffix, False, "matters", "", object)
    high, low = sides(explanation)
    to = f" the {what}"
    if explanation.contrast:
        high, low = (f"for “{name}”" for name in map(name_of, explanation.answers))
        to = ""
    if explanation.normalize:
        return Scale(unit, suffix, False, high, "", f"{to} the most")
    return Scale(unit, suffix, True, high, low, to)


def change(explanation: Explanation) -> tuple[str, str, str]:
    """What suppression changes, and how where a score is positive, and where it is negative."""
    if explanation.quantity == "logprob":
        return "loss", "rises", "falls"
    return base_word(explanation), "falls", "rises"


def titles(explanation: Explanation) -> dict[str, str]:
    """What lists of the strongest units are called.

    ``most`` for one target, ``all`` for several, ``overlay`` where explanations lie over each other
    and ``against`` for what does the opposite.
    """
    measure, what = scale(explanation), noun(explanation)
    if measure.high not in sides(explanation):
        most = "Matters most" if measure.high == "matters" else f"Speaks {measure.high}"
        against = f"Speaks {measure.low}"
        return {"most": most, "all": most, "overlay": most, "against": against}
    verb = measure.high.capitalize()
    return {
        "most": f"{verb} the {what.whole} most",
        "all": f"{verb} the {what.many} most",
        "overlay": f"{verb} this {what.whole}",
        "against": f"{measure.low.capitalize()} it",
    }


def sides(explanation: Explanation) -> tuple[str, str]:
    """What a unit with a positive score does, and one with a negative score."""
    return ("raises", "lowers") if explanation.quantity == "output" else ("supports", "opposes")


SCALED = "scaled: 0 is the smallest of the measured values, 1 the largest"


def name_of(answer: str) -> str:
    """A target in a phrase: on one line, and short."""
    text = visible(answer)
    return text if len(text) <= NAME else text[: NAME - 1] + "…"


def question(explanation: Explanation) -> str:
    """What a contrast asks."""
    this, that = map(visible, explanation.answers)
    return f"Why “{this}” rather than “{that}”"


def near(explanation: Explanation, unit: int, limit: int) -> str:
    """The tokens suppressed along with a unit, the most suppressed first; nothing without any."""
    found = by_weight(explanation.units[unit].neighbours)
    if not found:
        return ""
    names = drawn_tokens(explanation)
    shown = [
        f"{neighbour_text(explanation, each, names)} ×{each.factor:.2g}" for each in found[:limit]
    ]
    more = len(found) - limit
    return "with: " + ", ".join(shown) + (f" and {more} more" if more > 0 else "")


def by_weight(neighbours: Iterable[Neighbour]) -> list[Neighbour]:
    """The most manipulated first, then the most similar; ties stay in order."""
    return sorted(neighbours, key=lambda each: (-abs(1 - each.factor), -each.similarity))


def drawn_tokens(explanation: Explanation) -> dict[int, str]:
    """What tokens are called that are units of a picture or a sound."""
    return {
        unit.tokens[0]: place_name(explanation, index)
        for index, unit in enumerate(explanation.units)
        if drawn(unit) and len(unit.tokens) == 1
    }


def place_name(explanation: Explanation, unit: int) -> str:
    """A unit on its own; of several pictures with the name of its own one."""
    picture, own = source(explanation, unit).strip("[]"), name(explanation.units[unit])
    return f"{picture}: {own}" if picture else own


def neighbour_text(
    explanation: Explanation, neighbour: Neighbour, names: dict[int, str] | None = None
) -> str:
    """What stands there; where it has no place in the text its name or else its number.

    Args:
        names: Of tokens, by ``drawn_tokens``; None for none.
    """
    if neighbour.start is None:
        return (names or {}).get(neighbour.token, f"token {neighbour.token}")
    return visible(explanation.text[neighbour.start : neighbour.stop])


def source(explanation: Explanation, unit: int) -> str:
    """Of a unit in brackets: the id of its document, or which of several pictures it is of."""
    document, image = explanation.units[unit].document, explanation.units[unit].image
    if document is not None:
        return f"[{visible(explanation.documents[document].id)}]"
    whole = explanation.units[unit].level == "image"
    if image is None or whole or len(explanation.pictures) < 2:
        return ""
    return f"[{image_name(explanation, image)}]"


def image_name(explanation: Explanation, image: int) -> str:
    """``image``, or which of several: ``image 2``."""
    return f"image {image + 1}" if len(explanation.pictures) > 1 else "image"


DIFFERENCE = (
    "A total effect includes what later pieces took over from a suppressed one, a direct effect "
    "only what the answer itself reads from it."
)


def effect(explanation: Explanation, mark: str) -> str:
    """Which effect the numbers are; ``mark`` says how direct ones look among total ones."""
    direct = "direct effect: only the answer's own rows are manipulated"
    return {
        "total": "total effect",
        "direct": direct,
        "path": "share in suppressing all units together, from gradients on the way there",
        "gradient": "first-order estimate of suppressing all units together, usually a poor one",
        "baseline": f"what the baseline {explanation.method} gives, in a unit of its own",
        "mixed": f"total effect, but where {mark} a {direct}",
    }[explanation.effect]


def completeness(explanation: Explanation) -> str:
    """Whether the scores of a gradient method add up; nothing of other methods."""
    found = explanation.completeness
    if found is None:
        return ""
    what, rises, _ = change(explanation)
    # The sums are those of the scores, whatever is read from them.
    suffix = scale(replace(explanation, postprocessing="none", normalize=False)).suffix
    return f"Completeness: {found.described(suffix, f'{what} {rises}')}."


def levels(explanation: Explanation) -> str:
    """What the prompt's units are: ``words``, ``words and sentences``."""
    known = {explanation.units[unit].level for unit in of_prompt(explanation)}
    named = [_PLURALS.get(level, f"{level}s") for level in LEVELS if level in known]
    *names, last = named or ["units"]
    return f"{', '.join(names)} and {last}" if names else last


def decimals(values: Iterable[float]) -> int:
    """Digits after the point that show the largest value with three significant digits."""
    peak = max((abs(value) for value in values if math.isfinite(value)), default=0.0)
    return max(0, min(8, 2 - math.floor(math.log10(peak)))) if peak else 2


def signed(value: float, digits: int) -> str:
    """``+1.23``, with a true minus sign; NaN is a dash."""
    if math.isnan(value):
        return "–"
    if math.isinf(value):
        return "+∞" if value > 0 else "−∞"
    text = f"{value:+.{digits}f}"
    return text.replace("-", "−") if text.strip("+-0.") else text[1:]


def settings(explanation: Explanation) -> str:
    """The settings in one line: what was run, and how the numbers are to be read."""
    known = explanation.provenance
    words = [
        *([_model_name(str(known["model"]))] if known.get("model") else []),
        *([] if explanation.method == "exact" else [f"method {explanation.method}"]),
        *([f"steps {known['steps']}"] if known.get("steps") is not None else []),
        *(
            f"{name} {known[name]}"
            for name in ("preset", "mode", "factor", "similarity", "rule", "attention")
            if known.get(name) is not None
        ),
        *(
            f"{name} {_indices(known[name])}"
            for name in ("layers", "heads")
            if known.get(name) is not None
        ),
        _count(len(explanation.units), "unit"),
        *_explained(explanation),
        *([] if explanation.postprocessing == "none" else [explanation.postprocessing]),
        *(["normalized"] if explanation.normalize else []),
        *_controls(explanation),
    ]
    if explanation.completeness is not None and isinstance(known.get("forwards"), int | float):
        words.append(f"cost of {known['forwards']:.3g} forwards")
    elif isinstance(known.get("runs"), int):
        words.append(_count(known["runs"], "run"))
    if isinstance(known.get("seconds"), int | float):
        words.append(f"{known['seconds']:.3g} s")
    return printable(" · ".join(words)).replace("\n", " ")


def _rectangle(explanation: Explanation, control: dict[str, Any]) -> str:
    """Of an image control: ``10–40% × 20–90% of the image``."""
    left, top = 100 * control["left"], 100 * control["top"]
    right, bottom = left + 100 * control["width"], top + 100 * control["height"]
    name = image_name(explanation, control.get("image", 0))
    name = name if len(explanation.pictures) > 1 else f"the {name}"
    return f"{left:.3g}–{right:.3g}% × {top:.3g}–{bottom:.3g}% of {name}"


def _explained(explanation: Explanation) -> list[str]:
    """How many targets, and of answers how many tokens."""
    what, found = noun(explanation), []
    count, rows = len(explanation.target_stops), len(explanation.targets)
    if several(explanation) or named(explanation):
        found.append(f"{count} {what.one if count == 1 else what.many}")
    if what.one != what.row:
        how = f" ({explanation.reduction})" if rows > 1 else ""
        found.append(_count(rows, what.row) + how)
    return found


def _controls(explanation: Explanation) -> list[str]:
    """What acted on the explained model: ``controls “$33.80” ×2, token 7 ×0.5``."""
    found = []
    for control in explanation.provenance.get("controls") or ():
        if control["kind"] == "TextControl":
            start = control["start"]
            what = f"“{name_of(explanation.text[start : start + control['length']])}”"
        elif control["kind"] == "TokenControl":
            what = f"token {control['pos']}"
        else:
            what = _rectangle(explanation, control)
        found.append(f"{what} ×{control['factor']:g}")
    return [f"controls {', '.join(found)}"] if found else []


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _model_name(model: str) -> str:
    """A hub id as it is, of a folder the last two parts."""
    path = PurePath(model)
    return "/".join(path.parts[1:][-2:]) if path.is_absolute() else model


def _indices(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
