"""Scores from gradients: what the loss does while all units are suppressed together.

The factors of all explained columns move together on the straight line from 1 to the suppression
factor f. At a point p of it, every column has the factor ``m = 1 + p (f - 1)``, and a unit's score
is ``∫ dL/dm dm`` over its own columns: ``(f - 1)`` times the mean of ``dL/dm`` over the points, by
the midpoint rule. The scores of a token then sum to what its loss rises from one end of the line to
the other, but for the error of the rule.

One forward pass, of some points at a time, serves all target tokens; each needs a backward pass of
its own. Weights get no gradients, and of every decoder layer only the input is kept: the backward
pass runs the layer again.

Legend: U units, M scored tokens, S input columns, N points of the line, B of them in one pass.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from . import memory
from .capabilities import dtype_of, text_config
from .layers import THREAD
from .perturbations import Settings
from .plan import Batch
from .stacks import UnsupportedModelError, find_stack

if TYPE_CHECKING:
    from .runner import Runner

COST = {"forward": 1, "backward": 2, "recomputed": 1}
"""What a pass over a token costs, in forward passes; a backward pass runs every layer once more."""

# Copies of the scores of a layer that autograd keeps while it goes through it, and of the rest.
_SCORE_COPIES = 4
_LAYER_COPIES = 2
# Switching layers and weights is not for two threads at once.
_LOCK = threading.RLock()


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


def midpoints(steps: int) -> tuple[float, ...]:
    """The middles of ``steps`` equal parts of the line, as shares of it."""
    return tuple((step + 0.5) / steps for step in range(steps))


@dataclass
class Group:
    """Scored tokens whose units can be suppressed together.

    A larger unit of a target may begin before a token of it and reach beyond: that token has no
    score for it, so there it must not move. Single tokens all fit into one group.

    Args:
        rows: Scored tokens of the runner.
        moving: Units that are suppressed.
        still: Units that must not be.
        columns: Those of the units that are suppressed.
    """

    rows: list[int] = field(default_factory=list)
    moving: set[int] = field(default_factory=set)
    still: set[int] = field(default_factory=set)
    columns: list[int] = field(default_factory=list)


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
    runner: Runner,
    columns: Sequence[Sequence[int]],
    measured: Tensor,
    begun: Tensor,
    points: Sequence[float],
) -> Attribution:
    """The scores of one runner's tokens.

    Args:
        runner: Whose passes run over the whole input.
        columns: Of each unit, what is suppressed.
        measured: ``[U, M]`` bool, see ``groups``.
        begun: ``[U, M]`` bool.
        points: ``N`` places on the line, as shares of it.
    Raises:
        UnsupportedModelError: if the model cannot be differentiated.
        torch.OutOfMemoryError: if not even one point fits.
    """
    parts = groups(measured, begun)
    scores = torch.zeros(len(columns), measured.shape[1], dtype=torch.float64)
    together = runner.base.clone()
    length = runner.branches.length
    runner.expect(length * sum(1 + len(points) * _cost(group) for group in parts))
    for group in parts:
        group.columns = sorted(column for unit in group.moving for column in columns[unit])
        logprobs = runner.run_rows([group.columns], Batch(0, (0,)), "total")
        together[group.rows] = logprobs[0, group.rows]
    whole, size = Batch(0, tuple(range(len(points)))), _points_per_pass(runner)
    pending = [(group, part) for group in parts for part in whole.split(length, size * length)]
    with _differentiable(runner):
        while pending:
            group, batch = pending[0]
            before = runner.record.tokens
            try:
                slopes = _slopes(runner, group, [points[row] for row in batch.rows])
            except (RuntimeError, MemoryError) as error:
                if not memory.out_of_memory(error):
                    raise
                refused = str(error)
            else:
                for unit in group.moving:
                    scores[unit, group.rows] += slopes[:, list(columns[unit])].sum(1)
                pending = pending[1:]
                continue
            # Outside the except block, so that the failed pass's tensors are gone by now.
            runner.expect(runner.record.tokens - before)
            most = runner.smaller(batch, refused)
            pending = [(g, part) for g, each in pending for part in each.split(length, most)]
            if runner.device.type == "cuda":
                torch.cuda.empty_cache()
    scores *= (runner.settings.factor - 1) / len(points)
    return Attribution(scores.float().masked_fill_(~measured, torch.nan), together)


def _cost(group: Group) -> int:
    """Forward passes that one point of a group costs."""
    return COST["forward"] + len(group.rows) * (COST["backward"] + COST["recomputed"])


def _slopes(runner: Runner, group: Group, places: Sequence[float]) -> Tensor:
    """dL/dm of a group's tokens by every column, summed over points: ``[rows, S]`` float64."""
    length, count = runner.branches.length, len(places)
    name = type(runner.model).__name__
    factors = torch.ones(count, length)
    for factor, place in zip(factors, places, strict=True):
        factor[group.columns] = 1 + place * (runner.settings.factor - 1)
    factors = factors.to(runner.device).requires_grad_()
    slopes = torch.zeros(len(group.rows), length, dtype=torch.float64)
    last = len(group.rows) - 1
    try:
        with torch.enable_grad(), runner.manipulated(factors):
            logprobs = runner.logprobs_of(group.rows, count)  # [B, rows]
            runner.count(count, length)
            runner.advance(count * length)
            if not logprobs.requires_grad:
                raise UnsupportedModelError(
                    f"{name} runs without gradients, which method='path' and "
                    "method='score_gradient' need; use method='exact'."
                )
            for row in range(last + 1):
                loss = -logprobs[:, row].sum()
                (slope,) = torch.autograd.grad(loss, factors, retain_graph=row < last)
                slopes[row] = slope.double().sum(0).cpu()
                tokens = count * length * (COST["backward"] + COST["recomputed"])
                runner.record.backward_runs += count
                runner.record.tokens += tokens
                runner.advance(tokens)
    except UnsupportedModelError:
        raise
    except RuntimeError as error:
        if memory.out_of_memory(error):
            raise
        raise UnsupportedModelError(
            f"{name} cannot be differentiated, which method='path' and method='score_gradient' "
            f"need; use method='exact'. ({error})"
        ) from error
    return slopes


