"""Device helpers shared by the attention kernels, each written once.

Legend: BLOCK_M query rows and BLOCK_N keys of one tile. Scores are *raw* (q·k, or softcap applied)
until :func:`softmax_step`, which works in base 2; see "Units" in README.md.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def split_program(program, rows, heads, BLOCK_M: tl.constexpr, REVERSED: tl.constexpr):
    """Batch row, head and first query row of a program; REVERSED starts with the last rows."""
    blocks = tl.cdiv(rows, BLOCK_M)
    block = program % blocks
    if REVERSED:
        block = blocks - 1 - block
    batch_head = program // blocks
    return batch_head // heads, batch_head % heads, block * BLOCK_M


@triton.jit
def block_of_turn(
    turn,
    rows,
    lines,
    section,
    heads,
    group,
    keys_shared,
    BLOCK_M: tl.constexpr,
    REVERSED: tl.constexpr,
):
    """What :func:`split_program` gives, in the order of a persistent grid; see persistent.py.

    REVERSED starts the last section with the last rows, which see most keys, the one before it
    with the first, and so on by turns.

    Args:
        lines: batch rows times heads.
        section: lines that are walked together; those whose keys are the same stand together.
        keys_shared: all batch rows read the same keys.
    """
    blocks = tl.cdiv(rows, BLOCK_M)
    number = turn // (section * blocks)
    first_line = number * section
    width = tl.minimum(section, lines - first_line)
    inside = turn - first_line * blocks
    block = inside // width
    if REVERSED:
        falls = (tl.cdiv(lines, section) - number) % 2 == 1
        block = tl.where(falls, blocks - 1 - block, block)
    line = first_line + inside % width
    member, key_line = line % group, line // group
    batches = lines // heads
    key_heads = heads // group
    shared = keys_shared != 0
    batch = tl.where(shared, key_line % batches, key_line // key_heads)
    key_head = tl.where(shared, key_line // batches, key_line % key_heads)
    return batch, key_head * group + member, block * BLOCK_M


@triton.jit
def key_tiles(
    first_position,
    last_position,
    first_key,
    keys,
    window,
    CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Tile range ``[low, high)`` that some row sees, and ``[inner_low, inner_high)`` in it.

    Every row of the block sees every key of an inner tile, as far as causality, the window and
    the key range ``[first_key, keys)`` are concerned. Positions are key indices and may lie
    outside it.
    """
    low_key = first_key
    high_key = keys
    inner_low_key = first_key
    inner_high_key = keys
    if CAUSAL:
        high_key = tl.minimum(high_key, last_position + 1)
        inner_high_key = tl.minimum(inner_high_key, first_position + 1)
    if HAS_WINDOW:
        low_key = tl.maximum(low_key, first_position - window + 1)
        low_key = tl.minimum(low_key, tl.maximum(keys, first_key))  # rows may be far behind
        inner_low_key = tl.maximum(inner_low_key, last_position - window + 1)
        if not CAUSAL:
            high_key = tl.minimum(high_key, last_position + window)
            inner_high_key = tl.minimum(inner_high_key, first_position + window)
    low = low_key // BLOCK_N
    high = tl.maximum(low, tl.cdiv(tl.maximum(high_key, 0), BLOCK_N))
    inner_low = tl.minimum(tl.maximum(tl.cdiv(inner_low_key, BLOCK_N), low), high)
    inner_high = tl.minimum(tl.maximum(inner_high_key, 0) // BLOCK_N, high)
    return low, high, inner_low, tl.maximum(inner_low, inner_high)


@triton.jit
def row_blocks(
    start_n,
    first_key,
    keys,
    position,
    rows,
    window,
    CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The range of row blocks that see some key of a tile: :func:`key_tiles` from the other side.

    ``position`` is that of row 0; keys are visible in ``[first_key, keys)`` only.
    """
    low_key = tl.maximum(start_n, first_key)
    high_key = tl.minimum(start_n + BLOCK_N, keys)
    low_row = 0
    high_row = rows
    if CAUSAL:
        low_row = tl.maximum(low_row, low_key - position)
    if HAS_WINDOW:
        high_row = tl.minimum(high_row, high_key - 1 + window - position)
        if not CAUSAL:
            low_row = tl.maximum(low_row, low_key - window + 1 - position)
    high_row = tl.where(low_key < high_key, high_row, 0)
    low = tl.minimum(low_row, rows) // BLOCK_M
    return low, tl.maximum(low, tl.cdiv(tl.maximum(high_row, 0), BLOCK_M))


@triton.jit
def in_band(positions, offs_n, keys, window, CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr):
    """The keys each row sees by causality, window and their number, as a bool tile.

    ``positions`` and ``offs_n`` broadcast against each other to the tile, rows along either axis.
    """
    seen = offs_n < keys
    if CAUSAL:
        seen = seen & (offs_n <= positions)
    if HAS_WINDOW:
        distance = positions - offs_n
        if not CAUSAL:
            distance = tl.abs(distance)
        seen = seen & (distance < window)
    return seen


@triton.jit
def load_columns(
    matrix_ptr,
    offs_row,
    stride,
    rows,
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    SIZE: tl.constexpr,
    CHECK_ROWS: tl.constexpr,
):
    """``[len(offs_row), WIDTH]``: columns from FIRST of a ``[rows, SIZE]`` matrix, 0 outside it.

    ``stride`` is (row, column).
    """
    columns = FIRST + tl.arange(0, WIDTH).to(offs_row.dtype)
    pointers = matrix_ptr + offs_row[:, None] * stride[0] + columns[None, :] * stride[1]
    if CHECK_ROWS:
        if FIRST + WIDTH > SIZE:
            inside = (offs_row[:, None] < rows) & (columns[None, :] < SIZE)
            return tl.load(pointers, mask=inside, other=0.0)
        else:
            return tl.load(pointers, mask=offs_row[:, None] < rows, other=0.0)
    else:
        if FIRST + WIDTH > SIZE:
            return tl.load(pointers, mask=columns[None, :] < SIZE, other=0.0)
        else:
            return tl.load(pointers)


@triton.jit
def store_columns(
    matrix_ptr,
    values,
    offs_row,
    stride,
    rows,
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Inverse of :func:`load_columns`: nothing is written outside the matrix."""
    columns = FIRST + tl.arange(0, WIDTH).to(offs_row.dtype)
    pointers = matrix_ptr + offs_row[:, None] * stride[0] + columns[None, :] * stride[1]
    inside = offs_row[:, None] < rows
    if FIRST + WIDTH > SIZE:
        inside = inside & (columns[None, :] < SIZE)
    tl.store(pointers, values.to(matrix_ptr.dtype.element_ty), mask=inside)


@triton.jit
def dot(a, b, accumulator):
    """``accumulator + a @ b`` in float32; float32 inputs are multiplied without TF32."""
    return tl.dot(a, b, acc=accumulator, input_precision="ieee")


@triton.jit
def tanh(x, PRECISE: tl.constexpr):
    """Hyperbolic tangent from exp2, which every target and the interpreter have.

    1 − 2 / (e²ˣ + 1) loses relative accuracy near 0; PRECISE takes Cephes' polynomial there.
    """
    magnitude = tl.abs(x)
    # 2 log2(e) = 2.885...; beyond |x| = 16 float32 cannot tell tanh from 1
    far = 1.0 - 2.0 / (tl.exp2(tl.minimum(magnitude, 16.0) * 2.8853900817779268) + 1.0)
    far = tl.where(x < 0, -far, far)
    if PRECISE:
        z = tl.minimum(x * x, 1.0)
        near = -5.70498872745e-3
        near = near * z + 2.06390887954e-2
        near = near * z - 5.37397155531e-2
        near = near * z + 1.33314422036e-1
        near = near * z - 3.33332819422e-1
        return tl.where(magnitude < 0.625, near * z * x + x, far)
    else:
        return far


@triton.jit
def manipulate(scores, factor, key_bias, row_min, MODE: tl.constexpr, VISIT: tl.constexpr):
    """The score transform of the three modes; columns that are not VISITed become -inf.

    What is the same for every row is first summed per key, then added to the tile once. Numbers
    per key and per row broadcast against the tile, whichever axis they lie along.

    Args:
        scores: a tile in any unit; base-2 logits if MODE is ``log_additive``.
        factor: one per key.
        key_bias: one per key or None, added after the manipulation, in the unit of scores.
        row_min: minimum of each row's visible scores, final unless VISIT is ``ones``.
        VISIT: ``every`` column; going forward ``min_shift`` takes the ``ones`` first, the
            ``deferred`` last.
    """
    if MODE == "multiplicative":
        scores = scores * factor
        if key_bias is not None:
            scores += key_bias
        return scores
    elif MODE == "min_shift" and VISIT == "every":
        scores = tl.where(factor == 1.0, scores, row_min + factor * (scores - row_min))
        if key_bias is not None:
            scores += key_bias
        return scores
    else:
        if VISIT == "ones":
            per_key = tl.where(factor == 1.0, 0.0, float("-inf"))
        elif VISIT == "deferred":
            scores = row_min + factor * (scores - row_min)
            per_key = tl.where(factor != 1.0, 0.0, float("-inf"))
        else:
            tl.static_assert(MODE == "log_additive")
            per_key = tl.log2(tl.where(factor > 0, factor, 1.0))
            per_key = tl.where(factor > 0, per_key, float("-inf"))
        if key_bias is not None:
            per_key += key_bias
        return scores + per_key


@triton.jit
def kept(seed_ptr, offs_row, offs_column, batch_head, threshold):
    """Which probabilities dropout keeps, whatever the tiling: a bool tile; see dropout.py.

    ``offs_row`` and ``offs_column`` are int32 and broadcast against each other.
    """
    offs_row, offs_column = tl.broadcast(offs_row, offs_column)
    word, _, _, _ = tl.philox(tl.load(seed_ptr), offs_column, offs_row, batch_head, 0)
    return (word >> 8).to(tl.int32) >= threshold


@triton.jit
def softmax_step(scores, row_max, row_sum, unit, SCALED: tl.constexpr):
    """One online-softmax update: weights, rescaling of the old state, new state.

    ``unit`` turns scores into base-2 logits, inside exp2's multiply-add; SCALED says that they
    are base-2 logits already. Masked scores are -inf; a row with nothing but -inf keeps weight 0.
    """
    new_max = tl.max(scores, 1)
    if not SCALED:
        new_max = new_max * unit
    new_max = tl.maximum(row_max, new_max)
    shift = tl.where(new_max == float("-inf"), 0.0, new_max)
    if SCALED:
        weights = tl.exp2(scores - shift[:, None])  # [BLOCK_M, BLOCK_N]
    else:
        weights = tl.exp2(scores * unit - shift[:, None])
    rescale = tl.exp2(row_max - shift)
    return weights, rescale, new_max, row_sum * rescale + tl.sum(weights, 1)
