"""Attention of a few query tokens per batch row over a prefix that all rows share.

Legend: B batch, Hq/Hk query/key heads, Tq query tokens, Tp keys of the prefix, Tk keys of a row's
own, D head dim, Dv value dim, m factor of a key.

Query rows of many batch rows and of the heads of a group share a tile, each with its own factors;
see "Many short queries over one prefix" in README.md.
"""

from __future__ import annotations

from typing import Unpack

from torch import Tensor

from .packed_launch import Features, launch_packed


def packed_prefix_fwd(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    key_factor: Tensor | None = None,
    **features: Unpack[Features],
) -> tuple[Tensor, Tensor]:
    """Attention over a shared prefix, then each row's own keys. Arguments are taken as validated.

    Made for few query tokens in many batch rows; right for any number. Nothing is copied: batch 1,
    broadcast dimensions and any strides are read in place.

    Args:
        query: ``[B, Hq, Tq, D]``, fp16, bf16 or fp32; D and Dv at most 256.
        key, value: ``[B|1, Hk, Tk, D]`` and ``[B|1, Hk, Tk, Dv]``; Hk divides Hq. Tk may be 0.
        prefix_key, prefix_value: ``[1, Hk, Tp, D]`` and ``[1, Hk, Tp, Dv]``. Tp may be 0.
        key_factor: ``[B, Tp + Tk]`` or ``[B, Hq, Tp + Tk]`` float32; 1 keeps a key, < 1 suppresses
            it. Of length Tk, the prefix has ones.
        features: see :class:`Features`.
    Returns: as :func:`packed_launch.launch_packed`.
    """
    return launch_packed(query, (prefix_key, prefix_value), (key, value), key_factor, **features)
