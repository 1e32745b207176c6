"""Runs over a whole input in batches, smaller ones where memory does not hold them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from . import memory
from .perturbations import Record
from .plan import Batch


class Whole(Protocol):
    """What runs rows of one input, every row over all of its tokens."""

    device: torch.device
    record: Record
    expect: Callable[[int], None]

    @property
    def length(self) -> int:
        """Tokens of the input."""
        ...

    def smaller(self, batch: Batch, refused: str) -> int:
        """The most tokens of a batch to go on with after ``batch`` did not fit."""
        ...


def in_batches(runs: Whole, count: int, rows: int, run: Callable[[Sequence[int]], None]) -> None:
    """Run things, given by their numbers, in batches; nothing that is done is lost.

    Args:
        runs: What they run on.
        count: How many there are.
        rows: How many go into a batch to begin with.
        run: Runs a batch of them, and notes it in ``runs.record``.
    Raises: torch.OutOfMemoryError: from ``runs.smaller``.
    """
    pending = Batch(0, tuple(range(count))).split(runs.length, rows * runs.length)
    while pending:
        batch, before = pending[0], runs.record.tokens
        try:
            run(batch.rows)
        except (RuntimeError, MemoryError) as error:
            if not memory.out_of_memory(error):
                raise
            refused = str(error)
        else:
            pending = pending[1:]
            continue
        # Outside the except block, so that the failed pass's tensors are gone by now.
        runs.expect(runs.record.tokens - before)
        most = runs.smaller(batch, refused)
        pending = [part for each in pending for part in each.split(runs.length, most)]
        if runs.device.type == "cuda":
            torch.cuda.empty_cache()
