"""Manipulated attention inside transformers models.

Importing this module registers the attention implementation "atman" and its mask function.
:func:`manipulate` hands factors to the attention layers of a model's text stack: a forward pre-hook
on the stack puts them into its keyword arguments, which reach every attention layer and no vision
tower, and which activation checkpointing keeps for the backward pass.

Legend: B batch, Hq query heads, T tokens.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import finalize

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from . import adapters
from .attention import BACKENDS, MODES
from .layers import THREAD, Manipulation, attention_forward, mask_function, present_columns
from .masks import AttentionMask
from .prefix import PrefixStore
from .stacks import Stack, UnsupportedModelError, checkpoints_activations, find_stack

__all__ = ["UnsupportedModelError", "manipulate"]


@contextmanager
def manipulate(
    model: nn.Module,
    key_factor: Tensor,
    mode: str = "multiplicative",
    layers: Iterable[int] | None = None,
    heads: Iterable[int] | None = None,
    *,
    backend: str = "auto",
) -> Iterator[None]:
    """Manipulate the attention scores of a model's text stack while the context is open.

    Works on forward passes and on ``generate``, in the thread that opened it: there, the model runs
    with the attention implementation "atman" meanwhile, whatever it was set to. Other threads may
    use the same model at the same time with other factors, or none, and then with its own
    implementation. A model that trains with activation checkpointing is the exception: it runs
    "atman" in every thread, until the backward pass has recomputed the layers, so then use it in
    one thread only. (A checkpoint of your own around the whole model must run backward inside the
    context, and on the CPU, where the backward pass runs in the same thread.) Nested contexts on
    one model combine: in every mode the product of two factors is one manipulation after the other.

    Args:
        model: a transformers model; of a vision-language model only the text stack is touched.
        key_factor: floating, ``[B, T]`` or ``[B, Hq, T]``, dimensionless; 1 keeps a key, < 1
            suppresses it, > 1 amplifies it. Columns are absolute positions in the sequence
            (padding and cached tokens included), continued with ones. One row serves every batch
            entry; if the model runs on a multiple of B, each row serves as many neighbours as
            ``generate`` makes of one prompt (beams, returned sequences).
        mode: how a factor acts on scores, see :func:`atman_triton.attention`.
        layers: indices of decoder layers, ``None`` for all that have attention.
        heads: indices of query heads, ``None`` for all.
        backend: which implementation computes attention, see :func:`atman_triton.attention`.
    Raises:
        TypeError, ValueError: if an argument is not as above, or factors are not finite, or
            negative with ``log_additive``; ``ValueError`` also if a context around this one has
            another mode.
        UnsupportedModelError: if a layer that is named would not be manipulated: on entry, or from
            the forward pass; and on exit, if no forward pass of the model ran in this thread.
    """
    _, stack = find_stack(model)
    factor = _checked_factor(key_factor, mode, stack, heads)
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}.")
    with run_as_atman(model, factor, mode, layers, backend):
        yield


@contextmanager
def run_as_atman(
    model: nn.Module,
    factor: Tensor | None,
    mode: str,
    layers: Iterable[int] | None = None,
    backend: str = "auto",
    store: PrefixStore | None = None,
) -> Iterator[Manipulation]:
    """What :func:`manipulate` does with checked arguments; yields the manipulation.

    Args:
        factor: as :func:`manipulate` takes it; None leaves the scores alone, but checks all the
            same that every layer named runs "atman".
        store: keys and values in front of those of each forward pass, see :class:`PrefixStore`.
    """
    module, stack = find_stack(model)
    outer = stack.current.manipulation
    device = next(module.parameters()).device
    if device.type == "meta":
        if getattr(model, "hf_device_map", None) is None:  # else offloaded, loaded when it runs
            raise ValueError("model is on the meta device, where it has no weights to run with.")
    elif factor is not None:
        factor = factor.to(device)
    named = checked_indices("layers", layers, stack.layers)
    manipulation = _combine(outer, factor, mode, backend, named, 1 + max(stack.layers))
    manipulation.store = store

    stacks, by_config, switched = THREAD.stacks, THREAD.by_config, THREAD.switched
    stack.install(module)
    held = module.training and checkpoints_activations(module)
    if held:
        stack.hold()
    try:
        stack.current.manipulation = manipulation
        THREAD.stacks = ",".join(sorted({*filter(None, stacks.split(",")), stack.serial}))
        THREAD.by_config = {**by_config, stack.config_id: manipulation}
        THREAD.switched = {**switched, **dict.fromkeys(stack.configs, True)}
        yield manipulation
    except (AttributeError, TypeError) as error:
        if AttentionMask.__name__ not in str(error):
            raise
        raise UnsupportedModelError(
            f"{stack.model_name} changes the mask in its own code instead of leaving it to "
            "transformers' attention interface, so its scores cannot be manipulated."
        ) from error
    finally:
        stack.current.manipulation = outer
        THREAD.stacks, THREAD.by_config, THREAD.switched = stacks, by_config, switched
        if held:
            # A backward pass may yet recompute layers: they hold the manipulation until then.
            finalize(manipulation, stack.release).atexit = False
        else:
            stack.uninstall()
    if manipulation.reached is None:
        raise UnsupportedModelError(
            f"{stack.model_name}: the manipulation reached no layer, because no forward pass of "
            "this model ran in this thread while it was open."
        )
    if outer is not None and outer.reached is None:
        outer.reached = manipulation.reached


def _combine(
    outer: Manipulation | None,
    factor: Tensor | None,
    mode: str,
    backend: str,
    named: tuple[int, ...],
    layer_count: int,
) -> Manipulation:
    """Join a manipulation with the one around it, layer by layer."""
    if outer is None:
        slots = tuple(0 if layer in named else -1 for layer in range(layer_count))
        return Manipulation(mode, backend, (factor,), slots)
    if factor is None:
        mode = outer.mode
    if outer.mode != mode:
        raise ValueError(
            f"mode must be that of the context around this one, {outer.mode!r}, got {mode!r}."
        )
    factors: list[Tensor | None] = []
    known: dict[tuple[int, bool], int] = {}
    slots = []
    for layer, outer_slot in enumerate(outer.slots):
        inside = layer in named
        if outer_slot < 0 and not inside:
            slots.append(-1)
            continue
        if (outer_slot, inside) not in known:
            known[outer_slot, inside] = len(factors)
            around = None if outer_slot < 0 else outer.factors[outer_slot]
            factors.append(_product(around, factor if inside else None))
        slots.append(known[outer_slot, inside])
    backend = outer.backend if backend == "auto" else backend
    return Manipulation(mode, backend, tuple(factors), tuple(slots))


def _product(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    """Product of two factors of any length, ``[B, T]`` or ``[B, Hq, T]``; None is ones."""
    if first is None or second is None:
        return first if second is None else second
    if first.shape[0] != second.shape[0] and 1 not in (first.shape[0], second.shape[0]):
        raise ValueError(
            f"key_factor must have as many rows as that of the context around it, "
            f"{first.shape[0]}, got {second.shape[0]}."
        )
    tokens = max(first.shape[-1], second.shape[-1])
    first, second = present_columns(first, 0, tokens), present_columns(second, 0, tokens)
    if first.dim() != second.dim():
        first, second = (f if f.dim() == 3 else f[:, None] for f in (first, second))
    return first * second


def _checked_factor(
    key_factor: Tensor, mode: str, stack: Stack, heads: Iterable[int] | None
) -> Tensor:
    """Validated factors, float32 ``[B, T]``, or ``[B, Hq, T]`` with ones in heads not named."""
    if not isinstance(key_factor, Tensor):
        raise TypeError(f"key_factor must be a tensor, got {type(key_factor).__name__}.")
    if not key_factor.is_floating_point():
        raise TypeError(f"key_factor must have a floating dtype, got {key_factor.dtype}.")
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}.")
    shape = list(key_factor.shape)
    if key_factor.dim() not in (2, 3) or 0 in shape:
        raise ValueError(
            f"key_factor must have shape [batch, tokens] or [batch, heads, tokens], got {shape}."
        )
    if key_factor.dim() == 3 and shape[1] != stack.heads:
        raise ValueError(
            f"key_factor must have {stack.heads} heads in {stack.model_name}, got shape {shape}."
        )
    if key_factor.is_meta:
        raise ValueError("key_factor is on the meta device, where it has no values.")
    factor = key_factor.float()
    if not bool(torch.isfinite(factor).all()):
        raise ValueError("key_factor must be finite, got NaN or infinity.")
    if mode == "log_additive" and bool((factor < 0).any()):
        raise ValueError("key_factor must be at least 0 with mode='log_additive'.")
    if heads is None:
        return factor
    named = checked_indices("heads", heads, tuple(range(stack.heads)))
    chosen = torch.zeros(stack.heads, 1, dtype=torch.bool, device=factor.device)
    chosen[list(named)] = True
    factor = factor if factor.dim() == 3 else factor[:, None]
    return torch.where(chosen, factor, torch.ones_like(factor))


def checked_indices(
    name: str, given: Iterable[int] | None, known: tuple[int, ...]
) -> tuple[int, ...]:
    """Indices of layers or heads, each of which must exist."""
    if given is None:
        return known
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise TypeError(f"{name} must be an iterable of integers, got {given!r}.")
    indices = tuple(_checked_index(name, index) for index in given)
    if not indices:
        raise ValueError(f"{name} must name at least one, got none; leave it out for all.")
    for index in indices:
        if index not in known:
            raise ValueError(
                f"{name} must be among {known[0]}..{known[-1]} ({len(known)} with attention), "
                f"got {index}."
                if name == "layers"
                else f"{name} must be within 0..{known[-1]}, got {index}."
            )
    return indices


def _checked_index(name: str, index: Any) -> int:
    """Any integer, numpy's too, but no truth value."""
    kind = getattr(index, "dtype", type(index))
    try:
        if kind in (bool, torch.bool):
            raise TypeError
        return operator.index(index)
    except TypeError:
        raise TypeError(f"{name} must be integers, got {index!r}.") from None


AttentionInterface.register(adapters.NAME, attention_forward)
AttentionMaskInterface.register(adapters.NAME, mask_function)
adapters.register()
