"""Attention of one or a few query tokens against a long cache of keys.

Legend: B batch, Hq/Hk query/key heads, Tq query tokens, Tk keys of the cache, D head dim, Dv value
dim, m factor of a key.

All query heads of a key head share a tile, keys are split over programs; see "One query over a long
cache" in README.md.
"""

from __future__ import annotations

from typing import Unpack

from torch import Tensor

from .packed_launch import Features, launch_packed


def decode_fwd(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_factor: Tensor | None = None,
    **features: Unpack[Features],
) -> tuple[Tensor, Tensor]:
    """``attention_fwd`` for few query tokens. Arguments are taken as validated by the op.

    Made for queries that fill no tile; right for any number. Nothing is copied: broadcast
    dimensions and any strides are read in place. While a cache grows, nothing is compiled again.

    Args:
        query: ``[B, Hq, Tq, D]``, fp16, bf16 or fp32; D and Dv at most 256.
        key, value: ``[B|1, Hk, Tk, D]`` and ``[B|1, Hk, Tk, Dv]``; Hk divides Hq. Where both have
            batch 1, the queries of all rows share tiles too. In a static cache, causality with
            ``query_offset`` hides the empty slots behind the last query.
        key_factor: ``[B, Tk]`` or ``[B, Hq, Tk]`` float32; 1 keeps a key, < 1 suppresses it.
        features: see :class:`Features`, with Tk keys and no others.
    Returns: as :func:`packed_launch.launch_packed`.
    """
    return launch_packed(query, (key, value), None, key_factor, **features)
