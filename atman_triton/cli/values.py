"""Values of the options of ``atman explain``, read from words."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..loading import BadUsage
from .prompt import PLACEHOLDER
from .shared import check_one_of, our_errors, read_file

# Of pictures and of sounds: a grid, all of it, a length.
_NO_TEXT = re.compile(r"\d+\s*[x×]\s*\d+|image|frame|\d+(\.\d+)?\s*s")
_SPAN = re.compile(r"(\d+):(\d+)")


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


def parse_granularity(
    name: str | None, delimiters: Sequence[str], patterns: Sequence[str]
) -> dict[str, Any]:
    """What one unit is, as an argument of ``explain``; nothing for what that takes by itself."""
    from ..granularity import GRANULARITIES, Delimiter

    given = {
        "--granularity": name is not None,
        "--delimiter": bool(delimiters),
        "--delimiter-regex": bool(patterns),
    }
    several = [option for option, present in given.items() if present]
    if len(several) > 1:
        raise BadUsage(f"{' and '.join(several)} exclude each other; give one of them.")
    if name is not None:
        if not _NO_TEXT.fullmatch(name):
            # Chat messages have turns, and there are none on the command line.
            check_one_of("granularity", name, [one for one in GRANULARITIES if one != "turn"])
        return {"granularity": name}
    if not several:
        return {}
    with our_errors():
        return {"granularity": Delimiter(*(delimiters or patterns), regex=bool(patterns))}


def parse_passage(text: str) -> Any:
    """Words of a text, its characters as START:STOP, or ``{image}``, the pictures."""
    if text == PLACEHOLDER:
        from ..granularity import Images

        return Images()
    span = _SPAN.fullmatch(text)
    return text if span is None else (int(span[1]), int(span[2]))


def read_documents(files: Sequence[Path]) -> list[dict[str, str]]:
    """Documents, each named as its file: by its whole path where two have the same name."""
    names = [file.name for file in files]
    return [
        {
            "id": file.name if names.count(file.name) == 1 else str(file),
            "text": read_file("document", file).removesuffix("\n"),
        }
        for file in files
    ]
