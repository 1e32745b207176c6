"""Launcher of the packed kernel: for packed_prefix.py, and for decode.py.

Legend: B batch, C caches (1 or B), Hq/Hk query/key heads, Tq query tokens, Tp keys of a cache, Tk
keys of a row's own, D head dim, Dv value dim, m factor of a key.
"""

from __future__ import annotations

import functools
from collections.abc import Collection
from typing import TypedDict

import torch
import triton
from torch import Tensor

from .configs import device_architecture, extra_load, split_head_dim
from .launch import FAR, LOG2_E, strides
from .once import made_once
from .packed_configs import PackedConfig, packed_config, split_count
from .packed_kernel import _packed_fwd_kernel
from .packed_prepass import packed_tiles
from .packed_visit import PackedVariant
from .prepass import key_ranges

_KEYS_PER_SCAN = 1024  # in search of factors other than 1


class Features(TypedDict, total=False):
    """What a call uses beyond query, keys, values and factors; keys count the cache's and own ones.

    Args:
        mode: ``multiplicative`` (the default), ``min_shift`` or ``log_additive``.
        causal: a query at position p sees keys up to p.
        query_offset: key index at which query row 0 stands, a number or a 0-d integer tensor on
            the device (read there, never on the host); ``None`` means the last key belongs to the
            last query.
        scale: factor on q·k; ``None`` is ``D ** -0.5``.
        window: a query at position p sees keys j with ``p - j < window`` (``|p - j|`` if not
            causal).
        softcap: scores become ``softcap · tanh(score / softcap)`` before the manipulation.
        sinks: ``[Hq]`` logits that take part in the normaliser only.
        position_bias: broadcastable to ``[B, Hq, Tq, Tp + Tk]``, added after the manipulation.
        key_padding: bool ``[B, Tp + Tk]``, True = visible.
        block_mask: bool ``[B|1, Hq|1, Tq, Tp + Tk]``, True = visible.
    """

    mode: str
    causal: bool
    query_offset: int | Tensor | None
    scale: float | None
    window: int | None
    softcap: float | None
    sinks: Tensor | None
    position_bias: Tensor | None
    key_padding: Tensor | None
    block_mask: Tensor | None


def _halves(size: int) -> tuple[int, int]:
    """A head dim as :func:`split_head_dim` splits it, but 256 as 128 + 128.

    A tile of 256 values goes through more registers at once than five loops leave free.
    """
    first, second = split_head_dim(size)
    return (128, 128) if first == 256 else (first, second)


def packed_variant(
    config: PackedConfig,
    head_dim: int,
    value_dim: int,
    mode: str,
    features: Collection[str],
    *,
    stage: str = "whole",
    prefix_factor: bool = True,
    factor_per_head: bool = False,
    one_batch: bool = False,
    has_own: bool = True,
    offset_in_memory: bool = False,
    positive_unit: bool = True,
    wide: bool = False,
) -> PackedVariant:
    """What the kernel is compiled for.

    Args:
        mode: ``plain`` without factors, else the op's mode.
        features: of ``causal``, ``window``, ``softcap``, ``bias``, ``padding``, ``mask``,
            ``sinks``.
        stage: ``whole``, or with split keys one of :func:`stages`.
        prefix_factor: the factors span the prefix too, not only a row's own keys.
        one_batch: a tile's rows are of one batch row, which has a cache of its own.
        has_own: there are keys behind the prefix.
        positive_unit: scores need no scaling before the softmax to keep their order.
    """
    d0, d1 = _halves(head_dim)
    v0, v1 = _halves(value_dim)
    defer_n = (stage == "deferred" and config.defer_n) or config.block_n
    gathers = factor_per_head or not one_batch  # a factor for each row of a tile
    return PackedVariant(
        stage=stage,
        mode=mode,
        causal="causal" in features,
        has_window="window" in features,
        has_key_factor=mode != "plain",
        prefix_factor=mode != "plain" and prefix_factor,
        factor_per_head=factor_per_head,
        one_batch=one_batch,
        has_own=has_own,
        lists_tiles=mode != "plain" and prefix_factor and not one_batch,
        has_softcap="softcap" in features,
        has_bias="bias" in features,
        has_padding="padding" in features,
        has_mask="mask" in features,
        has_sinks="sinks" in features,
        offset_in_memory=offset_in_memory,
        # exp2's multiply-add applies a positive unit for nothing, where nothing is added before it
        scaled="bias" in features or mode == "log_additive" or not positive_unit,
        wide=wide,
        block_m=config.block_m,
        block_n=config.block_n,
        edge_n=config.edge_n,
        defer_n=config.edge_n if gathers else defer_n,
        scan_n=config.block_n if gathers else _KEYS_PER_SCAN,
        head_dim=head_dim,
        d0=d0,
        d1=d1,
        value_dim=value_dim,
        v0=v0,
        v1=v1,
    )


