"""Which way the portable implementation computes a call, and why: decided once, here.

Legend: Tk keys, D head dim, Dv value dim.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .portable_blocks import serves_blocks
from .visibility import Visibility

NOTHING = "nothing to compute"
SCORE_BLOCKS = "score blocks"
QUERY_BLOCKS = "query blocks"
PLAIN_SDPA = "SDPA"
SCALED_KEYS = "scaled keys + SDPA"
BIAS = "bias + SDPA"
ROW_MINIMUM = "row minimum + SDPA"
WITH_A_MASK = " with a mask"

_FOLDED = {
    "multiplicative": SCALED_KEYS,
    "log_additive": BIAS,
    "min_shift": ROW_MINIMUM,
    "min_shift_full": ROW_MINIMUM,
}


class PortablePath(NamedTuple):
    """A way to compute attention.

    Args:
        kernel: one of the names above; of SDPA possibly ``WITH_A_MASK``.
        reason: why it is not one call of SDPA without a mask, which its fastest kernels serve;
            empty where it is.
    """

    kernel: str
    reason: str = ""

    @property
    def masked(self) -> bool:
        """Whether SDPA is given a mask, and so called by blocks of query rows."""
        return self.kernel == BIAS or self.kernel.endswith(WITH_A_MASK)


def visibility_of(
    causal: bool,
    query_offset: int | Tensor,
    window: int | None,
    mask: Tensor | None,
    key_tokens: int,
) -> Visibility:
    """Which keys are visible; not causal where the first query sees all keys, as in decoding."""
    if isinstance(query_offset, int) and query_offset >= key_tokens - 1:
        causal = False
    return Visibility(causal, query_offset, window, mask, key_tokens)


def portable_path(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_factor: Tensor | None,
    *,
    mode: str,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    position_bias: Tensor | None,
    visibility: Visibility,
    dropout: float,
    return_lse: bool,
) -> PortablePath:
    """How ``attention_portable`` computes this call; its arguments."""
    if query.shape[2] == 0:
        return PortablePath(NOTHING, "there are no queries")
    half = query.dtype in (torch.float16, torch.bfloat16)
    needs_scores = return_lse or softcap is not None or sinks is not None
    if (
        dropout == 0
        and serves_blocks(query, key, value, key_factor, sinks, position_bias)
        and not _sdpa_is_faster(
            key_factor is not None,
            mode,
            scale,
            half,
            needs_scores or position_bias is not None,
            query.shape[2],
            visibility,
        )
    ):
        return PortablePath(SCORE_BLOCKS, "they are faster on a CPU without gradients")
    reason = _why_not_folded(
        half, key_factor, mode, softcap, sinks, position_bias, dropout, return_lse
    )
    if reason is not None:
        return PortablePath(QUERY_BLOCKS, reason)
    kernel = PLAIN_SDPA if key_factor is None else _FOLDED[mode]
    if kernel == BIAS:
        return PortablePath(kernel, "log m is a mask to it")
    reason = _why_masked(query, key, value, position_bias, scale, visibility)
    if reason is not None:
        return PortablePath(kernel + WITH_A_MASK, reason)
    if kernel == ROW_MINIMUM:
        return PortablePath(kernel, "each row's smallest score is found first")
    return PortablePath(kernel)


def prefix_path(*tensors: Tensor | None, dropout: float) -> PortablePath:
    """The same behind a prefix, of which no batch row gets a copy."""
    if dropout == 0 and serves_blocks(*tensors):
        return PortablePath(SCORE_BLOCKS, "a prefix is shared without copies")
    return PortablePath(QUERY_BLOCKS, "a prefix is shared without copies")


def _why_not_folded(
    half: bool,
    key_factor: Tensor | None,
    mode: str,
    softcap: float | None,
    sinks: Tensor | None,
    position_bias: Tensor | None,
    dropout: float,
    return_lse: bool,
) -> str | None:
    """Why SDPA cannot compute the call on other keys, queries or a bias; ``None`` if it can."""
    if softcap is not None:
        return "softcap changes the scores themselves"
    if sinks is not None:
        return "sinks take part in the normaliser"
    if return_lse:
        return "SDPA returns no log-sum-exp"
    if dropout > 0:
        return "dropout is drawn for each score by its own generator"
    if position_bias is not None and position_bias.requires_grad:
        return "SDPA's mask would keep position_bias for its gradient"
    if half and position_bias is not None:
        return "half precision would round position_bias"
    if half and key_factor is not None and mode != "multiplicative":
        return "half precision would round what the factors add to the scores"
    if key_factor is not None and mode == "log_additive" and key_factor.requires_grad:
        return "the logarithm of a factor of 0 has no gradient"
    return None


def _why_masked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    position_bias: Tensor | None,
    scale: float,
    visibility: Visibility,
) -> str | None:
    """Why SDPA needs a mask, which is built by blocks of query rows; ``None`` if it needs none."""
    if position_bias is not None:
        return "position_bias is a mask to it"
    if visibility.mask is not None:
        return "mask hides keys"
    window = visibility.window
    if not visibility.causal:
        if window is not None:
            return "window hides keys"
        if not _bounded(query, key, value):
            return "rows go in blocks, as SDPA may hold whole score matrices"
        return None
    offset = visibility.query_offset
    square = isinstance(offset, int) and query.shape[2] == visibility.key_tokens
    # is_causal with scale <= 0 gives NaN in torch 2.13 on CPU; the masked path does not
    if not square or offset != 0 or scale <= 0:
        return "SDPA's causal flag wants as many queries as keys and a positive scale"
    if window is not None and window < visibility.key_tokens:
        return "window hides keys"
    return None


def _bounded(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether a kernel of SDPA that holds no score matrix surely serves all queries at once.

    On a GPU that is so for equal head dims up to 256 in half precision; in float32 it depends on
    groups of heads and on strides.
    """
    if query.device.type == "cpu":
        return True
    head_dim = query.shape[-1]
    half = query.dtype in (torch.float16, torch.bfloat16)
    return half and head_dim == value.shape[-1] and head_dim <= 256


def _sdpa_is_faster(
    has_factor: bool,
    mode: str,
    scale: float,
    half: bool,
    needs_scores: bool,
    query_tokens: int,
    visibility: Visibility,
) -> bool:
    """Whether one call of SDPA beats blocks on a CPU: see the table in ``portable``."""
    if needs_scores or (has_factor and mode != "multiplicative"):
        return False
    if half:
        return True
    if visibility.mask is not None or visibility.window is not None:
        return False
    if not visibility.causal:
        return True
    offset = visibility.query_offset
    square = isinstance(offset, int) and offset == 0 and query_tokens == visibility.key_tokens
    return square and scale > 0
