"""Explains every example with every method, and measures how good the explanations are.

Legend: U units of an explanation, R of them that are rated.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..baselines import BASELINES, Case
from ..explain import Explainer
from ..explanation import Explanation
from . import labels
from .examples import Example
from .faithfulness import Faithful
from .journal import Journal, digest
from .metrics import Metric, align, align_grid, rank_correlation
from .readings import READINGS, read
from .results import Result, Split
from .settings import Setting, explain, explainer

ORDERED_BY = "signed mean"
"""The reading in which units are removed, compared and shown."""

EVERY = 12
"""Of so many examples, or groups of them, one is there to choose readings, the others are
reported."""


class MethodFailed(RuntimeError):
    """A method cannot explain an example."""


@dataclass(frozen=True)
class Plan:
    """What is to be measured.

    Args:
        examples: In the order of the data: the place of one says what it is for.
        digests: Of each, by its id, in the same order; see ``journal.digest``.
        splits: What each is for.
        own: Places of those that this process measures.
        settings: The methods.
        reworded: Places of those whose reworded question is explained too, to compare.
        gallery: Of so many of the first examples, relevance is kept.
    """

    examples: Sequence[Example]
    digests: Mapping[str, str]
    splits: Sequence[Split]
    own: Sequence[int]
    settings: Sequence[Setting]
    reworded: frozenset[int]
    gallery: int

    @classmethod
    def of(
        cls,
        examples: Sequence[Example],
        settings: Sequence[Setting],
        stability: int,
        gallery: int,
        together: bool = False,
    ) -> Plan:
        """All examples, each looked at once, as it may have to be read from disk.

        Args:
            stability: Of so many of the first examples the reworded question is explained, where
                they have one.
            together: What is chosen by examples of a group must not be reported of others of it:
                they are all for the one or all for the other, if there are several groups.
        Raises: ValueError: if there are no examples, or two have one id.
        """
        digests: dict[str, str] = {}
        numbers: dict[str, int] = {}  # of groups, in the order in which they come
        groups: list[int] = []
        reworded: set[int] = set()
        for index, example in enumerate(examples):
            if example.id in digests:
                raise ValueError(f"examples must have different ids, but {example.id!r} is twice.")
            digests[example.id] = digest(example)
            groups.append(numbers.setdefault(example.group, len(numbers)))
            if index < stability and example.reworded is not None:
                reworded.add(index)
        if not digests:
            raise ValueError("examples must hold at least one, got none.")
        own = range(len(digests))
        places: Sequence[int] = groups if together and len(numbers) > 1 else own
        splits: list[Split] = [split(place) for place in places]
        return cls(examples, digests, splits, own, settings, frozenset(reworded), gallery)

    @property
    def total(self) -> int:
        """How many results there will be."""
        return len(self.own) * len(self.settings)

    def part(self, process: int, processes: int) -> Plan:
        """What one of several processes does."""
        return replace(self, own=[index for index in self.own if index % processes == process])

    def missing(self, done: Mapping[tuple[str, str], Result]) -> dict[int, list[Setting]]:
        """By place, the methods that were not measured yet, or not all that is asked now."""
        ids, found = list(self.digests), {}
        for index in self.own:
            wanted = [
                setting
                for setting in self.settings
                if not self._whole(index, done.get((ids[index], setting.name)))
            ]
            if wanted:
                found[index] = wanted
        return found

    def results(self, done: Mapping[tuple[str, str], Result]) -> list[Result]:
        """What is done, by example, then by method."""
        ids = list(self.digests)
        return [
            replace(done[ids[index], setting.name], split=self.splits[index])
            for index in self.own
            for setting in self.settings
            if (ids[index], setting.name) in done
        ]

    def _whole(self, index: int, result: Result | None) -> bool:
        return (
            result is not None
            and (index not in self.reworded or "stability" in result.faithfulness)
            and (index >= self.gallery or bool(result.heat))
        )


def split(number: int) -> Split:
    """What the example or group of a number is for."""
    return "report" if number % EVERY else "choose"


def evaluate(
    model: Any,
    processor: Any,
    plan: Plan,
    journal: Journal,
    advance: Callable[[int], None] = lambda done: None,
) -> None:
    """Measure what the journal does not have yet.

    Args:
        model: Explained, and asked again with units removed.
        processor: Its tokenizer or processor.
        plan: What is measured; with several processes, this one's part.
        journal: Where every example is noted as soon as it is done.
        advance: Called with the number of methods that were measured since it was last called.
    Raises:
        MethodFailed: naming the method and the example that it fails on; what is done is noted.
        ValueError, TypeError, ImportError: if the model or what is installed does not allow a
            method.
    """
    missing = plan.missing(journal.read())
    explainers = prepared(model, processor, plan.settings) if missing else {}
    for index, settings in missing.items():
        example = plan.examples[index]
        own = {setting.name: explainers[setting.name] for setting in settings}
        results = measure(
            model,
            processor,
            example,
            own,
            split=plan.splits[index],
            again=index in plan.reworded,
            keep=index < plan.gallery,
            advance=advance,
        )
        journal.add(example, results)


def prepared(model: Any, processor: Any, settings: Sequence[Setting]) -> dict[str, Explainer]:
    """What explains, by the setting's name, with the libraries that it needs."""
    for setting in settings:
        if setting.kind == "baseline":
            BASELINES[setting.method].load()
    return {setting.name: explainer(setting, model, processor) for setting in settings}


