"""Manipulated attention inside transformers models.

Importing this module registers the attention implementation "atman" and its mask function.
:func:`manipulate` hands factors to the attention layers of a model's text stack: a forward pre-hook
on the stack puts them into its keyword arguments, which reach every attention layer and no vision
tower, and which activation checkpointing keeps for the backward pass.

Legend: B batch, Hq/Hk query/key heads, Tq/Tk query/key tokens, D head dim.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.masking_utils import eager_mask

from . import adapters
from .attention import BACKENDS, MODES, attention
from .masks import AttentionMask, dense_visibility, make_mask

NAME = adapters.NAME
_KEYWORD = "key_factor"
_WITHOUT_ATTENTION = frozenset({"linear_attention", "mamba", "conv", "moe", "recurrent"})
_LAYER_LISTS = ("layers", "h", "blocks", "layer")


class UnsupportedModelError(RuntimeError):
    """A manipulation does not reach the attention layers it names, so its answer would be wrong."""


class _Manipulation:
    """Factors on their way through one text stack, in one thread."""

    def __init__(
        self, mode: str, backend: str, factors: tuple[Tensor, ...], slots: tuple[int, ...]
    ) -> None:
        self.mode = mode
        self.backend = backend
        self.factors = factors  # distinct ones, float32 [B, T] or [B, Hq, T]
        self.slots = slots  # index into `factors` by layer, -1 = leave alone
        self.reached: dict[int, bool] | None = None  # layers of the latest forward pass
        self.traced = False  # see `_mark_while_tracing`

    @property
    def layers(self) -> list[int]:
        return [layer for layer, slot in enumerate(self.slots) if slot >= 0]


class _ThreadState(threading.local):
    """State of one thread.

    Set in ``__init__``, not as class attributes: only so does dynamo guard on the thread's values.
    """

    def __init__(self) -> None:
        self.stacks = ""  # names the manipulated stacks, see `_watch`
        self.by_config: dict[int, _Manipulation] = {}


class _Current(threading.local):
    """The manipulation of one stack in one thread."""

    def __init__(self) -> None:
        self.manipulation: _Manipulation | None = None


_THREAD = _ThreadState()
_LOCK = threading.RLock()


# --- the attention function ---------------------------------------------------------------------


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: AttentionMask | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    key_factor: _Manipulation | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers' interface wants it: ``[B, Hq|Hk, T, D]`` to ``[B, Tq, Hq, D]``.

    Raises:
        ValueError: for dropout, attention weights, a paged cache, and a mask that does not say
            which keys are visible.
    """
    _watch()
    if dropout:
        raise ValueError(
            f"attention dropout is not supported by 'atman', got {dropout}; call model.eval() or "
            "set the config's attention_dropout (attn_pdrop) to 0."
        )
    if kwargs.get("output_attentions"):
        _refuse_weights()
    if kwargs.get("cache") is not None:
        raise ValueError("a paged cache is not supported by 'atman'; use a dynamic or static one.")
    mask = attention_mask
    if not isinstance(mask, AttentionMask):
        mask, bias = _mask_from_model(module, query, key, mask, is_causal, sliding_window)
        if bias is not None:
            position_bias = bias if position_bias is None else position_bias + bias
    if mask.key_tokens != key.shape[2]:
        raise ValueError(
            f"the mask of {type(module).__name__} is for {mask.key_tokens} keys, "
            f"but it attends to {key.shape[2]}."
        )
    manipulation = key_factor if key_factor is not None else mask.manipulation
    factor, mode, backend = None, "multiplicative", "auto"
    if manipulation is not None and not _is_cross_attention(module):
        mode, backend = manipulation.mode, manipulation.backend
        factor = _factor_of_layer(manipulation, module)
    if factor is not None:
        factor = _present(factor, mask.key_offset, key.shape[2])
        factor = _rows(factor, query.shape[0]).to(query.device)
        if mode == "min_shift_full" and query.shape[2] != key.shape[2]:
            raise ValueError(
                "mode='min_shift_full' looks at future keys, so it cannot use a cache; "
                "pass use_cache=False or choose mode='min_shift'."
            )
    output = attention(
        query,
        key,
        value,
        factor,
        mode=mode,
        causal=mask.causal,
        query_offset=mask.query_offset,
        scale=scaling,
        window=mask.window,
        softcap=softcap,
        sinks=s_aux,
        position_bias=position_bias,
        mask=mask.dense if mask.dense is not None else mask.padding,
        backend=backend,
    )
    return output.transpose(1, 2).contiguous(), None


