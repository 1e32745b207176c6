"""The op: attention whose scores are manipulated by one factor per key.

Arguments are checked in ``validation``, backends are chosen and called in ``backend_registry``, the
fused kernels registered in ``triton_ops``, and the mathematics lives in ``kernels/``.

Legend: B batch, Hq/Hk query/key heads, Tq/Tk query/key tokens, Tp prefix tokens, D head dim, Dv
value dim.
"""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from .backend_call import checked_call
from .backend_registry import BACKENDS, choose
from .kernels.dropout import draw_seed
from .validation import MODES

__all__ = ["BACKENDS", "MODES", "Backend", "Mode", "attention"]

Mode = Literal["multiplicative", "min_shift", "min_shift_full", "log_additive"]
Backend = Literal["auto", "triton", "hopper", "torch", "reference"]


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
            over 256), ``triton`` on a GPU otherwise; on a GPU in ``backend_table.csv`` it is what
            measured fastest for such a call. :func:`atman_triton.explain_backend` says which and
            why. Any other name is taken at its word: it serves or raises.
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
    call = checked_call(
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
        return_lse=return_lse,
    )
    chosen = choose(call, backend)
    seed = _seed_tensor(dropout_seed, query.device) if dropout else None
    output, lse = chosen.run(call, seed)
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
