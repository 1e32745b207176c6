"""Baselines made of gradients, through captum, with the embeddings of the text stack as input.

captum wants one row of a batch for every number it differentiates. The rows of a target's tokens
are the same input, so here the model runs once for all of them, and once backward for each: what a
careful user would pay, and what is counted.

Legend: U units, M scored tokens, T of one target, S tokens that are read, D width, N inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .. import memory
from ..capabilities import text_config
from ..engine import undisturbed
from ..gradients import decoder_layers, still_weights
from ..scored import timed
from ..stacks import UnsupportedModelError
from ..table import import_extra
from .case import BACKWARD, Case
from .methods import Options


def input_x_gradient(case: Case, options: Options) -> Tensor:
    """``[U, M]``: the sum over a unit's embeddings of what each is times its gradient.

    Costs of each target one forward pass, and one backward for every token.

    Raises:
        ImportError: if captum is missing.
        UnsupportedModelError: if the model cannot be differentiated.
    Source: Shrikumar et al. 2016, "Not just a black box" (as captum's ``InputXGradient``).
    """
    captum = import_extra("captum.attr", "eval")

    def rate(target: int) -> Tensor:
        tokens, length = len(case.targets[target]), case.length(target)
        case.expect(length * (1 + BACKWARD * tokens))
        method = captum.InputXGradient(one_run_for_all(case, target, options))
        return method.attribute(rows_of_tokens(case, target)).sum(-1)

    return rated(case, rate)


def integrated_gradients(case: Case, options: Options) -> Tensor:
    """``[U, M]``: the gradient averaged on the straight line from zero embeddings, times the input.

    The scores of all tokens read, targets included, sum to what the output is above that of
    embeddings that are all zero, but for the error of ``options.steps`` places (Gauss and
    Legendre's). A model whose layers normalise their input changes most next to the zero end of
    the line, where these places stand closest, but few: expect a visible error. Pictures start
    at zero too; what their towers add to deeper layers stays.

    Costs of each target ``options.steps`` forward passes, and as many backward for every token.

    Raises:
        ImportError: if captum is missing.
        UnsupportedModelError: if the model cannot be differentiated.
    Source: Sundararajan et al. 2017, Eq. 1 and 3 (as captum's ``IntegratedGradients``).
    """
    captum = import_extra("captum.attr", "eval")

    def rate(target: int) -> Tensor:
        tokens, length = len(case.targets[target]), case.length(target)
        case.expect(options.steps * length * (1 + BACKWARD * tokens))
        method = captum.IntegratedGradients(one_run_for_all(case, target, options))
        found = method.attribute(
            rows_of_tokens(case, target),
            n_steps=options.steps,
            internal_batch_size=tokens * _places_together(case, target),
        )
        return found.sum(-1)

    return rated(case, rate)


def grad_cam(case: Case, options: Options) -> Tensor:
    """``[U, M]``: a layer's activations, its channels weighted by their mean gradients.

    A channel is one of the ``D`` numbers of every token, and the mean goes over all tokens that
    are read. What is negative counts as 0, token by token, before units are summed. Behind the
    last layer (the default) only the token that predicts has a gradient: there the method shows
    where activations point the way that raises the target.

    Costs of each target one forward pass, and for every token one backward pass through the layers
    above, which counts as their share of a whole one.

    Raises:
        ImportError: if captum is missing.
        UnsupportedModelError: if the model cannot be differentiated, or its layers not found.
    Source: Selvaraju et al. 2017, Eq. 1 and 2 (as captum's ``LayerGradCam``).
    """
    captum = import_extra("captum.attr", "eval")
    layers = decoder_layers(case.model)
    layer = options.layer % len(layers)
    above = len(layers) - 1 - layer

    def rate(target: int) -> Tensor:
        tokens, length = len(case.targets[target]), case.length(target)
        behind = round(length * above / len(layers))
        case.expect(length + BACKWARD * behind * tokens)
        with _cut_behind(layers[layer]) as cut:
            # Nothing below the layer needs a gradient, so none is kept there.
            found = case.values(target, case.embeddings(target), options.output)
        (activations,) = cut
        count = _counter(case, 1, behind)
        channels = nn.Identity()  # what captum looks at: [T, D, S]

        def forward(rows: Tensor) -> Tensor:
            return _copies(channels(rows), activations, found, count)

        method = captum.LayerGradCam(forward, channels)
        rows = activations.detach().expand(tokens, -1, -1)
        return method.attribute(rows, relu_attributions=True)[:, 0]

    return rated(case, rate)


# --- what they share --------------------------------------------------------------------------


def rated(case: Case, rate: Callable[[int], Tensor]) -> Tensor:
    """What ``rate`` gives for each target, ``[T, S]``, as scores of units ``[U, M]``."""
    model = case.model
    with undisturbed(model), timed(case.record), still_weights(model), torch.enable_grad():
        found = [rate(target) for target in range(len(case.targets))]
    return case.scores([case.by_unit(target, each) for target, each in enumerate(found)])


def rows_of_tokens(case: Case, target: int) -> Tensor:
    """The embeddings once for each token of a target: ``[T, S, D]``."""
    rows = case.embeddings(target).expand(len(case.targets[target]), -1, -1)
    return rows.requires_grad_()


def one_run_for_all(case: Case, target: int, options: Options) -> Callable[[Tensor], Tensor]:
    """A function of ``[N T, S, D]``, T equal rows for each of N inputs, that gives ``[N T]``.

    Row ``n T + t`` is what the model makes of token t for input n.
    """
    tokens = len(case.targets[target])

    def forward(rows: Tensor) -> Tensor:
        inputs = rows.detach()[::tokens].clone().requires_grad_()
        found = case.values(target, inputs, options.output)
        count = _counter(case, len(inputs), case.length(target))
        return _copies(rows, inputs, found, count)

    return forward


def _counter(case: Case, rows: int, tokens: int) -> Callable[[], None]:
    """Notes one backward pass."""
    return lambda: case.count(rows, tokens, backward=True)


class _Copies(torch.autograd.Function):
    """Gives T equal rows of each input the outputs of one run, and each its own gradient."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, outputs: Tensor, differentiate: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """``[N T]``.

        Args:
            ctx: Of autograd.
            rows: ``[N T, ...]``, only for their gradients.
            outputs: ``[N, T]``, without a graph.
            differentiate: Gives the gradients of ``rows`` for those of the outputs, ``[N, T]``.
        """
        ctx.differentiate, ctx.shape = differentiate, outputs.shape
        return outputs.flatten()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """Those of ``rows``."""
        return ctx.differentiate(gradients[0].view(ctx.shape)), None, None


def _copies(rows: Tensor, inputs: Tensor, outputs: Tensor, done: Callable[[], None]) -> Tensor:
    """``outputs`` as if each had been computed from its own row: ``[N T]``.

    Args:
        rows: ``[N T, ...]``, each ``T`` of them equal.
        inputs: ``[N, ...]``, the same once.
        outputs: ``[N, T]``, differentiable in ``inputs``.
        done: Called after every backward pass.
    Raises: UnsupportedModelError: if ``outputs`` has no graph, or one that cannot be run back.
    """
    if not outputs.requires_grad:
        raise UnsupportedModelError(
            "the model runs without gradients, which this method needs; "
            "use method='leave_one_out', or atman_triton.Explainer."
        )
    columns = outputs.unbind(1)

    def differentiate(wanted: Tensor) -> Tensor:
        found = []
        for token, column in enumerate(columns):
            more = token + 1 < len(columns)
            try:
                # Inputs know nothing of each other, so the sum's gradient is each one's own.
                found += torch.autograd.grad(column, inputs, wanted[:, token], retain_graph=more)
            except RuntimeError as error:
                if memory.out_of_memory(error):
                    raise
                raise UnsupportedModelError(
                    f"the model cannot be differentiated, which this method needs ({error}); "
                    "use method='leave_one_out', or atman_triton.Explainer."
                ) from error
            done()
        return torch.stack(found, 1).flatten(0, 1)

    result: Any = _Copies.apply(rows, outputs.detach(), differentiate)
    return result


@contextmanager
def _cut_behind(layer: nn.Module) -> Iterator[list[Tensor]]:
    """Let gradients begin at a layer's output: ``[1, D, S]``, in the list that is yielded."""
    kept: list[Tensor] = []

    def cut(module: nn.Module, args: Any, output: Any) -> Any:
        states = output[0] if isinstance(output, tuple) else output
        kept.append(states.detach().mT.requires_grad_())
        states = kept[-1].mT
        return (states, *output[1:]) if isinstance(output, tuple) else states

    hook = layer.register_forward_hook(cut)
    try:
        yield kept
    finally:
        hook.remove()


def _places_together(case: Case, target: int) -> int:
    """How many places of a line go through the model together, graph and all."""
    length, tokens = case.length(target), len(case.targets[target])
    size = max(1, memory.tokens_per_batch(case.device) // length)
    free = memory.free_memory(case.model)
    if free is None:
        return size
    layers = int(text_config(case.model).num_hidden_layers)
    each = layers * memory.bytes_per_row(case.model, length, tokens, length)
    return max(1, min(size, int(free * memory.SHARE) // each))