def mask_function(**kwargs: Any) -> AttentionMask | Tensor:
    """The registered mask function: an :class:`AttentionMask` for what transformers asks for."""
    config = kwargs.get("config")
    model_type = getattr(config, "model_type", None)
    if model_type not in adapters.CARRIES_IN_MASK:
        return make_mask(**kwargs)
    manipulation = _THREAD.by_config.get(id(config))
    if manipulation is None and model_type in adapters.KEEPS_OWN_LAYERS:
        return eager_mask(**kwargs)
    return make_mask(**kwargs)._replace(manipulation=manipulation)


def _watch() -> bool:
    """Make dynamo guard on which stacks this thread manipulates.

    It does not guard on hooks, so a graph compiled before a manipulation would go on without it.
    """
    return _THREAD.stacks == ""


def _mask_from_model(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    is_causal: bool | None,
    sliding_window: int | None,
) -> tuple[AttentionMask, Tensor | None]:
    """What a 4-D tensor, or no mask at all, says; with the bias that a float mask adds."""
    query_tokens, key_tokens = query.shape[2], key.shape[2]
    if mask is not None:
        if mask.dim() != 4:
            raise ValueError(
                f"attention_mask of a layer must have 4 dimensions, got shape {list(mask.shape)}."
            )
        visible, bias = dense_visibility(mask[..., :key_tokens])
        visible = visible.expand(-1, -1, query_tokens, -1)
        return AttentionMask(key_tokens, 0, 0, dense=visible), bias
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    causal = causal and query_tokens > 1
    unclear = causal and query_tokens != key_tokens
    if unclear or (sliding_window is not None and sliding_window < key_tokens):
        raise ValueError(
            f"{type(module).__name__} passes no mask for {query_tokens} queries and {key_tokens} "
            "keys, so their alignment is unknown; pass a 4-D attention_mask."
        )
    return AttentionMask(key_tokens, 0, 0, causal), None


def _is_cross_attention(module: nn.Module) -> bool:
    """Its keys are not text tokens, so factors do not apply to them."""
    return bool(getattr(module, "is_cross_attention", False)) or "Cross" in type(module).__name__


def _layer_index(module: nn.Module) -> int | None:
    for name in ("layer_idx", "layer_id"):
        index = getattr(module, name, None)
        if isinstance(index, int):
            return index
    return None


def _factor_of_layer(manipulation: _Manipulation, module: nn.Module) -> Tensor | None:
    """The factor of this layer, if the manipulation names it; marks the layer as reached."""
    layer = _layer_index(module)
    if layer is None or not 0 <= layer < len(manipulation.slots):
        return None
    slot = manipulation.slots[layer]
    if slot < 0:
        return None
    if manipulation.traced:
        _mark_while_tracing(layer)
    elif manipulation.reached is not None:
        manipulation.reached[layer] = True
    return manipulation.factors[slot]


def _present(factor: Tensor, key_offset: int, key_tokens: int) -> Tensor:
    """The columns of the keys that are present: ``[..., Tk]``, continued with ones."""
    factor = factor[..., key_offset : key_offset + key_tokens]
    missing = key_tokens - factor.shape[-1]
    return F.pad(factor, (0, missing), value=1.0) if missing > 0 else factor


