"""Baselines that read attention weights: Chefer's rule, rollout, the last layer alone.

For each target the model runs once with its eager attention, which alone holds the weights, and
must say what it said before. A weight ``A[p, s]`` is how much of position ``s`` goes into position
``p``. Only the rows of positions that predict target tokens are asked for, so products of matrices
over layers are taken from the last layer down, one row vector at a time.

Legend: U units, M scored tokens, T of one target, S tokens that are read, L layers, H heads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from .. import memory
from ..capabilities import dtype_of, text_config
from ..engine import undisturbed
from ..scored import timed
from ..stacks import UnsupportedModelError, find_stack, unwrap
from .case import BACKWARD, Case, Output
from .methods import Options


def chefer(case: Case, options: Options) -> Tensor:
    """Attention weights times their gradients, gathered over layers.

    ``R`` begins as the identity; each layer makes it ``R + Ā R``, where ``Ā`` is the mean over
    heads of ``max(∂y/∂A · A, 0)`` and ``y`` the target token's ``options.output``. A token's
    relevance is its entry in the row of the position that predicts the target token, but for the 1
    that the identity gave that position itself: it says nothing of the model, and the authors'
    code drops that entry too. Of a vision-language model the text stack counts, in whose attention
    a picture's tokens stand. Costs a forward pass for each target and a backward one for each of
    its tokens.

    Returns: ``[U, M]`` float64 on the CPU, NaN where ``~case.measured``.
    Raises:
        UnsupportedModelError: if the weights cannot be had or differentiated.
        ValueError: while the model is manipulated.
    Source: Chefer, Gur and Wolf 2021, arXiv 2103.15679, Eq. 5 and 6.
    """
    found = []
    for k, target in enumerate(case.targets):
        case.expect(case.length(k) * (1 + BACKWARD * len(target)))
        with undisturbed(case.model), timed(case.record), torch.enable_grad():
            weights, values = _read(case, k, options.output)
            rows = [
                _relevance(weights, _slopes(case, k, value, weights), place)
                for place, value in zip(case.places(k), values, strict=True)
            ]
        found.append(case.by_unit(k, torch.stack(rows)))
    return case.scores(found)


def rollout(case: Case, options: Options) -> Tensor:
    """Attention multiplied through the layers, half of each layer passing by on the residual path.

    A layer is ``(A + I) / 2``, ``A`` the mean over heads, its rows scaled to sum 1 (which they do
    unless sinks take part); the product of all layers is read in the row of the position that
    predicts the target token. Costs a forward pass for each target.

    Returns: ``[U, M]`` float64 on the CPU, NaN where ``~case.measured``.
    Raises: UnsupportedModelError, ValueError: as ``chefer`` does.
    Source: Abnar and Zuidema 2020, arXiv 2005.00928, Section 3.
    """
    found = []
    for k in range(len(case.targets)):
        case.expect(case.length(k))
        with undisturbed(case.model), timed(case.record):
            weights, _ = _read(case, k)
            rows = _identity(case.length(k), weights[-1].device)[list(case.places(k))]
            for own in reversed(weights):
                mixed = _mean(own) + _identity(case.length(k), own.device)
                rows = rows.to(own.device) @ (mixed / mixed.sum(-1, keepdim=True))
        found.append(case.by_unit(k, rows))
    return case.scores(found)


def last_attention(case: Case, options: Options) -> Tensor:
    """The last layer's attention, mean over heads, of the position that predicts the target token.

    Costs a forward pass for each target.

    Returns: ``[U, M]`` float64 on the CPU, NaN where ``~case.measured``.
    Raises: UnsupportedModelError, ValueError: as ``chefer`` does.
    Source: Jain and Wallace 2019, arXiv 1902.10186, who ask what it is worth.
    """
    found = []
    for k in range(len(case.targets)):
        case.expect(case.length(k))
        with undisturbed(case.model), timed(case.record):
            weights, _ = _read(case, k)
            found.append(case.by_unit(k, _mean(weights[-1])[list(case.places(k))]))
    return case.scores(found)


def _relevance(weights: Sequence[Tensor], slopes: Sequence[Tensor], place: int) -> Tensor:
    """``[S]`` float64: a row of Chefer's ``R`` less the identity's."""
    start = _identity(weights[-1].shape[-1], weights[-1].device)[place]
    row = start
    for own, slope in zip(reversed(weights), reversed(slopes), strict=True):
        row = row.to(own.device)
        row = row + row @ _mean((slope.detach().double() * own.detach().double()).clamp(min=0))
    return row - start.to(row.device)


def _mean(weights: Tensor) -> Tensor:
    """``[S, S]`` float64: over heads."""
    return weights.detach().double().mean(1)[0]


def _identity(tokens: int, device: torch.device) -> Tensor:
    return torch.eye(tokens, dtype=torch.float64, device=device)


def _slopes(case: Case, target: int, value: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """``L`` of ``[1, H, S, S]``: gradients of a target token's value with regard to the weights."""
    try:
        found = torch.autograd.grad(value, list(weights), retain_graph=True, allow_unused=True)
    except RuntimeError as error:
        if memory.out_of_memory(error):
            raise
        raise _refused(case, f"cannot be differentiated, which chefer needs ({error})") from error
    case.count(1, case.length(target), backward=True)
    missing = [layer for layer, slope in enumerate(found) if slope is None]
    if missing:
        raise _refused(
            case, f"computes its output without the attention weights it gives of layer {missing}"
        )
    return list(found)


