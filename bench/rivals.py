"""Everything that computes attention with one factor per key, ready to be timed side by side.

Our own op by backend; scaled keys through each of SDPA's backends and FlashAttention-4, or a bias
through SDPA; FlexAttention with the factor captured in its ``score_mod``; the modifier matrix in
eager attention. A provider takes query, key, value and factor, keeps what does not depend on them
(causal masks) from call to call, and raises where it does not serve.

Legend: B batch, Hq/Hk query/key heads, T tokens, D head dim.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from atman_triton import attention
from bench.eager import attention_eager, modifier_matrix
from bench.hopper_gate import on_hopper

Attention = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""``[B, Hq, T, D]``, twice ``[B, Hk, T, D]``, float32 ``[B, T]`` or ``[B, Hq, T]``: the output."""

OURS = "atman (triton)"
OURS_HOPPER = "atman (hopper)"
OURS_PORTABLE = "atman (torch)"
EAGER = "eager, modifier matrix"
FLEX = "FlexAttention"
SDPA = {
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "FLASH": SDPBackend.FLASH_ATTENTION,
    "EFFICIENT": SDPBackend.EFFICIENT_ATTENTION,
}
SDPA_ON_CPU = SDPA | {"MATH": SDPBackend.MATH}


class UnservedError(Exception):
    """A provider does not do this; the text says why."""


def matrix_of(factor: Tensor, rows: int) -> Tensor:
    """The modifier matrix ``[B, 1|Hq, rows, T]`` of factors ``[B, T]`` or ``[B, Hq, T]``."""
    if factor.dim() == 2:
        return modifier_matrix(factor, rows)
    return factor[:, :, None, :].expand(-1, -1, rows, -1).contiguous()


@functools.lru_cache(maxsize=2)  # of the size that is checked and of that which is timed
def _visible(rows: int, tokens: int, causal: bool, device: torch.device) -> Tensor:
    visible = torch.ones(rows, tokens, dtype=torch.bool, device=device)
    return visible.tril_(tokens - rows) if causal else visible


@functools.lru_cache(maxsize=2)
def _causal_bias(tokens: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.full((tokens, tokens), float("-inf"), dtype=dtype, device=device).triu_(1)


@functools.lru_cache(maxsize=2)
def _block_mask(tokens: int, device: torch.device) -> BlockMask:
    return create_block_mask(
        lambda batch, head, row, column: row >= column, None, None, tokens, tokens, device=device
    )


def forget_masks() -> None:
    """Give their memory back."""
    _visible.cache_clear()
    _causal_bias.cache_clear()
    _block_mask.cache_clear()


def atman(mode: str, causal: bool, backend: str) -> Attention:
    """This project's op."""

    def attend(query: Tensor, key: Tensor, value: Tensor, factor: Tensor) -> Tensor:
        return attention(query, key, value, factor, mode=mode, causal=causal, backend=backend)

    return attend


def eager(mode: str, causal: bool) -> Attention:
    """The paper's way: a matrix of factors on the whole score matrix."""

    def attend(query: Tensor, key: Tensor, value: Tensor, factor: Tensor) -> Tensor:
        rows, tokens = query.shape[2], key.shape[2]
        visible = _visible(rows, tokens, causal, query.device)
        matrix = matrix_of(factor, rows)
        return attention_eager(query, key, value, matrix, mode=mode, visible=visible)

    return attend


def _sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    backend: SDPBackend,
    *,
    causal: bool = False,
    bias: Tensor | None = None,
) -> Tensor:
    grouped = query.shape[1] != key.shape[1]
    if grouped and backend == SDPBackend.EFFICIENT_ATTENTION:  # it knows no groups of heads
        group = query.shape[1] // key.shape[1]
        key, value, grouped = (
            key.repeat_interleave(group, 1),
            value.repeat_interleave(group, 1),
            False,
        )
    with sdpa_kernel(backend):
        return scaled_dot_product_attention(
            query, key, value, attn_mask=bias, is_causal=causal, enable_gqa=grouped
        )


def scaled(query: Tensor, key: Tensor, factor: Tensor) -> Tensor:
    """Keys times their factors, in the keys' dtype."""
    per_head = factor.dim() == 3
    if per_head and query.shape[1] != key.shape[1]:
        raise UnservedError("a key cannot be scaled for each of the query heads that share it")
    return key * (factor if per_head else factor[:, None])[..., None].to(key.dtype)


