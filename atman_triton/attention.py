"""The op: attention whose scores are manipulated by one factor per key.

The backend is chosen here; arguments are checked in ``validation``, the fused kernels registered in
``triton_ops``, and the mathematics lives in ``kernels/``.

Legend: B batch, Hq/Hk query/key heads, Tq/Tk query/key tokens, Tp prefix tokens, D head dim, Dv
value dim.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any, Literal, overload

import torch
from torch import Tensor

from .kernels.dropout import draw_seed
from .kernels.portable import attention_portable
from .kernels.portable_prefix import attention_portable_prefix
from .kernels.reference import attention_reference
from .triton_ops import attention_triton
from .validation import BACKENDS, MODES, check_arguments

__all__ = ["BACKENDS", "MODES", "Backend", "Mode", "attention"]

Mode = Literal["multiplicative", "min_shift", "min_shift_full", "log_additive"]
Backend = Literal["auto", "triton", "torch", "reference"]

_HAS_TRITON = importlib.util.find_spec("triton") is not None
_TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_MAX_TRITON_HEAD_DIM = 256


@overload
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_factor: Tensor | None = None,
    *,
    mode: str = ...,
    causal: bool = ...,
    query_offset: int | Tensor | None = ...,
    scale: float | None = ...,
    window: int | None = ...,
    softcap: float | None = ...,
    sinks: Tensor | None = ...,
    position_bias: Tensor | None = ...,
    mask: Tensor | None = ...,
    prefix: tuple[Tensor, Tensor] | None = ...,
    dropout: float = ...,
    dropout_seed: int | Tensor | None = ...,
    return_lse: Literal[False] = ...,
    backend: str = ...,
) -> Tensor: ...


@overload
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_factor: Tensor | None = None,
    *,
    mode: str = ...,
    causal: bool = ...,
    query_offset: int | Tensor | None = ...,
    scale: float | None = ...,
    window: int | None = ...,
    softcap: float | None = ...,
    sinks: Tensor | None = ...,
    position_bias: Tensor | None = ...,
    mask: Tensor | None = ...,
    prefix: tuple[Tensor, Tensor] | None = ...,
    dropout: float = ...,
    dropout_seed: int | Tensor | None = ...,
    return_lse: Literal[True],
    backend: str = ...,
) -> tuple[Tensor, Tensor]: ...


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_factor: Tensor | None = None,
    *,
    mode: str = "multiplicative",
    causal: bool = False,
    query_offset: int | Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    position_bias: Tensor | None = None,
    mask: Tensor | None = None,
    prefix: tuple[Tensor, Tensor] | None = None,
    dropout: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention whose pre-softmax scores are manipulated by one factor per key.

    With ``s = scale · q·k`` (soft-capped where the model does), the manipulated score is, by
    ``mode``: ``multiplicative`` m·s; ``min_shift`` c + m·(s − c) with c the smallest score that
    the row can see; ``log_additive`` s + log m. ``position_bias`` and the masks come after it.

    Args:
        query: ``[B, Hq, Tq, D]``, fp16, bf16, fp32 (fp64 on the ``torch`` and ``reference``
            backends).
        key: ``[B|1, Hk, Tk, D]`` in ``query.dtype``; Hk divides Hq. Batch 1 is shared by all
            rows; ``triton`` reads it in place.
        value: ``[B|1, Hk, Tk, Dv]`` in ``query.dtype``.
        key_factor: ``[B, Tk]`` or ``[B, Hq, Tk]`` float32 (float64 with a float64 query),
            dimensionless; 1 keeps a key, < 1 suppresses it, > 1 amplifies it. ``None`` is plain
            attention. Values are not checked here (it would wait for the GPU): with NaN, or a
            negative factor in ``log_additive``, the result is undefined.
        mode: ``multiplicative``, ``min_shift``, ``log_additive``; ``min_shift_full`` (c over masked
            keys too, as the authors' released code has it), which ``triton`` does not serve.
        causal: a query at position p sees keys up to p.
        query_offset: key index at which query row 0 stands, an int or an integer tensor of one
            element on ``query``'s device. ``None`` aligns the last query with the last key
            (bottom-right), 0 the first with the first (upper-left).
        scale: factor on q·k; ``None`` is ``D ** -0.5``.
        window: keys at distance ``window`` or more behind the query (on either side of it when not
            causal) are hidden; tokens.
        softcap: scores become ``softcap · tanh(score / softcap)`` before the manipulation.
        sinks: ``[Hq]`` floating logits that take part in the normaliser only.
        position_bias: ``[B|1, Hq|1, Tq|1, Tk]`` floating (ALiBi, T5), never manipulated.
        mask: bool, True = visible: ``[B, Tk]`` padding or ``[B|1, Hq|1, Tq, Tk]``.
        prefix: key ``[1, Hk, Tp, D]`` and value ``[1, Hk, Tp, Dv]`` in ``query.dtype``, which every
            batch row has in front of its own ``key`` and ``value``; any strides, so a view of a
            longer cache will do. ``Tk`` above then reads ``Tp + Tk`` wherever keys are counted
            (``key_factor``, ``query_offset``, ``window``, ``position_bias``, ``mask``); a
            ``key_factor`` of length ``Tk`` leaves the prefix alone.
        dropout: share of the probabilities, after the softmax, that becomes 0 in the product with
            the values, ``0 <= dropout < 1``; the others are divided by ``1 - dropout``. Which ones
            is a function of seed, batch row, head, query row and key: the same in every backend.
        dropout_seed: an int64, as an int or a tensor of one element on ``query``'s device.
            ``None`` draws one from PyTorch's generator of the device.
        return_lse: also return the log-sum-exp of each row (natural log, sinks included,
            dropout not).
        backend: ``auto`` is ``torch`` on CPU and where ``triton`` cannot serve (float64, head dims
            over 256), ``triton`` on a GPU otherwise. Any other name is taken at its word: it serves
            or raises.
    Returns: ``[B, Hq, Tq, Dv]`` in ``query.dtype``; with ``return_lse`` also ``[B, Hq, Tq]``
        float32 (float64 for float64). A row that sees no key gives 0 and -inf (with ``sinks``: the
        sink).
    Raises:
        TypeError: if an argument is not of the type or dtype above.
        ValueError: if a shape, device or value disagrees with the above, or an explicit backend
            cannot serve the call.
    Source: AtMan (arXiv 2301.08110), Eq. 4, for ``multiplicative``; the authors' released code,
        made causal, for ``min_shift``; their later product for ``log_additive``.
    """
    check_arguments(
        query,
        key,
        value,
        key_factor,
        mode=mode,
        causal=causal,
        query_offset=query_offset,
        scale=scale,
        window=window,
        softcap=softcap,
        sinks=sinks,
        position_bias=position_bias,
        mask=mask,
        prefix=prefix,
        dropout=dropout,
        dropout_seed=dropout_seed,
        backend=backend,
    )
    if prefix is not None and prefix[0].shape[2] == 0:
        prefix = None
    head_dim = query.shape[-1]
    score_scale = head_dim**-0.5 if scale is None else scale
    if query_offset is None:
        prefix_tokens = 0 if prefix is None else prefix[0].shape[2]
        query_offset = prefix_tokens + key.shape[2] - query.shape[2]
    tensors = (query, key, value, key_factor, sinks, position_bias, *(prefix or ()))
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    chosen = _choose_backend(query, value, mode, backend)
    seed = _seed_tensor(dropout_seed, query.device) if dropout else None

    if chosen == "triton":
        padding = mask if mask is not None and mask.dim() == 2 else None
        block_mask = mask if mask is not None and mask.dim() == 4 else None
        offset_tensor = query_offset if isinstance(query_offset, Tensor) else None
        output, lse, *_ = attention_triton(
            query,
            key,
            value,
            *(prefix or (None, None)),
            key_factor,
            sinks,
            position_bias,
            padding,
            block_mask,
            offset_tensor,
            seed,
            0 if isinstance(query_offset, Tensor) else query_offset,
            mode,
            causal,
            score_scale,
            window,
            softcap,
            dropout,
            needs_grad,
        )
    else:
        features: dict[str, Any] = {
            "mode": mode,
            "causal": causal,
            "query_offset": query_offset,
            "scale": score_scale,
            "window": window,
            "softcap": softcap,
            "sinks": sinks,
            "position_bias": position_bias,
            "mask": mask,
            "dropout": dropout,
            "dropout_seed": seed,
        }
        if chosen == "reference":
            output, lse = attention_reference(
                query, key, value, key_factor, **features, prefix=prefix
            )
        elif prefix is not None:
            output, lse = attention_portable_prefix(
                query, key, value, key_factor, *prefix, **features, return_lse=return_lse
            )
        else:
            output, lse = attention_portable(
                query, key, value, key_factor, **features, return_lse=return_lse
            )
    if not return_lse:
        return output
    assert lse is not None  # every backend computes it when it is asked for
    return output, lse


