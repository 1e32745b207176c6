"""Tiles of the Hopper kernel, and which calls it serves. Needs no triton.

Legend: D head dim, Dv value dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .configs import decodes
from .hopper_tiles import HEAD_DIMS, HopperConfig
from .tuned import Problem, tuned_tiles


def hopper_config(
    head_dim: int,
    value_dim: int,
    architecture: str = "sm_90",
    mode: str = "plain",
    causal: bool = False,
    length: str | None = None,
    device: str = "",
) -> HopperConfig:
    """Tiles for one kind of problem: measured ones, else the rule's.

    Args:
        architecture, length, device: as of ``configs.forward_config``.
        mode: ``plain`` without factors.
    """
    found = None
    if length is not None:
        dims = (head_dim, value_dim)
        found = tuned_tiles(
            Problem(architecture, "hopper", *dims, "half", mode, causal, length), device
        )
    return found if isinstance(found, HopperConfig) else hopper_rule(head_dim, value_dim)


def hopper_rule(head_dim: int, value_dim: int) -> HopperConfig:
    """Tiles that compile well.

    Registers decide: a thread of a consumer has 240, for a row's share of the output (Dv / 2), of
    the scores (block_n / 2) and of the weights in half precision (block_n / 4). Wider tiles take
    fewer rescalings of the output. Then shared memory decides.
    """
    width = max(head_dim, value_dim)
    if width <= 64:
        return HopperConfig(block_n=128, stages=4, own_output=True)
    if width <= 128:
        return HopperConfig(block_n=128, stages=2, own_output=True)
    return HopperConfig(block_n=64, stages=2, own_output=head_dim != value_dim)


def why_not_hopper(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mode: str,
    query_offset: int | Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    position_bias: Tensor | None,
    mask: Tensor | None,
    prefix: tuple[Tensor, Tensor] | None,
    dropout: float,
    needs_grad: bool,
) -> str | None:
    """Why the Hopper kernel cannot serve a call; ``None`` if it can.

    Shapes and dtypes are known to agree. The device's architecture is not looked at here.

    Args:
        query: ``[B, Hq, Tq, D]``; key, value: ``[B|1, Hk, Tk, D]`` and ``[B|1, Hk, Tk, Dv]``.
        needs_grad: a backward pass will follow, for which ``min_shift`` saves more.
    """
    features = {
        "window": window,
        "softcap": softcap,
        "sinks": sinks,
        "position_bias": position_bias,
        "mask": mask,
        "prefix": prefix,
        "dropout": dropout or None,
    }
    given = [name for name, feature in features.items() if feature is not None]
    if given:
        return f"does not serve {', '.join(given)}"
    if query.dtype not in (torch.float16, torch.bfloat16):
        return f"serves fp16 and bf16, got {query.dtype}"
    if mode == "min_shift_full":
        return "cannot serve mode='min_shift_full'"
    for size in (query.shape[-1], value.shape[-1]):
        if size not in HEAD_DIMS:
            return f"serves head dims 64, 128 and 256, got {size}"
    if not isinstance(query_offset, int):
        return "needs query_offset as a number, got a tensor"
    if scale <= 0:
        return f"needs a positive scale, got {scale:g}"
    if decodes(query.shape[2]):
        return f"needs more query rows than fit one small tile, got {query.shape[2]}"
    if needs_grad and mode == "min_shift":
        return "saves no row minima, which the backward pass of min_shift needs"
    for name, tensor in {"query": query, "key": key, "value": value}.items():
        if not _copied_by_tma(tensor, shared=name != "query"):
            return (
                f"needs {name} with its last dimension contiguous and the other strides multiples "
                f"of 16 bytes, got strides {tuple(tensor.stride())} at {tensor.dtype}"
            )
    return None


def _copied_by_tma(tensor: Tensor, shared: bool) -> bool:
    """Whether ``[B, H, T, D]`` can be copied tile by tile.

    Args:
        shared: of a batch stride of 0 one row is taken, which all batch rows share.
    """
    aligned = 16 // tensor.element_size()
    *strides, last = tensor.stride()
    for place, stride in enumerate(strides):
        stays = tensor.shape[place] == 1 or (place == 0 and shared and stride == 0)
        if not stays and (stride <= 0 or stride % aligned):
            return False
    return last == 1