def _rows(factor: Tensor, batch: int) -> Tensor:
    """One row per batch entry; several per row as ``generate`` lays out beams and samples."""
    rows = factor.shape[0]
    if rows == batch:
        return factor
    if rows == 1:
        return factor.expand(batch, *factor.shape[1:])
    if batch % rows:
        raise ValueError(
            f"key_factor has {rows} rows, but the model runs on a batch of {batch}; give one row, "
            "one per batch entry, or (generate) one per prompt."
        )
    return factor.repeat_interleave(batch // rows, dim=0)


# --- coverage -----------------------------------------------------------------------------------

# Under torch.compile with activation checkpointing a layer may not change an object from outside,
# so there the marks are made by the tracer itself: these functions run while it traces.
_TRACED: set[int] = set()


@torch.compiler.assume_constant_result
def _start_tracing() -> bool:
    _TRACED.clear()
    return True


@torch.compiler.assume_constant_result
def _mark_while_tracing(layer: int) -> bool:
    _TRACED.add(layer)
    return True


@torch.compiler.assume_constant_result
def _marked_while_tracing() -> tuple[int, ...]:
    return tuple(_TRACED)


@torch.library.custom_op("atman_triton::refuse", mutates_args=())
def _refuse(output: Tensor, message: str) -> Tensor:
    """Raise when a compiled graph runs: an error raised while tracing would change its type."""
    raise UnsupportedModelError(message)


@_refuse.register_fake
def _(output: Tensor, message: str) -> Tensor:
    return torch.empty_like(output)


_refuse.register_autograd(lambda ctx, grad: (grad, None))


def _refuse_weights() -> None:
    raise ValueError(
        "output_attentions=True is not possible with the attention implementation 'atman', which "
        "never holds the weights; use model.set_attn_implementation('eager') without a "
        "manipulation."
    )


class _Stack:
    """The text stack of a model: which layers it has, and the manipulations it is under."""

    def __init__(self, module: nn.Module, model_name: str) -> None:
        self.model_name = model_name
        self.serial = str(id(module))
        self.current = _Current()
        config = _text_config(module)
        self.config_id = id(getattr(module, "config", config))
        self.heads: int = config.num_attention_heads
        self.carried = config.model_type in adapters.CARRIES_IN_MASK
        self.layers = _attention_layers(module, config)
        self.users = 0
        self._undo: list[Any] = []

    # The two hooks run inside the graph under torch.compile.

    def before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Put the thread's factors into the stack's keyword arguments."""
        manipulation = self.current.manipulation
        if manipulation is None:
            return None
        if kwargs.get("output_attentions"):
            _refuse_weights()
        _refuse_misaligned_mask(kwargs)
        manipulation.reached = {}
        manipulation.traced = bool(
            torch.compiler.is_compiling()
            and module.training
            and getattr(module, "gradient_checkpointing", False)
        )
        if manipulation.traced:
            _start_tracing()
        if self.carried:
            return None
        return args, {**kwargs, _KEYWORD: manipulation}

    def after(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        """Refuse an answer in which not every layer named was manipulated."""
        manipulation = self.current.manipulation
        if manipulation is None:
            return None
        reached = _marked_while_tracing() if manipulation.traced else manipulation.reached or {}
        missed = [layer for layer in manipulation.layers if layer not in reached]
        if not missed:
            return None
        message = (
            f"{self.model_name}: the manipulation did not reach attention layers {missed} of "
            f"{manipulation.layers}; these layers do not use transformers' attention interface."
        )
        if torch.compiler.is_compiling():
            return _refuse_in_graph(output, message)
        raise UnsupportedModelError(message)

    def install(self, module: nn.Module, configs: list[PreTrainedConfig]) -> None:
        """Switch the stack to "atman" and hook it, for the first of its users."""
        with _LOCK:
            if self.users == 0:
                self._undo = [
                    module.register_forward_pre_hook(self.before, with_kwargs=True).remove,
                    module.register_forward_hook(self.after, with_kwargs=True).remove,
                ]
                changed = adapters.adapt(module)
                self._undo.append(lambda: adapters.restore(changed))
                for config in configs:
                    self._undo.append(_switch(config))
            self.users += 1

    def uninstall(self) -> None:
        """Undo :meth:`install`, for the last of the stack's users."""
        with _LOCK:
            self.users -= 1
            if self.users == 0:
                undo, self._undo = self._undo, []
                for step in reversed(undo):
                    step()


def _refuse_in_graph(output: Any, message: str) -> Any:
    """``output`` with a node that raises when the graph runs."""
    if isinstance(output, Tensor):
        return _refuse(output, message)
    if isinstance(output, tuple):
        return (_refuse(output[0], message), *output[1:])
    first, *rest = output.keys()
    values = {name: output[name] for name in rest}
    return type(output)(**{first: _refuse(output[first], message)}, **values)


def _refuse_misaligned_mask(kwargs: dict[str, Any]) -> None:
    """A ready-made dense mask does not say which keys a sliding cache has dropped."""
    mask, cache = kwargs.get("attention_mask"), kwargs.get("past_key_values")
    if mask is None or cache is None or not any(getattr(cache, "is_sliding", ())):
        return
    masks = mask.values() if isinstance(mask, dict) else [mask]
    dense = any(isinstance(m, Tensor) and m.dim() == 4 for m in masks)
    length = cache.get_seq_length()
    if dense and (isinstance(length, Tensor) or length > 0):
        raise ValueError(
            "a 4-D attention_mask with a sliding-window cache does not say where its keys stand, "
            "so factors cannot be aligned; pass a 2-D padding mask."
        )


_SWITCHED: dict[int, list[Any]] = {}  # config id -> [config, previous implementation, users]


def _switch(config: PreTrainedConfig) -> Any:
    """Set a config to "atman"; returns what undoes it. Models may share a config."""
    entry = _SWITCHED.setdefault(id(config), [config, config._attn_implementation_internal, 0])
    entry[2] += 1
    config._attn_implementation_internal = NAME

    def undo() -> None:
        entry[2] -= 1
        if entry[2] == 0:
            config._attn_implementation_internal = entry[1]
            del _SWITCHED[id(config)]

    return undo


# --- finding the stack --------------------------------------------------------------------------

_STACKS: WeakKeyDictionary[nn.Module, _Stack] = WeakKeyDictionary()


def _unwrap(module: Any) -> Any:
    return getattr(module, "_orig_mod", module)  # torch.compile's wrapper


def _text_config(module: nn.Module) -> Any:
    return module.config.get_text_config(decoder=True)  # pyright: ignore


def _find_stack(model: Any) -> tuple[nn.Module, list[PreTrainedConfig]]:
    """The text stack of a model, and the configs that decide its attention implementation."""
    model = _unwrap(model)
    name = type(model).__name__
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a transformers model, got {name}.")
    config = getattr(model, "config", None)
    if not isinstance(config, PreTrainedConfig) or not hasattr(model, "get_decoder"):
        raise UnsupportedModelError(f"{name} is not a transformers model with a text stack.")
    if config.is_encoder_decoder:
        raise UnsupportedModelError(
            f"{name} is an encoder-decoder; only decoder-only text stacks can be manipulated."
        )
    stack = _unwrap(model.get_decoder())  # pyright: ignore[reportCallIssue]
    model_type = _text_config(stack).model_type
    takes_kwargs = any(
        parameter.kind is inspect.Parameter.VAR_KEYWORD
        for parameter in inspect.signature(stack.forward).parameters.values()
    )
    if model_type not in adapters.CARRIES_IN_MASK and not (
        takes_kwargs and getattr(stack, "_can_set_attn_implementation", lambda: True)()
    ):
        raise UnsupportedModelError(
            f"{name}: {type(stack).__name__} computes attention in its own code instead of "
            "transformers' attention interface, so its scores cannot be manipulated."
        )
    candidates = [getattr(module, "config", None) for module in stack.modules()]
    candidates.append(config.get_text_config(decoder=True))
    configs = {id(c): c for c in candidates if isinstance(c, PreTrainedConfig)}
    return stack, list(configs.values())


def _attention_layers(module: nn.Module, config: Any) -> tuple[int, ...]:
    """Indices of the decoder layers that have softmax attention over text tokens."""
    count = config.num_hidden_layers
    for name in _LAYER_LISTS:
        blocks = getattr(module, name, None)
        if isinstance(blocks, nn.ModuleList):
            count = min(count, len(blocks))
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * count
    crossing = getattr(config, "cross_attention_layers", None) or ()
    return tuple(
        layer
        for layer in range(count)
        if kinds[layer] not in _WITHOUT_ATTENTION and layer not in crossing
    )


# --- manipulate ---------------------------------------------------------------------------------


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

    Works on forward passes and on ``generate``, in the thread that opened it; other threads may use
    the same model with other factors, or none. The model runs with the attention implementation
    "atman" meanwhile, whatever it was set to. Nested contexts on one model combine: in every mode
    the product of two factors is one manipulation after the other.

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
    module, configs = _find_stack(model)
    with _LOCK:
        stack = _STACKS.get(module)
        if stack is None:
            stack = _STACKS[module] = _Stack(module, type(_unwrap(model)).__name__)
    outer = stack.current.manipulation
    factor = _checked_factor(key_factor, mode, stack, heads)
    factor = factor.to(next(module.parameters()).device)
    named = _checked_indices("layers", layers, stack.layers)
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}.")
    manipulation = _combine(outer, factor, mode, backend, named, 1 + max(stack.layers))

    stacks, by_config = _THREAD.stacks, _THREAD.by_config
    stack.install(module, configs)
    try:
        stack.current.manipulation = manipulation
        _THREAD.stacks = ",".join(sorted({*filter(None, stacks.split(",")), stack.serial}))
        _THREAD.by_config = {**by_config, stack.config_id: manipulation}
        yield
    finally:
        stack.current.manipulation = outer
        _THREAD.stacks, _THREAD.by_config = stacks, by_config
        stack.uninstall()
    if manipulation.reached is None:
        raise UnsupportedModelError(
            f"{stack.model_name}: the manipulation reached no layer, because no forward pass of "
            "this model ran in this thread while it was open."
        )
    if outer is not None and outer.reached is None:
        outer.reached = manipulation.reached


