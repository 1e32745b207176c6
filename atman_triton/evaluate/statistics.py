"""What a data set is made of, in numbers: the paper's Fig. 9 (SQuAD) and 15 (OpenImages)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .examples import Example

_OF_EXAMPLES = {
    "context_tokens": "tokens in a context",
    "context_words": "words in a context",
    "sentences": "sentences in a context",
    "label_tokens": "tokens in a label",
    "label_words": "words in a label",
    "mask_share": "share of a picture that its mask covers",
    "masks": "masks joined in a picture",
    "chance": "chance that the model gives the target",
}
_OF_GROUPS = {"questions": "questions on a paragraph"}
_QUARTILES = (("lower_quartile", 0.25), ("median", 0.5), ("upper_quartile", 0.75))


@dataclass(frozen=True)
class Statistics:
    """Numbers of a data set.

    Args:
        examples: How many it has.
        values: By quantity, all its values, which histograms are drawn of: one for each example,
            or for each paragraph or class, as the quantity's name says.
    """

    examples: int
    values: dict[str, list[float]] = field(default_factory=dict)

    def rows(self) -> list[dict[str, Any]]:
        """A row per quantity, JSON values.

        ``quantity``, ``count``, ``mean``, ``least``, ``lower_quartile``, ``median``,
        ``upper_quartile`` and ``most``. Quartiles lie between values where they must (linearly).
        """
        return [
            {
                "quantity": name,
                "count": len(own),
                "mean": float(np.mean(own)),
                "least": min(own),
                **{key: float(np.quantile(own, at)) for key, at in _QUARTILES},
                "most": max(own),
            }
            for name, own in self.values.items()
        ]

    def to_json(self) -> dict[str, Any]:
        """JSON values, from which ``Statistics(**...)`` makes it again."""
        return {"examples": self.examples, "values": self.values}


def statistics(examples: Iterable[Example]) -> Statistics:
    """Numbers of examples, from their ``facts`` and groups.

    Of paragraphs, ``questions`` counts all that the data has, whether they are among the examples
    or not; of pictures, ``images of a class`` counts those among the examples.

    Args:
        examples: Of one data set; they are gone through once.
    Raises: ValueError: if there are none, or two of a paragraph differ in ``questions``.
    """
    values: dict[str, list[float]] = {}
    of_groups: dict[str, dict[str, float]] = {}
    classes: Counter[str] = Counter()
    count = 0
    for example in examples:
        count += 1
        facts: Mapping[str, Any] = example.facts
        for fact, name in _OF_EXAMPLES.items():
            if fact in facts:
                values.setdefault(name, []).append(float(facts[fact]))
        if "paragraph" in facts:
            for fact, name in _OF_GROUPS.items():
                own = of_groups.setdefault(name, {})
                if own.setdefault(example.group, float(facts[fact])) != facts[fact]:
                    raise ValueError(f"examples of {example.group!r} differ in {fact!r}.")
        if example.is_picture:
            classes[example.group] += 1
    if not count:
        raise ValueError("examples must hold one at least, got none.")
    values |= {name: list(own.values()) for name, own in of_groups.items()}
    if classes:
        values["images of a class"] = [float(number) for _, number in sorted(classes.items())]
    return Statistics(count, values)
