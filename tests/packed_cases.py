"""Calls with a shared prefix, drawn from a description, and the oracle on concatenated keys.

Legend: B batch, Hq/Hk heads, Tq query tokens, Tp/Tk keys of the prefix and of a row's own, D head
dim, Dv value dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from kernel_cases import DEVICE, SHORT
from torch import Tensor

from atman_triton.kernels.reference import attention_reference


@dataclass(frozen=True)
class Case:
    """One call; ``dims`` are (D, Dv), ``tokens`` (Tq, Tp, Tk), ``heads`` (Hq, Hk)."""

    tokens: tuple[int, int, int] = (4, 150, 4)
    dims: tuple[int, int] = (32, 32)
    heads: tuple[int, int] = (4, 2)
    batch: int = 5
    dtype: torch.dtype = torch.float32
    mode: str = "min_shift"
    factors: str = "one"  # none | some | per_head | one | own
    band: str = "causal"  # full | causal | offset | window | window_full
    softcap: float | None = None
    sinks: bool = False
    bias: str = "none"  # none | dense | shared | alibi
    mask: str = "none"  # none | left | right | holes | rows | heads
    layout: str = "plain"  # plain | tokens_first | shared_keys
    splits: int = 1

    def __str__(self):
        (rows, prefix, own), dims = self.tokens, self.dims
        parts = [f"B{self.batch}-Hq{self.heads[0]}-Hk{self.heads[1]}"]
        parts += [f"Tq{rows}-Tp{prefix}-Tk{own}"]
        parts += [f"D{dims[0]}" + f"v{dims[1]}" * (dims[0] != dims[1])]
        parts += [SHORT[self.dtype], self.band]
        parts += [self.mode, self.factors] if self.factors != "none" else ["plain"]
        parts += [f"cap{cap:g}" for cap in [self.softcap] if cap] + ["sinks"] * self.sinks
        parts += [f"bias_{self.bias}"] * (self.bias != "none")
        parts += [f"mask_{self.mask}"] * (self.mask != "none")
        parts += [self.layout] * (self.layout != "plain") + [f"splits{self.splits}"]
        return "-".join(parts)


def make_inputs(case: Case, seed: int = 0) -> tuple[list, dict]:
    """Query, key, value, prefix_key, prefix_value, key_factor and the oracle's options."""
    generator = torch.Generator().manual_seed(seed)
    (rows, prefix, own), (head_dim, value_dim) = case.tokens, case.dims
    (heads, key_heads), batch, keys = case.heads, case.batch, prefix + own

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    def chance(p, *shape):
        return torch.rand(*shape, generator=generator) < p

    def tensor(first, count, tokens, width):
        if case.layout == "tokens_first":  # [B, T, H, D] with room to spare, seen as [B, H, T, D]
            whole = randn(first, tokens, count + 1, width + 3).to(case.dtype).to(DEVICE)
            return whole[:, :, 1:, 1 : width + 1].transpose(1, 2)
        return randn(first, count, tokens, width).to(case.dtype).to(DEVICE)

    own_batch = 1 if case.layout == "shared_keys" else batch
    tensors: list = [
        tensor(batch, heads, rows, head_dim),
        tensor(own_batch, key_heads, own, head_dim),
        tensor(own_batch, key_heads, own, value_dim),
        tensor(1, key_heads, prefix, head_dim),
        tensor(1, key_heads, prefix, value_dim),
    ]
    factor = None
    if case.factors != "none":
        count = own if case.factors == "own" else keys
        shape = (batch, heads, count) if case.factors == "per_head" else (batch, count)
        touched = chance(0.3, *shape)
        if case.factors == "per_head":  # each head another part, so that their tiles differ
            part = torch.arange(count) * heads // max(count, 1) == torch.arange(heads)[:, None]
            touched = chance(0.5, *shape) & part
        if case.factors == "one":  # row b suppresses key b of evenly spaced ones, as units do
            touched = torch.arange(count) == (torch.arange(batch) * count // batch)[:, None]
        low = 0.0 if case.mode == "log_additive" else -1.0
        values = torch.rand(*shape, generator=generator) * (2 - low) + low
        values = torch.where(chance(0.2, *shape), 0.0, values)
        factor = torch.where(touched, values, 1.0).to(DEVICE)

    options: dict = {"mode": case.mode, "softcap": case.softcap}
    options["causal"] = case.band not in ("full", "window_full")
    if case.band in ("offset", "window_full"):
        options["query_offset"] = torch.tensor(keys // 2 - rows // 3, device=DEVICE)
    if case.band in ("window", "window_full"):
        options["window"] = max(1, keys // 2)
    if case.sinks:
        options["sinks"] = (randn(heads) + 1).to(case.dtype).to(DEVICE)
    shapes = {"dense": (batch, heads, rows, keys), "shared": (1, 1, rows, keys)}
    shapes["alibi"] = (1, heads, 1, keys)
    if case.bias != "none":
        options["position_bias"] = (randn(*shapes[case.bias]) * 2).to(case.dtype).to(DEVICE)
    if case.mask in ("left", "right"):
        length = torch.randint(0, keys + 1, (batch, 1), generator=generator)
        column = torch.arange(keys)[None, :]
        options["mask"] = column >= length if case.mask == "left" else column < length
    elif case.mask == "holes":
        options["mask"] = chance(0.7, batch, keys)
    elif case.mask == "rows":
        options["mask"] = chance(0.6, batch, 1, rows, keys)
    elif case.mask == "heads":
        options["mask"] = chance(0.6, 1, heads, rows, keys)
        options["mask"][:, :, rows // 2] = False  # a row that sees nothing
    if "mask" in options:
        options["mask"] = options["mask"].to(DEVICE)
    return [*tensors, factor], options


def reference(tensors: list, options: dict) -> tuple[Tensor, Tensor]:
    """The oracle on each row's own copy of prefix and keys."""
    query, key, value, prefix_key, prefix_value, factor = tensors
    whole = [
        torch.cat([t.expand(query.shape[0], -1, -1, -1) for t in pair], 2)
        for pair in ((prefix_key, key), (prefix_value, value))
    ]
    missing = 0 if factor is None else whole[0].shape[2] - factor.shape[-1]
    if missing:
        factor = torch.cat([factor.new_ones(*factor.shape[:-1], missing), factor], -1)
    return attention_reference(query, *whole, factor, **options)


def double(values: list | dict) -> list | dict:
    """Floating tensors in float64, everything else as it is."""
    if isinstance(values, dict):
        return dict(zip(values, double(list(values.values())), strict=True))
    return [v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for v in values]