def _combine(
    outer: _Manipulation | None,
    factor: Tensor,
    mode: str,
    backend: str,
    named: tuple[int, ...],
    layer_count: int,
) -> _Manipulation:
    """Join a manipulation with the one around it, layer by layer."""
    if outer is None:
        slots = tuple(0 if layer in named else -1 for layer in range(layer_count))
        return _Manipulation(mode, backend, (factor,), slots)
    if outer.mode != mode:
        raise ValueError(
            f"mode must be that of the context around this one, {outer.mode!r}, got {mode!r}."
        )
    factors: list[Tensor] = []
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
    return _Manipulation(mode, backend, tuple(factors), tuple(slots))


def _product(first: Tensor | None, second: Tensor | None) -> Tensor:
    """Product of two factors of any length; ``[B, T]`` or ``[B, Hq, T]``."""
    if first is None or second is None:
        only = first if second is None else second
        assert only is not None  # the caller skips layers without a factor
        return only
    if first.shape[0] != second.shape[0] and 1 not in (first.shape[0], second.shape[0]):
        raise ValueError(
            f"key_factor must have as many rows as that of the context around it, "
            f"{first.shape[0]}, got {second.shape[0]}."
        )
    tokens = max(first.shape[-1], second.shape[-1])
    first, second = _present(first, 0, tokens), _present(second, 0, tokens)
    if first.dim() != second.dim():
        first, second = (f if f.dim() == 3 else f[:, None] for f in (first, second))
    return first * second


