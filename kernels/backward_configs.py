"""Tile sizes of the backward kernels: data with reasons, no autotuning at run time.

Legend: block_m query rows and block_n keys of one tile.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from .configs import TileConfig

PARTS = ("rows", "queries", "keys", "bias")


@lru_cache
def backward_config(
    part: str,
    architecture: str,
    head_dim: int,
    value_dim: int,
    dtype: torch.dtype,
    mode: str,
    queries: int,
    load: int,
) -> TileConfig:
    """Tile sizes of one of the backward kernels for one kind of problem.

    ``queries`` holds the gradient of its rows, ``keys`` those of its keys and values in float32,
    beside two tiles of products; ``rows`` and ``bias`` hold little and run seldom.

    Args:
        part: of :data:`PARTS`.
        architecture: see ``configs.device_architecture``.
        mode: ``plain`` without factors, else the op's mode.
        queries: query rows per head.
        load: see ``configs.extra_load``.
    """
    if architecture == "interpreter":
        # Its cost is per operation, not per element: few large tiles, small enough to have edges.
        return TileConfig(32 if queries <= 32 else 64, 64, num_warps=4, num_stages=1)
    width = max(head_dim, value_dim)
    if dtype == torch.float32:
        return TileConfig(16, 32 if width <= 128 else 16, num_warps=8, num_stages=1)
    rows = 16 if queries <= 16 else 64
    if part in ("rows", "bias"):
        return TileConfig(rows, 32, num_warps=8, num_stages=1)
    if part == "queries":
        return TileConfig(rows, 64 if width <= 64 else 32, num_warps=8, num_stages=2)
    return TileConfig(min(rows, 32), 64, num_warps=8, num_stages=2)
