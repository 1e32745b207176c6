"""Correlated suppression: what is suppressed along with a unit because it says much the same.

Where a fact stands twice, suppressing one mention changes little, because the other remains. So a
unit takes its *neighbourhood* along: the tokens whose input embeddings have a cosine similarity of
at least κ with one of its own (paper, 3.3).

With m the factor of the unit, and S the largest similarity of a token k with those of the unit's
tokens that are not k itself (the strongest factor wins), the factor of k is

============  =====================  ================  ================
rule          k in the unit          k outside, S ≥ κ  k outside, S < κ
============  =====================  ================  ================
``released``  m                      1 - (1 - m) · S   1
``paper``     as if it were outside  1 - S             1 - κ
============  =====================  ================  ================

``paper`` is the formula of the first arXiv version to the letter. It suppresses what is *unlike*
the unit too, by κ; it knows no m; and it leaves a token alone where that token itself is
suppressed. So the only token of a unit keeps the factor 1, and one of several gets what the others
give it.

Legend: S columns, D width of embeddings, U units, R rows of a block, C columns of a neighbourhood.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

__all__ = ["RULES", "Correlated", "Neighbourhood", "Rule", "factor_row", "neighbourhoods"]

Rule = Literal["released", "paper"]
RULES: tuple[str, ...] = get_args(Rule)

# Similarities that are held at a time. Larger blocks are not faster: a product of these is long.
_BLOCK_BYTES = {"cpu": 1 << 25}
_BLOCK_BYTES_ELSEWHERE = 1 << 28
# Equal embeddings have similarity 1; of normalised vectors it is found up to some roundings.
_ROUNDINGS = 16


class Neighbourhood(NamedTuple):
    """Tokens that are like a unit's, those of the unit itself among them where it has several.

    Args:
        columns: ``[C]`` int64 on the CPU, ascending.
        similarity: ``[C]`` float32 on the CPU, in ``[κ, 1]``: the largest one with a token of the
            unit, itself excepted.
    """

    columns: Tensor
    similarity: Tensor


def neighbourhoods(
    embeddings: Tensor,
    units: Sequence[Sequence[int]],
    threshold: float,
    *,
    reach: Callable[[Sequence[int]], Tensor] | None = None,
    block_bytes: int | None = None,
) -> list[Neighbourhood]:
    """What is at least κ similar to each unit.

    Args:
        embeddings: ``[S, D]``, of any floating dtype; compared in float32 (float64 stays). One of
            norm 0 is similar to nothing.
        units: Of each, its columns.
        threshold: κ, in ``(0, 1]``.
        reach: Bool ``[S]`` of a unit: which columns count; None is all.
        block_bytes: Of how many bytes similarities are held at a time; None is what is fast.
    Returns: ``U`` neighbourhoods. No tensor of size S · S is made: similarities are found for some
        rows at a time.
    Source: AtMan, section 3.3.
    """
    vectors = _normalised(embeddings)  # [S, D]
    count = len(vectors)
    if block_bytes is None:
        block_bytes = _BLOCK_BYTES.get(vectors.device.type, _BLOCK_BYTES_ELSEWHERE)
    rows = max(1, block_bytes // (vectors.element_size() * max(1, count)))
    equal = 1 - _ROUNDINGS * torch.finfo(vectors.dtype).eps
    found: list[Neighbourhood] = []
    for group in _groups(units, rows):
        largest = _largest(vectors, group, rows)  # [units of the group, S]
        if reach is not None:
            for row, unit in zip(largest, group, strict=True):
                row.masked_fill_(~reach(unit).to(row.device), -torch.inf)
        near = largest >= min(threshold, equal)
        columns = near.nonzero()[:, 1].cpu()  # row by row, ascending in each
        similarity = largest[near].float().cpu()
        similarity.masked_fill_(similarity > equal, 1.0)
        sizes = near.sum(1).tolist()
        parts = zip(columns.split(sizes), similarity.split(sizes), strict=True)
        # copies, so that an empty one does not keep the others' memory
        found += [Neighbourhood(own.clone(), each.clone()) for own, each in parts]
    return found


def factor_row(
    unit: Sequence[int],
    near: Neighbourhood,
    factor: float,
    threshold: float,
    rule: Rule,
    reach: Tensor,
) -> Tensor:
    """The factors of all columns while a unit is suppressed: ``[S]`` float32 on the CPU.

    Args:
        unit: Its columns.
        near: Its neighbourhood.
        factor: m, of the unit itself; ``paper`` knows none.
        threshold: κ.
        rule: See the table above.
        reach: Bool ``[S]`` on the CPU: which columns count; the others keep the factor 1.
    """
    row = torch.ones(len(reach))
    if rule == "released":
        row[near.columns] = 1 - (1 - factor) * near.similarity
        row[list(unit)] = factor
        return row
    row[reach] = 1 - threshold
    row[near.columns] = 1 - near.similarity
    if len(unit) == 1:
        row[unit[0]] = 1.0
    return row


class Correlated:
    """The units of one input together with their neighbourhoods.

    Args:
        embeddings: Gives ``[S, D]``, what the model reads in its first layer for every column.
        owners: Of each column, the target that it belongs to; -1 in the prompt. What is suppressed
            with a piece of the prompt may stand anywhere, with a piece of a target not in others.
        shown: Bool ``[S]``: columns that are no padding.
        factor: m.
        threshold: κ.
        rule: See the table above.
    """

    def __init__(
        self,
        embeddings: Callable[[], Tensor],
        owners: Sequence[int],
        shown: Tensor,
        factor: float,
        threshold: float,
        rule: Rule,
    ) -> None:
        self._embeddings = embeddings
        self._owners = torch.tensor(owners)
        self._shown = shown.cpu()
        self.factor = factor
        self.threshold = threshold
        self.rule: Rule = rule
        self._found: dict[tuple[int, ...], Neighbourhood] = {}

    def neighbourhoods(self, units: Sequence[Sequence[int]]) -> list[Neighbourhood]:
        """Of each unit, given by its columns; what was found is kept."""
        keys = [tuple(unit) for unit in units]
        missing = list(dict.fromkeys(key for key in keys if key not in self._found))
        if missing:
            own = neighbourhoods(self._embeddings(), missing, self.threshold, reach=self._reach)
            self._found |= zip(missing, own, strict=True)
        return [self._found[key] for key in keys]

    def row(self, unit: Sequence[int]) -> Tensor:
        """``[S]`` float32: the factors of all columns while the unit is suppressed."""
        (near,) = self.neighbourhoods([unit])
        reach = self._reach(unit)
        return factor_row(unit, near, self.factor, self.threshold, self.rule, reach)

    def start(self, unit: Sequence[int]) -> int:
        """The first column whose factor is not 1; the unit's first one if there is none."""
        changed = (self.row(unit) != 1).nonzero()
        return int(changed[0]) if len(changed) else min(unit)

    def _reach(self, unit: Sequence[int]) -> Tensor:
        """Bool ``[S]``: columns that stand in one sequence with the unit."""
        owner = self._owners[max(unit)]
        if owner < 0:
            return self._shown
        return self._shown & ((self._owners < 0) | (self._owners == owner))


