"""The contents of ``facts.toml``: what the demo documents can say and be asked."""

from __future__ import annotations

import tomllib
from importlib.resources import files
from typing import NamedTuple


class Fact(NamedTuple):
    """One thing a document can state.

    Attributes:
        name: what the fact is, unique within its document kind.
        statements: sentence patterns without the final full stop; ``{}`` is the value.
        questions: question patterns; ``{place}`` is "state" or "country" for a region.
    """

    name: str
    statements: tuple[str, ...]
    questions: tuple[str, ...]


_DATA = tomllib.loads(files(__spec__.parent).joinpath("facts.toml").read_text(encoding="utf-8"))


def _words(name: str) -> tuple[str, ...]:
    """A list of single words."""
    return tuple(_DATA["values"][name].split())


# Document kind -> value type -> facts.
FACTS: dict[str, dict[str, tuple[Fact, ...]]] = {
    kind: {
        value_type: tuple(
            Fact(name, tuple(wording["statements"]), tuple(wording["questions"]))
            for name, wording in facts.items()
        )
        for value_type, facts in types.items()
    }
    for kind, types in _DATA["facts"].items()
}
FILLERS: dict[str, tuple[str, ...]] = {k: tuple(texts) for k, texts in _DATA["fillers"].items()}
OPENINGS: tuple[str, ...] = tuple(_DATA["sentences"]["openings"])
# Country -> its states.
REGIONS: dict[str, tuple[str, ...]] = {k: tuple(states) for k, states in _DATA["regions"].items()}
FIRST_NAMES = _words("first_names")
LAST_NAMES = _words("last_names")
COMPANIES = _words("companies")
SUBJECTS = _words("subjects")
MATERIALS = _words("materials")
MONTHS = _words("months")
ORDINALS = _words("ordinals")
NUMBER_WORDS = _words("number_words")