def _checked_factor(
    key_factor: Tensor, mode: str, stack: _Stack, heads: Iterable[int] | None
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
    factor = key_factor.float()
    if not bool(torch.isfinite(factor).all()):
        raise ValueError("key_factor must be finite, got NaN or infinity.")
    if mode == "log_additive" and bool((factor < 0).any()):
        raise ValueError("key_factor must be at least 0 with mode='log_additive'.")
    if heads is None:
        return factor
    named = _checked_indices("heads", heads, tuple(range(stack.heads)))
    chosen = torch.zeros(stack.heads, 1, dtype=torch.bool, device=factor.device)
    chosen[list(named)] = True
    factor = factor if factor.dim() == 3 else factor[:, None]
    return torch.where(chosen, factor, torch.ones_like(factor))


def _checked_indices(
    name: str, given: Iterable[int] | None, known: tuple[int, ...]
) -> tuple[int, ...]:
    """Indices of layers or heads, each of which must exist."""
    if given is None:
        return known
    indices = tuple(given)
    if not indices:
        raise ValueError(f"{name} must name at least one, got none; leave it out for all.")
    for index in indices:
        if not isinstance(index, int) or isinstance(index, bool):
            raise TypeError(f"{name} must be integers, got {index!r}.")
        if index not in known:
            raise ValueError(
                f"{name} must be among {known[0]}..{known[-1]} ({len(known)} with attention), "
                f"got {index}."
                if name == "layers"
                else f"{name} must be within 0..{known[-1]}, got {index}."
            )
    return indices


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, mask_function)
adapters.register()
