"""Data of which it is known where the answers stand: SQuAD, OpenImages, contracts, shapes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..examples import Example
from .contracts import load_contracts
from .gather import Gathered
from .open_images import load_open_images
from .shapes import load_shapes
from .squad import load_squad

__all__ = ["DATASETS", "GROUPED", "Loaded", "load"]

DATASETS: dict[str, str] = {
    "squad": "SQuAD v1.1, from a JSON file or the hub; labels: the passage that answers",
    "openimages": "photographs of OpenImages, from its site's files; labels: pixels of the class",
    "contracts": "made documents with one question each; labels: the value that is asked for",
    "shapes": "made pictures of two shapes, one of them named; labels: its pixels",
}
"""Name -> what it is, in a line."""

GROUPED = ("squad",)
"""Of which several questions are about one paragraph: these choose or are reported together, and
are drawn together where intervals are estimated."""

_MADE: dict[str, Callable[..., Gathered[Example]]] = {
    "contracts": load_contracts,
    "shapes": load_shapes,
}


class Loaded(NamedTuple):
    """Examples, and what is to be said of them.

    Args:
        examples: In an order that is the same everywhere and does not depend on how many were
            asked for.
        notes: How many were left out and why, and what is unknown of them.
    """

    examples: Sequence[Example]
    notes: list[str]


def load(
    name: str,
    *,
    limit: int | None,
    path: str | Path | None = None,
    images: str | Path | None = None,
    seed: int = 0,
    model: Any = None,
    processor: Any = None,
    progress: bool = False,
) -> Loaded:
    """Examples of a data set: the first ``limit`` in its order.

    Args:
        name: One of ``DATASETS``.
        limit: The most examples; None, where data is not made but read, all of them.
        path: Of ``squad``, a JSON file or a folder that ``datasets`` saved (None: the hub); of
            ``openimages``, the folder with its annotations and masks.
        images: Of ``openimages``, the folder with its images (None: ``images`` in ``path``).
        seed: Of what is made, or of the order of what is read.
        model: What the examples are for: those too long for it are left out, and of made data
            those that it does not answer. None leaves out nothing.
        processor: Its tokenizer or processor.
        progress: Show a progress bar on stderr, if that is a terminal.
    Raises:
        ConnectionError: if the hub is needed and cannot be reached.
        FileNotFoundError: if a file is missing.
        TypeError: if an argument is of the wrong type.
        ValueError: if the name is unknown, an argument is not for this data, or no example is left.
    """
    if name not in DATASETS:
        raise ValueError(f"name must be one of {', '.join(DATASETS)}, got {name!r}.")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be an int, got {seed!r}.")
    asked = {"seed": seed, "model": model, "processor": processor, "progress": progress}
    if name in _MADE:
        if path is not None:
            raise ValueError(f"path is for data that is read, but {name} are made; leave it out.")
        if limit is None:
            raise ValueError(f"limit must be an int, as {name} have no end.")
    if images is not None and name != "openimages":
        raise ValueError(f"images is for openimages, but name is {name!r}; leave it out.")
    if name == "squad":
        found = load_squad(limit, path=path, **asked)
    elif name == "openimages":
        found = load_open_images(limit, path=path, images=images, **asked)
    else:
        found = _MADE[name](limit, **asked)
    return Loaded(found.kept, found.notes)
