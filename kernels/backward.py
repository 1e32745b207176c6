"""Gradients of the fused attention: the launcher of the backward kernels.

Probabilities are recomputed tile by tile from the saved log-sum-exp. A shared prefix is a segment
of keys of its own, with launches of its own. Nothing is written by two programs, so that a gradient
is the same number every time.

Legend: B batch, Hq/Hk query/key heads, Tq/Tk query/key tokens, Tp prefix tokens, D head dim, Dv
value dim.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor

from .backward_bias import _attention_bwd_bias_kernel
from .backward_configs import backward_config
from .backward_keys import _attention_bwd_dkv_kernel
from .backward_queries import _attention_bwd_dq_kernel
from .backward_rows import _attention_bwd_rows_kernel
from .launch import RowNumbers, prepare, strides
from .prepass import key_ranges
from .tuned import TileConfig

_SUM = torch.float32  # of what is added up
DIFFERENTIABLE = (
    "query",
    "key",
    "value",
    "prefix_key",
    "prefix_value",
    "key_factor",
    "sinks",
    "position_bias",
)


@dataclass(frozen=True)
class Saved:
    """What the forward pass leaves behind."""

    out: Tensor  # [B, Hq, Tq, Dv]
    lse: Tensor  # [B, Hq, Tq] float32, contiguous
    numbers: RowNumbers


@dataclass(frozen=True)
class _Segment:
    """Some of the keys, and the parts of what spans all keys that belong to them."""

    name: str  # of its tensors, in front of "key" and "value"
    key: Tensor  # [B | 1, Hk, keys, D]
    value: Tensor
    shared: bool  # one key and value for all rows of the batch
    columns: slice  # of all keys
    key_factor: Tensor | None  # [B, Hq, keys]
    factor_columns: slice  # of the factors' own
    position_bias: Tensor | None  # [B, Hq, Tq, keys]
    key_padding: Tensor | None  # [B, keys]
    ranges: Tensor | None
    block_mask: Tensor | None  # [B, Hq, Tq, keys]

    @property
    def keys(self) -> int:
        """How many there are."""
        return self.key.shape[2]


def attention_bwd(
    d_out: Tensor,
    d_lse: Tensor | None,
    saved: Saved,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_factor: Tensor | None = None,
    *,
    prefix: tuple[Tensor, Tensor] | None = None,
    wanted: Collection[str] = DIFFERENTIABLE,
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
    dropout: float = 0.0,
    dropout_seed: Tensor | None = None,
) -> dict[str, Tensor]:
    """Launch the backward kernels. Arguments are taken as validated by the op.

    Args:
        d_out: ``[B, Hq, Tq, Dv]``, gradient of the output, any strides.
        d_lse: ``[B, Hq, Tq]`` float32, gradient of the log-sum-exp; None is zeros.
        saved: what ``attention_fwd`` or ``shared_prefix_fwd`` gave for the same arguments.
        wanted: which gradients, of :data:`DIFFERENTIABLE`; those of absent tensors are left out.
        prefix: see ``shared_prefix_fwd``; the others see ``attention_fwd``.
    Returns: the gradients by name, each of its tensor's shape and dtype.
    """
    options = {
        "mode": mode,
        "causal": causal,
        "query_offset": query_offset,
        "scale": query.shape[-1] ** -0.5 if scale is None else scale,
        "window": window,
        "softcap": softcap,
        "sinks": sinks,
        "position_bias": position_bias,
        "key_padding": key_padding,
        "block_mask": block_mask,
        "dropout": dropout,
        "dropout_seed": dropout_seed,
    }
    tensors = (query, key, value, key_factor, prefix)
    return _Backward(d_out, d_lse, saved, tensors, options).gradients(frozenset(wanted))


class _Backward:
    """One call: its arguments in the kernels' form, and a method for each kernel."""

    def __init__(
        self,
        d_out: Tensor,
        d_lse: Tensor | None,
        saved: Saved,
        tensors: tuple[Tensor, Tensor, Tensor, Tensor | None, tuple[Tensor, Tensor] | None],
        options: dict[str, Any],
    ) -> None:
        query, key, value, key_factor, prefix = tensors
        self.query, self.key, self.value, self.prefix = query, key, value, prefix
        self.d_out, self.d_lse, self.saved = d_out, d_lse, saved
        # float32 shows what is rounded when δ is summed in another order than the products
        self.precise = saved.numbers.rest is not None
        self.scale = options["scale"]
        self.sinks: Tensor | None = options["sinks"]
        self.bias: Tensor | None = options["position_bias"]
        self.key_factor = key_factor
        self.factor_per_head = key_factor is not None and key_factor.dim() == 3
        self.batch, self.heads, self.rows, _ = query.shape
        self.group = self.heads // key.shape[1]
        prefix_keys = 0 if prefix is None else prefix[0].shape[2]
        self.call = prepare(
            query,
            value.shape[-1],
            prefix_keys + key.shape[2],
            key_factor,
            (query, key, value, *(prefix or ()), d_out, saved.out),
            **options,
            choose_config=partial(backward_config, "queries"),
            segments=1 if prefix is None else 2,
        )
        self.segments = self._segments(prefix_keys)
        numbers = (self.batch, self.heads, self.rows)
        self.delta = query.new_empty(numbers, dtype=torch.float32)
        self.d_minimum = None
        if self.call.spec.mode == "min_shift":
            self.d_minimum = torch.empty_like(self.delta)

    def gradients(self, wanted: frozenset[str]) -> dict[str, Tensor]:
        """Launch what is needed for the gradients that are wanted."""
        if not self.delta.numel():
            tensors = self._differentiable()
            return {name: torch.zeros_like(tensors[name]) for name in wanted & tensors.keys()}
        self._run_rows()
        found = self._run_keys(wanted)
        if "query" in wanted:
            found["query"] = self._run_queries()
        if self.bias is not None and self.bias.shape[2] != 1 and "position_bias" in wanted:
            found["position_bias"] = self._run_bias(self.bias)
        if self.sinks is not None and "sinks" in wanted:
            share = torch.exp(self.sinks.float()[:, None] - self.saved.lse)  # [B, Hq, Tq]
            delta = self.delta
            if self.precise and self.d_lse is not None:
                delta = delta - self.d_lse
            found["sinks"] = -(share * delta).sum((0, 2)).to(self.sinks.dtype)
        return found

    def _differentiable(self) -> dict[str, Tensor]:
        """The arguments by name, in the shapes that their gradients have."""
        key, value = self.prefix or (None, None)
        named = {
            "query": self.query,
            "key": self.key,
            "value": self.value,
            "prefix_key": key,
            "prefix_value": value,
            "key_factor": self.key_factor,
            "sinks": self.sinks,
            "position_bias": self.bias,
        }
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    # --- arguments -------------------------------------------------------------------------------

    def _segments(self, prefix_keys: int) -> list[_Segment]:
        """The prefix, if there is one, and then the rows' own keys."""
        call = self.call
        parts = [("", self.key, self.value, prefix_keys)]
        if self.prefix is not None:
            parts.insert(0, ("prefix_", *self.prefix, 0))
        factor = call.key_factor
        spans = factor is not None and factor.shape[-1] != self.key.shape[2]
        segments = []
        for name, key, value, first in parts:
            columns = slice(first, first + key.shape[2])
            shared = key.shape[0] == value.shape[0] == 1 < self.batch
            if not shared:
                key, value = (each.expand(self.batch, -1, -1, -1) for each in (key, value))
            own_factor = factor
            if factor is not None and prefix_keys:
                own_factor = factor[..., columns] if spans else (None if first == 0 else factor)
            padding = None if call.key_padding is None else call.key_padding[:, columns]
            segments.append(
                _Segment(
                    name=name,
                    key=key,
                    value=value,
                    shared=shared,
                    columns=columns,
                    key_factor=own_factor,
                    factor_columns=columns if spans else slice(0, key.shape[2]),
                    position_bias=None
                    if call.position_bias is None
                    else call.position_bias[..., columns],
                    key_padding=padding,
                    ranges=None if padding is None else key_ranges(padding),
                    block_mask=None if call.block_mask is None else call.block_mask[..., columns],
                )
            )
        return segments

    def _part(self, name: str, segment: _Segment) -> tuple[TileConfig, dict[str, Any]]:
        """Tiles of one of the kernels, and the arguments that all of them take."""
        config = backward_config(name, *self.call.problem)
        spec = replace(
            self.call.spec,
            has_key_factor=segment.key_factor is not None,
            save_rest=self.precise,
            d_lse_apart=self.precise and self.d_lse is not None,
            block_m=config.block_m,
            block_n=config.block_n,
            edge_stages=config.edge_stages,
        )
        stride_key, stride_value = segment.key.stride(), segment.value.stride()
        if segment.shared:
            stride_key, stride_value = (0, *stride_key[1:]), (0, *stride_value[1:])
        call, saved = self.call, self.saved
        return config, {
            "d_out_ptr": self.d_out,
            "lse_ptr": saved.lse,
            "delta_ptr": self.delta,
            "d_lse_ptr": self.d_lse,
            "rest_ptr": saved.numbers.rest,
            "minimum_ptr": saved.numbers.minimum,
            "argmin_ptr": saved.numbers.argmin,
            "d_minimum_ptr": self.d_minimum,
            "query_ptr": self.query,
            "key_ptr": segment.key,
            "value_ptr": segment.value,
            "factor_ptr": segment.key_factor,
            "bias_ptr": segment.position_bias,
            "padding_ptr": segment.key_padding,
            "range_ptr": segment.ranges,
            "mask_ptr": segment.block_mask,
            "seed_ptr": call.dropout_seed,
            "query_offset": call.query_offset,
            "first_column": segment.columns.start,
            "rows": self.rows,
            "keys": segment.keys,
            "heads": self.heads,
            "group": self.group,
            "window": call.window,
            "unit": call.unit,
            "inner_scale": call.inner_scale,
            "keep_scale": call.keep_scale,
            "threshold": call.threshold,
            "stride_d_out": self.d_out.stride(),
            "stride_query": self.query.stride(),
            "stride_key": stride_key,
            "stride_value": stride_value,
            "stride_factor": strides(segment.key_factor, 3),
            "stride_bias": strides(segment.position_bias, 4),
            "stride_padding": strides(segment.key_padding, 2),
            "stride_mask": strides(segment.block_mask, 4),
            "SPEC": spec,
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
            "enable_fp_fusion": True,
        }

    def _row_programs(self, config: TileConfig) -> int:
        return triton.cdiv(self.rows, config.block_m) * self.batch * self.heads

    # --- kernels ---------------------------------------------------------------------------------

    def _run_rows(self) -> None:
        """δ of each row and, for ``min_shift``, the gradient of its minimum."""
        if self.precise:
            self._run_rows_of("sums", self.segments)
        else:
            self._run_rows_of("outputs", self.segments[-1:])
        if self.d_minimum is not None:
            flagged = [each for each in self.segments if each.key_factor is not None]
            self._run_rows_of("minimum", [each for each in flagged if each.keys])
            if not any(each.keys for each in flagged):
                self.d_minimum.zero_()

    def _run_rows_of(self, stage: str, segments: list[_Segment]) -> None:
        """One stage of the kernel, over some segments of keys."""
        for index, segment in enumerate(segments):
            config, arguments = self._part("rows", segment)
            factors = segment.key_factor if stage == "minimum" else None
            lists = self.call.factor_tiles(factors, config.block_n)
            _attention_bwd_rows_kernel[(self._row_programs(config),)](
                **arguments,
                out_ptr=self.saved.out,
                before_ptr=lists.before,
                flagged_ptr=lists.flagged,
                stride_out=self.saved.out.stride(),
                stride_tiles=lists.stride,
                STAGE=stage,
                HAS_D_LSE=self.d_lse is not None,
                CONTINUES=index > 0,
            )

    def _run_queries(self) -> Tensor:
        """Gradient of the query, one segment after the other."""
        d_query = _like(self.query)
        partials = d_query if len(self.segments) == 1 else torch.empty_like(d_query, dtype=_SUM)
        for index, segment in enumerate(self.segments):
            config, arguments = self._part("queries", segment)
            target = d_query if segment is self.segments[-1] else partials
            _attention_bwd_dq_kernel[(self._row_programs(config),)](
                **arguments,
                d_query_ptr=target,
                partial_ptr=partials,
                scale=self.scale,
                stride_d_query=target.stride(),
                CONTINUES=index > 0,
            )
        return d_query

    def _run_keys(self, wanted: frozenset[str]) -> dict[str, Tensor]:
        """Gradients of keys and values, and of what has a number per key."""
        factor, bias, found = self.call.key_factor, self.bias, {}
        keys = 0 if factor is None else factor.shape[-1]
        d_factor = d_bias = None
        if factor is not None and "key_factor" in wanted:
            heads = self.heads if self.factor_per_head else self.heads // self.group
            d_factor = factor.new_empty(self.batch, heads, keys)
        if bias is not None and bias.shape[2] == 1 and "position_bias" in wanted:
            d_bias = bias.new_empty(self.batch, self.heads, bias.shape[3], dtype=_SUM)
        for segment in self.segments:
            names = {f"{segment.name}key", f"{segment.name}value"}
            if d_factor is None and d_bias is None and wanted.isdisjoint(names):
                continue
            d_key, d_value = self._run_keys_of(segment, d_factor, d_bias)
            shapes = self.prefix or () if segment.name else (self.key, self.value)
            for name, grad, given in zip(sorted(names), (d_key, d_value), shapes, strict=True):
                if name in wanted:
                    alone = grad.shape == given.shape
                    found[name] = grad if alone else grad.sum(0, keepdim=True).contiguous()
        if d_factor is not None:
            found["key_factor"] = d_factor if self.factor_per_head else d_factor.sum(1)
        if d_bias is not None and bias is not None:
            found["position_bias"] = d_bias[:, :, None].sum_to_size(bias.shape).to(bias.dtype)
            found["position_bias"] = found["position_bias"].contiguous()
        return found

    def _run_keys_of(
        self, segment: _Segment, d_factor: Tensor | None, d_bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Gradients of one segment's keys and values; its part of the others is written."""
        d_key, d_value = _like(segment.key), _like(segment.value)
        if segment.key_factor is None:
            d_factor = None
        if d_factor is not None:
            d_factor = d_factor[..., segment.factor_columns]
        if d_bias is not None:
            d_bias = d_bias[..., segment.columns]
        config, arguments = self._part("keys", segment)
        programs = triton.cdiv(segment.keys, config.block_n) * segment.key.shape[1]
        programs *= segment.key.shape[0]
        if not programs:
            return d_key, d_value
        _attention_bwd_dkv_kernel[(programs,)](
            **arguments,
            d_key_ptr=d_key,
            d_value_ptr=d_value,
            d_factor_ptr=d_factor,
            d_bias_ptr=d_bias,
            batches=self.batch if segment.shared else 1,
            scale=self.scale,
            stride_d_key=d_key.stride(),
            stride_d_value=d_value.stride(),
            stride_d_factor=strides(d_factor, 3),
            stride_d_bias=strides(d_bias, 3),
            FACTOR_PER_HEAD=self.factor_per_head,
            WANTS_FACTOR=d_factor is not None,
            WANTS_BIAS=d_bias is not None,
            LINEAR=self._linear(segment),
        )
        return d_key, d_value

    def _linear(self, segment: _Segment) -> bool:
        """Whether a program's scores are m q·k with one m for each of its keys."""
        spec = self.call.spec
        factors = self.group if self.factor_per_head else 1
        return (
            segment.key_factor is not None
            and spec.mode == "multiplicative"
            and not spec.has_softcap
            and not segment.shared
            and factors == 1
        )

    def _run_bias(self, bias: Tensor) -> Tensor:
        """Gradient of a bias with a number per query row and key."""
        # expanded biases have a number, and a gradient, for each of their elements
        d_bias = bias.new_empty(bias.shape)
        for segment in self.segments:
            config, arguments = self._part("bias", segment)
            tiles = triton.cdiv(self.rows, config.block_m) * triton.cdiv(
                segment.keys, config.block_n
            )
            if not tiles:
                continue
            part = d_bias[..., segment.columns]
            _attention_bwd_bias_kernel[(tiles * bias.shape[0] * bias.shape[1],)](
                **arguments,
                d_bias_ptr=part,
                bias_heads=bias.shape[1],
                shared_batches=self.batch // bias.shape[0],
                shared_heads=self.heads // bias.shape[1],
                stride_d_bias=part.stride(),
            )
        return d_bias


def _like(tensor: Tensor) -> Tensor:
    """An empty ``[B, H, T, D]``, heads beside dims in memory as models have them."""
    batch, heads, tokens, dim = tensor.shape
    return tensor.new_empty(batch, tokens, heads, dim).transpose(1, 2)
