"""Several targets behind one prompt, as the model reads them in one pass.

The columns of the input are the prompt, then each target's tokens without its last one (which is
predicted, never read). Every target is a branch: its tokens see the prompt and the branch's own
tokens before them, at the positions that they would have alone. One target is a plain sequence;
targets of one token add no columns at all, they read one softmax.

Legend: P prompt tokens, S columns, K targets, M scored tokens of all targets together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .masks import AttentionMask


@dataclass(frozen=True)
class Branches:
    """Where every token of a prompt and its targets stands.

    Args:
        prompt_tokens: ``P``, at least 1.
        targets: ``K`` sequences of token ids, none of them empty.
    """

    prompt_tokens: int
    targets: tuple[tuple[int, ...], ...]

    @cached_property
    def first_columns(self) -> list[int]:
        """Column of each target's first token that is read."""
        columns, column = [], self.prompt_tokens
        for target in self.targets:
            columns.append(column)
            column += len(target) - 1
        return columns

    @property
    def length(self) -> int:
        """``S``."""
        return self.prompt_tokens + len(self.read_ids)

    @property
    def read_ids(self) -> list[int]:
        """Token ids of the columns behind the prompt."""
        return [token for target in self.targets for token in target[:-1]]

    @property
    def linear(self) -> bool:
        """Whether the columns are one plain sequence, so that no tree mask is needed."""
        return sum(len(target) > 1 for target in self.targets) <= 1

    @property
    def first_stop(self) -> int:
        """The first so many columns are a plain sequence: the prompt and one target."""
        return self.prompt_tokens + next((len(t) - 1 for t in self.targets if len(t) > 1), 0)

    @property
    def longest(self) -> tuple[int, ...]:
        """The longest target."""
        return max(self.targets, key=len)

    @cached_property
    def positions(self) -> list[int]:
        """Of each column, its place in the sequence of the prompt and its own target alone."""
        own = [
            self.prompt_tokens + step for target in self.targets for step in range(len(target) - 1)
        ]
        return [*range(self.prompt_tokens), *own]

    @cached_property
    def owners(self) -> list[int]:
        """Of each column, the target that it belongs to; -1 in the prompt."""
        own = [index for index, target in enumerate(self.targets) for _ in target[:-1]]
        return [-1] * self.prompt_tokens + own

    @cached_property
    def predictors(self) -> list[int]:
        """``M`` columns: where each scored token is predicted."""
        columns = []
        for first, target in zip(self.first_columns, self.targets, strict=True):
            columns += [self.prompt_tokens - 1, *range(first, first + len(target) - 1)]
        return columns

    @property
    def scored_ids(self) -> list[int]:
        """``M`` token ids."""
        return [token for target in self.targets for token in target]

    def columns(self, branch: int | None, positions: Sequence[int]) -> list[int]:
        """Columns of tokens given by their positions in the sequence of one target alone."""
        shift = 0 if branch is None else self.first_columns[branch] - self.prompt_tokens
        return [p if p < self.prompt_tokens else p + shift for p in positions]


class TreeMask:
    """Turns a model's own mask over columns into that of the branches.

    Columns behind the prompt are no positions, so windows, chunks and causality are taken from the
    positions, and other branches are hidden.

    Args:
        branches: The layout.
        device: Where masks live.
    """

    def __init__(self, branches: Branches, device: torch.device) -> None:
        self.prompt_tokens = branches.prompt_tokens
        self._positions = torch.tensor(branches.positions, device=device)
        self._owners = torch.tensor(branches.owners, device=device)
        self._made: dict[tuple[int, int, bool, int | None], Tensor] = {}

    def of_branches(self, mask: AttentionMask, start: int) -> AttentionMask:
        """The mask of the rows behind the prompt, over all columns.

        Args:
            mask: What the model made, for rows from column ``start`` on.
            start: A column before ``Branches.first_stop``, where columns are positions.
        """
        first, columns = max(self.prompt_tokens, start), mask.key_tokens
        if mask.dense is not None:
            rows = self._positions[first:columns] - start
            seen = mask.dense[:, :, rows][..., self._positions[:columns]]
            return mask._replace(dense=seen & self._apart(first, columns))
        key = (first, columns, mask.causal, mask.window)
        if key not in self._made:
            distance = self._positions[first:columns, None] - self._positions[None, :columns]
            seen = self._apart(first, columns)
            if mask.causal:
                seen = seen & (distance >= 0)
            if mask.window is not None:
                near = (distance if mask.causal else distance.abs()) < mask.window
                seen = seen & near
            self._made[key] = seen[None, None]
        seen = self._made[key]
        if mask.padding is not None:
            seen = seen & mask.padding[:, None, None]
        return AttentionMask(columns, 0, first, dense=seen)

    def _apart(self, first: int, columns: int) -> Tensor:
        """Bool ``[rows, columns]``: the prompt and the row's own branch."""
        owner = self._owners[:columns]
        return (owner[None] == -1) | (owner[None] == owner[first:, None])
