"""What one tile adds to the gradients, shared by the backward kernels.

A backward launch sees one segment of keys: all of them, or first a shared prefix and then a row's
own. Everything is derived in README.md.

Legend: M query rows and N keys of a tile, [M, N], or [N, M] where it is TRANSPOSED; numbers per row
and per key come ready to broadcast against it. d_x is the gradient of x.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .primitives import dot, in_band, kept, load_columns, manipulate, tanh


@triton.jit
def per_row(numbers, TRANSPOSED: tl.constexpr):
    """``[M]`` numbers, to broadcast against a tile."""
    if TRANSPOSED:
        return numbers[None, :]
    else:
        return numbers[:, None]


@triton.jit
def load_rows(
    matrix_ptr,
    offs,
    stride,
    rows,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    SIZE: tl.constexpr,
    CHECK_ROWS: tl.constexpr,
):
    """A tile for each part of a head dim SIZE = FIRST + SECOND; one if SECOND is 0."""
    part0 = load_columns(matrix_ptr, offs, stride, rows, 0, FIRST, SIZE, CHECK_ROWS)
    if SECOND > 0:
        part1 = load_columns(matrix_ptr, offs, stride, rows, FIRST, SECOND, SIZE, CHECK_ROWS)
        return part0, part1
    else:
        return (part0,)


@triton.jit
def load_lse(lse_ptr, rest_ptr, offs_m, rows_left, SPEC: tl.constexpr):
    """``[M]`` log-sum-exp in base 2, and what rounding took from it.

    It is +inf, which makes all weights 0, where a row sees nothing.
    """
    lse = tl.load(lse_ptr + offs_m, mask=offs_m < rows_left, other=float("-inf"))
    lse = tl.where(lse == float("-inf"), float("inf"), lse * 1.4426950408889634)  # log2(e)
    if SPEC.save_rest:
        return lse, tl.load(rest_ptr + offs_m, mask=offs_m < rows_left, other=0.0)
    else:
        return lse, 0


@triton.jit
def load_row_numbers(
    pointers, start, offs_m, rows_left, SPEC: tl.constexpr, TRANSPOSED: tl.constexpr
):
    """What a tile needs of its rows, ready to broadcast against it.

    Log-sum-exp, its rest, δ, the log-sum-exp's gradient, and for ``min_shift`` the minimum, its
    column and its gradient.
    What a variant has no use for is 0, here and below: a tuple cannot hold None.

    Args:
        pointers: to the first of all rows.
        start: number of the block's first row, among those of all heads and batch rows.
    """
    lse_ptr, rest_ptr, delta_ptr, d_lse_ptr, minimum_ptr, argmin_ptr, d_minimum_ptr = pointers
    inside = offs_m < rows_left
    if SPEC.save_rest:
        rest_ptr += start
    lse, rest = load_lse(lse_ptr + start, rest_ptr, offs_m, rows_left, SPEC)
    lse = per_row(lse, TRANSPOSED)
    if SPEC.save_rest:
        rest = per_row(rest, TRANSPOSED)
    delta = per_row(tl.load(delta_ptr + start + offs_m, mask=inside, other=0.0), TRANSPOSED)
    d_lse = 0
    if SPEC.d_lse_apart:
        d_lse = per_row(tl.load(d_lse_ptr + start + offs_m, mask=inside, other=0.0), TRANSPOSED)
    minimum = 0
    argmin = 0
    d_minimum = 0
    if SPEC.mode == "min_shift":
        minimum = tl.load(minimum_ptr + start + offs_m, mask=inside, other=0.0)
        minimum = per_row(minimum, TRANSPOSED)
        argmin = tl.load(argmin_ptr + start + offs_m, mask=inside, other=-1)
        argmin = per_row(argmin, TRANSPOSED)
        d_minimum = tl.load(d_minimum_ptr + start + offs_m, mask=inside, other=0.0)
        d_minimum = per_row(d_minimum, TRANSPOSED)
    return lse, rest, delta, d_lse, minimum, argmin, d_minimum


@triton.jit
def load_key_numbers(factor_ptr, bias_ptr, offs_n, strides, inside, SPEC: tl.constexpr):
    """``[N]`` each: factor, and the bias that is the same for every row, in base 2."""
    factor = 0
    key_bias = 0
    if SPEC.has_key_factor:
        factor = tl.load(factor_ptr + offs_n * strides[0], mask=offs_n < inside, other=1.0)
    if SPEC.bias_per_key:
        key_bias = tl.load(bias_ptr + offs_n * strides[1], mask=offs_n < inside, other=0.0)
        key_bias = key_bias.to(tl.float32) * 1.4426950408889634  # log2(e)
    return factor, key_bias


@triton.jit
def load_tile(matrix_ptr, offs_m, offs_n, stride, rows_left, inside):
    """A tile of what has a number per query row and key; 0 outside."""
    readable = (offs_m < rows_left) & (offs_n < inside)
    return tl.load(matrix_ptr + offs_m * stride[0] + offs_n * stride[1], mask=readable, other=0)


@triton.jit
def tile_visibility(
    mask_ptr,
    shown,
    offs_m,
    offs_n,
    positions,
    start_n,
    stride_mask,
    limits,
    SPEC: tl.constexpr,
    EDGE: tl.constexpr,
):
    """Which keys of a tile its rows see; only for EDGE tiles and under a dense mask.

    Args:
        shown: which keys the padding mask shows, if there is one.
        offs_m, offs_n: counted from where ``mask_ptr`` points to.
        positions: of the rows, counted like ``start_n + offs_n``.
        limits: rows from ``offs_m`` = 0 on, keys of the segment, window.
    """
    rows_left, keys, window = limits
    visible = 0
    if EDGE:
        visible = in_band(
            positions, start_n + offs_n, keys, window, SPEC.causal, SPEC.has_window
        )  # fmt: skip
        if SPEC.has_padding:
            visible = visible & shown
    if SPEC.has_mask:
        dense = load_tile(mask_ptr, offs_m, offs_n, stride_mask, rows_left, keys - start_n) != 0
        if EDGE:
            visible = visible & dense
        else:
            visible = dense
    return visible


@triton.jit
def differentiate_tile(
    queries,
    d_outs,
    keys,
    values,
    row_numbers,
    factor,
    key_bias,
    bias,
    visible,
    keep,
    columns,
    units,
    SPEC: tl.constexpr,
    EDGE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    LINEAR: tl.constexpr,
):
    """Recompute a tile's weights and differentiate the loss by its logits, factors and scores.

    Args:
        queries, d_outs: ``[M, d]`` parts of the rows and of the output's gradient.
        keys, values: ``[N, d]`` parts.
        row_numbers: of :func:`load_row_numbers`, per row.
        factor, key_bias: per key.
        bias, visible, keep: tiles: bias in base 2, what is seen, what dropout keeps.
        columns: of the keys, counted like the row's argmin.
        units: base-2 logits per raw score, of q·k inside the softcap's tanh, 1 / (1 - dropout).
        LINEAR: the caller multiplies the scores' gradients by the factors, and needs no others.
    Returns: four tiles: the weights that met the values; the gradients of the logits, of the
        factors (still in the unit of scores), and of q·k (still without ``scale``).
    """
    lse, rest, delta, d_lse, minimum, argmin, d_minimum = row_numbers
    unit, inner_scale, keep_scale = units
    M: tl.constexpr = SPEC.block_m
    N: tl.constexpr = SPEC.block_n
    if TRANSPOSED:
        zeros = tl.zeros([N, M], tl.float32)
        scores = dot(keys[0], tl.trans(queries[0]), zeros)
        d_weights = dot(values[0], tl.trans(d_outs[0]), zeros)
        if SPEC.d1 > 0:
            scores = dot(keys[1], tl.trans(queries[1]), scores)
        if SPEC.v1 > 0:
            d_weights = dot(values[1], tl.trans(d_outs[1]), d_weights)
    else:
        zeros = tl.zeros([M, N], tl.float32)
        scores = dot(queries[0], tl.trans(keys[0]), zeros)
        d_weights = dot(d_outs[0], tl.trans(values[0]), zeros)
        if SPEC.d1 > 0:
            scores = dot(queries[1], tl.trans(keys[1]), scores)
        if SPEC.v1 > 0:
            d_weights = dot(d_outs[1], tl.trans(values[1]), d_weights)
    if SPEC.has_softcap:
        scores = tanh(scores * inner_scale, queries[0].dtype == tl.float32)
        slope = 1.0 - scores * scores
    if SPEC.scaled:
        scores = scores * unit

    WEIGHTED: tl.constexpr = SPEC.has_key_factor and SPEC.mode == "log_additive"
    logits = scores
    if SPEC.has_key_factor and not WEIGHTED:
        logits = manipulate(scores, factor, None, minimum, SPEC.mode, "every")
    if SPEC.bias_per_key:
        logits += key_bias
    if SPEC.has_bias and not SPEC.bias_per_key:
        logits += bias
    if SPEC.scaled:
        logits = logits - lse
    else:
        logits = logits * unit - lse
    if SPEC.save_rest:
        logits = logits - rest
    if WEIGHTED:  # a key of factor 0 is not part of the log-sum-exp and may lie far above it
        logits = tl.minimum(logits, 115.0)
    weights = tl.exp2(logits)
    if SPEC.has_mask or EDGE:
        weights = tl.where(visible, weights, 0.0)

    if SPEC.has_dropout:
        d_weights = tl.where(keep, d_weights * keep_scale, 0.0)
    d_weights = d_weights - delta
    if SPEC.d_lse_apart:
        d_weights += d_lse
    d_logits = weights * d_weights
    d_factors = d_logits
    if WEIGHTED:
        weights = weights * factor
        d_logits = d_factors * factor
    d_scores = d_logits
    if SPEC.has_key_factor and not WEIGHTED and not LINEAR:
        if SPEC.mode == "min_shift":
            d_factors = (scores - minimum) * d_logits
        else:
            d_factors = scores * d_logits
        d_scores = d_logits * factor
    if SPEC.mode == "min_shift":
        d_scores = tl.where(columns == argmin, d_scores + d_minimum, d_scores)
    if SPEC.has_softcap:
        d_scores = d_scores * slope
    if SPEC.has_dropout:
        weights = tl.where(keep, weights * keep_scale, 0.0)
    return weights, d_logits, d_factors, d_scores


@triton.jit
def visit_keys(
    tile,
    queries,
    d_outs,
    row_numbers,
    position,
    pointers,
    strides,
    limits,
    units,
    dropout,
    SPEC: tl.constexpr,
    EDGE: tl.constexpr,
):
    """One key tile: its keys and factors, and the gradients of its logits and scores.

    ``position`` is that of the first row, counted like the segment's keys.
    """
    key_ptr, value_ptr, factor_ptr, bias_ptr, padding_ptr, mask_ptr = pointers
    stride_key, stride_value, stride_factor, stride_bias, stride_padding, stride_mask = strides
    rows_left, keys, _ = limits
    seed_ptr, threshold, first_column, batch_head, start_m = dropout
    start_n = tile * SPEC.block_n
    first = start_n.to(tl.int64)
    inside = keys - start_n
    offs_m = tl.arange(0, SPEC.block_m)
    offs_n = tl.arange(0, SPEC.block_n)
    columns = (first_column + start_n + offs_n)[None, :]
    keep = 0
    if SPEC.has_dropout:
        keep = kept(seed_ptr, (start_m + offs_m)[:, None], columns, batch_head, threshold)
    positions = (position + offs_m)[:, None]
    if SPEC.wide:
        offs_m = offs_m.to(tl.int64)
        offs_n = offs_n.to(tl.int64)
    key_ptr += first * stride_key[0]
    value_ptr += first * stride_value[0]
    keys_tile = load_rows(
        key_ptr, offs_n, stride_key, inside, SPEC.d0, SPEC.d1, SPEC.head_dim, EDGE
    )
    values_tile = load_rows(
        value_ptr, offs_n, stride_value, inside, SPEC.v0, SPEC.v1, SPEC.value_dim, EDGE
    )
    shown = 0
    if SPEC.has_padding and EDGE:
        padding_ptr += first * stride_padding
        shown = tl.load(padding_ptr + offs_n * stride_padding, mask=offs_n < inside, other=0) != 0
        shown = shown[None, :]
    if SPEC.has_mask:
        mask_ptr += first * stride_mask[1]
    visible = tile_visibility(
        mask_ptr, shown, offs_m[:, None], offs_n[None, :], positions, start_n, stride_mask,
        limits, SPEC, EDGE,
    )  # fmt: skip
    if SPEC.has_key_factor:
        factor_ptr += first * stride_factor
    if SPEC.has_bias:
        bias_ptr += first * stride_bias[1]
    factor, key_bias = load_key_numbers(
        factor_ptr, bias_ptr, offs_n, (stride_factor, stride_bias[1]), inside, SPEC
    )
    if SPEC.has_key_factor:
        factor = factor[None, :]
    if SPEC.bias_per_key:
        key_bias = key_bias[None, :]
    bias = 0
    if SPEC.has_bias and not SPEC.bias_per_key:
        bias = load_tile(
            bias_ptr, offs_m[:, None], offs_n[None, :], stride_bias, rows_left, inside
        ).to(tl.float32)
        bias = bias * 1.4426950408889634  # log2(e)
    _, d_logits, _, d_scores = differentiate_tile(
        queries, d_outs, keys_tile, values_tile, row_numbers, factor, key_bias, bias, visible,
        keep, columns, units, SPEC, EDGE, False, False,
    )  # fmt: skip
    return keys_tile, factor, d_logits, d_scores
