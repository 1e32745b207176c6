"""What was measured of backends on devices, and which of it holds for a call.

``backend_table.csv`` stands beside this file, written by ``python -m bench.backend_table`` from the
rows of ``python bench/gpu.py kernels``. Backends are compared within one setup (one shape, one kind
of factors, one run), and one is faster for a call only where it is in every setup that was measured
at the lengths around the call's.

Legend: Hq/Hk query/key heads, D head dim, Dv value dim.
"""

from __future__ import annotations

import csv
import importlib
import math
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

TABLE = Path(__file__).with_name("backend_table.csv")
FORWARD, BOTH = "forward", "forward + backward"
NO_FACTORS, PER_HEAD = "none", "every key and head"
_BEYOND = 2  # times a measured length is as far as it is taken to hold where no other follows


@dataclass(frozen=True)
class MeasuredRow:
    """The time of one backend, with all that decides for which calls it holds.

    Args:
        device: as ``torch.cuda.get_device_name`` has it.
        triton, torch: versions, ``major.minor``.
        mode: ``plain`` without factors.
        factors: ``none``, or which keys had one: ``one key per row``, ``every key``, or ``every key
            and head``.
        grouped: whether Hq > Hk.
        direction: ``forward`` or ``forward + backward``.
        queries: tokens of the query; as many as ``tokens`` in self-attention.
        tokens: keys.
        shape: the whole shape that was timed.
        milliseconds: the median.
    """

    device: str
    triton: str
    torch: str
    dtype: str
    head_dim: int
    value_dim: int
    mode: str
    factors: str
    causal: bool
    grouped: bool
    direction: str
    queries: int
    tokens: int
    shape: str
    backend: str
    milliseconds: float
    commit: str
    date: str

    @property
    def setup(self) -> tuple[object, ...]:
        """What rows must have in common to be compared."""
        return tuple(
            getattr(self, field.name)
            for field in fields(self)
            if field.name not in ("backend", "milliseconds")
        )


COLUMNS = tuple(field.name for field in fields(MeasuredRow))


class Case(NamedTuple):
    """What of a call the table knows, but the length.

    Args:
        per_head: whether query heads have factors of their own.
        queries: tokens of the query; ``None`` for as many as there are keys.
    """

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    value_dim: int
    mode: str
    per_head: bool
    causal: bool
    grouped: bool
    backward: bool
    queries: int | None


def read_table(path: Path = TABLE) -> list[MeasuredRow]:
    """The rows of a table.

    Raises: ValueError: naming the file, the line and what is wrong with it.
    """
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file, strict=True)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(
                f"{path} must have the columns {', '.join(COLUMNS)}, got "
                f"{', '.join(reader.fieldnames or ()) or 'none'}."
            )
        rows = []
        for found in reader:
            try:
                rows.append(_row_of(found))
            except ValueError as error:
                raise ValueError(f"{path}, line {reader.line_num}: {error}") from None
    return rows


def write_table(rows: Iterable[MeasuredRow], path: Path = TABLE) -> None:
    """Write a table, in order of its columns."""
    ordered = sorted(rows, key=lambda row: tuple(getattr(row, name) for name in COLUMNS))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for row in ordered:
            writer.writerow(
                str(cell).lower() if isinstance(cell, bool) else cell
                for cell in (getattr(row, name) for name in COLUMNS)
            )


def _row_of(found: dict[str, str]) -> MeasuredRow:
    """A line's cells in their types."""
    cells: dict[str, object] = dict(found)
    for name, cell in found.items():
        if not isinstance(name, str) or not isinstance(cell, str) or not cell:
            raise ValueError(f"every column must have a value, got {cell!r} in {name}.")
    for name in ("causal", "grouped"):
        if found[name] not in ("true", "false"):
            raise ValueError(f"{name} must be true or false, got {found[name]!r}.")
        cells[name] = found[name] == "true"
    for name in ("head_dim", "value_dim", "queries", "tokens"):
        if not found[name].isdecimal() or int(found[name]) < 1:
            raise ValueError(f"{name} must be a number of at least 1, got {found[name]!r}.")
        cells[name] = int(found[name])
    if found["direction"] not in (FORWARD, BOTH):
        raise ValueError(f"direction must be {FORWARD!r} or {BOTH!r}, got {found['direction']!r}.")
    try:
        milliseconds = float(found["milliseconds"])
    except ValueError:
        milliseconds = math.nan
    if not 0 < milliseconds < math.inf:
        raise ValueError(f"milliseconds must be greater than 0, got {found['milliseconds']!r}.")
    cells["milliseconds"] = milliseconds
    return MeasuredRow(**cells)  # pyright: ignore[reportArgumentType]


