"""The backends of the op: what each can serve, which one ``auto`` takes, and how it is called.

A backend is an entry of :data:`CANDIDATES`; to add one is to add an entry. :func:`choose` is the
one place where a choice is made: ``attention`` runs what it returns, and ``explain_backend`` tells
of it.

torch.compile skips files whose path holds ``triton/backends``: this one must not be called so.

Legend: B batch, Hq/Hk query/key heads, Tq/Tk query/key tokens, Tp prefix tokens, D head dim, Dv
value dim.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import backend_table
from .backend_call import Call
from .backend_table import Case
from .kernels.configs import fused_kernel
from .kernels.hopper_configs import why_not_hopper
from .kernels.portable import attention_portable
from .kernels.portable_paths import (
    QUERY_BLOCKS,
    PortablePath,
    portable_path,
    prefix_path,
    visibility_of,
)
from .kernels.portable_prefix import attention_portable_prefix
from .kernels.reference import attention_reference
from .triton_ops import attention_triton

Outputs = tuple[Tensor, Tensor | None]
"""Output ``[B, Hq, Tq, Dv]`` and log-sum-exp ``[B, Hq, Tq]``, where that was asked for."""

_HAS_TRITON = importlib.util.find_spec("triton") is not None
_TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_MAX_TRITON_HEAD_DIM = 256


@dataclass(frozen=True)
class Candidate:
    """A backend.

    Args:
        name: what users write.
        why_not: why it cannot serve a call, to follow its name in a sentence without its end;
            ``None`` if it can.
        kernel: which of its kernels would compute the call and, unless that is its fastest way,
            why not another.
        run: computes the call; takes also the seed of the dropout, int64 ``[1]``, if there is any.
        unmeasured_on: device types on which ``auto`` takes it without rows that say so; of several
            the first that serves. ``None`` is all of them.
        automatic: whether ``auto`` ever takes it.
        instead: what to ask for where it cannot serve.
    """

    name: str
    why_not: Callable[[Call], str | None]
    kernel: Callable[[Call], tuple[str, str]]
    run: Callable[[Call, Tensor | None], Outputs]
    unmeasured_on: tuple[str, ...] | None = ()
    automatic: bool = True
    instead: str = "torch"


# --- the choice -----------------------------------------------------------------------------------


def choose(call: Call, backend: str) -> Candidate:
    """The backend that computes a call.

    Raises: ValueError: if ``backend`` is not known, or named and cannot serve.
    """
    if backend != "auto":
        named = find_candidate(backend)
        reason = named.why_not(call)
        if reason is not None:
            raise ValueError(f"backend='{backend}' {reason}; use backend='{named.instead}'.")
        return named
    ruled = by_rule(call)
    if not backend_table.has_rows(call.query.device):
        return ruled
    case = measured_case(call)
    if isinstance(case, str):
        return ruled
    for name in backend_table.faster_backends(call.key.shape[2], ruled.name, *case):
        for candidate in CANDIDATES:
            if candidate.name == name and candidate.automatic and candidate.why_not(call) is None:
                return candidate
    return ruled


def by_rule(call: Call) -> Candidate:
    """What ``auto`` takes where nothing was measured: the first that serves on such a device."""
    device = call.query.device.type
    for candidate in CANDIDATES:
        here = candidate.unmeasured_on is None or device in candidate.unmeasured_on
        if candidate.automatic and here and candidate.why_not(call) is None:
            return candidate
    raise RuntimeError("no backend serves this call, which torch always does.")


def find_candidate(name: str) -> Candidate:
    """A backend by name.

    Raises: ValueError: if there is none.
    """
    for candidate in CANDIDATES:
        if candidate.name == name:
            return candidate
    names = ("auto", *[candidate.name for candidate in CANDIDATES])
    raise ValueError(f"backend must be one of {', '.join(names)}, got {name!r}.")


def measured_case(call: Call) -> Case | str:
    """What the table may know of a call, or why it knows nothing: only bare calls are measured.

    While compiling, a length that the graph leaves open is unknown, and no guard is put on it.
    """
    query, key, value, factor = call.query, call.key, call.value, call.key_factor
    for name in ("window", "softcap", "sinks", "position_bias", "mask", "prefix"):
        if getattr(call, name) is not None:
            return f"calls with {name} are not in the table"
    if call.dropout or call.return_lse:
        return f"calls with {'dropout' if call.dropout else 'return_lse'} are not in the table"
    queries, keys = query.shape[2], key.shape[2]
    if torch.compiler.is_compiling():
        from torch.fx.experimental.symbolic_shapes import has_static_value  # slow to import

        if not (has_static_value(queries) and has_static_value(keys)):
            return "the compiled graph leaves the number of tokens open"
    if key.shape[0] != query.shape[0] or value.shape[0] != query.shape[0]:
        return "calls whose batch rows share keys are not in the table"
    if isinstance(call.query_offset, Tensor) or not call.scale > 0:
        return "calls with query_offset in a tensor or a scale of 0 or less are not in the table"
    causal = call.causal and call.query_offset < keys - 1  # else the first query sees all keys
    if causal and call.query_offset != keys - queries:
        return "causal calls with a query_offset of their own are not in the table"
    return Case(
        device=query.device,
        dtype=query.dtype,
        head_dim=query.shape[3],
        value_dim=value.shape[3],
        mode="plain" if factor is None else call.mode,
        per_head=factor is not None and factor.dim() == 3,
        causal=causal,
        grouped=query.shape[1] != key.shape[1],
        backward=call.needs_grad,
        queries=None if queries == keys else queries,
    )


# --- the fused kernels ----------------------------------------------------------------------------


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def _why_not_triton(call: Call) -> str | None:
    query = call.query
    if not _HAS_TRITON:
        return "needs the triton package, which is not installed (pip install triton)"
    if query.device.type != "cuda" and not _interpreting():
        return f"needs a GPU or the interpreter (TRITON_INTERPRET=1), got tensors on {query.device}"
    if call.mode == "min_shift_full":
        return "cannot serve mode='min_shift_full'"
    if query.dtype not in _TRITON_DTYPES:
        return f"serves fp16, bf16 and fp32, got {query.dtype}"
    largest = max(query.shape[-1], call.value.shape[-1])
    if largest > _MAX_TRITON_HEAD_DIM:
        return f"serves head dims up to {_MAX_TRITON_HEAD_DIM}, got {largest}"
    return None


def _triton_kernel(call: Call) -> tuple[str, str]:
    batch, heads, queries, _ = call.query.shape
    kernel = fused_kernel(
        queries,
        batch * heads // call.key.shape[1],
        has_prefix=call.prefix is not None,
        trains=call.needs_grad or call.dropout > 0,
    )
    return kernel, ""


def _run_triton(call: Call, seed: Tensor | None) -> Outputs:
    return _run_fused(call, seed, hopper=False)


def _run_fused(call: Call, seed: Tensor | None, hopper: bool) -> Outputs:
    mask, offset = call.mask, call.query_offset
    output, lse, *_ = attention_triton(
        call.query,
        call.key,
        call.value,
        *(call.prefix or (None, None)),
        call.key_factor,
        call.sinks,
        call.position_bias,
        mask if mask is not None and mask.dim() == 2 else None,
        mask if mask is not None and mask.dim() == 4 else None,
        offset if isinstance(offset, Tensor) else None,
        seed,
        0 if isinstance(offset, Tensor) else offset,
        call.mode,
        call.causal,
        call.scale,
        call.window,
        call.softcap,
        call.dropout,
        call.needs_grad,
        hopper,
    )
    return output, lse


@torch.compiler.assume_constant_result
def _is_hopper(device: torch.device) -> bool:
    if device.type != "cuda" or not torch.cuda.is_available():
        return False
    return torch.cuda.get_device_capability(device) == (9, 0)


@torch.compiler.assume_constant_result
def _has_gluon() -> bool:
    return importlib.util.find_spec("triton.experimental.gluon") is not None


def _why_not_hopper(call: Call) -> str | None:
    if not _is_hopper(call.query.device):
        return f"needs a Hopper GPU (sm_90), got tensors on {call.query.device}"
    reason = _why_not_triton(call)
    if reason is not None:
        return reason
    if not _has_gluon():
        return "needs triton with triton.experimental.gluon (pip install 'triton>=3.6')"
    return why_not_hopper(
        call.query,
        call.key,
        call.value,
        mode=call.mode,
        query_offset=call.query_offset,
        scale=call.scale,
        window=call.window,
        softcap=call.softcap,
        sinks=call.sinks,
        position_bias=call.position_bias,
        mask=call.mask,
        prefix=call.prefix,
        dropout=call.dropout,
        needs_grad=call.needs_grad,
    )


def _hopper_kernel(_: Call) -> tuple[str, str]:
    return "forward for sm_90", ""


def _run_hopper(call: Call, seed: Tensor | None) -> Outputs:
    return _run_fused(call, seed, hopper=True)


# --- plain PyTorch --------------------------------------------------------------------------------


def _serves_all(_: Call) -> None:
    return None


def _features(call: Call, seed: Tensor | None) -> dict[str, Any]:
    """What the portable implementations and the oracle take by name."""
    return {
        "mode": call.mode,
        "causal": call.causal,
        "query_offset": call.query_offset,
        "scale": call.scale,
        "window": call.window,
        "softcap": call.softcap,
        "sinks": call.sinks,
        "position_bias": call.position_bias,
        "mask": call.mask,
        "dropout": call.dropout,
        "dropout_seed": seed,
    }


def _torch_kernel(call: Call) -> tuple[str, str]:
    kernel, reason = _torch_path(call)
    return kernel, f"slow: {reason}" if kernel == QUERY_BLOCKS else reason


def _torch_path(call: Call) -> PortablePath:
    tensors = (call.query, call.key, call.value, call.key_factor)
    if call.prefix is not None and call.query.shape[2]:
        others = (*call.prefix, call.sinks, call.position_bias)
        return prefix_path(*tensors, *others, dropout=call.dropout)
    return portable_path(
        *tensors,
        mode=call.mode,
        scale=call.scale,
        softcap=call.softcap,
        sinks=call.sinks,
        position_bias=call.position_bias,
        visibility=visibility_of(
            call.causal, call.query_offset, call.window, call.mask, call.key.shape[2]
        ),
        dropout=call.dropout,
        return_lse=call.return_lse,
    )


def _run_torch(call: Call, seed: Tensor | None) -> Outputs:
    tensors = (call.query, call.key, call.value, call.key_factor)
    features = _features(call, seed)
    features["return_lse"] = call.return_lse
    if call.prefix is not None:
        return attention_portable_prefix(*tensors, *call.prefix, **features)
    return attention_portable(*tensors, **features)


def _oracle(_: Call) -> tuple[str, str]:
    return "oracle", "it is there to test the others"


def _run_reference(call: Call, seed: Tensor | None) -> Outputs:
    tensors = (call.query, call.key, call.value, call.key_factor)
    return attention_reference(*tensors, **_features(call, seed), prefix=call.prefix)


# ``auto`` prefers by rule what stands first.
CANDIDATES: tuple[Candidate, ...] = (
    Candidate("triton", _why_not_triton, _triton_kernel, _run_triton, unmeasured_on=("cuda",)),
    Candidate("hopper", _why_not_hopper, _hopper_kernel, _run_hopper, instead="auto"),
    Candidate("torch", _serves_all, _torch_kernel, _run_torch, unmeasured_on=None),
    Candidate("reference", _serves_all, _oracle, _run_reference, automatic=False),
)
BACKENDS = ("auto", *(candidate.name for candidate in CANDIDATES))
