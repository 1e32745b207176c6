"""Tiles that were measured: ``tuned.json``, read before the rules of ``configs.py``.

The file is a list of rows, each a problem, its tiles, and the measurement that put it there:
``bench/tune.py`` writes it. A row serves its own device and Triton version (major.minor), or
another device of the same architecture that has no row of its own. A problem without a row takes
the rule; a file that cannot be read as this is an error.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import torch

from .hopper_tiles import HopperConfig

FILE = Path(__file__).with_name("tuned.json")
LENGTHS = {"1k": 1 << 10, "4k": 1 << 12, "above": None}
"""Buckets of key tokens and the most that each holds: a growing cache changes tiles twice."""

HOPPER = "hopper"  # whose tiles are a HopperConfig
KERNELS = (
    "attention",
    "shared_prefix",
    "backward_queries",
    "backward_keys",
    "backward_rows",
    HOPPER,
)
MODES = ("plain", "multiplicative", "min_shift", "log_additive")
DTYPES = ("half", "float32")
_T = TypeVar("_T")


@dataclass(frozen=True)
class TileConfig:
    """How the work of one program is cut: block_m query rows and block_n keys of one tile.

    ``edge_stages`` is the pipeline depth of the masked tiles (diagonal, window, last keys).
    ``skip_plain_tiles`` branches around the manipulation in tiles whose factors are all 1.
    ``persistent`` launches as many programs as run at once, which take blocks of rows in turns,
    the longest first; for the forward kernel without a prefix only.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    edge_stages: int = 1
    skip_plain_tiles: bool = False
    persistent: bool = False


Tiles = TileConfig | HopperConfig


@dataclass(frozen=True)
class Problem:
    """What tiles are chosen by; ``architecture`` as of ``configs.device_architecture``."""

    architecture: str
    kernel: str  # of KERNELS
    head_dim: int
    value_dim: int
    dtype: str  # of DTYPES
    mode: str  # of MODES
    causal: bool
    length: str  # of LENGTHS


@dataclass(frozen=True)
class Measurement:
    """Medians of one call with the tiles and with the rule's, and with what they were measured."""

    ms: float
    rule_ms: float
    spread_ms: float  # the larger distance of the two calls' 20% and 80% quantiles
    shape: str
    device: str
    triton: str
    torch: str
    date: str
    commit: str


@dataclass(frozen=True)
class Row:
    """One line of the file."""

    problem: Problem
    tiles: Tiles
    measured: Measurement

    @property
    def place(self) -> tuple[Problem, str, str]:
        """What no two rows of a file have in common."""
        return self.problem, release(self.measured.triton), self.measured.device


class Table:
    """Rows, found by problem, Triton version and device.

    Raises: ValueError: rows disagree about one place, or tiles are none that their kernel takes.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = tuple(rows)
        self._exact: dict[tuple[Problem, str, str], Tiles] = {}
        self._related: dict[tuple[Problem, str], Tiles] = {}
        for index, row in enumerate(self.rows):
            problem, version, device = row.place
            if trouble := _trouble(row):
                raise ValueError(f"row {index}: {trouble}")
            if row.place in self._exact:
                raise ValueError(
                    f"row {index}: {device} with Triton {version} has a row for {problem} already."
                )
            self._exact[row.place] = row.tiles
        for row in sorted(self.rows, key=lambda row: row.measured.date):  # the newest comes last
            self._related[row.place[:2]] = row.tiles

    def find(self, problem: Problem, version: str, device: str) -> Tiles | None:
        """Tiles of this device, else of another one of its architecture."""
        exact = self._exact.get((problem, version, device))
        return exact or self._related.get((problem, version))


_table: Table | None = None  # of FILE, once it is read, or what stands in for it


def release(version: str) -> str:
    """``3.7`` of ``3.7.1``: within one, the compiler gives the same code."""
    return ".".join(version.split(".")[:2])


def length_bucket(keys: int) -> str:
    """The name in :data:`LENGTHS` of a number of key tokens."""
    return next(name for name, most in LENGTHS.items() if most is None or keys <= most)


def tuned_config(
    kernel: str,
    architecture: str,
    head_dim: int,
    value_dim: int,
    dtype: torch.dtype,
    mode: str,
    queries: int,
    load: int,
    causal: bool,
    length: str | None,
    device: str,
) -> TileConfig | None:
    """Measured tiles of a problem, ``None`` where the rule serves.

    Few query rows, and calls whose features take registers beyond those that were tuned (``load``
    above 0), have none. ``length`` of ``None`` asks for the rule alone.
    """
    if length is None or queries <= 16 or load or not table().rows:
        return None
    kind = "float32" if dtype == torch.float32 else "half"
    problem = Problem(architecture, kernel, head_dim, value_dim, kind, mode, causal, length)
    found = tuned_tiles(problem, device)
    return found if isinstance(found, TileConfig) else None


def tuned_tiles(problem: Problem, device: str) -> Tiles | None:
    """Measured tiles of a problem, ``None`` where there are none."""
    if not table().rows:
        return None
    import triton  # optional, and configs.py is read without it

    return table().find(problem, release(triton.__version__), device)


def table() -> Table:
    """The rows in use: those of the file, read once."""
    global _table
    if _table is None:
        _table = load(FILE)
    return _table


@contextmanager
def in_use(rows: Table) -> Iterator[None]:
    """Other rows than the file's while the context is open, in all threads: to try tiles out."""
    global _table
    before, _table = _table, rows
    try:
        yield
    finally:
        _table = before


