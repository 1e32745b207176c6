"""What the partitions of the Hopper kernel share: its variant, pieces of work, rings of buffers.

Legend: B batch, Hq/Hk query/key heads, Tq/Tk query/key tokens, D head dim, Dv value dim.
"""

from __future__ import annotations

from dataclasses import dataclass

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .primitives import key_tiles

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
def place_of(turn, program, programs, paired):
    """Which unit of work a program takes in a turn: a block of rows, or half of two if paired.

    Single blocks become shorter and shorter: every other turn goes backwards, so that the program
    with the longest of one turn has the shortest of the next. Pairs are all as long.
    """
    turn = turn >> paired
    back = (turn & 1) * (1 - paired) * (programs - 1 - 2 * program)
    return turn * programs + program + back


@gluon.jit
def turns_of(program, programs, order):
    """How many blocks of rows a program takes; ``order`` is as in :func:`piece_of_work`."""
    row_blocks, batch_heads, _, _, paired = order
    units = (row_blocks >> paired) * batch_heads
    full = units // programs
    last = place_of(full << paired, program, programs, paired) < units
    return (full + last.to(gl.int32)) << paired


@gluon.jit
def piece_of_work(turn, program, programs, order):
    """Batch row, head and block of rows of a program's turn: section by section, the longest first.

    A section is as many heads as have their keys and values in the second-level cache together.
    With causality the first block is the shortest and the last the longest; a pair is one from
    either end, the first of them in even turns.

    Args:
        order: ``row_blocks, batch_heads, heads, section, paired`` of the kernel.
    """
    row_blocks, batch_heads, heads, section, paired = order
    place = place_of(turn, program, programs, paired)
    blocks = row_blocks >> paired
    per_section = section * blocks
    first = place // per_section * section
    rest = place % per_section
    width = gl.minimum(section, batch_heads - first)  # the last section may hold fewer heads
    batch_head = first + rest % width
    block = rest // width
    if (turn & paired) == 0:
        block = row_blocks - 1 - block
    return batch_head // heads, batch_head % heads, block


@gluon.jit
def visible_tiles(block, rows, keys, query_offset, SPEC: gl.constexpr):
    """Tiles that some row of both consumers sees, ``[0, high)``; all rows see ``[0, inner)``.

    Of a block after the last row, which completes a pair, nothing is seen.
    """
    start = block * ROWS * CONSUMERS
    first_position = query_offset + start
    last_position = query_offset + gl.minimum(start + ROWS * CONSUMERS, rows) - 1
    _, high, _, inner = key_tiles(
        first_position, last_position, 0, keys, 0, SPEC.causal, False, SPEC.block_n
    )
    return gl.where(start < rows, high, 0), inner


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
