"""The numbers of results, by method, as figures read them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

from ..bootstrap import Interval, bootstrap
from ..results import Result

ALIGNED = {
    "mAP": ("precision", "average precision"),
    "mAR": ("recall", "average recall"),
    "pointing": ("pointing", "pointing accuracy"),
}
"""Measures that need a label: by their name in tables, key of ``Result.alignment`` and words."""

FAITHFUL = {
    "removal_gap": "removal gap, nats per token",
    "gap_area": "area between removing least and most relevant first, nats per token",
    "lds": "linear datamodeling score",
}
"""Measures that need none: key of ``Result.faithfulness`` and words."""

PREFERRED = (
    "exact multiplicative",
    "exact",
    "direct",
    "chefer",
    "integrated_gradients",
    "leave_one_out",
    "context_cite",
    "grad_cam",
    "input_x_gradient",
    "rollout",
    "lime",
    "kernel_shap",
    "attn_lrp",
    "hybrid",
    "occlusion",
    "last_attention",
    "path",
)
"""Which methods a figure without room for all shows: the paper's, and one of every kind first.

A fixed order, so that no result decides who is shown.
"""

FLOOR = "random"


class NothingToDraw(ValueError):
    """Results do not hold what a figure shows; the message says what is missing."""


class Chosen(Protocol):
    """What of a ``tables.Row`` is read."""

    @property
    def method(self) -> str:
        """Name of the ``settings.Setting``."""
        ...

    @property
    def reading(self) -> str:
        """Key of ``Result.alignment``."""
        ...

    @property
    def chosen(self) -> bool:
        """Whether this is the reading that is shown."""
        ...

    @property
    def paper(self) -> dict[str, float]:
        """By metric, the paper's own numbers of this method, fractions."""
        ...


class Described(Protocol):
    """What of ``statistics.Statistics`` is read."""

    @property
    def values(self) -> dict[str, list[float]]:
        """By quantity."""
        ...


@dataclass(frozen=True, eq=False)
class Collected:
    """Results with the reading that was chosen for each method.

    Args:
        results: All of them.
        readings: By method. A method that is not named here is not drawn.
        title: Data set and model, for captions.
        paper: By method and metric, the paper's own numbers, fractions.
        grouped: Whether examples of one group are drawn together where intervals are estimated.
    """

    results: Sequence[Result]
    readings: Mapping[str, str]
    title: str
    paper: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    grouped: bool = False

    @classmethod
    def of(
        cls, results: Sequence[Result], rows: Iterable[Chosen], title: str, *, grouped: bool = False
    ) -> Collected:
        """Results beside the rows of their table, of which those that were chosen count."""
        kept = [row for row in rows if row.chosen]
        readings = {row.method: row.reading for row in kept}
        return cls(results, readings, title, {row.method: row.paper for row in kept}, grouped)

    @cached_property
    def by_method(self) -> dict[str, dict[str, Result]]:
        """Results that are reported, by method and example; methods as the table orders them."""
        found: dict[str, dict[str, Result]] = {name: {} for name in self.readings}
        for result in self.results:
            if result.split == "report" and result.method in found:
                found[result.method][result.example] = result
        return {name: own for name, own in found.items() if own}

    @property
    def methods(self) -> list[str]:
        """Those that have results."""
        return list(self.by_method)

    def values(self, method: str, measure: str) -> dict[str, float]:
        """Finite values of a measure by example.

        Args:
            method: One of ``methods``.
            measure: Key of ``ALIGNED``, of ``Result.faithfulness``, or ``forwards``.
        """
        numbers = {
            example: self._value(method, measure, result)
            for example, result in self.by_method[method].items()
        }
        return {example: value for example, value in numbers.items() if math.isfinite(value)}

    def interval(self, method: str, measure: str) -> Interval | None:
        """Mean and 95% interval of a measure over examples; None where it has no value."""
        values = self.values(method, measure)
        if not values:
            return None
        return bootstrap(list(values.values()), groups=self.groups(method, values))

    def groups(self, method: str, examples: Iterable[str]) -> list[str] | None:
        """The examples' groups; None if each is drawn for itself."""
        own = self.by_method[method]
        return [own[example].group for example in examples] if self.grouped else None

    def intervals(self, measure: str) -> dict[str, Interval]:
        """Of the methods that have a value."""
        found = {name: self.interval(name, measure) for name in self.methods}
        return {name: each for name, each in found.items() if each is not None}

    def caption(self, counts: Iterable[int], *more: str) -> str:
        """Data, model, number of examples, and what else there is to say."""
        several = sorted(set(counts))
        count = f"{several[0]}" if len(several) == 1 else f"{several[0]} to {several[-1]}"
        first = f"{self.title}; {count} examples" + (" per method" if len(several) > 1 else "")
        return sentences(first, *more)

    def _value(self, method: str, measure: str, result: Result) -> float:
        if measure == "forwards":
            return result.forwards
        if measure in ALIGNED:
            aligned = result.alignment.get(self.readings[method], {})
            return aligned.get(ALIGNED[measure][0], math.nan)
        return result.faithfulness.get(measure, math.nan)


def picked(methods: Sequence[str], limit: int, *, floor: bool = True) -> list[str]:
    """At most so many methods, in the order of ``PREFERRED``, then their own; chance comes last.

    Args:
        methods: What there is.
        limit: At least 1.
        floor: Whether chance has a place among them, if it is there.
    """
    chance = [name for name in methods if name == FLOOR] if floor else []
    rest = [name for name in methods if name != FLOOR]
    order = {name: place for place, name in enumerate(PREFERRED)}
    rest.sort(key=lambda name: order.get(name, len(order)))
    return (rest[: max(limit - len(chance), 0)] + chance)[:limit]


def left_out(methods: Sequence[str], shown: Sequence[str]) -> str:
    """What a caption says of methods that have no room."""
    if len(shown) == len(methods):
        return ""
    return (
        f"{len(shown)} of {len(methods)} methods, in an order fixed beforehand; "
        "the table has them all"
    )


def sentences(*parts: str) -> str:
    """A caption of those parts that say something."""
    first, *rest = (part.rstrip(".") for part in parts if part)
    return ". ".join([first, *(part[0].upper() + part[1:] for part in rest)]) + "."


def several(values: Iterable[Any]) -> bool:
    """Whether there are two different ones."""
    return len(set(values)) > 1