# --- the file -------------------------------------------------------------------------------------


def load(path: Path) -> Table:
    """Read a file of rows.

    Raises: ValueError: naming the row, what was required and what came.
    """
    try:
        found = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(found, list):
        raise ValueError(f"{path} must hold a list of rows, got {type(found).__name__}.")
    try:
        return Table([_row(index, each) for index, each in enumerate(found)])
    except ValueError as error:
        raise ValueError(f"{path}, {error}") from None


def save(rows: Sequence[Row], path: Path) -> None:
    """Write rows, a line each, ordered so that a change is a small one."""
    ordered = sorted(rows, key=lambda row: str((row.measured.device, row.measured.triton, row)))
    lines = [json.dumps(asdict(row)) for row in Table(ordered).rows]
    path.write_text("[\n" + ",\n".join(lines) + "\n]\n" if lines else "[]\n")


def _row(index: int, found: Any) -> Row:
    _require_names(f"row {index}", found, ("problem", "tiles", "measured"))
    problem = _fill(f"row {index}, problem", Problem, found["problem"])
    return Row(
        problem,
        _fill(f"row {index}, tiles", _kind_of(problem), found["tiles"]),
        _fill(f"row {index}, measured", Measurement, found["measured"]),
    )


def _kind_of(problem: Problem) -> type[Tiles]:
    """What the tiles of a kernel are."""
    return HopperConfig if problem.kernel == HOPPER else TileConfig


def _require_names(where: str, found: Any, names: tuple[str, ...]) -> None:
    if not isinstance(found, dict):
        raise ValueError(f"{where}: must be an object, got {found!r}.")
    for what, extra in (
        ("unknown field", found.keys() - set(names)),
        ("missing field", set(names) - found.keys()),
    ):
        if extra:
            raise ValueError(f"{where}: {what} {min(extra)!r}; required are {', '.join(names)}.")


def _fill(where: str, kind: type[_T], found: Any) -> _T:
    """An instance of a dataclass of numbers and strings, every field given."""
    types = get_type_hints(kind)
    _require_names(where, found, tuple(field.name for field in fields(kind)))  # pyright: ignore
    for name, value in found.items():
        allowed = (int, float) if types[name] is float else (types[name],)
        if type(value) not in allowed:  # True is no number
            raise ValueError(f"{where}: {name} must be {types[name].__name__}, got {value!r}.")
    return kind(**found)


def _trouble(row: Row) -> str | None:
    """Why a row cannot serve, if it cannot."""
    problem, tiles, measured = row.problem, row.tiles, row.measured
    for name, known in (("kernel", KERNELS), ("dtype", DTYPES), ("mode", MODES)):
        if getattr(problem, name) not in known:
            return f"{name} must be one of {', '.join(known)}, got {getattr(problem, name)!r}."
    if problem.length not in LENGTHS:
        return f"length must be one of {', '.join(LENGTHS)}, got {problem.length!r}."
    for name in ("head_dim", "value_dim"):
        if not 1 <= getattr(problem, name) <= 256:
            return f"{name} must lie between 1 and 256, got {getattr(problem, name)}."
    if not 0 < measured.ms < measured.rule_ms:
        return f"ms must lie between 0 and rule_ms = {measured.rule_ms}, got {measured.ms}."
    if not isinstance(tiles, _kind_of(problem)):
        return f"tiles of {problem.kernel} must be a {_kind_of(problem).__name__}, got {tiles}."
    if isinstance(tiles, HopperConfig):
        if problem.dtype != "half":
            return f"dtype must be half for {HOPPER}, got {problem.dtype!r}."
        return tiles.trouble(problem.head_dim, problem.value_dim)
    for name, least, most in (("block_m", 16, 256), ("block_n", 16, 256), ("num_warps", 1, 16)):
        size = getattr(tiles, name)
        if not least <= size <= most or size & (size - 1):
            return f"{name} must be a power of two between {least} and {most}, got {size}."
    for name in ("num_stages", "edge_stages"):
        if not 1 <= getattr(tiles, name) <= 8:
            return f"{name} must lie between 1 and 8, got {getattr(tiles, name)}."
    backward = problem.kernel.startswith("backward")
    if tiles.skip_plain_tiles and (backward or problem.mode == "plain"):
        return f"skip_plain_tiles is not taken by {problem.kernel} in mode {problem.mode}."
    if tiles.persistent and problem.kernel != "attention":
        return f"persistent is taken by attention only, got it for {problem.kernel}."
    return None
