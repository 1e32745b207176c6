"""Tile sizes of the forward kernel: data with reasons, no autotuning at run time.

Legend: block_m query rows and block_n keys of one tile.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

_SHORT_QUERY = 16  # rows: decoding, or a few target tokens


@dataclass(frozen=True)
class TileConfig:
    """How the work of one program is cut.

    ``edge_stages`` is the pipeline depth of the masked tiles (diagonal, window, last keys).
    ``skip_plain_tiles`` branches around the manipulation in tiles whose factors are all 1.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    edge_stages: int = 1
    skip_plain_tiles: bool = False


def split_head_dim(size: int) -> tuple[int, int]:
    """Two powers of two, at least 16 or else 0, that hold a head dim with the least padding.

    192 = 128 + 64, 96 = 64 + 32, 80 = 64 + 16, 40 = 32 + 16 (8 of them masked), 64 = 64 + 0.
    """
    if not 1 <= size <= 256:
        raise ValueError(f"head dims must lie between 1 and 256, got {size}.")
    whole = max(16, 1 << (size - 1).bit_length())
    first = whole // 2
    if first < 16 or size <= first:
        return whole, 0
    second = max(16, 1 << (size - first - 1).bit_length())
    return (whole, 0) if first + second >= whole else (first, second)


@lru_cache
def device_architecture(device: torch.device, interpreted: bool) -> str:
    """Key of the tables below: ``interpreter``, ``sm_90``, ``gfx942``..."""
    if interpreted:
        return "interpreter"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


@lru_cache
def forward_config(
    architecture: str,
    head_dim: int,
    value_dim: int,
    dtype: torch.dtype,
    mode: str,
    queries: int,
    dense: bool,
) -> TileConfig:
    """Tile sizes of the forward kernel for one kind of problem.

    Args:
        architecture: see :func:`device_architecture`.
        mode: ``plain`` without factors, else the op's mode.
        queries: query rows per head.
        dense: a mask or bias with a number per query and key is read.
    """
    if architecture == "interpreter":
        # Its cost is per operation, not per element: few large tiles, small enough to have edges.
        return TileConfig(32 if queries <= 32 else 64, 64, num_warps=4, num_stages=1)
    width = max(head_dim, value_dim)
    if dtype == torch.float32:
        return TileConfig(32, 32, num_warps=4, num_stages=2)
    if width <= 64:
        return TileConfig(128, 64, num_warps=4, num_stages=3)
    if width <= 128:
        return TileConfig(128, 64, num_warps=8, num_stages=3)
    return TileConfig(128, 32, num_warps=8, num_stages=2)
