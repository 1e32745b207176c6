"""What the launchers of the attention kernels have in common.

Legend: B batch, Hq query heads, Tq/Tk query/key tokens; where keys come in several segments, Tk
counts them all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial

import torch
import triton
from torch import Tensor

from .configs import (
    device_architecture,
    device_name,
    extra_load,
    forward_config,
    split_head_dim,
)
from .dropout import dropout_threshold
from .once import made_once
from .prepass import factor_tiles
from .tiles import Variant
from .tuned import TileConfig, length_bucket

LOG2_E = math.log2(math.e)
FAR = 1 << 30  # a window that hides nothing; position + window stays within int32


@dataclass(frozen=True)
class FactorTiles:
    """The lists of ``prepass.factor_tiles`` and their (batch, head) strides in rows."""

    before: Tensor | None = None
    flagged: Tensor | None = None
    stride: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class RowNumbers:
    """What a backward pass needs of each row beyond the log-sum-exp; contiguous ``[B, Hq, Tq]``.

    Args:
        minimum: float32, the smallest visible score in the kernel's unit; for ``min_shift``.
        argmin: int32, its key, counted over all keys.
        rest: float32, what rounding took from the log-sum-exp, base 2; for float32 inputs, whose
            gradients it would spoil where the log-sum-exp is large.
    """

    minimum: Tensor | None = None
    argmin: Tensor | None = None
    rest: Tensor | None = None


NO_NUMBERS = RowNumbers()


@dataclass(frozen=True)
class Call:
    """A kernel's arguments, brought into the form in which it takes them."""

    # what tiles are chosen by: the arguments of configs.forward_config
    problem: tuple[str, int, int, torch.dtype, str, int, int, bool, str, str]
    config: TileConfig
    spec: Variant
    key_factor: Tensor | None  # [B, Hq, Tk]; heads that share a row have a stride of 0
    position_bias: Tensor | None  # [B, Hq, Tq, Tk]
    key_padding: Tensor | None  # uint8 [B, Tk]
    block_mask: Tensor | None  # uint8 [B, Hq, Tq, Tk]
    sinks: Tensor | None  # contiguous
    dropout_seed: Tensor | None  # int64 [1]; None without dropout
    threshold: int  # see dropout.py
    keep_scale: float
    query_offset: int | Tensor
    window: int
    unit: float
    inner_scale: float

    def factor_tiles(self, key_factor: Tensor | None, block_n: int | None = None) -> FactorTiles:
        """Flagged tiles of factors ``[B, Hq, keys]``, where the kernel reads them at all."""
        if key_factor is None:
            return FactorTiles()
        if self.spec.mode != "min_shift" and not self.spec.skip_plain:
            return FactorTiles()
        shared = key_factor.stride(1) == 0  # one row for all heads
        rows = key_factor[:, :1] if shared else key_factor
        size = block_n or self.config.block_n
        make = partial(factor_tiles, rows, size)
        before, flagged = made_once(("factor_tiles", size), rows, make)
        return FactorTiles(before, flagged, (rows.shape[1], int(rows.shape[1] > 1)))


def strides(tensor: Tensor | None, dims: int) -> tuple[int, ...]:
    """Strides of an optional tensor, zeros where there is none."""
    return (0,) * dims if tensor is None else tensor.stride()


def make_variant(
    config: TileConfig,
    head_dim: int,
    value_dim: int,
    mode: str,
    features: Collection[str],
    *,
    save_minimum: bool = False,
    save_rest: bool = False,
    offset_in_memory: bool = False,
    positive_unit: bool = True,
    wide: bool = False,
) -> Variant:
    """The compile-time description of a kernel.

    Args:
        mode: ``plain`` without factors, else the op's mode.
        features: of ``causal, window, softcap, bias, alibi, padding, mask, sinks, dropout``;
            ``alibi`` is a bias that is the same for every row.
    """
    d0, d1 = split_head_dim(head_dim)
    v0, v1 = split_head_dim(value_dim)
    has_bias = not {"bias", "alibi"}.isdisjoint(features)
    return Variant(
        mode=mode,
        causal="causal" in features,
        has_window="window" in features,
        has_key_factor=mode != "plain",
        has_softcap="softcap" in features,
        has_bias=has_bias,
        bias_per_key="alibi" in features,
        has_padding="padding" in features,
        has_mask="mask" in features,
        has_sinks="sinks" in features,
        has_dropout="dropout" in features,
        save_minimum=save_minimum,
        save_rest=save_rest,
        d_lse_apart=False,
        offset_in_memory=offset_in_memory,
        skip_plain=config.skip_plain_tiles,
        persistent=config.persistent,
        # exp2's multiply-add applies a positive unit for nothing, where nothing is added before it
        scaled=has_bias or mode == "log_additive" or not positive_unit,
        wide=wide,
        block_m=config.block_m,
        block_n=config.block_n,
        edge_stages=config.edge_stages,
        head_dim=head_dim,
        d0=d0,
        d1=d1,
        value_dim=value_dim,
        v0=v0,
        v1=v1,
    )