# --- which rows hold ------------------------------------------------------------------------------


def device_name(device: torch.device) -> str | None:
    """The name that rows have; ``None`` for a device that has none, such as a CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None


def versions() -> tuple[str, str]:
    """Of triton and torch, as rows have them: ``major.minor``."""
    triton = importlib.import_module("triton").__version__
    return major_minor(triton), major_minor(str(torch.__version__))


def major_minor(version: str) -> str:
    """``3.7`` of ``3.7.1``."""
    return ".".join(version.split(".")[:2])


@torch.compiler.assume_constant_result
def has_rows(device: torch.device) -> bool:
    """Whether anything was measured on such a device with these versions."""
    return bool(_rows_here(device))


@torch.compiler.assume_constant_result
def faster_backends(tokens: int, than: str, *case: Any) -> tuple[str, ...]:
    """Backends that measured faster than one of them for a call of so many keys, best first.

    Args:
        case: the parts of a :class:`Case`, since torch.compile takes no constant of a class.
    """
    lengths, margins = _margins(Case(*case), than)
    around = _around(lengths, tokens)
    if not around:
        return ()
    # of several lengths the one where it gains least counts
    gains = {
        name: min(margins[length].get(name, 0.0) for length in around)
        for name in margins[around[0]]
    }
    faster = [name for name, gain in gains.items() if gain > 1]
    return tuple(sorted(faster, key=lambda name: -gains[name]))


def rows_for(case: Case, tokens: int) -> list[MeasuredRow]:
    """The rows that decide for a call of so many keys, the nearest length first."""
    rows = _rows_of(case)
    around = _around(tuple(sorted({row.tokens for row in rows})), tokens)
    held = [row for row in rows if row.tokens in around]
    return sorted(held, key=lambda row: abs(math.log(row.tokens / max(1, tokens))))


def forget() -> None:
    """Read the table again at the next call."""
    for cached in (_rows_here, _rows_of, _margins):
        cached.cache_clear()


@lru_cache
def _rows_here(device: torch.device) -> tuple[MeasuredRow, ...]:
    name = device_name(device)
    rows = () if name is None else tuple(row for row in read_table(TABLE) if row.device == name)
    if not rows:
        return ()
    here = versions()
    return tuple(row for row in rows if (row.triton, row.torch) == here)


@lru_cache
def _rows_of(case: Case) -> tuple[MeasuredRow, ...]:
    """Of all lengths."""
    return tuple(row for row in _rows_here(case.device) if _holds(row, case))


def _holds(row: MeasuredRow, case: Case) -> bool:
    queries = row.tokens if case.queries is None else case.queries
    return (
        row.dtype == str(case.dtype).removeprefix("torch.")
        and (row.head_dim, row.value_dim) == (case.head_dim, case.value_dim)
        and (row.mode, row.causal, row.grouped) == (case.mode, case.causal, case.grouped)
        and (row.factors == PER_HEAD) == case.per_head
        and row.direction == (BOTH if case.backward else FORWARD)
        and row.queries == queries
    )


@lru_cache
def _margins(case: Case, than: str) -> tuple[tuple[int, ...], dict[int, dict[str, float]]]:
    """Measured lengths, and at each how many times faster than ``than`` a backend is at least."""
    setups: dict[tuple[object, ...], dict[str, MeasuredRow]] = {}
    for row in _rows_of(case):
        setups.setdefault(row.setup, {})[row.backend] = row
    margins: dict[int, dict[str, float]] = {}
    for by_backend in setups.values():
        if than not in by_backend:
            continue
        base = by_backend[than]
        gains = {name: base.milliseconds / row.milliseconds for name, row in by_backend.items()}
        before = margins.get(base.tokens)
        if before is not None:  # what is missing in one of them could not run there
            gains = {name: min(gain, before.get(name, 0.0)) for name, gain in gains.items()}
        margins[base.tokens] = gains
    return tuple(sorted(margins)), margins


def _around(lengths: tuple[int, ...], tokens: int) -> tuple[int, ...]:
    """The measured length itself, or its neighbours; none too far beyond the ends."""
    place = bisect_left(lengths, tokens)
    if place < len(lengths) and lengths[place] == tokens:
        return (tokens,)
    if 0 < place < len(lengths):
        return lengths[place - 1], lengths[place]
    if place == 0 and lengths and lengths[0] <= _BEYOND * tokens:
        return (lengths[0],)
    if lengths and place == len(lengths) and tokens <= _BEYOND * lengths[-1]:
        return (lengths[-1],)
    return ()
