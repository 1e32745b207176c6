"""What the partitions of the Hopper kernel share: its variant, pieces of work, rings of buffers.

Legend: B batch, Hq/Hk query/key heads, Tq/Tk query/key tokens, D head dim, Dv value dim.
"""

from __future__ import annotations

from dataclasses import dataclass

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .primitives import block_of_turn, key_tiles

ROWS = gl.constexpr(64)  # of a consumer: what the matrix product of one warpgroup takes
CONSUMERS = gl.constexpr(2)


@dataclass(frozen=True)
class HopperVariant:
    """Everything the kernel knows at compile time; see ``hopper_configs.HopperConfig``."""

    mode: str  # "plain" without factors
    causal: bool
    scaled: bool  # scores become base-2 logits before, not within, the softmax's exp2
    head_dim: int
    value_dim: int
    block_n: int
    stages: int
    own_output: bool


@gluon.jit
def piece_of_work(turn, order, SPEC: gl.constexpr):
    """Batch row, head and first row of a turn, in the order of a persistent grid.

    Args:
        order: ``rows, lines, section, heads, group, keys_shared`` of ``primitives.block_of_turn``.
    """
    BLOCK_M: gl.constexpr = ROWS * CONSUMERS
    REVERSED: gl.constexpr = SPEC.causal
    rows, lines, section, heads, group, keys_shared = order
    shared = keys_shared != 0
    return block_of_turn(turn, rows, lines, section, heads, group, shared, BLOCK_M, REVERSED)


@gluon.jit
def visible_tiles(start, rows, keys, query_offset, SPEC: gl.constexpr):
    """Tiles that some row of both consumers sees, ``[0, high)``; all rows see ``[0, inner)``."""
    # 0, which the compiler cannot know: what depends on the number of tiles alone, found once for
    # all pieces of work where nothing is causal, would be held through the loops over tiles
    keys += start >> 30
    first_position = query_offset + start
    last_position = query_offset + gl.minimum(start + ROWS * CONSUMERS, rows) - 1
    _, high, _, inner = key_tiles(
        first_position, last_position, 0, keys, 0, SPEC.causal, False, SPEC.block_n
    )
    return high, inner


@gluon.jit
def factor_row(batch, head, factor_heads):
    """Row of the factors of a batch row and head; all heads share one where there is 1 a row."""
    return (batch * factor_heads + gl.minimum(head, factor_heads - 1)).to(gl.int64)


@gluon.jit
def deferred_tiles(before_ptr, row, tiles, high, SPEC: gl.constexpr):
    """How many flagged tiles of a row of factors lie below ``high`` and are visited again."""
    count = high * 0
    if SPEC.mode == "min_shift":
        count = gl.load(before_ptr + row * (tiles + 1) + high)
    return count


@gluon.jit
def ring(step, STAGES: gl.constexpr):
    """Slot and parity of the ``step``-th use of a ring of buffers."""
    return step % STAGES, (step // STAGES) & 1
