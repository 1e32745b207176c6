"""Where on the line from no suppression to full suppression gradients are taken.

The loss stays flat as long as the model is certain and then rises within a small part of the line,
which equal steps would jump over. So the loss is looked at first, by forward passes alone, and the
parts whose middles get a gradient are made short where it bends.

Legend: places on the line are shares of it, in ``[0, 1]``; X of them are looked at, M rows (scored
tokens), N equal intervals of the grid on which parts may end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

EQUAL_FROM = 32
"""From so many steps on, parts are equal and nothing is looked at: they are short enough."""

_LOOKS_PER_STEP = 4
_MOST_LOOKS = 32
_ROUNDS = 2  # in which places are added where the loss bends
_GRID = 256


def looks(steps: int) -> int:
    """How many places besides the two ends are looked at."""
    return 0 if steps == 1 or steps >= EQUAL_FROM else min(_MOST_LOOKS, _LOOKS_PER_STEP * steps) - 1


def look(losses: Callable[[Sequence[float]], Tensor], steps: int) -> tuple[Tensor, Tensor]:
    """Places on the line, ascending, both ends among them, and the losses there.

    Args:
        losses: Gives ``[places, M]``, nats.
        steps: How many parts the line will have.
    Returns: ``[X]`` and ``[X, M]`` float64.
    """
    first = max(1, (looks(steps) + 1) // 2)
    places = torch.linspace(0, 1, first + 1, dtype=torch.float64)
    found = losses(places.tolist()).double()
    for left in range(_ROUNDS, 0, -1):
        more = (looks(steps) + 2 - len(places)) // left
        if not more:
            continue
        new = _between(places, found, more)
        found = torch.cat([found, losses(new.tolist()).double()])
        places, order = torch.cat([places, new]).sort()
        found = found[order]
    return places, found


def _between(places: Tensor, losses: Tensor, count: int) -> Tensor:
    """The middles of those intervals where a row's slope changes most, weighed by their length."""
    gaps = places.diff()
    slopes = losses.diff(dim=0) / gaps[:, None]
    bends = torch.zeros_like(slopes)
    bends[1:] += slopes.diff(dim=0).abs()
    bends[:-1] += slopes.diff(dim=0).abs()
    ranges = losses.diff(dim=0).abs().sum(0)  # of each row
    bends = torch.where(ranges > 0, bends / ranges, 0.0).sum(1) * gaps.square()
    chosen = bends.argsort(descending=True, stable=True)[:count]
    return places[chosen] + gaps[chosen] / 2


def edges(places: Tensor, losses: Tensor, steps: int) -> Tensor:
    """Where parts begin and end, ``[steps + 1]`` float64, so that their middles stand for them.

    Of all parts that end on a grid of ``N`` intervals, those of which length times slope in (and
    next to) the middle differs least from the rise of the loss, added over the parts. Equal parts
    where nothing but the ends was looked at.

    Args:
        places: ``[X]``, from 0 to 1.
        losses: ``[X]`` of one scored token, nats.
        steps: How many parts.
    """
    if not looks(steps):
        return torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    size = _GRID
    grid = torch.linspace(0, 1, size + 1, dtype=torch.float64)
    curve = _interpolated(places, losses, grid)
    slope = torch.zeros_like(curve)
    slope[1:-1] = (curve[2:] - curve[:-2]) * (size / 2)
    start, stop = torch.meshgrid(torch.arange(size + 1), torch.arange(size + 1), indexing="ij")
    allowed = (stop > start) & ((stop - start) % 2 == 0)  # the middle stands on the grid
    error = torch.zeros(size + 1, size + 1, dtype=torch.float64)
    for off in (-1, 0, 1):  # the curve is known roughly, so a middle near a bend is no good
        middle = ((start + stop) // 2 + off).clamp(0, size)
        error += (curve[stop] - curve[start] - slope[middle] * (stop - start) / size).abs()
    error = error.masked_fill(~allowed, math.inf)
    best = torch.full((size + 1,), math.inf, dtype=torch.float64)
    best[0] = 0
    before = []
    for _ in range(steps):
        best, origin = (best[:, None] + error).min(0)
        before.append(origin)
    found = [size]
    for origin in reversed(before):
        found.append(int(origin[found[-1]]))
    return grid[found[::-1]]


def _interpolated(places: Tensor, values: Tensor, wanted: Tensor) -> Tensor:
    """A piecewise cubic curve through the values that overshoots nowhere (Fritsch and Butland)."""
    gaps, rises = places.diff(), values.diff()
    slopes = rises / gaps
    tangents = torch.zeros_like(values)
    tangents[0], tangents[-1] = slopes[0], slopes[-1]
    left, right = slopes[:-1], slopes[1:]
    first, second = 2 * gaps[1:] + gaps[:-1], gaps[1:] + 2 * gaps[:-1]
    mean = (first + second) / (first / left + second / right)
    tangents[1:-1] = torch.where(left * right > 0, mean, 0.0)
    at = torch.searchsorted(places, wanted, right=True).clamp(1, len(places) - 1) - 1
    t = (wanted - places[at]) / gaps[at]
    return (
        values[at] * (1 + 2 * t) * (1 - t) ** 2
        + gaps[at] * tangents[at] * t * (1 - t) ** 2
        + values[at + 1] * t**2 * (3 - 2 * t)
        + gaps[at] * tangents[at + 1] * t**2 * (t - 1)
    )
