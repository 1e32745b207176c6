"""How much fits: free memory, what a row takes, and telling memory errors from others."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn

from .capabilities import dtype_of, text_config, vocabulary_size

SHARE = 0.5
"""Share of the free memory that one batch may take; the estimate of a row is a rough one."""

# Where a larger batch no longer makes a token cheaper. On a CPU (one thread, models of 1M and 50M
# parameters, inputs of 128 and 512 tokens) that was at 1000 to 2000 tokens; up to 18% was lost at
# more. With two threads and 34M parameters 2072 tokens took 0 to 9% less time than 777.
_TOKENS_PER_BATCH = {"cpu": 2048}
_TOKENS_PER_BATCH_ELSEWHERE = 65536
_SCORE_ROWS = 64  # query rows of which the portable backend holds scores at a time


def tokens_per_batch(device: torch.device) -> int:
    """Tokens of a batch from which on more bring no more speed."""
    return _TOKENS_PER_BATCH.get(device.type, _TOKENS_PER_BATCH_ELSEWHERE)


def bytes_per_row(model: nn.Module, tokens: int, logits: int, keys: int) -> int:
    """A rough estimate of what one row allocates at the widest point of a forward pass.

    Args:
        tokens: Tokens that the row runs.
        logits: Positions at which the model computes logits.
        keys: Tokens that its queries attend to, a shared prefix included.
    """
    element = dtype_of(model).itemsize
    layer = layer_bytes(text_config(model), element, tokens, keys)
    return layer + 3 * logits * vocabulary_size(model) * element


def layer_bytes(config: Any, element: int, tokens: int, keys: int) -> int:
    """The same without logits.

    Args:
        config: Of the layers.
        element: Bytes of a number of the model's dtype.
        tokens: Tokens that the row runs.
        keys: Tokens that its queries attend to.
    """
    hidden = int(getattr(config, "hidden_size", 1024))
    inner = getattr(config, "intermediate_size", None)
    inner = max(inner) if isinstance(inner, (list, tuple)) else inner or 4 * hidden
    # Residual stream, its norm, queries, keys, values, output; the gated products of the MLP.
    layer = tokens * element * (6 * hidden + 3 * inner)
    heads = int(getattr(config, "num_attention_heads", 1))
    scores = 3 * 4 * heads * min(tokens, _SCORE_ROWS) * keys
    return layer + scores + 2 * 4 * keys


def free_memory(model: nn.Module) -> int | None:
    """Bytes that can still be allocated on the fullest of the model's devices; None if unknown."""
    devices = {parameter.device for parameter in model.parameters()}
    known = [free for device in devices if (free := _free_on(device)) is not None]
    return min(known, default=None)


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out; on a CPU only the text of a plain RuntimeError tells."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error).lower()
    return any(
        words in text for words in ("out of memory", "not enough memory", "can't allocate memory")
    )


def _free_on(device: torch.device) -> int | None:
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + reserved
    if device.type == "cpu" and "SC_AVPHYS_PAGES" in getattr(os, "sysconf_names", {}):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None
