"""Manipulated attention on a CPU without gradients, by blocks of scores in one buffer.

A block is some batch rows × some query rows × every key that they may see, ``[Hk, rows, keys]``:

1. two products fill it: the queries of all its batch rows with the shared prefix, as one matrix
   product per key head, and each batch row's queries with its own keys;
2. only the columns with a factor other than 1 are manipulated, in place;
3. PyTorch's softmax, in place: one pass, 6 times faster than exp_ after a subtraction;
4. two products with the values.

In ``min_shift_full`` a block has all keys, as hidden ones count in the minimum. The prefix is never
copied, and ``min_shift`` costs one more pass over a block (the row minimum),
not another product q·k. Log-sum-exp comes from the row maxima before and after the softmax.

Measured against PyTorch's flash kernel, which has the plain scores only, on 2 threads of a Xeon
with 4 MB of L2, float32, a million scores at D 64: two products 0.73 ms, softmax 0.25, minimum
0.05; flash 1.01. So flash on the prefix, merged with the rest by log-sum-exp, has nothing to gain
here, and in ``min_shift`` it would need the product q·k once more.

Legend: B batch, Hq/Hk query/key heads, g = Hq / Hk, Tq/Tk query/key tokens, Tp prefix tokens,
D head dim, Dv value dim; n batch rows and r query rows of a block, ``rows`` = n · g · r.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .visibility import Visibility

# 8 MB of scores. At half of it the blocks of a call over 4096 keys took 12% more time, at an eighth
# 80% (few rows per product, more launches); at twice of it 10% less, for twice the memory.
_SCORES_PER_BLOCK = 1 << 21
# A causal block computes keys that only its later rows see; 32 and 128 rows were slower or equal.
_CAUSAL_ROWS = 64
# Changed columns are gathered if there is one or less in so many, else all are manipulated.
_COLUMNS_PER_CHANGE = 16
# In calls with so few scores, as in decoding, looking for them takes longer than manipulating all.
_SCORES_TO_SEARCH = 1 << 18


def serves_blocks(*tensors: Tensor | None) -> bool:
    """Whether ``attention_blocks`` can serve a call with these tensors."""
    if torch.compiler.is_compiling():
        return False
    given = [tensor for tensor in tensors if tensor is not None]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given):
        return False
    return all(tensor.device.type == "cpu" for tensor in given)


def attention_blocks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_factor: Tensor | None,
    prefix_key: Tensor,
    prefix_value: Tensor,
    *,
    mode: str,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    position_bias: Tensor | None,
    visibility: Visibility,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """Attention without gradients; arguments as in ``attention_portable_prefix``.

    Args:
        prefix_key, prefix_value: ``[1, Hk, Tp, D]`` and ``[1, Hk, Tp, Dv]``; Tp may be 0.
        visibility: of Tp + Tk keys.
    Returns: output ``[B, Hq, Tq, Dv]``, in memory ``[B, Tq, Hq, Dv]``, and, if asked for,
        log-sum-exp ``[B, Hq, Tq]`` float32 (float64 for float64 inputs).
    """
    batch, query_heads, query_tokens, head_dim = query.shape
    key_heads, value_dim = key.shape[1], value.shape[-1]
    group = query_heads // key_heads
    prefix_tokens = prefix_key.shape[2]
    key_tokens = prefix_tokens + key.shape[2]
    # half precision would round the scores
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    shared_key = prefix_key[0].to(dtype)  # [Hk, Tp, D]
    shared_value = prefix_value[0].to(dtype)  # [Hk, Tp, Dv]
    key, value = key.expand(batch, -1, -1, -1), value.expand(batch, -1, -1, -1)
    queries = query.unflatten(1, (key_heads, group)).transpose(0, 1)  # [Hk, B, g, Tq, D]
    output = query.new_empty(batch, query_tokens, key_heads, group, value_dim)
    outputs = output.permute(2, 0, 3, 1, 4)  # [Hk, B, g, Tq, Dv]
    lses = query.new_empty(key_heads, batch, group, query_tokens, dtype=dtype)

    batch_rows, query_rows = _block_shape(query.shape, key_tokens, visibility)
    sink = None if sinks is None else sinks.to(dtype).view(key_heads, 1, group, 1)
    extra = 0 if sink is None else 1  # the sink is one more column
    buffer = query.new_empty(
        batch_rows * query_heads * query_rows * (key_tokens + extra), dtype=dtype
    )
    search = batch * query_heads * query_tokens * key_tokens > _SCORES_TO_SEARCH
    factors = _Factors.of(key_factor, mode, key_heads, group, key_tokens, dtype, search=search)
    no_dead_row = sinks is None and position_bias is None and visibility.always_some_key()
    find_peak = return_lse or not no_dead_row or (factors is not None and factors.removes_keys())
    limits_of: dict[tuple[int, int, int], tuple[Tensor, Tensor]] = {}

    for first in range(0, batch, batch_rows):
        last = min(first + batch_rows, batch)
        chunk, size = slice(first, last), last - first
        # [Hk·n, Tk, D]: a copy of the block's own keys, where it holds several batch rows
        own_key = key[chunk].transpose(0, 1).to(dtype).flatten(0, 1)
        own_value = value[chunk].transpose(0, 1).to(dtype).flatten(0, 1)
        chunk_factors = None if factors is None else factors.batch_rows(first, last)
        seen = visibility.batch_rows(chunk)
        for start in range(0, query_tokens, query_rows):
            stop = min(start + query_rows, query_tokens)
            place = (slice(None), chunk, slice(None), slice(start, stop))
            # a minimum over all keys needs the scores of hidden ones
            whole = chunk_factors is not None and mode == "min_shift_full"
            low, high = (0, key_tokens) if whole else seen.key_range(start, stop)
            if low == high:
                outputs[place] = 0
                lses[place] = float("-inf") if sink is None else sink
                continue
            shape = (key_heads, size, group, stop - start)  # [Hk, n, g, r]
            width, rows = high - low, size * group * (stop - start)
            split = min(max(prefix_tokens - low, 0), width)  # columns 0..split are the prefix's
            shared = slice(low, low + split)
            own = slice(max(low - prefix_tokens, 0), max(high - prefix_tokens, 0))
            block = buffer[: key_heads * rows * (width + extra)]
            block = block.view(key_heads, rows, width + extra)
            by_row = block.view(key_heads * size, -1, width + extra)[..., split:width]
            scores = block.view(*shape, -1)[..., :width].transpose(0, 1)  # [n, Hk, g, r, keys]

            q = queries[place].to(dtype).reshape(key_heads, rows, head_dim)
            if split:
                keys = shared_key[:, shared].transpose(1, 2)
                block[..., :split].baddbmm_(q, keys, beta=0, alpha=scale)
            if split < width:
                q = q.reshape(key_heads * size, -1, head_dim)
                keys = own_key[:, own].transpose(1, 2)
                if by_row.is_contiguous():
                    by_row.baddbmm_(q, keys, beta=0, alpha=scale)
                else:  # a batch of small products into strided memory is slower than a copy
                    by_row.copy_(torch.baddbmm(q.new_empty(()), q, keys, beta=0, alpha=scale))
            if softcap is not None:
                scores.div_(softcap).tanh_().mul_(softcap)

            edge = seen.first_hidden(start, low, high)
            limits = None
            if edge < high:
                # a plain diagonal looks the same in most blocks
                same = (start - edge, stop - start, high - edge)
                limits = limits_of.get(same)
                if limits is None:
                    limits = _limits(
                        seen.block(start, stop, edge, high, q.device), key_heads, dtype
                    )
                    if seen.mask is None and seen.window is None and limits is not None:
                        limits_of[same] = limits
            edged = scores[..., edge - low :]
            changes = None if chunk_factors is None else chunk_factors.between(low, high)
            if changes is not None:
                minimum = None
                if mode in ("min_shift", "min_shift_full"):
                    if limits is not None and mode == "min_shift":
                        torch.maximum(edged, limits[0], out=edged)
                    minimum = block[..., :width].amin(-1).view(*shape, 1).transpose(0, 1)
                changes.apply(scores, mode, minimum)
            if position_bias is not None:
                scores += _bias_block(position_bias, chunk, start, stop, low, high, key_heads)
            if limits is not None:
                torch.minimum(edged, limits[1], out=edged)
            if sink is not None:
                block.view(*shape, -1)[..., width] = sink

            peak = block.amax(-1, keepdim=True) if find_peak else None  # [Hk, rows, 1]
            torch.softmax(block, -1, out=block)
            if split:
                result = torch.bmm(block[..., :split], shared_value[:, shared])  # [Hk, rows, Dv]
            else:
                result = block.new_zeros(key_heads, rows, value_dim)
            if split < width:
                result.view(key_heads * size, -1, value_dim).baddbmm_(by_row, own_value[:, own])
            if peak is not None:
                dead = peak == float("-inf")  # its softmax is NaN
                result.masked_fill_(dead, 0.0)
                if return_lse:  # the largest weight is exp(peak - lse)
                    lse = peak - block.amax(-1, keepdim=True).log()
                    lses[place] = lse.masked_fill_(dead, float("-inf")).view(shape)
            outputs[place] = result.view(*shape, value_dim)
    output = output.flatten(2, 3).transpose(1, 2)
    return output, lses.transpose(0, 1).flatten(1, 2) if return_lse else None


def _block_shape(
    query_shape: torch.Size, key_tokens: int, visibility: Visibility
) -> tuple[int, int]:
    """Batch rows and query rows of a block."""
    batch, query_heads, query_rows, _ = query_shape
    if visibility.causal or visibility.window is not None:
        query_rows = min(query_rows, _CAUSAL_ROWS)
    row = query_heads * max(1, key_tokens)
    query_rows = max(1, min(query_rows, _SCORES_PER_BLOCK // row))
    return max(1, min(batch, _SCORES_PER_BLOCK // (row * query_rows))), query_rows


def _limits(
    visible: Tensor | None, key_heads: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor] | None:
    """What maximum and minimum make of hidden scores: a huge number, and -inf.

    They are 6 times faster than masked_fill_ here. The huge number is finite, because a factor of
    0 would turn infinity into NaN.

    Returns: two ``[n|1, Hk|1, g|1, r|1, keys]``; ``None`` if every key is visible.
    """
    if visible is None:
        return None
    visible = _split_heads(visible, key_heads)
    upper = torch.zeros(visible.shape, dtype=dtype).masked_fill_(~visible, float("-inf"))
    lower = torch.full_like(upper, torch.finfo(dtype).max / 4)
    return lower.masked_fill_(visible, float("-inf")), upper.masked_fill_(visible, float("inf"))


def _bias_block(
    bias: Tensor, chunk: slice, start: int, stop: int, low: int, high: int, key_heads: int
) -> Tensor:
    """A block of ``[B|1, Hq|1, Tq|1, keys|1]``: ``[n|1, Hk|1, g|1, r|1, keys|1]``."""
    bias = bias if bias.shape[0] == 1 else bias[chunk]
    bias = bias if bias.shape[2] == 1 else bias[:, :, start:stop]
    bias = bias if bias.shape[3] == 1 else bias[..., low:high]
    return _split_heads(bias, key_heads)


def _split_heads(tensor: Tensor, key_heads: int) -> Tensor:
    """``[B, Hq|1, ...]`` as ``[B, Hk|1, g|1, ...]``."""
    return tensor.unsqueeze(1) if tensor.shape[1] == 1 else tensor.unflatten(1, (key_heads, -1))


@dataclass(frozen=True)
class _Changes:
    """Some columns of ``scores [n, Hk, g, r, keys]`` and their factors."""

    index: tuple[Tensor | slice, ...]
    factor: Tensor  # broadcasts to ``scores[index]``
    gathered: bool  # ``scores[index]`` is a copy, not a view

    def apply(self, scores: Tensor, mode: str, minimum: Tensor | None) -> None:
        """Manipulate the columns in place; ``minimum [n, Hk, g, r, 1]`` for the shifts."""
        columns = scores[self.index]
        if mode == "multiplicative":
            columns.mul_(self.factor)
        elif mode == "log_additive":
            columns.add_(self.factor.log())
        else:
            assert minimum is not None
            lowest = minimum.expand_as(scores)[self.index]
            torch.lerp(lowest, columns, self.factor, out=columns)
        if self.gathered:
            scores[self.index] = columns


@dataclass(frozen=True)
class _Factors:
    """The factors of some batch rows, and where they are not 1."""

    mode: str
    factor: Tensor  # [n, Hk|1, g|1, F], of the last F keys
    offset: int  # key of column 0
    changed: Tensor | None  # [changes, 4]: indices into ``factor``, in order; None: any may be

    @classmethod
    def of(
        cls,
        key_factor: Tensor | None,
        mode: str,
        key_heads: int,
        group: int,
        key_tokens: int,
        dtype: torch.dtype,
        *,
        search: bool,
    ) -> _Factors | None:
        """From ``[B, F]`` or ``[B, Hq, F]``; ``None`` if a search finds all of them to be 1."""
        if key_factor is None:
            return None
        factor = key_factor.to(dtype)
        if factor.dim() == 3:
            factor = factor.unflatten(1, (key_heads, group))
        else:
            factor = factor[:, None, None]
        changed = (factor != 1).nonzero() if search else None
        if changed is not None and not len(changed):
            return None
        return cls(mode, factor, key_tokens - factor.shape[-1], changed)

    def removes_keys(self) -> bool:
        """Whether some factor gives a weight of 0."""
        return self.mode == "log_additive" and bool((self.factor <= 0).any())

    def batch_rows(self, first: int, last: int) -> _Factors | None:
        """The same for some rows of the batch; ``None`` if their factors are known to be 1."""
        if self.changed is None:
            return _Factors(self.mode, self.factor[first:last], self.offset, None)
        borders = torch.searchsorted(
            self.changed[:, 0].contiguous(), torch.tensor([first, last])
        ).tolist()
        if borders[0] == borders[1]:
            return None
        changed = self.changed[slice(*borders)] - torch.tensor([first, 0, 0, 0])
        return _Factors(self.mode, self.factor[first:last], self.offset, changed)

    def between(self, low: int, high: int) -> _Changes | None:
        """The changes among keys ``low..high``, counted from ``low``; ``None`` if none."""
        changed = self.changed
        if changed is None or len(changed) * _COLUMNS_PER_CHANGE > self.factor.numel():
            start = max(low, self.offset)
            if start >= high:
                return None
            factor = self.factor[..., None, start - self.offset : high - self.offset]
            columns = (*[slice(None)] * 4, slice(start - low, None))
            return _Changes(columns, factor, gathered=False)
        first, last = low - self.offset, high - self.offset
        column = changed[:, 3]
        changed = changed[(column >= first) & (column < last)]
        if not len(changed):
            return None
        row, head, member, column = changed.unbind(1)
        # a factor that heads share changes the column in all of them
        index = (
            row,
            head if self.factor.shape[1] > 1 else slice(None),
            member if self.factor.shape[2] > 1 else slice(None),
            slice(None),
            column - first,
        )
        factor = self.factor[row, head, member, column]
        shared = [1 for part in index if isinstance(part, slice)]
        return _Changes(index, factor.view(-1, *shared), gathered=True)
