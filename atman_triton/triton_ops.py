"""The fused kernels as torch operators: what autograd, compile and fake tensors know of them.

Legend: B batch, Hq/Hk query/key heads, Tq/Tk query/key tokens, Tp prefix tokens, D head dim, Dv
value dim. Arguments are those of ``kernels/forward.py`` and ``kernels/shared_prefix.py``, taken as
validated; an offset that lives on the device comes as ``offset_tensor``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])

_TENSORS = (
    "query",
    "key",
    "value",
    "prefix_key",
    "prefix_value",
    "key_factor",
    "sinks",
    "position_bias",
)
"""The differentiable arguments, in the order in which both operators take them."""


def _on_their_device(operator: F) -> F:
    """Make the first tensor's device the current one, on which Triton launches whatever it gets."""

    @wraps(operator)
    def guarded(first: Tensor, *others: Any) -> Any:
        with torch.cuda.device_of(first):
            return operator(first, *others)

    return cast(Any, guarded)


@torch.library.custom_op("atman_triton::attention_fwd", mutates_args=())
@_on_their_device
def attention_triton(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor | None,
    prefix_value: Tensor | None,
    key_factor: Tensor | None,
    sinks: Tensor | None,
    position_bias: Tensor | None,
    key_padding: Tensor | None,
    block_mask: Tensor | None,
    offset_tensor: Tensor | None,
    dropout_seed: Tensor | None,
    query_offset: int,
    mode: str,
    causal: bool,
    scale: float,
    window: int | None,
    softcap: float | None,
    dropout: float,
    differentiable: bool,
    hopper: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Attention by the fused kernel that suits the call.

    Args:
        differentiable: save what a backward pass needs beyond the log-sum-exp.
        hopper: take the kernel for sm_90, which is known to serve.
    Returns: output ``[B, Hq, Tq, Dv]``, log-sum-exp ``[B, Hq, Tq]`` and, of that shape where a
        backward pass needs them and else ``[0]``, what ``launch.RowNumbers`` holds.
    """
    # triton is optional, so what needs it is imported here
    from .kernels.configs import DECODE, PACKED, fused_kernel
    from .kernels.decode import decode_fwd
    from .kernels.forward import attention_fwd
    from .kernels.launch import RowNumbers
    from .kernels.packed_prefix import packed_prefix_fwd
    from .kernels.shared_prefix import shared_prefix_fwd

    features: dict[str, Any] = {
        "mode": mode,
        "causal": causal,
        "query_offset": query_offset if offset_tensor is None else offset_tensor,
        "scale": scale,
        "window": window,
        "softcap": softcap,
        "sinks": sinks,
        "position_bias": position_bias,
        "key_padding": key_padding,
        "block_mask": block_mask,
    }
    numbers = _row_numbers(query, key_factor, mode, differentiable)
    if hopper:
        from .kernels.hopper import attention_fwd_hopper  # Gluon, which few triton versions have

        output, lse = attention_fwd_hopper(
            query,
            key,
            value,
            key_factor,
            mode=mode,
            causal=causal,
            query_offset=query_offset,
            scale=scale,
        )
        return output, lse, *numbers
    training: dict[str, Any] = {
        "dropout": dropout,
        "dropout_seed": dropout_seed,
        "saves": RowNumbers(*_present(*numbers)),
    }
    batch, heads, queries, _ = query.shape
    trains = differentiable or dropout > 0  # which the packed kernel saves and knows nothing for
    sharing, has_prefix = batch * heads // key.shape[1], prefix_key is not None
    kernel = fused_kernel(queries, sharing, has_prefix=has_prefix, trains=trains)
    if prefix_key is None or prefix_value is None:
        if kernel == DECODE:
            output, lse = decode_fwd(query, key, value, key_factor, **features)
        else:
            output, lse = attention_fwd(query, key, value, key_factor, **features, **training)
        return output, lse, *numbers
    prefix = (prefix_key, prefix_value)
    if kernel == PACKED:
        output, lse = packed_prefix_fwd(query, key, value, *prefix, key_factor, **features)
    else:
        output, lse = shared_prefix_fwd(
            query, key, value, *prefix, key_factor, **features, **training
        )
    return output, lse, *numbers


@attention_triton.register_fake
def _fake_fwd(
    query: Tensor, key: Tensor, value: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, query_heads, query_tokens, _head_dim = query.shape
    # heads beside dims in memory, as the kernels write it and transformers wants it next
    output = query.new_empty(batch, query_tokens, query_heads, value.shape[-1]).transpose(1, 2)
    lse = query.new_empty(batch, query_heads, query_tokens, dtype=torch.float32)
    return output, lse, *_row_numbers(query, rest[2], rest[10], rest[-2])


def _row_numbers(
    query: Tensor, key_factor: Tensor | None, mode: str, differentiable: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Room for each row's minimum, its key, and the log-sum-exp's rest; ``[0]`` for nothing."""
    shifts = differentiable and mode == "min_shift" and key_factor is not None
    precise = differentiable and query.dtype == torch.float32
    minimum = query.new_empty(query.shape[:3] if shifts else (0,), dtype=torch.float32)
    argmin = query.new_empty(query.shape[:3] if shifts else (0,), dtype=torch.int32)
    return minimum, argmin, query.new_empty(query.shape[:3] if precise else (0,))


def _present(*numbers: Tensor) -> list[Tensor | None]:
    """None for what has no room."""
    return [tensor if tensor.dim() == 3 else None for tensor in numbers]


@torch.library.custom_op("atman_triton::attention_bwd", mutates_args=())
@_on_their_device
def _attention_bwd(
    d_output: Tensor,
    d_lse: Tensor | None,
    output: Tensor,
    lse: Tensor,
    minimum: Tensor,
    argmin: Tensor,
    rest: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor | None,
    prefix_value: Tensor | None,
    key_factor: Tensor | None,
    sinks: Tensor | None,
    position_bias: Tensor | None,
    key_padding: Tensor | None,
    block_mask: Tensor | None,
    offset_tensor: Tensor | None,
    dropout_seed: Tensor | None,
    query_offset: int,
    mode: str,
    causal: bool,
    scale: float,
    window: int | None,
    softcap: float | None,
    dropout: float,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the tensors from ``query`` to ``position_bias``; empty where not ``wanted``."""
    from .kernels.backward import Saved, attention_bwd  # triton is optional
    from .kernels.launch import RowNumbers

    found = attention_bwd(
        d_output,
        d_lse,
        Saved(output, lse, RowNumbers(*_present(minimum, argmin, rest))),
        query,
        key,
        value,
        key_factor,
        prefix=None if prefix_key is None or prefix_value is None else (prefix_key, prefix_value),
        wanted=[name for name, wants in zip(_TENSORS, wanted, strict=True) if wants],
        mode=mode,
        causal=causal,
        query_offset=query_offset if offset_tensor is None else offset_tensor,
        scale=scale,
        window=window,
        softcap=softcap,
        sinks=sinks,
        position_bias=position_bias,
        key_padding=key_padding,
        block_mask=block_mask,
        dropout=dropout,
        dropout_seed=dropout_seed,
    )
    q, k, v, pk, pv, m, s, b = (found.get(name, query.new_empty(0)) for name in _TENSORS)
    return q, k, v, pk, pv, m, s, b


@_attention_bwd.register_fake
def _fake_bwd(
    d_output: Tensor, d_lse: Any, output: Any, lse: Any, minimum: Any, argmin: Any, *others: Any
) -> tuple[Tensor, ...]:
    tensors, wanted = others[1 : 1 + len(_TENSORS)], others[-1]
    query, key, value = tensors[:3]
    full = query.shape[0] if key.shape[0] != value.shape[0] else key.shape[0]
    found = []
    for name, tensor, wants in zip(_TENSORS, tensors, wanted, strict=True):
        if not wants:
            found.append(query.new_empty(0))
        elif name in ("key_factor", "sinks", "position_bias") or (
            name in ("key", "value") and tensor.shape[0] != full
        ):
            found.append(tensor.new_empty(tensor.shape))
        else:  # heads beside dims in memory
            batch, heads, tokens, dim = tensor.shape
            found.append(tensor.new_empty(batch, tokens, heads, dim).transpose(1, 2))
    return tuple(found)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Keep what the backward pass reads."""
    ctx.set_materialize_grads(False)
    tensors = inputs[: len(_TENSORS) + 4]
    ctx.save_for_backward(*output, *tensors)
    ctx.options = inputs[len(tensors) : -2]


def _differentiate(
    ctx: Any, d_output: Tensor | None, d_lse: Tensor | None, *_: Any
) -> tuple[Tensor | None, ...]:
    """Gradients of the forward operator's arguments."""
    wanted = list(ctx.needs_input_grad[: len(_TENSORS)])
    inputs = len(ctx.needs_input_grad)
    if d_output is None and d_lse is None:
        return (None,) * inputs
    output, *saved = ctx.saved_tensors
    if d_output is None:
        d_output = torch.zeros_like(output)
    if d_lse is not None:
        d_lse = d_lse.contiguous()
    found = _attention_bwd(d_output, d_lse, output, *saved, *ctx.options, wanted)
    grads = [grad if wants else None for grad, wants in zip(found, wanted, strict=True)]
    return (*grads, *(None,) * (inputs - len(grads)))


def _refuse(ctx: object, *grads: Tensor) -> None:
    raise NotImplementedError(
        "backend='triton' has no second derivatives; use backend='torch' for them."
    )


attention_triton.register_autograd(_differentiate, setup_context=_save)
_attention_bwd.register_autograd(_refuse)