def prepare(
    query: Tensor,
    value_dim: int,
    keys: int,
    key_factor: Tensor | None,
    matrices: tuple[Tensor, ...],
    *,
    mode: str,
    causal: bool,
    query_offset: int | Tensor | None,
    scale: float | None,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    position_bias: Tensor | None,
    key_padding: Tensor | None,
    block_mask: Tensor | None,
    dropout: float,
    dropout_seed: Tensor | None,
    saves: RowNumbers = NO_NUMBERS,
    choose_config: Callable[..., TileConfig] = forward_config,
    segments: int = 1,
) -> Call:
    """Choose tiles and variant; expand what broadcasts, without a copy.

    Args:
        keys: Tk, which ``position_bias``, ``key_padding`` and ``block_mask`` span.
        matrices: every tensor of which the kernel reads or writes tiles.
        choose_config: takes the arguments of ``forward_config``.
        segments: see ``extra_load``.
    """
    batch, heads, rows, head_dim = query.shape
    kind = "plain" if key_factor is None else mode
    bias_per_key = position_bias is not None and (
        position_bias.shape[2] == 1 or position_bias.stride(2) == 0
    )
    optional = {
        "causal": causal or None,
        "window": window,
        "softcap": softcap,
        "alibi" if bias_per_key else "bias": position_bias,
        "padding": key_padding,
        "mask": block_mask,
        "sinks": sinks,
        "dropout": dropout or None,
    }
    features = {name for name, feature in optional.items() if feature is not None}
    problem = (
        device_architecture(query.device, triton.knobs.runtime.interpret),
        head_dim,
        value_dim,
        query.dtype,
        kind,
        rows,
        extra_load(
            kind,
            features,
            segments,
            width=max(head_dim, value_dim),
            saves=saves.minimum is not None,
        ),
        causal,
        length_bucket(keys),
        device_name(query.device, triton.knobs.runtime.interpret),
    )
    config = choose_config(*problem)
    if key_factor is not None:
        if key_factor.dim() == 2:
            key_factor = key_factor[:, None]  # [B, 1, Tk]
        key_factor = key_factor.expand(batch, heads, -1)
    if position_bias is not None:
        position_bias = position_bias.expand(batch, heads, rows, keys)
    if block_mask is not None:
        block_mask = block_mask.view(torch.uint8).expand(batch, heads, rows, keys)
    if scale is None:
        scale = head_dim**-0.5
    unit = (scale if softcap is None else softcap) * LOG2_E
    tiled = (*matrices, key_factor, position_bias, block_mask)
    longest = max(abs(stride) for t in tiled if t is not None for stride in t.stride()[-2:])
    return Call(
        problem=problem,
        config=config,
        spec=make_variant(
            config,
            head_dim,
            value_dim,
            kind,
            features,
            save_minimum=saves.minimum is not None,
            save_rest=saves.rest is not None,
            offset_in_memory=isinstance(query_offset, Tensor),
            positive_unit=unit > 0,
            wide=longest * 256 >= 1 << 31,
        ),
        key_factor=key_factor,
        position_bias=position_bias,
        key_padding=None if key_padding is None else key_padding.view(torch.uint8),
        block_mask=block_mask,
        sinks=None if sinks is None else sinks.contiguous(),
        dropout_seed=dropout_seed if dropout else None,
        threshold=dropout_threshold(dropout),
        keep_scale=1.0 / (1.0 - dropout),
        query_offset=keys - rows if query_offset is None else query_offset,
        window=FAR if window is None else min(window, FAR),
        unit=unit,
        inner_scale=0.0 if softcap is None else scale / softcap,
    )
