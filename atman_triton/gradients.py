"""Scores from gradients: what the loss does while all units are suppressed together.

The factors of all explained columns move together on the straight line from 1 to the suppression
factor f. At a place p of it, every column has the factor ``m = 1 + p (f - 1)``, and a unit's score
is ``∫ dL/dm dm`` over its own columns. By the midpoint rule that is ``(f - 1)`` times the sum, over
parts of the line, of a part's length times ``dL/dm`` in its middle. The scores of a token then sum
to what its loss rises from one end of the line to the other, but for the error of the rule. Where
the parts end is chosen for every scored token, see ``line``.

Every place and token costs a forward and a backward pass, some of them in one batch. Weights get no
gradients, and of every decoder layer only the input is kept: the backward pass runs the layer
again.

Legend: U units, M scored tokens, S input columns, B rows of a batch.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from . import line, memory
from .batches import Whole, in_batches
from .capabilities import dtype_of, text_config
from .layers import THREAD, ThreadState
from .perturbations import Settings
from .stacks import UnsupportedModelError, find_stack

_BACKWARD = 3  # forward passes that a backward one costs: two, and one because it runs layers again

# Copies of the scores of a layer that autograd keeps while it goes through it, and of the rest.
_SCORE_COPIES = 4
_LAYER_COPIES = 2
# Switching layers and weights is not for two threads at once.
_LOCK = threading.RLock()


class Runs(Whole, Protocol):
    """What runs an input whole: ``Runner`` of decoders, ``ClassifierEngine``."""

    model: nn.Module
    settings: Settings
    advance: Callable[[int], None]

    @property
    def base(self) -> Tensor:
        """``[M]`` float32: nothing suppressed."""
        ...

    @property
    def layers(self) -> Sequence[nn.Module]:
        """What is run again for a backward pass, in order."""
        ...

    @property
    def config(self) -> Any:
        """The configuration of these layers."""
        ...

    def run_factors(self, factors: Tensor) -> Tensor:
        """Rows with factors ``[B, S]``: ``[B, M]``."""
        ...

    def manipulated(self, factors: Tensor) -> AbstractContextManager[Any]:
        """Runs in it feel factors ``[B, S]``."""
        ...

    def logprobs_of(self, scored: Sequence[int], rows: int) -> Tensor:
        """``[B, scored]`` of a run in ``manipulated``, neither moved nor counted."""
        ...

    def count(self, rows: int, tokens: int) -> None:
        """Note a finished forward pass."""
        ...

    def bytes_per_row(self) -> int:
        """A rough estimate of what a forward pass takes for a row."""
        ...


@dataclass(frozen=True)
class Attribution:
    """What every unit did to every scored token along the line.

    Args:
        scores: ``[U, M]`` float32, nats: rise of the loss that is the unit's; NaN where it does not
            stand before the token.
        together: ``[M]`` float32, nats: log-probability with all units suppressed at once that
            have a score for the token.
    """

    scores: Tensor
    together: Tensor


@dataclass(frozen=True)
class Point:
    """A gradient to take.

    Args:
        row: The scored token.
        place: Where on the line, as a share of it.
        length: Of the part of the line that it stands for.
        columns: What is suppressed.
    """

    row: int
    place: float
    length: float
    columns: Sequence[int]


@dataclass
class Group:
    """Scored tokens whose units can be suppressed together.

    A larger unit of a target may begin before a token of it and reach beyond: that token has no
    score for it, so there it must not move. Single tokens all fit into one group.

    Args:
        rows: Scored tokens of the runner.
        moving: Units that are suppressed.
        still: Units that must not be.
    """

    rows: list[int] = field(default_factory=list)
    moving: set[int] = field(default_factory=set)
    still: set[int] = field(default_factory=set)


def groups(measured: Tensor, begun: Tensor) -> list[Group]:
    """As few groups as a greedy search finds; tokens without any unit are in none.

    Args:
        measured: ``[U, M]`` bool: the unit has a score for the token.
        begun: ``[U, M]`` bool: a part of it stands before the token, in the token's own target.
    """
    found: list[Group] = []
    for row in range(measured.shape[1]):
        moving = set(measured[:, row].nonzero().flatten().tolist())
        if not moving:
            continue
        still = set((begun & ~measured)[:, row].nonzero().flatten().tolist())
        for group in found:
            if not (moving & group.still or still & group.moving):
                break
        else:
            found.append(group := Group())
        group.rows.append(row)
        group.moving |= moving
        group.still |= still
    return found


def attribute(
    runner: Runs,
    columns: Sequence[Sequence[int]],
    measured: Tensor,
    begun: Tensor,
    steps: int | None,
) -> Attribution:
    """The scores of one runner's tokens.

    Args:
        runner: Whose passes run over the whole input.
        columns: Of each unit, what is suppressed.
        measured: ``[U, M]`` bool, see ``groups``.
        begun: ``[U, M]`` bool.
        steps: Parts of the line; None takes the gradient at its start for the whole.
    Raises:
        UnsupportedModelError: if the model cannot be differentiated.
        torch.OutOfMemoryError: if not even one row fits.
    """
    scores = torch.zeros(len(columns), measured.shape[1], dtype=torch.float64)
    together = runner.base.clone()
    parts = groups(measured, begun)
    looks = 0 if steps is None else line.looks(steps)
    passes = sum(looks + 1 + len(group.rows) * (steps or 1) * (1 + _BACKWARD) for group in parts)
    runner.expect(runner.length * passes)
    points: list[Point] = []
    for group in parts:
        moved = sorted(column for unit in group.moving for column in columns[unit])
        if steps is None:
            together[group.rows] = -_losses(runner, moved, group.rows, (1.0,))[0]
            points += [Point(row, 0.0, 1.0, moved) for row in group.rows]
            continue
        losses = functools.partial(_losses, runner, moved, group.rows)
        places, found = line.look(losses, steps)  # [X], [X, rows]
        together[group.rows] = -found[-1].float()
        for row, own in zip(group.rows, found.T, strict=True):
            for start, stop in pairwise(line.edges(places, own, steps).tolist()):
                points.append(Point(row, (start + stop) / 2, stop - start, moved))
    slopes = torch.zeros(measured.shape[1], runner.length, dtype=torch.float64)

    def differentiate(chosen: Sequence[int]) -> None:
        batch = [points[index] for index in chosen]
        found = _slopes(runner, batch)  # after which nothing can run out of memory
        for point, slope in zip(batch, found, strict=True):
            slopes[point.row] += point.length * slope

    with _differentiable(runner):
        in_batches(runner, len(points), _rows_per_batch(runner), differentiate)
    for unit, own in enumerate(columns):
        scores[unit] = slopes[:, list(own)].sum(1) * (runner.settings.factor - 1)
    return Attribution(scores.float().masked_fill_(~measured, torch.nan), together)


def _losses(
    runner: Runs, columns: Sequence[int], rows: Sequence[int], places: Sequence[float]
) -> Tensor:
    """Losses of some tokens at places of the line: ``[places, rows]`` float32."""
    found = (-runner.base[list(rows)]).repeat(len(places), 1)
    others = [index for index, place in enumerate(places) if place > 0]

    def run(chosen: Sequence[int]) -> None:
        own = [others[index] for index in chosen]
        factors = _factors(runner, [columns] * len(own), [places[index] for index in own])
        found[own] = -runner.run_factors(factors)[:, list(rows)]

    in_batches(runner, len(others), _rows_per_batch(runner), run)
    return found


def _factors(runner: Runs, columns: Sequence[Sequence[int]], places: Sequence[float]) -> Tensor:
    """``[B, S]`` float32 on the CPU: each row at its place on its line."""
    factors = torch.ones(len(places), runner.length)
    for factor, own, place in zip(factors, columns, places, strict=True):
        factor[list(own)] = 1 + place * (runner.settings.factor - 1)
    return factors


def _slopes(runner: Runs, points: Sequence[Point]) -> Tensor:
    """dL/dm by every column, of each point's own token: ``[B, S]`` float64."""
    length, count = runner.length, len(points)
    name = type(runner.model).__name__
    factors = _factors(
        runner, [point.columns for point in points], [point.place for point in points]
    )
    factors = factors.to(runner.device).requires_grad_()
    rows = sorted({point.row for point in points})
    own = [rows.index(point.row) for point in points]
    try:
        with torch.enable_grad(), runner.manipulated(factors):
            logprobs = runner.logprobs_of(rows, count)  # [B, rows]
            runner.count(count, length)
            runner.advance(count * length)
            if not logprobs.requires_grad:
                raise UnsupportedModelError(
                    f"{name} runs without gradients, which method='path' and "
                    "method='score_gradient' need; use method='exact'."
                )
            # Rows of a batch know nothing of each other, so the sum's gradient is each one's own.
            (slopes,) = torch.autograd.grad(-logprobs[range(count), own].sum(), factors)
    except UnsupportedModelError:
        raise
    except RuntimeError as error:
        if memory.out_of_memory(error):
            raise
        raise UnsupportedModelError(
            f"{name} cannot be differentiated, which method='path' and method='score_gradient' "
            f"need; use method='exact'. ({error})"
        ) from error
    runner.record.backward_runs += count
    runner.record.tokens += _BACKWARD * count * length
    runner.advance(_BACKWARD * count * length)
    return slopes.double().cpu()