def stages(splits: int, mode: str) -> tuple[str, ...]:
    """The launches: with split keys, ``min_shift`` has its deferred columns in one of their own."""
    if splits == 1:
        return ("whole",)
    return ("partial", "deferred", "merge") if mode == "min_shift" else ("partial", "merge")


def _processors(device: torch.device) -> int:
    """Multiprocessors to keep busy; the interpreter has one."""
    if triton.knobs.runtime.interpret:
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def _spans_beyond_int32(
    packed: Collection[Tensor | None], prefix: Collection[Tensor], config: PackedConfig
) -> bool:
    """Whether offsets within a tile need 64 bits.

    Args:
        packed: what is gathered by row, at most ``block_m`` batch rows of it.
        prefix: what is read ``block_n`` keys at a time.
    """
    spans = [
        sum(
            abs(stride) * min(size, config.block_m if axis == 0 else size)
            for axis, (size, stride) in enumerate(zip(t.shape, t.stride(), strict=True))
        )
        for t in packed
        if t is not None
    ]
    spans += [max(abs(stride) for stride in t.stride()[-2:]) * 512 for t in prefix]
    return max(spans) >= 1 << 31


def launch_packed(
    query: Tensor,
    cache: tuple[Tensor, Tensor],
    own: tuple[Tensor, Tensor] | None = None,
    key_factor: Tensor | None = None,
    *,
    mode: str = "multiplicative",
    causal: bool = False,
    query_offset: int | Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    position_bias: Tensor | None = None,
    key_padding: Tensor | None = None,
    block_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of few queries over a cache, then each row's own keys; taken as validated.

    Nothing is copied: batch 1, broadcast dimensions and any strides are read in place.

    Args:
        query: ``[B, Hq, Tq, D]``, fp16, bf16 or fp32; D and Dv at most 256.
        cache: key and value ``[C, Hk, Tp, D]`` and ``[C, Hk, Tp, Dv]``; Hk divides Hq. One that
            all rows share, or one for each, then without own keys.
        own: key and value ``[B|1, Hk, Tk, D]`` and ``[B|1, Hk, Tk, Dv]`` behind it.
        key_factor: float32 ``[B, Tp + Tk]`` or ``[B, Hq, Tp + Tk]``, or Tk long: the cache then
            has ones.
    Others: see :class:`Features`.
    Returns: output ``[B, Hq, Tq, Dv]`` in ``query.dtype``, laid out in memory as
        ``[B, Tq, Hq, Dv]``, and log-sum-exp ``[B, Hq, Tq]`` float32, natural log. A row that sees
        no key gives 0 and -inf (with a sink: the sink).
    """
    batch, heads, rows, head_dim = query.shape
    cache_key, cache_value = cache
    key_heads, prefix_keys, value_dim = cache_value.shape[1:]
    if own is not None and own[0].shape[2] == 0:
        own = None
    one_batch = own is None and batch == max(cache_key.shape[0], cache_value.shape[0])
    if one_batch:
        cache_key, cache_value = (t.expand(batch, -1, -1, -1) for t in cache)
    key = value = None
    own_keys = 0
    if own is not None:
        key, value = (t.expand(batch, -1, -1, -1) for t in own)
        own_keys = key.shape[2]
    keys = prefix_keys + own_keys
    out = query.new_empty(batch, rows, heads, value_dim).transpose(1, 2)
    lse = torch.empty(batch, heads, rows, dtype=torch.float32, device=query.device)
    if batch * heads * rows == 0:
        return out, lse

    kind = "plain" if key_factor is None else mode
    optional = {
        "causal": causal or None,
        "window": window,
        "softcap": softcap,
        "sinks": sinks,
        "bias": position_bias,
        "padding": key_padding,
        "mask": block_mask,
    }
    features = {name for name, feature in optional.items() if feature is not None}
    sharing = 1 if one_batch else batch  # batch rows of one cache
    packed_rows = sharing * (heads // key_heads) * rows
    config = packed_config(
        device_architecture(query.device, triton.knobs.runtime.interpret),
        head_dim,
        value_dim,
        query.dtype,
        kind,
        packed_rows,
        load=extra_load(kind, features),
    )
    shape = (batch, heads, rows, keys)
    before = tiles = None
    per_head = prefix_factor = False
    if key_factor is not None:
        if key_factor.dim() == 2:
            key_factor = key_factor[:, None]  # [B, 1, Tp + Tk or Tk]
        per_head = key_factor.shape[1] > 1
        prefix_factor = key_factor.shape[2] > own_keys
        if prefix_factor and not one_batch:
            spanned = key_factor[..., :prefix_keys]
            how = (rows, heads, key_heads, config)
            make = functools.partial(packed_tiles, spanned, *how)
            before, tiles = made_once(("packed_tiles", *how), spanned, make)
        key_factor = key_factor.expand(batch, heads, -1)
    if position_bias is not None:
        position_bias = position_bias.expand(shape)
    if block_mask is not None:
        block_mask = block_mask.view(torch.uint8).expand(shape)
    ranges = None
    if key_padding is not None:
        key_padding = key_padding.view(torch.uint8)
        ranges = key_ranges(key_padding)
    if query_offset is None:
        query_offset = keys - rows
    if scale is None:
        scale = head_dim**-0.5
    unit = (scale if softcap is None else softcap) * LOG2_E

    states = key_heads * batch // sharing
    programs = triton.cdiv(packed_rows, config.block_m) * states
    reach = (
        prefix_keys
        if window is None
        else min(prefix_keys, (window if causal else 2 * window) + rows)
    )
    splits = split_count(programs, triton.cdiv(reach, config.block_n), _processors(query.device))
    partial = stats = None
    if splits > 1:
        state = (splits, states, packed_rows)
        partial = torch.empty(*state, value_dim, dtype=torch.float32, device=query.device)
        stats = torch.empty(3, *state, dtype=torch.float32, device=query.device)
    wide = _spans_beyond_int32(
        (query, out, key, value, key_factor, position_bias, block_mask, key_padding),
        (cache_key, cache_value),
        config,
    )
    for stage in stages(splits, kind):
        spec = packed_variant(
            config,
            head_dim,
            value_dim,
            kind,
            features,
            stage=stage,
            prefix_factor=prefix_factor,
            factor_per_head=per_head,
            one_batch=one_batch,
            has_own=own is not None,
            offset_in_memory=isinstance(query_offset, Tensor),
            positive_unit=unit > 0,
            wide=wide,
        )
        split_programs = programs * splits if stage in ("partial", "deferred") else programs
        _packed_fwd_kernel[(split_programs,)](
            out,
            lse,
            partial,
            stats,
            query,
            key,
            value,
            cache_key,
            cache_value,
            key_factor,
            before,
            tiles,
            position_bias,
            key_padding,
            ranges,
            block_mask,
            None if sinks is None else sinks.contiguous(),
            query_offset,
            sharing,
            rows,
            prefix_keys,
            own_keys,
            heads,
            heads // key_heads,
            splits,
            states * packed_rows,
            0 if prefix_factor else prefix_keys,
            FAR if window is None else min(window, FAR),
            unit,
            0.0 if softcap is None else scale / softcap,
            out.stride(),
            query.stride(),
            strides(key, 4),
            strides(value, 4),
            cache_key.stride(),
            cache_value.stride(),
            *strides(key_factor, 3)[:2],
            *strides(position_bias, 4)[:3],
            *strides(key_padding, 2)[:1],
            *strides(block_mask, 4)[:3],
            tuple(
                strides(t, dims)[-1]
                for t, dims in (
                    (key_factor, 3),
                    (position_bias, 4),
                    (key_padding, 2),
                    (block_mask, 4),
                )
            ),
            SPEC=spec,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            enable_fp_fusion=True,
        )
    return out, lse
