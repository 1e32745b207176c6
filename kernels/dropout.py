"""Attention dropout whose mask is computed from a counter, never stored.

A probability is kept by the first word of Philox-4x32-10 at the counter (column, row, batch · Hq +
head, 0) under the key ``seed``: the same number under any tiling, in forward and backward, and in
every implementation (``tl.philox(seed, column, row, batch * heads + head, 0)`` in a kernel).

Legend: B batch, Hq query heads, Tq query tokens, Tk key tokens (with a prefix's).
"""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_MULTIPLY_A, _MULTIPLY_B = 0xD2511F53, 0xCD9E8D57
_RAISE_A, _RAISE_B = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10
_COUNTERS_PER_CHUNK = 1 << 16  # their words, 8 bytes each, stay in a CPU's L2 cache


def dropout_threshold(dropout: float) -> int:
    """A probability is kept if the upper 24 bits of its word are not below this number."""
    return round(dropout * (1 << 24))


def draw_seed(device: torch.device) -> Tensor:
    """A seed, int64 ``[1]``, from the device's default generator.

    So ``torch.manual_seed`` repeats it, and so does activation checkpointing; no host waits for it.
    """
    return torch.randint(0, (1 << 63) - 1, (1,), dtype=torch.int64, device=device)


def keep_mask(
    seed: Tensor,
    dropout: float,
    *,
    heads: int,
    batch: tuple[int, int],
    rows: tuple[int, int],
    columns: tuple[int, int],
) -> Tensor:
    """Which probabilities dropout keeps, for a block of them.

    Args:
        seed: int64 of one element, any bits.
        dropout: share that is dropped, ``0 <= dropout < 1``.
        heads: Hq; the block holds all of them.
        batch, rows, columns: first and last + 1 of batch rows, query rows and keys.
    Returns: bool ``[batch, Hq, rows, columns]`` on ``seed``'s device, True = kept.
    Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (2011), for Philox.
    """
    device = seed.device
    seed = seed.detach().reshape(1)
    streams = torch.arange(*batch, device=device)[:, None] * heads
    streams = streams + torch.arange(heads, device=device)  # [batch, heads]
    row = torch.arange(*rows, device=device)[:, None]
    column = torch.arange(*columns, device=device)
    threshold = dropout_threshold(dropout)
    if device.type != "cpu" or torch.compiler.is_compiling():
        return _first_word(seed, column, row, streams[:, :, None, None]) >> 8 >= threshold
    keep = torch.empty((streams.numel(), row.shape[0], column.shape[0]), dtype=torch.bool)
    some_rows = max(1, _COUNTERS_PER_CHUNK // max(1, keep.shape[2]))
    some_streams = max(1, some_rows // max(1, keep.shape[1]))
    streams = streams.flatten()[:, None, None].split(some_streams)
    for part, stream in zip(keep.split(some_streams), streams, strict=True):
        for piece, few in zip(part.split(some_rows, 1), row.split(some_rows), strict=True):
            torch.ge(_first_word(seed, column, few, stream) >> 8, threshold, out=piece)
    return keep.unflatten(0, (batch[1] - batch[0], heads))


def _first_word(seed: Tensor, column: Tensor, row: Tensor, stream: Tensor) -> Tensor:
    """First output word of Philox at (column, row, stream, 0); int64, broadcast, 0 to 2³² − 1.

    Two words' product wraps in int64, which leaves its bits right. The upper halves of words 1 and
    3 are not cleared: these words only enter the exclusive-ors, whose result is.
    """
    word0, word1, word2, word3 = column & _WORD, row, stream & _WORD, torch.zeros_like(seed)
    key0, key1 = seed & _WORD, seed >> 32
    for _ in range(_ROUNDS - 1):
        product_a, product_b = word0 * _MULTIPLY_A, word2 * _MULTIPLY_B
        word0 = ((product_b >> 32) ^ (word1 ^ key0)) & _WORD
        word2 = ((product_a >> 32) ^ (word3 ^ key1)) & _WORD
        word1, word3 = product_b, product_a
        key0, key1 = key0 + _RAISE_A, key1 + _RAISE_B
    return ((word2 * _MULTIPLY_B >> 32) ^ (word1 ^ key0)) & _WORD