@contextmanager
def _differentiable(runner: Runner) -> Iterator[None]:
    """Gradients to factors alone, of every layer only the input kept; undone whatever happens."""
    model = runner.model
    with _LOCK, ExitStack() as undo:
        trained = [weight for weight in model.parameters() if weight.requires_grad]
        undo.callback(lambda: [weight.requires_grad_(True) for weight in trained])
        for weight in trained:
            weight.requires_grad_(False)
        layers = decoder_layers(model)
        for layer in layers:
            undo.callback(_checkpoint(layer))
        runner.record.activations = (
            f"checkpointed: only the inputs of {len(layers)} decoder layers are kept, and each is "
            "run again for every backward pass"
        )
        yield


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
        state = (THREAD.stacks, THREAD.by_config, THREAD.switched)

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
def _thread_state(state: tuple[Any, Any, Any]) -> Iterator[None]:
    """What the forward pass knew: autograd runs layers of a GPU again in a thread of its own."""
    before = (THREAD.stacks, THREAD.by_config, THREAD.switched)
    THREAD.stacks, THREAD.by_config, THREAD.switched = state
    try:
        yield
    finally:
        THREAD.stacks, THREAD.by_config, THREAD.switched = before


def _points_per_pass(runner: Runner) -> int:
    """How many points go through the model together."""
    settings: Settings = runner.settings
    if "batching" in settings.without:
        return 1
    if settings.batch_size != "auto":
        return settings.batch_size
    length = runner.branches.length
    size = max(1, memory.tokens_per_batch(runner.device) // length)
    free = memory.free_memory(runner.model)
    if free is None:
        return size
    return max(1, min(size, int(free * memory.SHARE) // _bytes_per_point(runner)))


def _bytes_per_point(runner: Runner) -> int:
    """A rough estimate of what one point takes: every layer's input, and all of one layer."""
    model, length = runner.model, runner.branches.length
    config = text_config(model)
    kept = length if not runner.replay.keeps_logits else length - runner.tail
    inputs = config.num_hidden_layers * length * int(getattr(config, "hidden_size", 1024))
    scores = 4 * int(getattr(config, "num_attention_heads", 1)) * length**2
    layer = memory.bytes_per_row(model, length, kept, length)
    return inputs * dtype_of(model).itemsize + _SCORE_COPIES * scores + _LAYER_COPIES * layer
