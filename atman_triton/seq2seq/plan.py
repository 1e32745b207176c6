"""Which perturbations of an encoder-decoder run together, and how many.

Legend: U units, L lanes (see ``lanes``), T decoder tokens, E tokens of a source.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from torch import nn

from .. import memory
from ..capabilities import device_of
from ..perturbations import Settings
from .gradients import does_not_fit, nothing_fits
from .lanes import Lane


@dataclass(frozen=True)
class Pass:
    """Perturbations that run together.

    Args:
        first: The first stage that runs; the number of stages if only the decoder does.
        branch: The target that all units stand in; None if they stand in the prompt.
        lanes: Which answers are read.
        rows: Indices of the units.
    """

    first: int
    branch: int | None
    lanes: tuple[int, ...]
    rows: tuple[int, ...]

    def split(self, rows: int, lanes: int) -> Iterator[Pass]:
        """The same in parts of at most so many units and lanes."""
        for i in range(0, len(self.rows), rows):
            for j in range(0, len(self.lanes), lanes):
                yield replace(self, rows=self.rows[i : i + rows], lanes=self.lanes[j : j + lanes])


class Planner:
    """Passes of level size.

    Args:
        model: An encoder-decoder.
        settings: Its batch size, and what it saves.
        edges: Of each source, its first column, and where the decoder's start tokens begin.
        start: How many tokens the decoder reads before an answer.
        lanes: What it reads behind them.
        joined: Whether lanes run together.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: Settings,
        edges: Sequence[int],
        start: int,
        lanes: Sequence[Lane],
        *,
        joined: bool,
    ) -> None:
        self._model = model
        self._settings = settings
        self._edges = list(edges)
        self._start = start
        self._lanes = lanes
        self._joined = joined

    def lanes_of(self, branch: int | None) -> list[tuple[int, ...]]:
        """Lanes that are read for units of a target, or of the prompt; those of a part together."""
        if branch is not None:
            own = next(i for i, lane in enumerate(self._lanes) if branch in lane.targets)
            return [(own,)]
        everything = range(len(self._lanes))
        return [tuple(everything)] if self._joined else [(lane,) for lane in everything]

    def width(self, one: Pass) -> int:
        """``T``."""
        return self._start + max(len(self._lanes[lane].read) for lane in one.lanes)

    def tokens(self, one: Pass) -> int:
        """Tokens that a pass runs."""
        encoded = self._edges[-1] - self._edges[one.first]
        return len(one.rows) * (encoded + len(one.lanes) * self.width(one))

    def planned(self, one: Pass) -> list[Pass]:
        """Parts that fit into memory, or have the batch size that was asked for."""
        size = 1 if "batching" in self._settings.without else self._settings.batch_size
        if size != "auto":
            return list(one.split(size, len(one.lanes)))
        row = self.tokens(replace(one, rows=one.rows[:1]))
        most = max(1, memory.tokens_per_batch(device_of(self._model)) // row) * row
        free = memory.free_memory(self._model)
        if free is not None:
            kept = len(one.lanes) * (self.width(one) - self._start + 1)
            keys = max(*self._edges, self.width(one))
            taken = memory.bytes_per_row(self._model, row, kept, keys)
            most = min(most, int(free * memory.SHARE * row) // taken)
        return self.within(one, most)

    def within(self, one: Pass, tokens: int) -> list[Pass]:
        """Parts of at most so many tokens, as far as one unit and one lane have no more."""
        row = self.tokens(replace(one, rows=one.rows[:1]))
        if row <= tokens:
            return list(one.split(tokens // row, len(one.lanes)))
        encoded = self._edges[-1] - self._edges[one.first]
        return list(one.split(1, max(1, (tokens - encoded) // self.width(one))))

    def smaller(self, one: Pass, refused: str) -> int:
        """The most tokens of a pass to go on with after one did not fit."""
        size = self._settings.batch_size
        if size != "auto":
            raise does_not_fit(len(one.rows), refused)
        if len(one.rows) == len(one.lanes) == 1:
            raise nothing_fits(refused)
        return self.tokens(one) // 2
