"""Persistent grids: as many programs as run at once, which take blocks of rows in turns.

Under a causal mask a head's last rows see all of its keys and its first rows a tile of them. A grid
of a program for each block leaves the balance to the order in which programs end. A persistent one
settles it beforehand: blocks are sorted by length over many heads and dealt out in rounds, to
each program one, so that what a round gives differs little.

Sorted over all heads at once, all their keys would be read at the same time. So heads are walked in
sections whose keys stay in the second-level cache together. The last section goes from the longest
block to the shortest, the one before it from the shortest to the longest, and so on: lengths then
never jump from one section to the next, where a round would hold both, and the end is fine-grained.
With an even number of sections a program that gets the longer end of each round in one gets the
shorter in the next.

Legend: B batch, Hq/Hk query/key heads, Tk key tokens, D head dim, Dv value dim.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

INTERPRETED_PROGRAMS = 3  # few, so that a program takes several blocks
_INTERPRETED_CACHE = 1 << 16
_CACHE_SHARE = 2  # of the second-level cache half is left to queries and outputs


class Resources(NamedTuple):
    """What the programs of one multiprocessor share."""

    registers: int  # of 32 bits
    shared: int  # bytes
    reserved: int  # bytes that each program takes beyond its own
    threads: int
    warp_size: int


_known: dict[tuple[Any, ...], int] = {}


def resident_programs(registers: int, shared: int, num_warps: int, have: Resources) -> int:
    """How many programs of a kernel run on one multiprocessor at once, at least 1.

    Args:
        registers: of a thread.
        shared: bytes of a program.
    """
    threads = num_warps * have.warp_size
    granted = -(-registers // 8) * 8  # registers are handed out by eights
    return max(
        1,
        min(
            have.registers // (max(granted, 8) * threads),
            have.shared // max(shared + have.reserved, 1),
            have.threads // threads,
        ),
    )


def programs_at_once(
    kernel: Any, arguments: tuple[Any, ...], options: dict[str, Any], query: Tensor
) -> int:
    """How many programs of a variant run on the device of ``query`` at once; found out once.

    Args:
        arguments, options: of the launch; ``options`` name the variant as ``SPEC``.
    """
    if triton.knobs.runtime.interpret:
        return INTERPRETED_PROGRAMS
    place = (query.device, query.dtype, *options.values())
    if place not in _known:
        compiled = kernel.warmup(*arguments, grid=(1,), **options)
        compiled._init_handles()  # as in Triton's tutorials: registers are known once it is loaded
        properties = torch.cuda.get_device_properties(query.device)
        fits = resident_programs(
            compiled.n_regs,
            compiled.metadata.shared,
            options["num_warps"],
            _resources(properties),
        )
        _known[place] = properties.multi_processor_count * fits
    return _known[place]


def _resources(properties: Any) -> Resources:
    """Those of a device, from what torch says of it."""
    amd = torch.version.hip is not None
    return Resources(
        # four vector units with 512 registers for each of 64 lanes, where NVIDIA has 64 K
        registers=(1 << 17) if amd else (1 << 16),
        shared=properties.shared_memory_per_multiprocessor,
        reserved=0 if amd else 1 << 10,
        threads=properties.max_threads_per_multi_processor,
        warp_size=properties.warp_size,
    )


def section_of(key: Tensor, value: Tensor, heads: int, blocks: int, programs: int) -> int:
    """How many heads, counted over all batch rows, are walked together.

    Args:
        key, value: ``[B, Hk, Tk, D]`` and ``[B, Hk, Tk, Dv]``, expanded.
        heads: Hq.
        blocks: of query rows, of each head.
        programs: that run at once.
    """
    batch, key_heads, keys, _ = key.shape
    sharing = heads // key_heads * (batch if key.stride(0) == 0 else 1)
    needed = keys * (key.shape[3] + value.shape[3]) * key.element_size()
    cache = _INTERPRETED_CACHE
    if key.device.type == "cuda":
        cache = torch.cuda.get_device_properties(key.device).L2_cache_size
    fits = max(1, cache // _CACHE_SHARE // max(needed, 1))
    return even_sections(batch * heads // sharing, sharing, fits, blocks, programs)


def even_sections(sets: int, sharing: int, fits: int, blocks: int, programs: int) -> int:
    """Heads of a section, so that there is an even number of them, each no less than a round.

    Args:
        sets: of heads that share keys, and are not parted unless there is only one set.
        sharing: heads in a set.
        fits: sets whose keys the cache holds.
    """
    if sets == 1:
        sets, sharing = sharing, 1
        fits = sets
    each = max(fits, -(-programs // (blocks * sharing)))
    sections = -(-sets // each)
    sections += sections % 2
    return max(1, -(-sets // sections)) * sharing
