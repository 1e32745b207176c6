"""Checks of the op's arguments: whatever would give a wrong answer or an obscure error.

Legend: B batch, Hq/Hk query/key heads, Tq/Tk query/key tokens, Tp prefix tokens, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

MODES = ("multiplicative", "min_shift", "min_shift_full", "log_additive")


def check_arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_factor: Tensor | None,
    *,
    mode: str,
    causal: bool,
    query_offset: int | Tensor | None,
    scale: float | None,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    position_bias: Tensor | None,
    mask: Tensor | None,
    prefix: tuple[Tensor, Tensor] | None,
    dropout: float,
    dropout_seed: int | Tensor | None,
) -> None:
    """Check the arguments of :func:`atman_triton.attention`, which are described there.

    Raises: TypeError, ValueError: naming the argument, what it must be and what came.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}.")
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        _check_tensor(name, tensor, query)
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must have a floating dtype, got {tensor.dtype}.")
        if tensor.dim() != 4:
            raise ValueError(
                f"{name} must have 4 dimensions [batch, heads, tokens, dim], "
                f"got shape {list(tensor.shape)}."
            )
    batch, query_heads, query_tokens, head_dim = query.shape
    key_heads, key_tokens = key.shape[1], key.shape[2]
    for name, tensor in (("key", key), ("value", value)):
        if tensor.dtype != query.dtype:
            raise TypeError(f"{name} must have query's dtype {query.dtype}, got {tensor.dtype}.")
        if tensor.shape[0] not in (1, batch):
            raise ValueError(f"{name} must have batch {batch} or 1, got {tensor.shape[0]}.")
    if head_dim < 1 or key.shape[-1] != head_dim:
        raise ValueError(f"key must have query's head dim {head_dim}, got {key.shape[-1]}.")
    if value.shape[1:3] != key.shape[1:3]:
        raise ValueError(
            f"value must have key's heads and tokens {list(key.shape[1:3])}, "
            f"got {list(value.shape[1:3])}."
        )
    if key_heads < 1 or query_heads < 1 or query_heads % key_heads:
        raise ValueError(
            f"query heads must be a multiple of key heads, got {query_heads} and {key_heads}."
        )
    if value.shape[-1] < 1:
        raise ValueError("value must have a head dim of at least 1, got 0.")
    own_tokens = key_tokens
    if prefix is not None:
        _check_prefix(prefix, query, key, value)
        key_tokens += prefix[0].shape[2]
    if key_factor is not None:
        _check_tensor("key_factor", key_factor, query)
        # float32 would round the factor of a float64 oracle
        wanted = (
            (torch.float32, torch.float64) if query.dtype == torch.float64 else (torch.float32,)
        )
        if key_factor.dtype not in wanted:
            raise TypeError(
                f"key_factor must be torch.float32, got {key_factor.dtype}; use key_factor.float()."
            )
        shapes = [[batch, key_tokens], [batch, query_heads, key_tokens]]
        if prefix is not None:
            shapes += [[batch, own_tokens], [batch, query_heads, own_tokens]]
        if list(key_factor.shape) not in shapes:
            text = f"{shapes[0]} or {shapes[1]}"
            if prefix is not None:
                text = f"{text}, or {shapes[2]} or {shapes[3]} without the prefix"
            raise ValueError(f"key_factor must have shape {text}, got {list(key_factor.shape)}.")
    if isinstance(query_offset, Tensor):
        _check_tensor("query_offset", query_offset, query)
        if query_offset.is_floating_point() or query_offset.numel() != 1:
            raise ValueError(
                "query_offset must be an int or an integer tensor of one element, "
                f"got {query_offset.dtype} of shape {list(query_offset.shape)}."
            )
    elif query_offset is not None:
        _check_int("query_offset", query_offset)
    if not isinstance(causal, bool):
        raise TypeError(f"causal must be True or False, got {causal!r}.")
    if window is not None:
        _check_int("window", window)
        if window < 1:
            raise ValueError(f"window must be at least 1 token, got {window}.")
    for name, number in (("scale", scale), ("softcap", softcap), ("dropout", dropout)):
        if number is not None and (
            isinstance(number, bool) or not isinstance(number, (int, float))
        ):
            raise TypeError(f"{name} must be a number, got {number!r}.")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be greater than 0, got {softcap}.")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be at least 0 and less than 1, got {dropout}.")
    if isinstance(dropout_seed, Tensor):
        _check_tensor("dropout_seed", dropout_seed, query)
        if dropout_seed.dtype != torch.int64 or dropout_seed.numel() != 1:
            raise ValueError(
                "dropout_seed must be an int or a torch.int64 tensor of one element, "
                f"got {dropout_seed.dtype} of shape {list(dropout_seed.shape)}."
            )
    elif dropout_seed is not None:
        _check_int("dropout_seed", dropout_seed)
        if not -(1 << 63) <= dropout_seed < 1 << 63:
            raise ValueError(f"dropout_seed must fit in 64 bits with sign, got {dropout_seed}.")
    if sinks is not None:
        _check_tensor("sinks", sinks, query)
        if not sinks.is_floating_point():
            raise TypeError(f"sinks must have a floating dtype, got {sinks.dtype}.")
        if list(sinks.shape) != [query_heads]:
            raise ValueError(f"sinks must have shape [{query_heads}], got {list(sinks.shape)}.")
    full = (batch, query_heads, query_tokens, key_tokens)
    if position_bias is not None:
        _check_tensor("position_bias", position_bias, query)
        if not position_bias.is_floating_point():
            raise TypeError(f"position_bias must have a floating dtype, got {position_bias.dtype}.")
        _check_broadcast("position_bias", position_bias, full)
    if mask is not None:
        _check_tensor("mask", mask, query)
        if mask.dtype != torch.bool:
            raise TypeError(f"mask must be torch.bool (True = visible), got {mask.dtype}.")
        if mask.dim() == 2:
            if list(mask.shape) != [batch, key_tokens]:
                raise ValueError(
                    f"mask must have shape {[batch, key_tokens]} or {list(full)}, "
                    f"got {list(mask.shape)}."
                )
        else:
            _check_broadcast("mask", mask, full)
            if list(mask.shape[2:]) != [query_tokens, key_tokens]:
                raise ValueError(f"mask must have shape {list(full)}, got {list(mask.shape)}.")


