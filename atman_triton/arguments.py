"""Checks of what is given to ``Explainer``: each error names the argument and the way out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from types import NoneType
from typing import Any, Literal

from .integration import checked_indices as _known_indices
from .methods import DEFAULT_BUDGET, DEFAULT_STEPS, GRADIENT_METHODS
from .presets import Preset
from .suppression import RULES, Rule


def check_one_of(name: str, value: Any, known: Sequence[str]) -> None:
    """Refuse a value that is not among the known ones."""
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}.")


def check_sequence(name: str, value: Any) -> None:
    """Refuse what is neither None nor a sequence; a str is none."""
    if value is not None and (isinstance(value, (str, bytes)) or not isinstance(value, Iterable)):
        raise TypeError(f"{name} must be a sequence of ints or None, got {value!r}.")


def checked_indices(
    name: str, given: Sequence[int] | None, known: Sequence[int]
) -> tuple[int, ...] | None:
    """Indices of layers or heads, each of which must exist; None stays None, for all."""
    check_sequence(name, given)
    return None if given is None else _known_indices(name, given, tuple(known))


def checked_targets(target: Any, targets: Any, *, classes: bool = False) -> list[Any] | None:
    """All targets, of which there must be one way to give them; None to generate one.

    A single int is a class, where targets are classes.
    """
    if targets is None:
        return None if target is None else [target]
    if target is not None:
        raise TypeError("target and targets exclude each other; put the one among the several.")
    if isinstance(targets, (str, bytes)) or not isinstance(targets, Iterable):
        kinds = "class names or indices" if classes else "str or token ids"
        raise TypeError(f"targets must be a sequence of {kinds}, got {targets!r}.")
    several = list(targets)
    if not several:
        raise ValueError("targets must hold at least one target, got none.")
    for index, each in enumerate(several):
        if isinstance(each, int) and not classes:
            raise TypeError(
                f"targets[{index}] must be a str or a sequence of token ids, got {each!r}; a "
                f"single token id is [{each!r}]."
            )
    return several


def check_contrast(contrast_target: Any, targets: Any, *, classes: bool = False) -> None:
    """Refuse what the one target is compared with if there are several, or it is a single id."""
    if contrast_target is None:
        return
    if targets is not None:
        raise TypeError("contrast_target is compared with one target; give target, not targets.")
    if classes:
        return
    if isinstance(contrast_target, int) or not isinstance(contrast_target, (str, Iterable)):
        raise TypeError(
            f"contrast_target must be a str or a sequence of token ids, got {contrast_target!r}."
        )


def checked_budget(method: str, budget: Any) -> float | int | None:
    """The budget of a method that has one: a share or a count; None of the others."""
    if method not in DEFAULT_BUDGET:
        if budget is not None:
            raise ValueError(
                f"budget is for {' and '.join(DEFAULT_BUDGET)}, but method is {method!r}."
            )
        return None
    if budget is None:
        return DEFAULT_BUDGET[method]
    if isinstance(budget, bool) or not isinstance(budget, (int, float)):
        raise TypeError(
            f"budget must be a float (a share), an int (a count) or None, got {budget!r}."
        )
    if isinstance(budget, float) and not 0 < budget <= 1:
        raise ValueError(f"budget as a share must lie in (0, 1], got {budget}.")
    if budget < 1 and isinstance(budget, int):
        raise ValueError(f"budget as a count must be at least 1, got {budget}.")
    return budget


def checked_steps(method: str, steps: Any) -> int | None:
    """The steps of a path; None of the other methods."""
    if method != "path":
        if steps is not None:
            raise ValueError(f"steps is for path, but method is {method!r}.")
        return None
    if steps is None:
        return DEFAULT_STEPS
    if isinstance(steps, bool) or not isinstance(steps, int):
        raise TypeError(f"steps must be an int or None, got {steps!r}.")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}.")
    return steps


def check_generation(targets: Any, max_new_tokens: Any, others: dict[str, Any]) -> None:
    """Refuse generation arguments beside given targets, and a length that is none."""
    names = [*(["max_new_tokens"] if max_new_tokens is not None else []), *others]
    if targets is not None and names:
        raise TypeError(f"{', '.join(names)} would go to model.generate, but a target is given.")
    if max_new_tokens is None:
        return
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int):
        raise TypeError(f"max_new_tokens must be an int or None, got {max_new_tokens!r}.")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}.")


def checked_factor(factor: Any) -> float:
    """A suppression, not an amplification."""
    if isinstance(factor, bool) or not isinstance(factor, (int, float)):
        raise TypeError(f"factor must be a number, got {factor!r}.")
    if not math.isfinite(factor) or not 0 <= factor < 1:
        raise ValueError(
            f"factor must lie in [0, 1), got {factor}: 1 suppresses nothing, and a score's sign "
            "means something only where a unit is suppressed."
        )
    return float(factor)


def checked_similarity(
    similarity: Any, rule: Any, factor: Any, method: str, preset: Preset
) -> tuple[float | None, Rule]:
    """κ, None where units are suppressed alone, and the rule.

    Args:
        similarity: As given: κ, True for the preset's, False for none, None for what it does.
        rule: As given, None for the preset's.
        factor: As given, None for the preset's.
        method: Which perturbations are run.
        preset: Where the rest comes from.
    """
    if not isinstance(similarity, (bool, int, float, NoneType)):
        raise TypeError(f"similarity must be a number, a bool or None, got {similarity!r}.")
    if rule is not None:
        check_one_of("rule", rule, RULES)
    if similarity is None:
        similarity = preset.correlated
    if similarity is False:
        if rule is not None:
            raise ValueError(
                f"rule={rule!r} says how similar tokens are suppressed, but none are; pass "
                f"similarity too, such as {preset.threshold}."
            )
        return None, preset.rule
    threshold = preset.threshold if similarity is True else float(similarity)
    if not 0 < threshold <= 1:
        raise ValueError(
            f"similarity must lie in (0, 1], as the smallest cosine of two embeddings that are "
            f"suppressed together, got {similarity}; False suppresses units alone."
        )
    if method in GRADIENT_METHODS:
        raise ValueError(
            f"method={method!r} cannot take similarity: it suppresses all units at once, and their "
            "neighbourhoods overlap; take method='exact' or 'direct', or similarity=False."
        )
    rule = preset.rule if rule is None else rule
    if rule == "paper" and factor is not None:
        raise ValueError(
            "rule='paper' takes all factors from similarities and none from factor, got "
            f"factor={factor}; leave it out, or take rule='released'."
        )
    return threshold, rule


def checked_batch_size(batch_size: Any) -> int | Literal["auto"]:
    """Rows of a batch, or ``auto``."""
    if batch_size == "auto":
        return "auto"
    if isinstance(batch_size, bool) or not isinstance(batch_size, int):
        raise TypeError(f"batch_size must be 'auto' or an int, got {batch_size!r}.")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    return batch_size


def plain(value: Any) -> Any:
    """A generation argument as a JSON value."""
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else repr(value)
