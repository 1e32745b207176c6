"""What an attention layer does under the implementation "atman": masks, factors, the op.

Legend: B batch, Hq/Hk query/key heads, Tq/Tk query/key tokens, D head dim.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.masking_utils import eager_mask

from . import adapters
from .attention import attention
from .branches import TreeMask
from .kernels.once import Once, kept_in
from .masks import AttentionMask, cut_mask, dense_visibility, make_mask
from .places import Places
from .prefix import PrefixStore


class Manipulation:
    """Factors on their way through one stack, in one thread."""

    def __init__(
        self,
        mode: str,
        backend: str,
        factors: tuple[Tensor | None, ...],
        slots: tuple[int, ...],
        places: Places,
        store: PrefixStore | None = None,
    ) -> None:
        self.mode = mode
        self.backend = backend
        self.factors = factors  # distinct ones, float32 [B, T] or [B, Hq, T]; None = ones
        self.slots = slots  # index into `factors` by place, -1 = leave alone
        self.places = places
        self.store = store  # keys and values that come before those of this pass
        self.reached: dict[int, bool] | None = None  # places of the latest forward pass
        self.traced = False  # marks go to `mark_while_tracing`
        self.recomputed = False  # layers run again in the backward pass
        self.observe: Callable[[Tensor, Tensor, AttentionMask], None] | None = None
        self.once = Once()  # what the layers of the latest forward pass have in common

    @property
    def named(self) -> list[int]:
        """Places that the manipulation names."""
        return [place for place, slot in enumerate(self.slots) if slot >= 0]


class ThreadState(NamedTuple):
    """Which manipulations hold in a thread."""

    stacks: str  # names the manipulated stacks, see `_watch`
    by_config: dict[int, Manipulation]
    by_stack: dict[str, Manipulation]  # of stacks that are known by their modules
    switched: dict[int, bool]  # ids of the configs that answer "atman" here


class _Thread(threading.local):
    """State of one thread, see :class:`ThreadState`.

    Set in ``__init__``, not as class attributes: only so does dynamo guard on the thread's values.
    """

    def __init__(self) -> None:
        self.stacks = ""
        self.by_config: dict[int, Manipulation] = {}
        self.by_stack: dict[str, Manipulation] = {}
        self.switched: dict[int, bool] = {}
        self.serves = threading.get_ident()  # the thread whose call runs here, itself mostly

    @property
    def state(self) -> ThreadState:
        """To be put back later, or into another thread."""
        return ThreadState(self.stacks, self.by_config, self.by_stack, self.switched)

    @state.setter
    def state(self, state: ThreadState) -> None:
        self.stacks, self.by_config, self.by_stack, self.switched = state


THREAD = _Thread()
KEYWORD = "key_factor"
"""The keyword argument of attention layers that holds a manipulation."""


def attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attention as transformers' interface wants it: ``[B, Hq|Hk, T, D]`` to ``[B, Tq, Hq, D]``.

    Under autocast in its dtype, as PyTorch's own attention; sums inside stay what they are.

    Raises:
        ValueError: for attention weights, a paged cache, and a mask that does not say which keys
            are visible.
    """
    device = query.device.type
    if not torch.is_autocast_enabled(device):
        return _attention_forward(module, query, key, value, *args, **kwargs)
    dtype = torch.get_autocast_dtype(device)
    if query.dtype != torch.float64:
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    with torch.autocast(device, enabled=False):
        return _attention_forward(module, query, key, value, *args, **kwargs)