# --- a run that gives its weights -----------------------------------------------------------------


def _read(case: Case, target: int, output: Output = "logprob") -> tuple[list[Tensor], Tensor]:
    """Weights ``L`` of ``[1, H, S, S]`` after the softmax, and ``[T]`` of the target's tokens.

    Both in one graph where gradients are taken. Rows of weights sum to 1, or to less where a sink
    takes part.
    """
    model: Any = unwrap(case.model)
    _, stack = find_stack(model)
    if stack.current.manipulation is not None:
        raise ValueError(
            "attention weights cannot be had of a model that is manipulated: leave out controls, "
            "or use a method that does not read them."
        )
    layers = text_config(model).num_hidden_layers
    if len(stack.layers) < layers:
        raise _refused(
            case, f"has {layers} layers, of which only {len(stack.layers)} are self-attention"
        )
    with _eager(stack.configs.values()), _differentiable(model), case.task.encoded.on(model):
        found = model(
            **case.inputs(target),
            **case.keep(len(case.targets[target])),
            use_cache=False,
            output_attentions=True,
        )
    case.count(1, case.length(target))
    weights: list[Any] = list(getattr(found, "attentions", None) or ())
    _check_weights(case, weights, (1, stack.heads, *2 * (case.length(target),)))
    _check_said(case, target, case.scored(found.logits.detach(), target)[0])
    values = case.scored(found.logits, target, output)[0]
    if torch.is_grad_enabled() and not all(each.requires_grad for each in (values, *weights)):
        raise _refused(case, "runs without gradients, which chefer needs")
    return weights, values


@contextmanager
def _eager(configs: Any) -> Iterator[None]:
    """Let some configurations name eager attention; each gets its own back."""
    before = [(config, config._attn_implementation_internal) for config in configs]
    try:
        for config, _ in before:
            config._attn_implementation_internal = "eager"
        yield
    finally:
        for config, own in before:
            config._attn_implementation_internal = own


@contextmanager
def _differentiable(model: Any) -> Iterator[None]:
    """Where gradients are taken, let them reach the embeddings, even if all weights are frozen."""
    with ExitStack() as undo:
        if torch.is_grad_enabled():
            hook = model.get_input_embeddings().register_forward_hook(
                # a copy, as some models write pictures into it
                lambda module, args, found: found.detach().requires_grad_().clone()
            )
            undo.callback(hook.remove)
        yield


def _check_weights(case: Case, weights: Sequence[Any], shape: tuple[int, ...]) -> None:
    """Refuse what are not the weights of every layer."""
    layers = text_config(case.model).num_hidden_layers
    given = [each for each in weights if isinstance(each, Tensor)]
    if len(given) != layers or len(weights) != layers:
        raise _refused(
            case, f"has {layers} layers, but gives the attention weights of {len(given)}"
        )
    for layer, own in enumerate(given):
        if tuple(own.shape) != shape:
            raise _refused(
                case,
                f"gives attention weights of shape {list(own.shape)} in layer {layer}, not "
                f"{list(shape)}",
            )
        sums = own.detach().sum(-1, dtype=torch.float32)
        if not bool((own >= 0).all() and (sums <= 1 + _half_of_the_digits(own.dtype)).all()):
            raise _refused(case, f"gives no softmax for its attention in layer {layer}")


def _check_said(case: Case, target: int, said: Tensor) -> None:
    """Refuse weights of a run that gives other log-probabilities than the model's own attention.

    ``said``: ``[T]``.
    """
    rows = case.rows[target]
    base = case.base_logprobs[rows.start : rows.stop].double()
    error = (said.double().cpu() - base).abs()
    rounding = _half_of_the_digits(dtype_of(case.model))
    if not bool((error <= rounding * (1 + base.abs())).all()):
        raise _refused(
            case,
            f"gives other log-probabilities with eager attention (by {float(error.max()):.2g} "
            "nats), so its weights are not those of the answer",
        )


def _half_of_the_digits(dtype: torch.dtype) -> float:
    """How closely two ways must agree; eager code often takes its softmaxes in float32."""
    return max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps) ** 0.5


def _refused(case: Case, why: str) -> UnsupportedModelError:
    name = type(unwrap(case.model)).__name__
    return UnsupportedModelError(
        f"{name} {why}. Load it with attn_implementation='eager', or use a method that does not "
        "read attention weights."
    )
