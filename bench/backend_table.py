"""Put what a GPU measured of our backends into the table by which ``backend="auto"`` chooses.

::

    python bench/gpu.py kernels --out bench/results
    python -m bench.backend_table bench/results/<device>.csv

Takes the milliseconds of ``atman (triton)``, ``atman (hopper)``, ``atman (torch)`` and whatever
other backends were timed in the set ``kernels``; rivals and other measurements are passed over. Of
a setup that was measured more than once the last run counts, and a setup with one backend only
compares nothing, so that it is left out. In the table, rows of the same setups on the same device
and versions are replaced, or go where one backend only could run this time; all others stay.

Legend: B batch, Hq/Hk query/key heads, Tq/T query/key tokens, D head dim.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from atman_triton.backend_registry import CANDIDATES
from atman_triton.backend_table import (
    BOTH,
    FORWARD,
    TABLE,
    MeasuredRow,
    major_minor,
    read_table,
    write_table,
)
from bench.harness import Row
from bench.kernel_cases import EACH, ONE, PER_HEAD, TOY_CASES

_FACTORS = "|".join((ONE, PER_HEAD, EACH))
_WHAT = re.compile(
    rf"attention (?:(?P<direction>{re.escape(BOTH)}|{FORWARD}), (?P<sees>causal|full)|decode B\d+)"
    rf", (?P<factors>{_FACTORS}), (?P<mode>\w+)"
)
_SHAPE = re.compile(
    r"B\d+-Hq(?P<heads>\d+)-Hk(?P<key_heads>\d+)(-Tq(?P<queries>\d+))?"
    r"-T(?P<tokens>\d+)-D(?P<head_dim>\d+)"
)
_PROVIDER = re.compile(r"atman \((?P<backend>\w+)\)")
_VERSION = re.compile(r"\d+\.\d+")
_NOT_KNOWN = ("", "none", "unknown")


def measured(path: Path) -> list[MeasuredRow]:
    """The rows of our backends in a results file: the last run of each setup.

    Raises: ValueError: naming the line, what a row must have and what came.
    """
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        wanted = [field.name for field in dataclasses.fields(Row)]
        missing = [name for name in wanted if name not in (reader.fieldnames or ())]
        if missing:
            raise ValueError(
                f"{path} must have the columns of bench/gpu.py, but {', '.join(missing)} are "
                "missing."
            )
        found = []
        for cells in reader:
            try:
                row = row_of(cells)
            except ValueError as error:
                raise ValueError(f"{path}, line {reader.line_num}: {error}") from None
            if row is not None:
                found.append(row)
    runs = {place_of(row): (row.commit, row.date) for row in found}
    last = {
        (place_of(row), row.backend): row
        for row in found
        if runs[place_of(row)] == (row.commit, row.date)
    }
    return list(last.values())


def compared(rows: Iterable[MeasuredRow]) -> list[MeasuredRow]:
    """Those that compare backends: of setups in which more than one was timed."""
    rows = list(rows)
    counts = Counter(map(place_of, rows))
    return [row for row in rows if counts[place_of(row)] > 1]


def row_of(cells: dict[str, str]) -> MeasuredRow | None:
    """A line of the results; ``None`` for what is no time of a backend of ours.

    Raises: ValueError: for one that lacks what the table needs.
    """
    what = _WHAT.fullmatch(cells["what"] or "")
    provider = _PROVIDER.fullmatch(cells["provider"] or "")
    names = {candidate.name for candidate in CANDIDATES if candidate.automatic}
    if what is None or provider is None or provider["backend"] not in names:
        return None
    if cells["metric"] != "ms":
        return None
    for name in ("device", "dtype", "commit", "date"):
        if cells[name] in (None, *_NOT_KNOWN):
            raise ValueError(f"{name} must be known, got {cells[name]!r}.")
    if re.search(r", \d+ threads$", cells["device"]):
        raise ValueError(
            f"device must be a GPU, got {cells['device']!r}; on a CPU auto takes torch anyway."
        )
    for name in ("triton", "torch"):
        if not _VERSION.match(cells[name] or ""):
            raise ValueError(f"{name} must be a version, got {cells[name]!r}.")
    shape = _SHAPE.fullmatch(cells["shape"] or "")
    if shape is None:
        raise ValueError(f"shape must read as B1-Hq2-Hk2-T64-D64, got {cells['shape']!r}.")
    if cells["shape"] in {case.shape for case in TOY_CASES}:
        raise ValueError(f"shape must not be a toy's, whose times mean nothing: {shape[0]}.")
    try:
        milliseconds = float(cells["median"])
    except (TypeError, ValueError):
        milliseconds = 0.0
    if not 0 < milliseconds < float("inf"):
        raise ValueError(f"median must be greater than 0 ms, got {cells['median']!r}.")
    return MeasuredRow(
        device=cells["device"],
        triton=major_minor(cells["triton"]),
        torch=major_minor(cells["torch"]),
        dtype=cells["dtype"],
        head_dim=int(shape["head_dim"]),
        value_dim=int(shape["head_dim"]),
        mode=what["mode"],
        factors=what["factors"],
        causal=what["sees"] == "causal",
        grouped=shape["heads"] != shape["key_heads"],
        direction=what["direction"] or FORWARD,
        queries=int(shape["queries"] or shape["tokens"]),
        tokens=int(shape["tokens"]),
        shape=shape[0],
        backend=provider["backend"],
        milliseconds=milliseconds,
        commit=cells["commit"],
        date=cells["date"],
    )


def place_of(row: MeasuredRow) -> MeasuredRow:
    """The setup alone: the same for every run and backend of it."""
    return dataclasses.replace(row, backend="", milliseconds=0.0, commit="", date="")


def merged(old: Iterable[MeasuredRow], new: Iterable[MeasuredRow]) -> list[MeasuredRow]:
    """The old rows, but for setups of which there are new ones, and the new that compare."""
    new = list(new)
    places = {place_of(row) for row in new}
    return [*(row for row in old if place_of(row) not in places), *compared(new)]


def main(arguments: list[str] | None = None) -> None:
    """Command line; exits 2 where a file cannot be used, and then writes nothing."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("results", type=Path, help="rows that bench/gpu.py kernels wrote")
    parser.add_argument("--table", type=Path, default=TABLE, help="the table that is written")
    options = parser.parse_args(arguments)
    try:
        found = measured(options.results)
        old = read_table(options.table)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    new = compared(found)
    if not new:
        parser.error(f"{options.results} has no setup in which two of our backends were timed.")
    write_table(merged(old, found), options.table)
    setups: dict[MeasuredRow, dict[str, float]] = {}
    for row in new:
        setups.setdefault(place_of(row), {})[row.backend] = row.milliseconds
    print(f"{len(new)} rows of {len(setups)} setups in {options.table}")
    for place, times in setups.items():
        best = min(times, key=times.__getitem__)
        kind = f"{'causal' if place.causal else 'full'}, {place.factors}, {place.mode}"
        told = ", ".join(f"{name} {milliseconds:g} ms" for name, milliseconds in times.items())
        print(f"  {place.shape} {place.direction}, {kind}: {best} of {told}")


if __name__ == "__main__":
    main()