@contextmanager
def _differentiable(runner: Runs) -> Iterator[None]:
    """Gradients to factors alone, of every layer only the input kept; undone whatever happens."""
    with still_weights(runner.model), ExitStack() as undo:
        layers = runner.layers
        for layer in layers:
            undo.callback(_checkpoint(layer))
        runner.record.activations = (
            f"checkpointed: only the inputs of {len(layers)} layers are kept, and each is "
            "run again for every backward pass"
        )
        yield


@contextmanager
def still_weights(model: nn.Module) -> Iterator[None]:
    """No gradients to weights, whatever happens given back to those that took some."""
    with _LOCK:
        trained = [weight for weight in model.parameters() if weight.requires_grad]
        try:
            for weight in trained:
                weight.requires_grad_(False)
            yield
        finally:
            for weight in trained:
                weight.requires_grad_(True)


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The layers of the text stack, in order.

    Raises: UnsupportedModelError: if they cannot be found.
    """
    stack, _ = find_stack(model)
    count = text_config(model).num_hidden_layers
    for part in stack.children():
        if isinstance(part, nn.ModuleList) and len(part) == count:
            return list(part)
    raise UnsupportedModelError(
        f"{type(model).__name__}: the decoder layers of {type(stack).__name__} cannot be found, so "
        "its activations cannot be checkpointed; use method='exact'."
    )


def _checkpoint(layer: nn.Module) -> Callable[[], None]:
    """Let a layer keep its input only, in this thread; returns what undoes it."""
    owner = threading.get_ident()
    own = layer.__dict__.get("forward")  # what another library has put in place of the class's
    original = layer.forward

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != owner or not torch.is_grad_enabled():
            return original(*args, **kwargs)
        state = THREAD.state

        def run(*args: Any, **kwargs: Any) -> Any:
            with _thread_state(state):
                return original(*args, **kwargs)

        return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    def undo() -> None:
        if own is None:
            del layer.forward
        else:
            layer.forward = own

    layer.forward = forward
    return undo


@contextmanager
def _thread_state(state: ThreadState) -> Iterator[None]:
    """What the forward pass knew: autograd runs layers of a GPU again in a thread of its own."""
    before = THREAD.state
    THREAD.state = state
    try:
        yield
    finally:
        THREAD.state = before


def _rows_per_batch(runner: Runs) -> int:
    """How many rows go through the model together."""
    settings: Settings = runner.settings
    if "batching" in settings.without:
        return 1
    if settings.batch_size != "auto":
        return settings.batch_size
    length = runner.length
    size = max(1, memory.tokens_per_batch(runner.device) // length)
    free = memory.free_memory(runner.model)
    if free is None:
        return size
    return max(1, min(size, int(free * memory.SHARE) // _bytes_per_row(runner)))


def _bytes_per_row(runner: Runs) -> int:
    """A rough estimate of what one row takes: every layer's input, and all of one layer."""
    config, length = runner.config, runner.length
    inputs = len(runner.layers) * length * int(getattr(config, "hidden_size", 1024))
    scores = 4 * int(getattr(config, "num_attention_heads", 1)) * length**2
    element = dtype_of(runner.model).itemsize
    return inputs * element + _SCORE_COPIES * scores + _LAYER_COPIES * runner.bytes_per_row()
