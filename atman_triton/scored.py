"""What engines of all kinds of models share: which tokens are scored, and for which units.

Legend: U units, K targets, M scored tokens of all targets, P prompt tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from .perturbations import Record, RunFailed, Unit
from .runner import check_nan


def rows_of(targets: Sequence[Sequence[int]]) -> list[range]:
    """Of each target, its rows among the ``M``."""
    slices, first = [], 0
    for target in targets:
        slices.append(range(first, first + len(target)))
        first += len(target)
    return slices


def stands_before(
    units: Sequence[Unit],
    rows: Sequence[range],
    prompt_tokens: int,
    end: Callable[[Sequence[int]], int],
) -> Tensor:
    """Bool ``[U, M]``: a token of the unit is read before the scored one, in the latter's target.

    Args:
        units: Whose tokens.
        rows: Of each target, its rows.
        prompt_tokens: ``P``.
        end: Which token of a unit: ``max`` is the last one, ``min`` the first.
    """
    owner = torch.tensor([k for k, own in enumerate(rows) for _ in own])  # [M]
    place = torch.tensor([prompt_tokens + i for own in rows for i in range(len(own))])
    edge = torch.tensor([end(unit.positions) for unit in units], dtype=torch.long)[:, None]
    branch = [-1 if unit.branch is None else unit.branch for unit in units]
    branch = torch.tensor(branch, dtype=torch.long)[:, None]
    return ((branch < 0) | (branch == owner)) & (edge < place)


@contextmanager
def timed(record: Record) -> Iterator[None]:
    """Add the wall time of what runs inside to the record."""
    started = time.perf_counter()
    try:
        yield
    finally:
        record.seconds += time.perf_counter() - started


def check_base(base: Tensor, dtype: torch.dtype) -> None:
    """Refuse, by ``RunFailed``, base runs that cannot be explained."""
    check_nan(base, dtype)
    if not bool(base.isfinite().all()):
        token = int((~base.isfinite()).nonzero()[0])
        raise RunFailed(f"the model gives target token {token} probability 0: nothing to explain.")
