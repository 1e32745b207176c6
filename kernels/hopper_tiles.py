"""What the Hopper kernel's tiles are. Needs neither triton nor torch.

Legend: D head dim, Dv value dim.
"""

from __future__ import annotations

from dataclasses import dataclass

SHARED_LIMIT = 227 << 10  # bytes that one program can have on sm_90
BARRIERS = 1 << 10  # bytes of it, at most, that are no tiles
ROWS_AT_ONCE = 128  # query rows of a program: two consumers of 64
HEAD_DIMS = (64, 128, 256)
BLOCKS, STAGES = (32, 64, 128), (2, 3, 4, 5, 6, 7, 8)  # that the kernel can be compiled with


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

    def trouble(self, head_dim: int, value_dim: int) -> str | None:
        """Why a problem cannot have these tiles, if it cannot."""
        for name, size in (("head_dim", head_dim), ("value_dim", value_dim)):
            if size not in HEAD_DIMS:
                return f"{name} must be one of 64, 128, 256, got {size}."
        if self.block_n not in BLOCKS:
            return f"block_n must be one of 32, 64, 128, got {self.block_n}."
        if self.stages not in STAGES:
            return f"stages must lie between 2 and 8, got {self.stages}."
        if head_dim != value_dim and not self.own_output:
            return "own_output must be true where values are of another size than keys."
        shared = self.shared_bytes(head_dim, value_dim) + BARRIERS
        if shared > SHARED_LIMIT:
            return f"the tiles must fit {SHARED_LIMIT} bytes of shared memory, got {shared}."
        return None