def scaled_keys(causal: bool, backend: SDPBackend) -> Attention:
    """``multiplicative``: q·(m k) is m (q·k), so the keys are scaled first."""

    def attend(query: Tensor, key: Tensor, value: Tensor, factor: Tensor) -> Tensor:
        return _sdpa(query, scaled(query, key, factor), value, backend, causal=causal)

    return attend


def flash_4(causal: bool) -> Attention:
    """The same through FlashAttention-4, which is a package of its own."""

    def attend(query: Tensor, key: Tensor, value: Tensor, factor: Tensor) -> Tensor:
        try:
            flash = importlib.import_module("flash_attn.cute").flash_attn_func
        except ImportError as error:
            raise UnservedError(f"needs the package flash-attn-4: {error}") from None
        tensors = (query, scaled(query, key, factor), value)
        output = flash(*(tensor.transpose(1, 2) for tensor in tensors), causal=causal)
        output = output[0] if isinstance(output, tuple) else output  # with the log-sum-exp
        return output.transpose(1, 2)

    return attend


def biased(causal: bool, backend: SDPBackend) -> Attention:
    """``log_additive``: log m is a bias; SDPA takes one or a causal flag, so both are in it."""

    def attend(query: Tensor, key: Tensor, value: Tensor, factor: Tensor) -> Tensor:
        logs = factor.log().to(query.dtype)
        bias = (logs if factor.dim() == 3 else logs[:, None])[:, :, None, :]
        if causal:
            bias = bias + _causal_bias(query.shape[2], query.dtype, query.device)
        return _sdpa(query, key, value, backend, bias=bias)

    return attend


def _flex(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    captured: Tensor,
    multiplies: bool,
    block_mask: BlockMask | None,
) -> Tensor:
    def score_mod(score: Tensor, batch: Tensor, head: Tensor, row: Tensor, column: Tensor):
        # read once: FlexAttention refuses a gradient to what is indexed twice
        number = captured[batch, column] if captured.dim() == 2 else captured[batch, head, column]
        return score * number if multiplies else score + number

    grouped = query.shape[1] != key.shape[1]
    output = flex_attention(
        query, key, value, score_mod=score_mod, block_mask=block_mask, enable_gqa=grouped
    )
    assert isinstance(output, Tensor)  # a tuple only where more is asked for
    return output


# With fullgraph the limit of recompilations is an error, not a silent return to eager.
_flex_compiled = torch.compile(_flex, dynamic=False, fullgraph=True)


def flex(mode: str, causal: bool) -> Attention:
    """FlexAttention, compiled on a GPU, eager on a CPU (which it gives no gradients)."""

    def attend(query: Tensor, key: Tensor, value: Tensor, factor: Tensor) -> Tensor:
        # What is captured must come from outside of the compiled region: a gradient to a tensor
        # that is computed inside it can get lost (pytorch/pytorch#162228).
        captured = factor.log() if mode == "log_additive" else factor
        mask = _block_mask(query.shape[2], query.device) if causal else None
        call = _flex_compiled if query.device.type == "cuda" else _flex
        return call(query, key, value, captured, mode == "multiplicative", mask)

    return attend


def providers(mode: str, causal: bool, device: torch.device) -> dict[str, Attention]:
    """All that compute this mode on a device, by name; ours come first."""
    on_cpu = device.type != "cuda"
    offer = {OURS: atman(mode, causal, "triton")}
    if on_hopper(device):
        offer[OURS_HOPPER] = atman(mode, causal, "hopper")
    # on a GPU, in half precision, only scaled keys are more than a way to be right
    if on_cpu or mode == "multiplicative":
        offer[OURS_PORTABLE] = atman(mode, causal, "torch")
    for name, backend in (SDPA_ON_CPU if on_cpu else SDPA).items():
        if mode == "multiplicative":
            offer[f"k·m + SDPA {name}"] = scaled_keys(causal, backend)
        if mode == "log_additive":
            offer[f"bias + SDPA {name}"] = biased(causal, backend)
    if mode == "multiplicative":
        offer["k·m + FlashAttention-4"] = flash_4(causal)
    if mode != "min_shift":
        offer[FLEX] = flex(mode, causal)
    offer[EAGER] = eager(mode, causal)
    return offer
