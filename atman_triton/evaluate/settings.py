"""What is compared: AtMan in its definitions and methods, and what people use instead."""

from __future__ import annotations

import importlib.util
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from ..arguments import (
    check_one_of,
    checked_budget,
    checked_factor,
    checked_similarity,
    checked_steps,
)
from ..asked import check_method
from ..attention import MODES
from ..baselines import BASELINES, Baseline, Options
from ..baselines.case import Output
from ..explain import Explainer
from ..explanation import Explanation
from ..granularity import Images
from ..methods import DEFAULT_BUDGET, DEFAULT_STEPS
from ..presets import PRESETS
from ..suppression import RULES
from .examples import Example

ATMAN = ("exact", "direct", "hybrid", "path", "score_gradient")
"""AtMan's methods whose units are all of one size."""

RELEASED = "released"
"""The preset that is a method of its own; the paper's is ``exact multiplicative``."""

_TAKES = {"hybrid": ("budget",), "path": ("steps",)}
_DEFAULTS = {
    "mode": PRESETS["default"].mode,
    "factor": PRESETS["default"].factor,
    "rule": PRESETS["default"].rule,
    "budget": DEFAULT_BUDGET["hybrid"],
    "steps": DEFAULT_STEPS,
}
_ORDER = (
    *("mode", "factor", "similarity", "rule", "budget", "superpixels"),
    *("steps", "layer", "seed", "output"),
)


@dataclass(frozen=True)
class Setting:
    """One method with its options: what a row of a table is about.

    Args:
        name: Short and the same in every run, such as ``exact multiplicative``.
        kind: Who explains: ``Explainer`` or ``Baseline``.
        method: One of ``ATMAN``, ``released``, or one of ``BASELINES``.
        options: What it is given besides, where that is not its default.
    """

    name: str
    kind: Literal["atman", "baseline"]
    method: str
    options: dict[str, Any] = field(default_factory=dict)


GROUPS: dict[str, str] = {
    "all": (
        "direct, direct multiplicative, direct log_additive, direct similarity=0.6, exact, "
        "exact multiplicative, exact log_additive, exact min_shift_full, "
        "exact multiplicative similarity=0.7 rule=paper, released, hybrid, path, baselines"
    ),
    "paper": (
        "integrated_gradients, input_x_gradient, grad_cam, chefer, exact multiplicative, released"
    ),
    "fast": "direct, input_x_gradient, grad_cam, chefer, rollout, last_attention, random",
}
"""Names for several settings; ``baselines`` are all, attn_lrp only where lxt is there."""


def parse_methods(text: str) -> list[Setting]:
    """Settings as they are written on the command line, without those that come twice.

    Args:
        text: Methods with commas between them: ``direct, exact:mode=multiplicative, chefer``. The
            options of one follow it behind colons, commas or spaces, a mode also without
            ``mode=``, so that names in tables can be given back: ``direct similarity=0.6``. The
            names of ``GROUPS`` and ``baselines`` stand for several.
    Raises: ValueError: naming what cannot be read, and what could be.
    """
    found: list[Setting] = []
    for words in _methods(text):
        name, options = words[0], words[1:]
        if name in (*GROUPS, "baselines"):
            if options:
                raise ValueError(
                    f"methods: {name} stands for several methods and takes no options, got "
                    f"{' '.join(options)!r}; name the methods (the paper's preset is "
                    "exact:mode=multiplicative:similarity=0.7:rule=paper)."
                )
            several = GROUPS.get(name)
            found += parse_methods(several) if several else _baselines()
        else:
            found.append(_setting(name, options))
    return list({setting.name: setting for setting in found}.values())


def setting(method: str, options: Mapping[str, Any]) -> Setting:
    """A method with options, checked as far as that goes without a model.

    Raises: ValueError: naming the option that is wrong.
    """
    if method in BASELINES:
        given = _without(options, {name: getattr(Options, name) for name in options})
        return Setting(_name(method, given), "baseline", method, given)
    preset = PRESETS[RELEASED if method == RELEASED else "default"]
    how = preset.method if method == RELEASED else method
    mode, factor = options.get("mode", preset.mode), options.get("factor")
    check_one_of("mode", mode, MODES)
    check_method(mode, how)
    checked_factor(preset.factor if factor is None else factor)
    checked_similarity(options.get("similarity"), options.get("rule"), factor, how, preset)
    checked_budget(how, options.get("budget"))
    checked_steps(how, options.get("steps"))
    alone = preset.threshold if preset.correlated else False
    given = _without(options, _DEFAULTS | {"similarity": alone})
    return Setting(_name(method, given), "atman", method, given)


