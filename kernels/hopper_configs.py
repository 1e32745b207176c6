"""Tiles of the Hopper kernel: data with reasons, no autotuning at run time.

Legend: D head dim, Dv value dim.
"""

from __future__ import annotations

from dataclasses import dataclass

SHARED_LIMIT = 227 << 10  # bytes that one program can have on sm_90
ROWS_AT_ONCE = 128  # query rows of a program: two consumers of 64
HEAD_DIMS = (64, 128, 256)


@dataclass(frozen=True)
class HopperConfig:
    """How the work of one program is cut.

    ``stages`` tiles of ``block_n`` keys, and as many of values, are in shared memory at once.
    ``own_output`` gives the output shared memory of its own, so that the queries of the next
    piece of work are loaded while this one's output is written.
    """

    block_n: int
    stages: int
    own_output: bool

    def shared_bytes(self, head_dim: int, value_dim: int) -> int:
        """Shared memory of the tiles, 16 bit an element; the barriers come on top."""
        output = ROWS_AT_ONCE * value_dim if self.own_output else 0
        ring = self.stages * self.block_n * (head_dim + value_dim)
        return 2 * (ROWS_AT_ONCE * max(head_dim, value_dim) + ring + output)


def hopper_config(head_dim: int, value_dim: int) -> HopperConfig:
    """Tiles for one kind of problem.

    Registers decide: a thread of a consumer has 240, for a row's share of the output (Dv / 2), of
    the scores (block_n / 2) and of the weights in half precision (block_n / 4). Wider tiles take
    fewer rescalings of the output. Then shared memory decides.
    """
    width = max(head_dim, value_dim)
    if width <= 64:
        return HopperConfig(block_n=128, stages=4, own_output=True)
    if width <= 128:
        return HopperConfig(block_n=128, stages=2, own_output=True)
    return HopperConfig(block_n=64, stages=2, own_output=False)
