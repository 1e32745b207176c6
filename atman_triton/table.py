"""An explanation as a pandas table, and what optional libraries need."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .pieces import Box

if TYPE_CHECKING:
    import pandas

    from .explanation import Explanation


def dataframe(explanation: Explanation, top_k: int | None = None) -> pandas.DataFrame:
    """What ``Explanation.to_dataframe`` gives, which says more."""
    pandas = import_extra("pandas", "data")
    check_top_k(top_k)
    order = explanation.ranking()
    rank = {unit: place for place, unit in enumerate(order, start=1)}
    whole = {
        "start": [unit.start for unit in explanation.units],
        "stop": [unit.stop for unit in explanation.units],
        "rank": [rank.get(index) for index in range(len(explanation.units))],
    }
    integers = {name: pandas.array(column, dtype="Int64") for name, column in whole.items()}
    columns: dict[str, Any] = {
        "text": [unit.text for unit in explanation.units],
        "part": [unit.part for unit in explanation.units],
        "start": integers["start"],
        "stop": integers["stop"],
        "relevance": explanation.relevance.numpy(),
        "rank": integers["rank"],
        "effect": [unit.effect for unit in explanation.units],
        "level": [unit.level for unit in explanation.units],
    }
    e = explanation
    if e.documents:
        owners = [unit.document for unit in e.units]
        ids = [None if owner is None else e.documents[owner].id for owner in owners]
        columns["document"] = pandas.array(ids, dtype="string")
    columns |= _places(pandas, e)
    if any(unit.neighbours for unit in e.units):
        columns["neighbours"] = [len(unit.neighbours) for unit in e.units]
    rows: list[tuple[str, Tensor]]
    if len(e.target_stops) > 1:
        columns["branch"] = pandas.array([unit.branch for unit in e.units], dtype="Int64")
        rows = list(zip(e.answers, e.relevances, strict=True))
    else:
        rows = [(target.text, e.values(row)) for row, target in enumerate(e.targets)]
    if len(rows) > 1:
        columns |= {f"{index}: {name}": row.numpy() for index, (name, row) in enumerate(rows)}
    if len(e.parts) > len(e.target_stops):
        parts = zip(e.parts, e.part_relevances, strict=True)
        columns |= {f"part {i}: {part.text}": row.numpy() for i, (part, row) in enumerate(parts)}
    frame = pandas.DataFrame(columns, index=pandas.RangeIndex(len(explanation.units), name="unit"))
    if explanation.completeness is not None:
        frame.attrs["completeness_error"] = explanation.completeness.error
    return frame if top_k is None else frame.loc[order[:top_k]]


def _places(pandas: Any, explanation: Explanation) -> dict[str, Any]:
    """Where units stand on pictures and when in a sound, only where there are such.

    A unit of several boxes has the smallest one around them.
    """
    columns: dict[str, Any] = {}
    units = explanation.units
    if any(unit.image is not None for unit in units):
        columns["image"] = pandas.array([unit.image for unit in units], dtype="Int64")
        around = [_around(unit.boxes) for unit in units]
        for index, name in enumerate(("left", "top", "width", "height")):
            column = [None if box is None else box[index] for box in around]
            columns[name] = pandas.array(column, dtype="Float64")
    if any(unit.seconds is not None for unit in units):
        for index, name in enumerate(("start_seconds", "stop_seconds")):
            column = [None if unit.seconds is None else unit.seconds[index] for unit in units]
            columns[name] = pandas.array(column, dtype="Float64")
    return columns


def _around(boxes: Sequence[Box]) -> Box | None:
    if not boxes:
        return None
    left, top = min(box[0] for box in boxes), min(box[1] for box in boxes)
    right, bottom = max(box[0] + box[2] for box in boxes), max(box[1] + box[3] for box in boxes)
    return left, top, right - left, bottom - top


def import_extra(module: str, extra: str) -> Any:
    """Import an optional library.

    Raises: ImportError: naming the extra that brings it, if it is missing.
    """
    import importlib

    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if not f"{module}.".startswith(f"{error.name}."):
            raise
        raise ImportError(
            f"{module.partition('.')[0]} is not installed: pip install 'atman_triton[{extra}]'."
        ) from error


def check_top_k(top_k: int | None) -> None:
    """Raise ValueError unless ``top_k`` is None or at least 1."""
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}.")
