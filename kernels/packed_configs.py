"""Tile sizes and split counts of the packed kernel: data with reasons.

Legend: block_m packed query rows and block_n keys of one tile.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

_TILES_PER_SPLIT = 4  # below that, storing and merging a partial state costs more than it saves
_PROGRAMS_PER_PROCESSOR = 2


@dataclass(frozen=True)
class PackedConfig:
    """How the work of one program is cut.

    ``edge_n`` divides ``block_n``: keys of a tile that is masked or whose factors are gathered.
    ``defer_n``, if not ``block_n``, those of a deferred tile whose rows share their factors, in the
    launch that visits no others.
    """

    block_m: int
    block_n: int
    edge_n: int
    num_warps: int
    num_stages: int
    defer_n: int | None = None


@lru_cache
def packed_config(
    architecture: str,
    head_dim: int,
    value_dim: int,
    dtype: torch.dtype,
    mode: str,
    packed_rows: int,
    load: int,
) -> PackedConfig:
    """Tile sizes for one kind of problem; arguments as of ``configs.forward_config``.

    Args:
        packed_rows: query rows that share a key head: batch · heads of a group · tokens.
        load: see ``configs.extra_load``.
    """
    if architecture == "interpreter":
        # Its cost is per operation: few large tiles, small enough to have edges.
        return PackedConfig(32 if packed_rows <= 32 else 64, 64, 32, num_warps=4, num_stages=1)
    width = max(head_dim, value_dim)
    amd = architecture.startswith("gfx")
    rows = max(16, 1 << (packed_rows - 1).bit_length())  # of fewer rows, no more than needed
    if dtype == torch.float32:
        # True float32 products have few matrix instructions or none, and keep much in registers.
        block_m = 32 if amd and rows > 16 and width <= 128 else 16
        block_n = 32 if width <= 128 else 16
        return PackedConfig(block_m, block_n, 16, num_warps=4 if amd else 8, num_stages=1)
    if rows <= 32:  # memory is the limit
        gathers = load == 2 and width > 64  # numbers for every row and key, in every tile
        warps = 4 if amd or (rows == 16 and not gathers) else 8
        edge_n = 64 if width <= 64 else 16
        block_n = 64 if width <= 128 else 32
        if width > 128 and architecture == "sm_100" and mode == "min_shift":
            return PackedConfig(rows, 32, 16, num_warps=8, num_stages=2, defer_n=16)
        return PackedConfig(rows, block_n, edge_n, num_warps=warps, num_stages=2)
    if amd:
        # 64 threads a warp and 512 registers each, but only 64 KB of shared memory.
        if width <= 64:
            return PackedConfig(min(rows, 128), 64, 32, num_warps=4, num_stages=2)
        if width <= 128:
            if load == 2 or rows == 64:
                return PackedConfig(64, 64, 32, num_warps=4, num_stages=2)
            return PackedConfig(128, 64, 16, num_warps=4, num_stages=2)
        return PackedConfig(64, 32, 32, num_warps=4, num_stages=2)
    return _nvidia_packed(architecture, width, mode, min(rows, 128), load)


def _nvidia_packed(architecture: str, width: int, mode: str, rows: int, load: int) -> PackedConfig:
    """sm_80 to sm_100 in half precision.

    Found by compiling: the largest tiles without spills. Numbers that are gathered for every row
    and key of a tile (factors, masks, biases) take an address each, so edge tiles are narrow.
    """
    if width <= 64:
        if load == 2 and architecture == "sm_80":
            return PackedConfig(64, 32, 16, num_warps=8, num_stages=2)
        if load == 2:
            return PackedConfig(rows, 32, 16, num_warps=8, num_stages=3)
        if architecture == "sm_80":
            return PackedConfig(rows, 32 if rows == 64 else 64, 16, num_warps=8, num_stages=3)
        edge_n = 16 if architecture == "sm_100" and mode == "plain" else 32
        return PackedConfig(rows, 64, edge_n, num_warps=8, num_stages=3)
    if width <= 128:
        if load == 2:
            return PackedConfig(64, 32, 16, num_warps=8, num_stages=2)
        block_n = 32 if architecture == "sm_80" else 64
        stages = 2 if architecture == "sm_80" else 3
        return PackedConfig(rows, block_n, 16, num_warps=8, num_stages=stages)
    if load == 2:
        return PackedConfig(32, 32, 16, num_warps=8, num_stages=2)
    block_n = 16 if architecture == "sm_80" and mode in ("log_additive", "min_shift") else 32
    edge_n = 32 if architecture == "sm_100" and mode == "log_additive" else 16
    return PackedConfig(64, block_n, edge_n, num_warps=8, num_stages=2)


def split_count(programs: int, tiles: int, processors: int) -> int:
    """Over how many programs the prefix of one packed tile is split.

    Args:
        programs: packed tiles of all key heads, each of which walks over the prefix.
        tiles: key tiles of the prefix.
        processors: multiprocessors of the device.
    """
    wanted = processors * _PROGRAMS_PER_PROCESSOR // max(programs, 1)
    return max(1, min(wanted, tiles // _TILES_PER_SPLIT))
