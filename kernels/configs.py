"""Tile sizes of the forward kernels: data with reasons, no autotuning at run time.

What was measured (``tuned.py``) comes first; the rules here were found by compiling.

Legend: block_m query rows and block_n keys of one tile.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import lru_cache

import torch

from .tuned import TileConfig, tuned_config

FORWARD, DECODE, SHARED, PACKED = "forward", "decode", "shared prefix", "packed shared prefix"


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
def device_name(device: torch.device, interpreted: bool) -> str:
    """Which of an architecture's devices it is, as measurements name it."""
    return "interpreter" if interpreted else torch.cuda.get_device_name(device)


def extra_load(
    mode: str, features: Collection[str], segments: int = 1, *, width: int = 0, saves: bool = False
) -> int:
    """How many registers ``features`` need beyond the plain kernel: 0 few, 1 more, 2 most.

    Args:
        width: the larger head dim.
        saves: the row minimum's column is tracked, for a backward pass.
        features: names of what the call uses beyond ``causal``.
        segments: walks over keys, each with tile ranges of its own.
    """
    if not {"bias", "mask", "dropout"}.isdisjoint(features):  # a number per query and key
        return 2
    if saves and width > 128:
        return 2
    costly = {"softcap", "alibi"}
    if mode == "min_shift" or segments > 1:
        costly |= {"window", "padding"}
    return int(not costly.isdisjoint(features))


