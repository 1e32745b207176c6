"""What one method gave for one example: a line of a journal."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Split = Literal["choose", "report"]
"""Settings are chosen on the first, numbers are reported on the second."""


@dataclass(frozen=True)
class Result:
    """Numbers of one method on one example. NaN where one is not defined; ``notes`` say why.

    Args:
        example: Its ``id``.
        method: Name of the ``methods.Setting``.
        split: Which part of the data the example belongs to.
        group: The example's.
        facts: The example's, and ``units``: how many were rated.
        forwards: Cost of the explanation, in passes over the prompt.
        seconds: Wall time of the explanation.
        alignment: By reading (see ``readings``), what agrees with the label: ``precision``,
            ``recall``, ``pointing``; of pictures also ``variation`` and ``outside``.
        faithfulness: What does not need a label: see ``faithfulness.Faithfulness.values``; and
            ``stability`` where the example has a reworded question.
        curve: Mean log-probability of the target, nats per token, after a share of the region was
            removed, by ``most`` and ``least`` relevant first; see ``faithfulness.SHARES``.
        notes: What a metric could not do as usual, such as "all relevance is equal".
        heat: Relevance of every rated unit in the reading ``signed mean``, kept of the first
            examples for galleries: ``{"units": [...], "values": [...]}``; else empty.
    """

    example: str
    method: str
    split: Split
    group: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    forwards: float = 0.0
    seconds: float = 0.0
    alignment: dict[str, dict[str, float]] = field(default_factory=dict)
    faithfulness: dict[str, float] = field(default_factory=dict)
    curve: dict[str, list[float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    heat: dict[str, list[Any]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """JSON values; NaN as None."""
        return _plain(asdict(self))

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Result:
        """What ``to_json`` gave."""
        own = dict(data)
        for name in ("alignment", "faithfulness", "curve"):
            own[name] = _numbers(own.get(name, {}))
        return cls(**own)


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, (list, tuple)) else value


def _numbers(value: Any) -> Any:
    """None as NaN again."""
    if isinstance(value, dict):
        return {name: _numbers(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_numbers(each) for each in value]
    return math.nan if value is None else value