def _seed_tensor(seed: int | Tensor | None, device: torch.device) -> Tensor:
    """The seed as int64 ``[1]`` on the device; drawn if there is none."""
    if seed is None:
        return draw_seed(device)
    if isinstance(seed, Tensor):
        return seed.reshape(1)
    return torch.full((1,), seed, dtype=torch.int64, device=device)


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def _why_not_triton(query: Tensor, value: Tensor, mode: str) -> str | None:
    """Why the fused kernel cannot serve this call; ``None`` if it can."""
    if not _HAS_TRITON:
        return "needs the triton package, which is not installed (pip install triton)"
    if query.device.type != "cuda" and not _interpreting():
        return (
            f"needs a GPU or the interpreter (TRITON_INTERPRET=1), got tensors on {query.device}; "
            "use backend='torch'"
        )
    if mode == "min_shift_full":
        return "cannot serve mode='min_shift_full'; use backend='torch'"
    if query.dtype not in _TRITON_DTYPES:
        return f"serves fp16, bf16 and fp32, got {query.dtype}; use backend='torch'"
    largest = max(query.shape[-1], value.shape[-1])
    if largest > _MAX_TRITON_HEAD_DIM:
        return f"serves head dims up to {_MAX_TRITON_HEAD_DIM}, got {largest}; use backend='torch'"
    return None


def _choose_backend(
    query: Tensor, value: Tensor, mode: str, backend: str
) -> Literal["triton", "torch", "reference"]:
    """Resolve ``auto``; refuse an explicit backend that cannot serve the call."""
    if backend == "triton":
        reason = _why_not_triton(query, value, mode)
        if reason is not None:
            raise ValueError(f"backend='triton' {reason}.")
        return "triton"
    if backend == "reference":
        return "reference"
    if backend == "torch" or query.device.type != "cuda":
        return "torch"
    return "torch" if _why_not_triton(query, value, mode) is not None else "triton"