def _attention_forward(
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
    key_factor: Manipulation | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The same with what transformers names, in the dtypes given."""
    _watch()
    if kwargs.get("output_attentions"):
        adapters.refuse_weights()
    if kwargs.get("cache") is not None:
        raise ValueError(
            "a paged cache (continuous batching) is not supported by 'atman'; "
            "use generate(), with a dynamic or static cache."
        )
    mask = attention_mask
    if not isinstance(mask, AttentionMask):
        mask, bias = _mask_from_model(module, query, key, mask, is_causal, sliding_window)
        if bias is not None:
            position_bias = bias if position_bias is None else position_bias + bias
    manipulation = key_factor if key_factor is not None else mask.manipulation
    if manipulation is None and THREAD.by_stack:
        manipulation = _of_module(module)
    crossing = manipulation is not None and manipulation.places.crosses(module)
    store = None if manipulation is None or crossing else manipulation.store
    prefix = None
    if store is not None and manipulation is not None:
        layer = manipulation.places.layer(module)
        if layer is None:
            raise ValueError(f"{type(module).__name__} does not know which layer it is.")
        key, value, prefix = store.around(layer, key, value, mask)
    before = 0 if prefix is None else prefix[0].shape[2]
    if mask.key_tokens != before + key.shape[2]:
        raise ValueError(
            f"the mask of {type(module).__name__} is for {mask.key_tokens} keys, "
            f"but it attends to {before + key.shape[2]}."
        )
    factor, mode, backend = None, "multiplicative", "auto"
    if manipulation is not None:
        mode, backend = manipulation.mode, manipulation.backend
        factor = _factor_of(manipulation, module)
        if factor is not None and manipulation.observe is not None:
            manipulation.observe(query, key, mask)
    if factor is not None and manipulation is not None:
        columns = (mask.key_offset, mask.key_tokens, store is not None and store.own_factors_only)
        factor = _factor_rows(manipulation, factor, query, before, *columns)
        if mode == "min_shift_full" and not crossing and query.shape[2] != mask.key_tokens:
            raise ValueError(
                "mode='min_shift_full' looks at future keys, so it cannot use a cache; "
                "pass use_cache=False or choose mode='min_shift'."
            )
    settings: dict[str, Any] = {
        "mode": mode,
        "scale": scaling,
        "softcap": softcap,
        "sinks": s_aux,
        "dropout": dropout,
        "backend": backend,
    }
    arguments = (query, key, value, factor, prefix, mask, position_bias, settings)
    attend: Callable[..., Tensor] = _attend
    if store is not None and store.tree is not None:
        attend = partial(_attend_in_branches, store.tree)
    if manipulation is None or torch.compiler.is_compiling():
        output = attend(*arguments)
    else:
        with kept_in(manipulation.once):
            output = attend(*arguments)
    return output.transpose(1, 2).contiguous(), None


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    factor: Tensor | None,
    prefix: tuple[Tensor, Tensor] | None,
    mask: AttentionMask,
    position_bias: Tensor | None,
    settings: dict[str, Any],
) -> Tensor:
    """Call the op with what the mask says: ``[B, Hq, Tq, D]``."""
    visible = mask.dense if mask.dense is not None else mask.padding
    if visible is not None and visible.dim() == 2:
        visible = visible.expand(query.shape[0], -1)
    return attention(
        query,
        key,
        value,
        factor,
        causal=mask.causal,
        query_offset=mask.query_offset,
        window=mask.window,
        position_bias=position_bias,
        mask=visible,
        prefix=prefix,
        **settings,
    )


def _attend_in_branches(
    tree: TreeMask,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    factor: Tensor | None,
    prefix: tuple[Tensor, Tensor] | None,
    mask: AttentionMask,
    position_bias: Tensor | None,
    settings: dict[str, Any],
) -> Tensor:
    """Rows of the prompt as the model's own mask has it, rows of the branches under the tree's.

    The branches' columns are the last ones, so the prompt's rows do without them.
    """
    if position_bias is not None:
        raise ValueError("a position bias counts columns, which in branches are no positions.")
    start = mask.key_tokens - query.shape[2]
    rows = max(0, min(query.shape[2], tree.prompt_tokens - start))  # of the prompt
    rest = query.shape[2] - rows
    outputs = []
    if rows:
        outputs.append(
            _attend(
                query[:, :, :rows],
                key[:, :, : key.shape[2] - rest],
                value[:, :, : value.shape[2] - rest],
                None if factor is None else factor[..., : factor.shape[-1] - rest],
                prefix,
                cut_mask(mask, 0, rows, mask.key_tokens - rest),
                None,
                settings,
            )
        )
    if rest:
        branches = tree.of_branches(mask, start)
        outputs.append(
            _attend(query[:, :, rows:], key, value, factor, prefix, branches, None, settings)
        )
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)


def mask_function(**kwargs: Any) -> AttentionMask | Tensor:
    """The registered mask function: an :class:`AttentionMask` for what transformers asks for."""
    config = kwargs.get("config")
    model_type = getattr(config, "model_type", None)
    if model_type not in adapters.CARRIES_IN_MASK:
        return make_mask(**kwargs)
    manipulation = THREAD.by_config.get(id(config))
    if manipulation is None and model_type in adapters.KEEPS_OWN_LAYERS:
        return eager_mask(**kwargs)
    return make_mask(**kwargs)._replace(manipulation=manipulation)


def _watch() -> bool:
    """Make dynamo guard on which stacks this thread manipulates.

    It does not guard on hooks, so a graph compiled before a manipulation would go on without it.
    """
    return THREAD.stacks == ""


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


def _of_module(module: nn.Module) -> Manipulation | None:
    """The manipulation of a layer that its stack's keyword arguments do not reach."""
    for manipulation in THREAD.by_stack.values():
        if manipulation.places.layer(module) is not None:
            if manipulation.recomputed and torch.is_grad_enabled():
                raise ValueError(
                    f"{type(module).__name__} takes no factors as arguments, so activation "
                    "checkpointing would run it again without them; switch checkpointing off."
                )
            return manipulation
    return None


def _factor_of(manipulation: Manipulation, module: nn.Module) -> Tensor | None:
    """The factor of this module, if the manipulation names its place; marks it as reached."""
    place = manipulation.places.place(module)
    if place is None or not 0 <= place < len(manipulation.slots):
        return None
    slot = manipulation.slots[place]
    if slot < 0:
        return None
    if manipulation.traced:
        mark_while_tracing(place)
    elif manipulation.reached is not None:
        manipulation.reached[place] = True
    return manipulation.factors[slot]


def _factor_rows(
    manipulation: Manipulation,
    factor: Tensor,
    query: Tensor,
    before: int,
    key_offset: int,
    key_tokens: int,
    own_only: bool,
) -> Tensor:
    """A factor for the keys that are present and the rows that run: the same in most layers.

    Args:
        before: Keys of the prefix, which ``own_only`` leaves out.
    """

    def make() -> Tensor:
        rows = _rows(present_columns(factor, key_offset, key_tokens), query.shape[0])
        rows = rows.to(query.device)
        return rows[..., before:] if own_only else rows

    if factor.requires_grad or torch.compiler.is_compiling():
        return make()
    how = (key_offset, key_tokens, query.shape[0], query.device, before if own_only else 0)
    return manipulation.once.get(how, factor, make)


def present_columns(factor: Tensor, key_offset: int, key_tokens: int) -> Tensor:
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


# Under torch.compile with activation checkpointing a layer may not change an object from outside,
# so there the marks are made by the tracer itself: these functions run while it traces.
_TRACED: set[int] = set()


@torch.compiler.assume_constant_result
def start_tracing() -> bool:
    """Forget the marks of an earlier trace."""
    _TRACED.clear()
    return True


@torch.compiler.assume_constant_result
def mark_while_tracing(place: int) -> bool:
    """Note that the graph being traced manipulates this place."""
    _TRACED.add(place)
    return True


@torch.compiler.assume_constant_result
def marked_while_tracing() -> tuple[int, ...]:
    """Places that the graph being traced manipulates."""
    return tuple(_TRACED)
