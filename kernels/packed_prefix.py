"""Attention of a few query tokens per batch row over a prefix that all rows share.

Legend: B batch, Hq/Hk query/key heads, Tq query tokens, Tp keys of the prefix, Tk keys of a row's
own, D head dim, Dv value dim, m factor of a key, c minimum of a row.

Query rows of many batch rows and of the heads of a group share a tile, each with its own factors;
see "Many short queries over one prefix" in README.md.
"""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
import triton
from torch import Tensor

from .configs import device_architecture, extra_load, split_head_dim
from .packed_configs import PackedConfig, packed_config, split_count
from .packed_kernel import _packed_prefix_fwd_kernel
from .packed_prepass import packed_tiles
from .packed_visit import PackedVariant
from .prepass import key_ranges

_LOG2_E = math.log2(math.e)
_FAR = 1 << 30  # a window that hides nothing; position + window stays within int32


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
    offset_in_memory: bool = False,
    positive_unit: bool = True,
    wide: bool = False,
) -> PackedVariant:
    """What the kernel is compiled for.

    Args:
        mode: ``plain`` without factors, else the op's mode.
        features: of ``causal``, ``window``, ``softcap``, ``bias``, ``padding``, ``mask``,
            ``sinks``.
        stage: ``whole``, or with split keys ``partial`` and then ``merge``.
        prefix_factor: the factors span the prefix too, not only a row's own keys.
        positive_unit: scores need no scaling before the softmax to keep their order.
    """
    d0, d1 = _halves(head_dim)
    v0, v1 = _halves(value_dim)
    return PackedVariant(
        stage=stage,
        mode=mode,
        causal="causal" in features,
        has_window="window" in features,
        has_key_factor=mode != "plain",
        prefix_factor=mode != "plain" and prefix_factor,
        factor_per_head=factor_per_head,
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
        head_dim=head_dim,
        d0=d0,
        d1=d1,
        value_dim=value_dim,
        v0=v0,
        v1=v1,
    )


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


def packed_prefix_fwd(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
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
    """Attention over a shared prefix, then each row's own keys. Arguments are taken as validated.

    Made for few query tokens in many batch rows; right for any number. Nothing is copied: batch 1,
    broadcast dimensions and any strides are read in place.

    Args:
        query: ``[B, Hq, Tq, D]``, fp16, bf16 or fp32; D and Dv at most 256.
        key, value: ``[B|1, Hk, Tk, D]`` and ``[B|1, Hk, Tk, Dv]``; Hk divides Hq. Tk may be 0.
        prefix_key, prefix_value: ``[1, Hk, Tp, D]`` and ``[1, Hk, Tp, Dv]``. Tp may be 0.
        key_factor: ``[B, Tp + Tk]`` or ``[B, Hq, Tp + Tk]`` float32; 1 keeps a key, < 1 suppresses
            it. Of length Tk, the prefix has ones.
        mode: ``multiplicative``, ``min_shift`` or ``log_additive``.
        query_offset: key index at which query row 0 stands, a number or a 0-d integer tensor on
            the device (read there, never on the host); ``None`` means ``Tp + Tk - Tq``.
        window: a query at position p sees keys j with ``p - j < window`` (``|p - j|`` if not
            causal).
        softcap: scores become ``softcap · tanh(score / softcap)`` before the manipulation.
        sinks: ``[Hq]`` logits that take part in the normaliser only.
        position_bias: broadcastable to ``[B, Hq, Tq, Tp + Tk]``, added after the manipulation.
        key_padding: bool ``[B, Tp + Tk]``, True = visible.
        block_mask: bool ``[B|1, Hq|1, Tq, Tp + Tk]``, True = visible.
    Returns: output ``[B, Hq, Tq, Dv]`` in ``query.dtype``, laid out in memory as
        ``[B, Tq, Hq, Dv]``, and log-sum-exp ``[B, Hq, Tq]`` float32, natural log. A row that sees
        no key gives 0 and -inf (with a sink: the sink).
    """
    batch, heads, rows, head_dim = query.shape
    key_heads, own_keys, value_dim = value.shape[1:]
    prefix_keys = prefix_value.shape[2]
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
    packed_rows = batch * (heads // key_heads) * rows
    config = packed_config(
        device_architecture(query.device, triton.knobs.runtime.interpret),
        head_dim,
        value_dim,
        query.dtype,
        kind,
        packed_rows,
        load=extra_load(kind, features),
    )
    key = key.expand(batch, -1, -1, -1)
    value = value.expand(batch, -1, -1, -1)
    shape = (batch, heads, rows, keys)
    before = tiles = None
    per_head = prefix_factor = False
    if key_factor is not None:
        if key_factor.dim() == 2:
            key_factor = key_factor[:, None]  # [B, 1, Tp + Tk or Tk]
        per_head = key_factor.shape[1] > 1
        prefix_factor = key_factor.shape[2] > own_keys
        if prefix_factor:
            before, tiles = packed_tiles(
                key_factor[..., :prefix_keys], rows, heads, key_heads, config
            )
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
    unit = (scale if softcap is None else softcap) * _LOG2_E

    programs = triton.cdiv(packed_rows, config.block_m) * key_heads
    prefix_tiles = triton.cdiv(prefix_keys, config.block_n)
    splits = split_count(programs, prefix_tiles, _processors(query.device))
    partial = stats = None
    if splits > 1:
        state = (splits, key_heads, packed_rows)
        partial = torch.empty(*state, value_dim, dtype=torch.float32, device=query.device)
        stats = torch.empty(3, *state, dtype=torch.float32, device=query.device)
    wide = _spans_beyond_int32(
        (query, out, key, value, key_factor, position_bias, block_mask, key_padding),
        (prefix_key, prefix_value),
        config,
    )
    for stage in ("partial", "merge") if splits > 1 else ("whole",):
        spec = packed_variant(
            config,
            head_dim,
            value_dim,
            kind,
            features,
            stage=stage,
            prefix_factor=prefix_factor,
            factor_per_head=per_head,
            offset_in_memory=isinstance(query_offset, Tensor),
            positive_unit=unit > 0,
            wide=wide,
        )
        _packed_prefix_fwd_kernel[(programs * splits if stage == "partial" else programs,)](
            out,
            lse,
            partial,
            stats,
            query,
            key,
            value,
            prefix_key,
            prefix_value,
            key_factor,
            before,
            tiles,
            position_bias,
            key_padding,
            ranges,
            block_mask,
            None if sinks is None else sinks.contiguous(),
            query_offset,
            batch,
            rows,
            prefix_keys,
            own_keys,
            heads,
            heads // key_heads,
            splits,
            0 if prefix_factor else prefix_keys,
            _FAR if window is None else min(window, _FAR),
            unit,
            0.0 if softcap is None else scale / softcap,
            out.stride(),
            query.stride(),
            key.stride(),
            value.stride(),
            prefix_key.stride(),
            prefix_value.stride(),
            (0, 0, 0) if key_factor is None else key_factor.stride(),
            (0, 0, 0, 0) if position_bias is None else position_bias.stride(),
            (0, 0) if key_padding is None else key_padding.stride(),
            (0, 0, 0, 0) if block_mask is None else block_mask.stride(),
            SPEC=spec,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            enable_fp_fusion=True,
        )
    return out, lse
