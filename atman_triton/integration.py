"""Manipulated attention inside transformers models.

Importing this module registers the attention implementation "atman" and its mask function.
:func:`manipulate` hands factors to the attention layers of a model's stacks (a decoder alone; an
encoder; both): a forward pre-hook on the stack puts them into its keyword arguments, which reach
every attention layer of a decoder and no vision tower, and which activation checkpointing keeps for
the backward pass. Layers of an encoder that they do not reach look them up.

Legend: B batch, Hq query heads, T tokens.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import finalize

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from . import adapters
from .attention import BACKENDS, MODES
from .layers import (
    THREAD,
    Manipulation,
    ThreadState,
    attention_forward,
    mask_function,
    present_columns,
)
from .masks import AttentionMask
from .places import Places
from .prefix import PrefixStore
from .sites import Attention, Site, named_sites
from .stacks import Stack, UnsupportedModelError, checkpoints_activations

__all__ = ["UnsupportedModelError", "manipulate"]


@contextmanager
def manipulate(
    model: nn.Module,
    key_factor: Tensor | Mapping[str, Tensor],
    mode: str = "multiplicative",
    layers: Iterable[int] | None = None,
    heads: Iterable[int] | None = None,
    *,
    attention: Attention | None = None,
    backend: str = "auto",
) -> Iterator[None]:
    """Manipulate a model's attention scores while the context is open.

    Works on forward passes and on ``generate``, in the thread that opened it: there, the model runs
    with the attention implementation "atman" meanwhile, whatever it was set to. Other threads may
    use the same model at the same time with other factors, or none, and then with its own
    implementation. A model that trains with activation checkpointing is the exception: it runs
    "atman" in every thread, until the backward pass has recomputed the layers, so then use it in
    one thread only. (A checkpoint of your own around the whole model must run backward inside the
    context, and on the CPU, where the backward pass runs in the same thread.) Nested contexts on
    one model combine: in every mode the product of two factors is one manipulation after the other.

    Args:
        model: a transformers model. Of a vision-language model only the text stack is touched,
            which holds the image's tokens or, in Mllama, attends to them.
        key_factor: floating, ``[B, T]`` or ``[B, Hq, T]``, dimensionless; 1 keeps a key, < 1
            suppresses it, > 1 amplifies it. Columns are absolute positions in the sequence
            (padding and cached tokens included), continued with ones. One row serves every batch
            entry; if the model runs on a multiple of B, each row serves as many neighbours as
            ``generate`` makes of one prompt (beams, returned sequences). A mapping gives one such
            tensor for each source it names, see :func:`atman_triton.sites.sources`; a tensor alone
            is for the first of them, in an encoder-decoder the encoder's tokens.
        mode: how a factor acts on scores, see :func:`atman_triton.attention`.
        layers: indices of layers, of encoder and decoder alike, ``None`` for all that have
            attention.
        heads: indices of query heads, ``None`` for all.
        attention: where the encoder's tokens are manipulated: in the "encoder"'s self-attention, in
            the "cross"-attention, or in "both" (also if ``None``). Only for models that have both.
        backend: which implementation computes attention, see :func:`atman_triton.attention`.
    Raises:
        TypeError, ValueError: if an argument is not as above, or factors are not finite, or
            negative with ``log_additive``; ``ValueError`` also if a context around this one has
            another mode.
        UnsupportedModelError: if a layer that is named would not be manipulated: on entry, or from
            the forward pass; and on exit, if no forward pass of the model ran in this thread.
    """
    _, named = named_sites(model, key_factor, attention)
    factors: dict[str, Tensor] = {}
    for source in dict.fromkeys(site.source for site, _ in named):
        reading = [(site.stack, given) for site, given in named if site.source == source]
        stacks = [stack for stack, _ in reading]
        factors[source] = _checked_factor(reading[0][1], mode, stacks, heads)
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}.")
    with run_as_atman(model, factors, mode, layers, backend, attention=attention):
        yield


@contextmanager
def run_as_atman(
    model: nn.Module,
    factor: Tensor | Mapping[str, Tensor] | None,
    mode: str,
    layers: Iterable[int] | None = None,
    backend: str = "auto",
    store: PrefixStore | None = None,
    attention: Attention | None = None,
) -> Iterator[Manipulation]:
    """What :func:`manipulate` does with checked arguments; yields the last stack's manipulation.

    Args:
        factor: as :func:`manipulate` takes it; None leaves the scores alone, but checks all the
            same that every self-attention layer named runs "atman", in those stacks that run.
        store: keys and values in front of those of each forward pass, see :class:`PrefixStore`.
    """
    sites, named = named_sites(model, factor, attention)
    if _on_meta(sites[0].module) and getattr(model, "hf_device_map", None) is None:
        raise ValueError("model is on the meta device, where it has no weights to run with.")
    modules = {site.stack: site.module for site in sites}
    outer = {stack: stack.current.manipulation for stack in modules}
    new: dict[Stack, Manipulation] = {}
    for stack, given in _given(named, layers).items():
        new[stack] = _combine(outer[stack], given, mode, backend, stack.places)
        new[stack].store = store

    with ExitStack() as undo:
        for stack, module in modules.items():
            _install(undo, stack, module, new.get(stack))
        undo.callback(_become, [(stack.current, outer[stack]) for stack in new], THREAD.state)
        _enter(new)
        try:
            yield list(new.values())[-1]
        except (AttributeError, TypeError) as error:
            if AttentionMask.__name__ not in str(error):
                raise
            raise UnsupportedModelError(
                f"{sites[0].stack.model_name} changes the mask in its own code instead of leaving "
                "it to transformers' attention interface, so its scores cannot be manipulated."
            ) from error
    _check_reached(new, outer, factor is None)


Given = tuple[tuple[int, ...], Tensor | None]
"""Places of a stack, and the factor that they are given."""


def _given(
    named: list[tuple[Site, Tensor | None]], layers: Iterable[int] | None
) -> dict[Stack, list[Given]]:
    """Of each stack, which of its places get which factor, on its device."""
    known = sorted({layer for site, _ in named for layer in site.layers})
    chosen = set(checked_indices("layers", layers, tuple(known)))
    given: dict[Stack, list[Given]] = {}
    read: set[str] = set()
    for site, factor in named:
        places = site.places(chosen)
        if places:
            device = next(site.module.parameters()).device
            if factor is not None and device.type != "meta":  # else offloaded, loaded when it runs
                factor = factor.to(device)
            given.setdefault(site.stack, []).append((places, factor))
            read.add(site.source)
    left_out = sorted({site.source for site, _ in named} - read)
    if left_out:
        raise ValueError(
            f"layers must name some that read {left_out[0]!r}, got {sorted(chosen)}; "
            "leave them out for all."
        )
    return given


def _on_meta(module: nn.Module) -> bool:
    return next(module.parameters()).device.type == "meta"


def _install(
    undo: ExitStack, stack: Stack, module: nn.Module, manipulation: Manipulation | None
) -> None:
    """Let a stack run "atman" in threads that say so, until ``undo`` is closed."""
    stack.install(module)
    if manipulation is None or not (module.training and checkpoints_activations(module)):
        undo.callback(stack.uninstall)
        return
    # A backward pass may yet recompute layers: they hold the manipulation until then.
    stack.hold()
    manipulation.recomputed = True
    undo.callback(lambda: setattr(finalize(manipulation, stack.release), "atexit", False))


def _enter(new: dict[Stack, Manipulation]) -> None:
    """Let manipulations hold in this thread, beside those of other models."""
    stacks, by_config, by_stack, switched = THREAD.state
    by_config, by_stack, switched = dict(by_config), dict(by_stack), dict(switched)
    serials = {*filter(None, stacks.split(","))}
    for stack, manipulation in new.items():
        stack.current.manipulation = manipulation
        serials.add(stack.serial)
        by_config[stack.config_id] = manipulation
        switched |= dict.fromkeys(stack.configs, True)
        if stack.places.by_module:
            by_stack[stack.serial] = manipulation
    THREAD.state = ThreadState(",".join(sorted(serials)), by_config, by_stack, switched)


def _become(currents: list[tuple[Any, Manipulation | None]], state: ThreadState) -> None:
    """Put a thread back into the state that it had."""
    for current, manipulation in currents:
        current.manipulation = manipulation
    THREAD.state = state


def _check_reached(
    new: dict[Stack, Manipulation], outer: dict[Stack, Manipulation | None], some: bool
) -> None:
    """Refuse a context in which a stack that it manipulates never ran; all of them, if ``some``."""
    missed = [stack for stack, manipulation in new.items() if manipulation.reached is None]
    if missed and not (some and len(missed) < len(new)):
        stack = missed[0]
        what = "this model" if len(new) == 1 else f"its {stack.role} stack"
        advice = ""
        if stack.role == "encoder":
            advice = " If it is given the encoder's outputs, choose attention='cross'."
        raise UnsupportedModelError(
            f"{stack.model_name}: the manipulation reached no layer, because no forward pass of "
            f"{what} ran in this thread while it was open.{advice}"
        )
    for stack, manipulation in new.items():
        around = outer[stack]
        if around is not None and around.reached is None:
            around.reached = manipulation.reached


def _combine(
    outer: Manipulation | None, given: list[Given], mode: str, backend: str, places: Places
) -> Manipulation:
    """Join a manipulation with the one around it, place by place."""
    inside = {place: index for index, (named, _) in enumerate(given) for place in named}
    if outer is None:
        slots = tuple(inside.get(place, -1) for place in range(places.count))
        return Manipulation(mode, backend, tuple(factor for _, factor in given), slots, places)
    if all(factor is None for _, factor in given):
        mode = outer.mode
    if outer.mode != mode:
        raise ValueError(
            f"mode must be that of the context around this one, {outer.mode!r}, got {mode!r}."
        )
    factors: list[Tensor | None] = []
    known: dict[tuple[int, int], int] = {}
    slots = []
    for place, outer_slot in enumerate(outer.slots):
        pair = (outer_slot, inside.get(place, -1))
        if pair == (-1, -1):
            slots.append(-1)
            continue
        if pair not in known:
            known[pair] = len(factors)
            around = None if pair[0] < 0 else outer.factors[pair[0]]
            factors.append(_product(around, None if pair[1] < 0 else given[pair[1]][1]))
        slots.append(known[pair])
    backend = outer.backend if backend == "auto" else backend
    return Manipulation(mode, backend, tuple(factors), tuple(slots), places)


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
    key_factor: Any, mode: str, stacks: list[Stack], heads: Iterable[int] | None
) -> Tensor:
    """Validated factors, float32 ``[B, T]``, or ``[B, Hq, T]`` with ones in heads not named.

    Args:
        stacks: all that use them.
    """
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
    several = sorted({stack.heads for stack in stacks})
    if key_factor.dim() == 3 and several != [shape[1]]:
        count = " and ".join(map(str, several))
        raise ValueError(
            f"key_factor must have {count} heads in {stacks[0].model_name}, got shape {shape}."
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
    if len(several) > 1:
        raise ValueError(
            f"heads must be the same in all stacks, but {stacks[0].model_name} has "
            f"{' and '.join(map(str, several))} heads; choose attention='encoder' or 'cross'."
        )
    named = checked_indices("heads", heads, tuple(range(several[0])))
    chosen = torch.zeros(several[0], 1, dtype=torch.bool, device=factor.device)
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