def explainer(one: Setting, model: Any, processor: Any) -> Explainer:
    """What explains by a setting; the same one for all examples.

    Raises: ValueError, TypeError, UnsupportedModelError: if the model does not allow it.
    """
    options = dict(one.options)
    if one.kind == "baseline":
        return Baseline(model, processor, method=one.method, progress=False, **options)
    chosen = {"preset": RELEASED} if one.method == RELEASED else {"method": one.method}
    return Explainer(model, processor, progress=False, **chosen, **options)


def explain(own: Explainer, example: Example, prompt: Any = None) -> Explanation:
    """What in the rated part of an example's prompt its target rests on, token by token.

    Args:
        own: See ``explainer``. What a baseline draws depends on its seed and on the example.
        example: Of which the region is explained, or the pictures.
        prompt: In place of the example's.
    """
    asked = example.prompt if prompt is None else prompt
    if isinstance(own, Baseline):  # or chance would look the same in every example
        drawn = f"{own.options.seed}-{example.id}" + "-reworded" * (prompt is not None)
        own = own.with_seed(zlib.crc32(drawn.encode()))
    rated = Images() if example.is_picture else example.region
    return own.explain(asked, example.target, "token", explain_only=rated)


# --- reading ----------------------------------------------------------------------------------


def _methods(text: str) -> Iterable[list[str]]:
    """Each method as its words; what looks like an option belongs to the method before it."""
    found: list[list[str]] = []
    for part in text.split(","):
        words = part.replace(":", " ").split()
        if not words:
            raise ValueError(f"methods: a name is missing between commas, got {text!r}.")
        if "=" not in words[0]:
            found.append(words)
        elif found:
            found[-1] += words
        else:
            raise ValueError(f"methods: {words[0]!r} is an option without a method in front of it.")
    return found


def _setting(name: str, words: Iterable[str]) -> Setting:
    options: dict[str, Any] = {}
    for word in words:
        option, equals, value = word.partition("=")
        if not equals and word in MODES:
            option, value = "mode", word
        if option in options:
            raise ValueError(f"methods: {name} is given {option} twice.")
        options[option] = read_option(name, option, value)
    takes(name)
    try:
        return setting(name, options)
    except ValueError as error:
        raise ValueError(f"methods: {name}: {error}") from error


def takes(name: str) -> tuple[str, ...]:
    """Names of the options of a method.

    Raises: ValueError: if there is no such method.
    """
    if name in BASELINES:
        return BASELINES[name].options
    if name == RELEASED:
        return ("mode", "factor", "similarity", "rule")
    if name in ATMAN:
        return ("mode", "factor", "similarity", "rule", *_TAKES.get(name, ()))
    known = (*ATMAN, RELEASED, *BASELINES, *GROUPS, "baselines")
    raise ValueError(f"methods: {name!r} is none of {', '.join(known)}.")


def _without(options: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """What of the options says more than the defaults."""
    return {name: value for name, value in options.items() if value != defaults[name]}


def _similarity(text: str) -> float | bool:
    return False if text == "none" else float(text)


def _number(text: str) -> float | int:
    return int(text) if text.isdecimal() else float(text)


_READ: dict[str, tuple[Callable[[str], Any], str]] = {
    "factor": (float, "a number in [0, 1)"),
    "similarity": (_similarity, "a number in (0, 1], or none"),
    "budget": (_number, "a number"),
    "superpixels": (int, "a whole number"),
    "steps": (int, "a whole number"),
    "layer": (int, "a whole number"),
    "seed": (int, "a whole number"),
}
_ONE_OF: dict[str, tuple[str, ...]] = {"mode": MODES, "rule": RULES, "output": get_args(Output)}


def read_option(method: str, option: str, text: str) -> Any:
    """The value of an option, as it is written.

    Raises: ValueError: if the method has no such option, or it cannot have this value.
    """
    if option not in takes(method):
        known = ", ".join(f"{one}=" for one in takes(method)) or "no options"
        raise ValueError(f"methods: {method} takes {known}, got {option!r}.")
    if option in _ONE_OF:
        if text in _ONE_OF[option]:
            return text
        wanted = f"one of {', '.join(_ONE_OF[option])}"
    else:
        read, wanted = _READ[option]
        try:
            return read(text)
        except ValueError:
            pass
    raise ValueError(f"methods: {option} of {method} must be {wanted}, got {text!r}.")


def _name(method: str, options: Mapping[str, Any]) -> str:
    words = [method]
    for option in _ORDER:
        if option in options:
            value = options[option]
            if value is False:
                shown = "none"
            else:
                shown = f"{value:g}" if isinstance(value, (int, float)) else value
            words.append(shown if option == "mode" else f"{option}={shown}")
    return " ".join(words)


def _baselines() -> list[Setting]:
    there = importlib.util.find_spec("lxt") is not None
    return [setting(name, {}) for name in BASELINES if there or name != "attn_lrp"]
