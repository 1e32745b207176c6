"""Studies whose exact explanations, about n / 2 forwards each, are of the first documents alone."""

from __future__ import annotations

import argparse
import math
from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

EXACT = "exact"
Key = TypeVar("Key", bound=Hashable)


def extend(parser: argparse.ArgumentParser) -> None:
    """Let a command line say how many documents are explained exactly; all by default."""
    parser.add_argument(
        "--exact-documents", type=int, metavar="N", help="explained exactly, from 1; all if absent"
    )


def methods(known: Sequence[str], number: int, exact_documents: int | None) -> Sequence[str]:
    """Those of some methods by which a document is explained, counted from 0.

    Raises: ValueError: if not even the first document would be explained exactly.
    """
    if exact_documents is not None and exact_documents < 1:
        raise ValueError(f"exact_documents must be at least 1, got {exact_documents}.")
    if exact_documents is None or number < exact_documents:
        return known
    return [method for method in known if method != EXACT]


def measured(
    found: Sequence[Mapping[Key, Mapping[str, float]]], key: Key, measure: str
) -> list[float]:
    """Of each document one measure of one setting; NaN where it was left out."""
    return [each.get(key, {}).get(measure, math.nan) for each in found]