def _normalised(embeddings: Tensor) -> Tensor:
    """Rows of norm 1, or 0: ``[S, D]`` float32 (float64 stays)."""
    dtype = torch.promote_types(embeddings.dtype, torch.float32)
    vectors = embeddings.detach().to(dtype)
    tiny = torch.finfo(dtype).tiny
    # by the largest part first, whose square neither overflows nor vanishes
    vectors = vectors / vectors.abs().amax(-1, keepdim=True).clamp_min(tiny)
    return vectors / vectors.norm(dim=-1, keepdim=True).clamp_min(tiny)


def _groups(units: Sequence[Sequence[int]], rows: int) -> Iterator[list[Sequence[int]]]:
    """Units that have at most so many columns together, or a single one that has more."""
    group: list[Sequence[int]] = []
    size = 0
    for unit in units:
        if group and size + len(unit) > rows:
            yield group
            group, size = [], 0
        group.append(unit)
        size += len(unit)
    if group:
        yield group


def _largest(vectors: Tensor, units: Sequence[Sequence[int]], rows: int) -> Tensor:
    """The largest similarity of every column with a unit's others: ``[U, S]``."""
    columns = torch.tensor([column for unit in units for column in unit], device=vectors.device)
    if len(columns) > rows:  # one unit
        best = vectors.new_full((len(vectors),), -torch.inf)
        for part in columns.split(rows):
            torch.maximum(best, _similarities(vectors, part).amax(0), out=best)
        return best[None]
    block = _similarities(vectors, columns)
    if len(units) == len(columns):
        return block
    return torch.stack([part.amax(0) for part in block.split([len(unit) for unit in units])])


def _similarities(vectors: Tensor, columns: Tensor) -> Tensor:
    """Cosines of some columns with all: ``[R, S]``, -∞ with themselves."""
    with torch.autocast(vectors.device.type, enabled=False):
        block = vectors[columns] @ vectors.T
    block[torch.arange(len(columns)), columns] = -torch.inf
    return block
