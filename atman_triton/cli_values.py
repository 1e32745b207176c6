"""Values of the options of ``atman explain``, read from words."""

from __future__ import annotations

from typing import Any

from .loading import BadUsage


def parse_budget(text: str | None) -> float | int | None:
    """A share or a number of runs; whether it fits the method is for the explainer to say."""
    if text is None:
        return None
    try:
        return int(text) if text.isdecimal() else float(text)
    except ValueError as error:
        raise BadUsage(
            f"--budget must be a share such as 0.2, or a number of runs, got {text!r}."
        ) from error


def parse_similarity(text: str | None) -> float | bool | None:
    """A threshold, whether the preset's is taken, or None for what the preset does."""
    if text is None or text in ("preset", "off"):
        return None if text is None else text == "preset"
    try:
        return float(text)
    except ValueError as error:
        raise BadUsage(
            f"--similarity must be a number in (0, 1], preset or off, got {text!r}."
        ) from error


def parse_batch_size(text: str) -> Any:
    """Perturbations per pass."""
    if text == "auto":
        return text
    if not text.isdecimal() or int(text) < 1:
        raise BadUsage(f"--batch-size must be auto or a number from 1 up, got {text!r}.")
    return int(text)