def measure(
    model: Any,
    processor: Any,
    example: Example,
    explainers: Mapping[str, Explainer],
    *,
    split: Split = "report",
    again: bool = False,
    keep: bool = False,
    advance: Callable[[int], None] = lambda done: None,
) -> list[Result]:
    """One example explained by several methods.

    Args:
        explainers: By the names of their settings, at least one.
        split: Of the results.
        again: Explain the reworded question too.
        keep: Keep the relevance of the rated units.
        advance: Called with 1 after every method.
    Returns: A result for every method, in their order.
    Raises: MethodFailed: if a method fails, or gives other units than the first.
    """
    explained: dict[str, tuple[Explanation, float]] = {}
    for name, own in explainers.items():
        with _named(name, example):
            started = time.perf_counter()
            explanation = explain(own, example)
            explained[name] = explanation, time.perf_counter() - started
            first = next(iter(explained.values()))[0]
            if [unit.tokens for unit in explanation.units] != [unit.tokens for unit in first.units]:
                raise ValueError(f"its units differ from those of {next(iter(explained))}.")
            advance(1)
    first = next(iter(explained.values()))[0]
    label = labels.labelled(first, example)
    relevances = {
        name: _rated(explanation, label.units, ORDERED_BY)
        for name, (explanation, _) in explained.items()
    }
    faithful = Faithful(
        Case.of(model, processor, example.prompt, first), label.units, seed=example.id
    )
    measured = faithful.measure(relevances)
    results = []
    for name, (explanation, seconds) in explained.items():
        alignment, notes = _alignment(explanation, example, label)
        faithfulness = dict(measured[name].values)
        notes += measured[name].notes
        if again:
            with _named(name, example):
                other = explain(explainers[name], example, example.reworded)
                found = _stability(relevances[name], other, example)
            faithfulness["stability"] = found.value
            notes += [f"stability: {found.note}"] if found.note else []
        results.append(
            Result(
                example=example.id,
                method=name,
                split=split,
                group=example.group,
                facts=example.facts | {"units": len(label.units)},
                forwards=float(explanation.provenance["forwards"]),
                seconds=seconds,
                alignment=alignment,
                faithfulness=faithfulness,
                curve=measured[name].curve,
                notes=list(dict.fromkeys(notes)),
                heat=_heat(explanation, label.units, relevances[name]) if keep else {},
            )
        )
    return results


@contextmanager
def _named(method: str, example: Example) -> Iterator[None]:
    """Say which method failed on which example."""
    try:
        yield
    except Exception as error:
        raise MethodFailed(
            f"{method} failed on example {example.id!r}: {type(error).__name__}: {error}"
        ) from error


def _rated(explanation: Explanation, units: Sequence[int], reading: str) -> list[float]:
    """``[R]`` of the ``[U]``, float64."""
    return read(explanation, reading)[list(units)].double().tolist()


def _alignment(
    explanation: Explanation, example: Example, label: labels.Labelled
) -> tuple[dict[str, dict[str, float]], list[str]]:
    """By reading, how relevance agrees with the label; and what was not as usual."""
    found: dict[str, dict[str, float]] = {}
    notes = list(label.notes)
    for reading in READINGS:
        x = torch.tensor(_rated(explanation, label.units, reading), dtype=torch.float64)
        if example.is_picture:
            grids = [labels.grid(explanation, example, values) for values in (x, label.values)]
            metrics = align_grid(*grids)
        else:
            metrics = align(x, label.values)
        found[reading] = {name: metric.value for name, metric in metrics.items()}
        notes += [f"{name}: {metric.note}" for name, metric in metrics.items() if metric.note]
    return found, notes


def _stability(relevance: Sequence[float], other: Explanation, example: Example) -> Metric:
    """How alike the rated units are ordered where the question has other words."""
    there = _rated(other, labels.rated(other, example), ORDERED_BY)
    if len(there) != len(relevance):
        return Metric(math.nan, "the reworded prompt is cut into other units")
    return rank_correlation(relevance, there)


def _heat(
    explanation: Explanation, units: Sequence[int], values: Sequence[float]
) -> dict[str, list[Any]]:
    """Places of the rated units, characters of the prompt or boxes, and their relevance."""
    own = [explanation.units[unit] for unit in units]
    places = [
        [list(box) for box in unit.boxes] if unit.boxes else [unit.start, unit.stop] for unit in own
    ]
    return {"units": places, "values": list(values)}
