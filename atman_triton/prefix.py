"""Keys and values of the base run, which every perturbation reads in place.

transformers asks a cache how many tokens came before and hands it each layer's new keys and values.
:class:`PrefixCache` answers with the length of the prefix and gives the new ones back unchanged;
the prefix itself goes to the attention function through :class:`PrefixStore`, so it is never copied
per row, and what a perturbation adds lives for one layer only.

Legend: Hk key heads, D head dim, S input tokens, Tp tokens of the prefix, q new tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from .branches import TreeMask
from .masks import AttentionMask


class PrefixStore:
    """One pair of buffers ``[1, Hk, S, D]`` per attention layer; they double when they are full.

    Args:
        length: ``S`` at first.
    """

    def __init__(self, length: int) -> None:
        self.length = length
        self.tokens = 0  # Tp: how many of the buffers' first tokens the next pass reads
        self.recording = False  # the next pass writes its own behind them
        self.own_factors_only = False  # no factor of the next pass acts on the prefix
        self.tree: TreeMask | None = None
        self.looks_ahead = False  # a recorded row saw a later token
        self._buffers: dict[int, tuple[Tensor, Tensor]] = {}

    def bytes(self) -> int:
        """Bytes that all buffers take."""
        return sum(t.numel() * t.element_size() for pair in self._buffers.values() for t in pair)

    def around(
        self, layer: int, key: Tensor, value: Tensor, mask: AttentionMask
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
        """What a layer attends to: its keys and values, and the prefix in front of them.

        While recording, the new keys are written behind the prefix, and both are one tensor.
        """
        if not self.recording:
            if self.tokens == 0:
                return key, value, None
            keys, values = self._buffers[layer]
            return key, value, (keys[:, :, : self.tokens], values[:, :, : self.tokens])
        self._watch(mask)
        stop = self.tokens + key.shape[2]
        if layer not in self._buffers:
            self._buffers[layer] = self._empty(key), self._empty(value)
        while self._buffers[layer][0].shape[2] < stop:
            keys, values = self._buffers[layer]
            self._buffers[layer] = _doubled(keys), _doubled(values)
        buffers = self._buffers[layer]
        for buffer, new in zip(buffers, (key, value), strict=True):
            buffer[:, :, self.tokens : stop] = new
        return buffers[0][:, :, :stop], buffers[1][:, :, :stop], None

    def _empty(self, new: Tensor) -> Tensor:
        return new.new_empty(1, new.shape[1], self.length, new.shape[3])

    def _watch(self, mask: AttentionMask) -> None:
        """Note whether a row of a recorded pass sees a token behind it."""
        if self.looks_ahead or mask.causal:
            return
        if mask.dense is None:
            self.looks_ahead = True
            return
        rows = mask.dense.shape[2]
        place = torch.arange(rows, device=mask.dense.device)[:, None] + mask.query_offset
        later = torch.arange(mask.dense.shape[3], device=mask.dense.device)[None] > place
        self.looks_ahead = bool((mask.dense & later).any())


def _doubled(buffer: Tensor) -> Tensor:
    """With as much room again."""
    return torch.cat([buffer, torch.empty_like(buffer)], 2)


class PrefixLayer(CacheLayerMixin):
    """The cache of one layer: it counts the prefix and keeps nothing."""

    is_sliding = False

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.tokens = tokens
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to prepare."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """The new keys and values alone."""
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Prefix and new tokens, from position 0 on, also where a window hides the first."""
        return self.tokens + query_length, 0

    def get_seq_length(self) -> int:
        """``Tp``."""
        return self.tokens

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    def get_max_cache_shape(self) -> int:
        """No limit, by the name of older releases."""
        return -1


class PrefixCache(Cache):
    """Tells a model that ``tokens`` came before, and gives its new keys and values back.

    Args:
        tokens: ``Tp``.
        layers: How many layers the model has.
    """

    def __init__(self, tokens: int, layers: int) -> None:
        super().__init__(layers=[PrefixLayer(tokens) for _ in range(layers)])