def _check_prefix(prefix: tuple[Tensor, Tensor], query: Tensor, key: Tensor, value: Tensor) -> None:
    if not isinstance(prefix, tuple) or len(prefix) != 2:
        came = f"a tuple of {len(prefix)}" if isinstance(prefix, tuple) else type(prefix).__name__
        raise TypeError(f"prefix must be a tuple (key, value), got {came}.")
    for name, tensor in zip(("prefix key", "prefix value"), prefix, strict=True):
        _check_tensor(name, tensor, query)
        if tensor.dtype != query.dtype:
            raise TypeError(f"{name} must have query's dtype {query.dtype}, got {tensor.dtype}.")
    shared_key, shared_value = prefix
    heads, head_dim, value_dim = key.shape[1], key.shape[-1], value.shape[-1]
    fits = shared_key.dim() == 4 and shared_key.shape[:2] == (1, heads)
    if not fits or shared_key.shape[-1] != head_dim:
        raise ValueError(
            f"prefix key must have shape [1, {heads}, Tp, {head_dim}], "
            f"got {list(shared_key.shape)}."
        )
    wanted = [1, heads, shared_key.shape[2], value_dim]
    if list(shared_value.shape) != wanted:
        raise ValueError(f"prefix value must have shape {wanted}, got {list(shared_value.shape)}.")


def _check_int(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an int, got {value!r}.")


def _check_tensor(name: str, tensor: Tensor, query: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}.")
    if tensor.device != query.device:
        raise ValueError(f"{name} must be on query's device {query.device}, got {tensor.device}.")


def _check_broadcast(name: str, tensor: Tensor, full: tuple[int, int, int, int]) -> None:
    fits = tensor.dim() == 4 and all(a in (1, b) for a, b in zip(tensor.shape, full, strict=True))
    if not fits:
        raise ValueError(f"{name} must broadcast to {list(full)}, got {list(tensor.shape)}.")