def forward_config(
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
    """Tile sizes of the forward kernel for one kind of problem: measured ones, else the rule's.

    Args:
        architecture: see :func:`device_architecture`.
        mode: ``plain`` without factors, else the op's mode.
        queries: query rows per head.
        load: see :func:`extra_load`.
        length: of the keys, see ``tuned.length_bucket``; ``None`` asks for the rule alone.
        device: see :func:`device_name`.
    """
    problem = (architecture, head_dim, value_dim, dtype, mode, queries, load)
    return tuned_config("attention", *problem, causal, length, device) or forward_rule(*problem)


@lru_cache
def forward_rule(
    architecture: str,
    head_dim: int,
    value_dim: int,
    dtype: torch.dtype,
    mode: str,
    queries: int,
    load: int,
) -> TileConfig:
    """Tile sizes of the forward kernel that compile well; arguments of :func:`forward_config`.

    Registers decide: a thread holds ``block_m * value_dim`` of the output and
    ``block_m * block_n`` scores, over 32 threads a warp (64 on AMD), of at most 255 (512).
    """
    if architecture == "interpreter":
        # Its cost is per operation, not per element: few large tiles, small enough to have edges.
        return TileConfig(32 if queries <= 32 else 64, 64, num_warps=4, num_stages=1)
    width = max(head_dim, value_dim)
    if dtype == torch.float32:
        # True float32 products have few matrix instructions or none, and keep much in registers.
        if architecture.startswith("gfx"):
            return TileConfig(32, 32 if width <= 128 else 16, num_warps=4, num_stages=1)
        if width > 128:
            return TileConfig(16, 32, num_warps=8, num_stages=1)
        return TileConfig(32, 16 if mode == "min_shift" else 32, num_warps=8, num_stages=1)
    if queries <= 16:
        # A few tokens that are trained: memory is the limit, 16 rows are the least a dot takes.
        if width <= 128:
            return TileConfig(16, 64, num_warps=4, num_stages=2)
        warps = 4 if architecture.startswith("gfx") else 8
        return TileConfig(16, 32, num_warps=warps, num_stages=2)
    if architecture.startswith("gfx"):
        # 64 threads a warp and 512 registers each, but only 64 KB of shared memory.
        if width <= 128:
            rows = 128 if width <= 64 and load < 2 else 64
            narrow = load == 2 and width > 64
            return TileConfig(rows, 32 if narrow else 64, num_warps=4, num_stages=2)
        return TileConfig(64, 32, num_warps=4, num_stages=2)
    return _nvidia_forward(architecture, head_dim, value_dim, mode == "min_shift", load)


def _nvidia_forward(
    architecture: str, head_dim: int, value_dim: int, deferred: bool, load: int
) -> TileConfig:
    """sm_80 to sm_100 in half precision; ``deferred`` means a third loop, for min_shift.

    Found by compiling: the largest tiles without spills (``python -m bench.compile_report``).
    """
    if max(head_dim, value_dim) <= 64:
        narrow = load == 2 and (deferred or architecture != "sm_90")
        return TileConfig(128, 32 if narrow else 64, num_warps=8, num_stages=3)
    if value_dim <= 128:
        stages = 3 if head_dim <= 128 else 2  # 192/128 with 3 would not fit sm_80's memory
        if architecture == "sm_80" and load:
            return TileConfig(64, 64, num_warps=8, num_stages=2)  # the query is held as well
        parts = split_head_dim(head_dim)[1] > 0  # of which both are held
        if load or (deferred and (head_dim > 128 or (parts and architecture == "sm_80"))):
            return TileConfig(128, 32, num_warps=8, num_stages=stages)
        # pipelining the edge tiles as well costs min_shift its last registers
        edge_stages = 1 if deferred else stages
        return TileConfig(128, 64, num_warps=8, num_stages=stages, edge_stages=edge_stages)
    if deferred and load == 2:
        return TileConfig(32, 32, num_warps=8, num_stages=2)
    # 128 rows of 256 values are 128 registers: clean on sm_90 only, and without a third loop
    if architecture == "sm_90" and not deferred and not load:
        return TileConfig(128, 32, num_warps=8, num_stages=2)
    narrow = load or (deferred and architecture == "sm_90")
    return TileConfig(64, 16 if narrow else 32, num_warps=8, num_stages=2)


def packs_queries(queries: int, sharing: int) -> bool:
    """Whether queries of several batch rows and heads share a tile over a shared prefix.

    A tile has at least 16 rows, the least a matrix product takes, so a plain tile of fewer queries
    is mostly padding, and each of them reads the whole prefix. Packed, they read it once per tile.
    Longer suffixes fill tiles of their own, where rows need not be gathered one by one.

    Args:
        queries: query rows per head.
        sharing: batch rows times query heads that read the same prefix keys.
    """
    return decodes(queries) and sharing > 1


def decodes(queries: int) -> bool:
    """Whether so few query rows per head fill no tile of their own: then reading keys is the work.

    The heads of a group then share a tile, so that their keys are read once, and the keys are
    split over programs.
    """
    return queries <= 16


def fused_kernel(queries: int, sharing: int, *, has_prefix: bool, trains: bool) -> str:
    """Which kernel family computes a call: ``FORWARD``, ``DECODE``, ``SHARED`` or ``PACKED``.

    Args:
        queries: query rows per head.
        sharing: batch rows times query heads that read the same prefix keys.
        trains: something is saved for a backward pass, or dropped: the packed kernel, which also
            decodes, knows neither.
    """
    if has_prefix:
        return PACKED if packs_queries(queries, sharing) and not trains else SHARED
    return DECODE if decodes(queries) and not trains else FORWARD


def shared_prefix_config(
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
    """Tile sizes of the shared-prefix kernel; arguments as in :func:`forward_config`.

    Two walks hold the addresses of both segments, so that on NVIDIA some tiles are smaller.
    """
    problem = (architecture, head_dim, value_dim, dtype, mode, queries, load)
    measured = tuned_config("shared_prefix", *problem, causal, length, device)
    if measured is not None:
        return measured
    config = forward_rule(*problem)
    if not architecture.startswith("sm_") or dtype == torch.float32 or queries <= 16:
        return config
    width, deferred = max(head_dim, value_dim), mode == "min_shift"
    if width > 128 and deferred and architecture == "sm_90" and not load:
        return TileConfig(128, 16, num_warps=8, num_stages=2)  # a warpgroup's product needs 64 rows
    if width > 128 and (load == 2 or (deferred and architecture == "sm_90")):
        return TileConfig(32, 32, num_warps=8, num_stages=2)
    if load == 2:
        rows = 128 if width <= 64 else 64
        return TileConfig(rows, 32, num_warps=8, num_stages=3 if width <= 64 else 2)
    if 64 < width <= 128 and deferred:
        return TileConfig(128, 32, num_warps=8, num_stages=3)
    return config
