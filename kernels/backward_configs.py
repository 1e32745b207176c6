"""Tile sizes of the backward kernels: data with reasons, no autotuning at run time.

What was measured (``tuned.py``) comes first; the rules here were found by compiling.

Legend: block_m query rows and block_n keys of one tile.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from .tuned import TileConfig, tuned_config

PARTS = ("rows", "queries", "keys", "bias")


def backward_config(
    part: str,
    architecture: str,
    head_dim: int,
    value_dim: int,
    dtype: torch.dtype,
    mode: str,
    queries: int,
    load: int,
    causal: bool = False,
    length: str | None = None,
    device: str = "",
) -> TileConfig:
    """Tile sizes of one of the backward kernels: measured ones, else the rule's.

    Args:
        part: of :data:`PARTS`; the others as in ``configs.forward_config``.
    """
    problem = (architecture, head_dim, value_dim, dtype, mode, queries, load)
    measured = tuned_config(f"backward_{part}", *problem, causal, length, device)
    return measured or backward_rule(part, *problem)


@lru_cache
def backward_rule(
    part: str,
    architecture: str,
    head_dim: int,
    value_dim: int,
    dtype: torch.dtype,
    mode: str,
    queries: int,
    load: int,
) -> TileConfig:
    """Tile sizes that compile well; arguments of :func:`backward_config`.

    ``queries`` holds the gradient of its rows, ``keys`` those of its keys and values in float32,
    beside two tiles of products; ``rows`` and ``bias`` hold little and run seldom.
    """
    if architecture == "interpreter":
        # Its cost is per operation, not per element: few large tiles, small enough to have edges.
        return TileConfig(32 if queries <= 32 else 64, 64, num_warps=4, num_stages=1)
    width = max(head_dim, value_dim)
    if dtype == torch.float32:
        # True float32 products have few matrix instructions or none, and keep much in registers.
        return TileConfig(16, 16, num_warps=8 if width > 64 else 4, num_stages=1)
    if part in ("rows", "bias"):
        # a block of so few rows leaves the rest of the registers to numbers per row and key
        warps = 4 if architecture.startswith("gfx") else 8
        return TileConfig(16, 32, num_warps=warps, num_stages=1)
    if architecture.startswith("gfx"):
        config = _amd(part, width)
    else:
        deferred = mode == "min_shift"
        choose = _nvidia_keys if part == "keys" else _nvidia_queries
        config = choose(architecture, width, deferred, mode == "plain", load)
    if queries <= 16:
        return TileConfig(16, config.block_n, config.num_warps, config.num_stages)
    return config


def _nvidia_keys(
    architecture: str, width: int, deferred: bool, plain: bool, load: int
) -> TileConfig:
    """Two accumulators of ``block_n * width``: 128 of 255 registers at 128×128 and 8 warps.

    Numbers per row lie along the tile's second axis, where every thread holds many of them, so
    ``min_shift`` with five of them affords fewer rows. A pipelined loop costs registers as well.
    """
    if width <= 64:
        if architecture == "sm_80" and load:
            return TileConfig(16, 128, num_warps=8, num_stages=1)
        rows = 32 if architecture == "sm_80" or deferred or load else 64
        return TileConfig(rows, 128, num_warps=8, num_stages=1)
    if width <= 128 and not load:
        if architecture == "sm_90" and plain:
            return TileConfig(32, 128, num_warps=8, num_stages=2)
        if architecture == "sm_80" and deferred:
            return TileConfig(32, 64, num_warps=8, num_stages=1)
        return TileConfig(16, 128, num_warps=8, num_stages=1)
    narrow = architecture == "sm_80" and width > 128 and load == 2
    return TileConfig(16, 16 if narrow else 32, num_warps=8, num_stages=1)


def _nvidia_queries(
    architecture: str, width: int, deferred: bool, plain: bool, load: int
) -> TileConfig:
    """One accumulator of ``block_m * width``, beside the rows' query and output gradient."""
    if width <= 128:
        if (architecture == "sm_80" and width > 64) or (architecture == "sm_100" and load):
            return TileConfig(64, 64, num_warps=8, num_stages=2)
        return TileConfig(128, 32 if load else 64, num_warps=8, num_stages=2)
    return TileConfig(32, 32 if architecture == "sm_80" else 16, num_warps=8, num_stages=1)


def _amd(part: str, width: int) -> TileConfig:
    """64 threads a warp and 512 registers each, but only 64 KB of shared memory."""
    if part == "keys":
        return TileConfig(32 if width <= 128 else 16, 64 if width <= 128 else 32, 4, 1)
    return TileConfig(64, 32, 4, 1) if width <= 128 else TileConfig(32, 16, 4, 1)
