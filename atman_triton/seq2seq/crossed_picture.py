"""Mllama as an encoder-decoder: a text that reads across what a vision tower made of pictures.

Only the attention of the text stack is manipulated, as in every vision-language model.

Legend: B rows, T tokens of the text, C image tokens (of all tiles of all pictures), D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from ..prefix import PrefixCache

KINDS = frozenset({"mllama"})
"""``config.model_type`` of models that read pictures beside the text."""


class CrossedCache(PrefixCache):
    """Keeps nothing of the text's own keys, and in ``crossing`` those made of the picture.

    Args:
        layers: How many layers the text stack has.
        crossed: Which of them attend to the picture.
        crossing: Filled by the first pass, read in place by later ones.
    """

    def __init__(self, layers: int, crossed: Sequence[int], crossing: DynamicCache) -> None:
        super().__init__(0, layers)
        for own in self.layers:
            setattr(own, "keys", torch.empty(0))  # noqa: B010 - Mllama counts those of every layer
        self._places = {layer: place for place, layer in enumerate(crossed)}
        self._crossing = crossing
        self.filled = len(crossing.layers) == len(crossed)
        """Whether the picture's keys are there already."""
        for layer, place in self._places.items():
            self.layers[layer] = crossing.layers[place] if self.filled else DynamicLayer()

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Keys and values to attend to, ``[B, Hk, Tk, D]``."""
        place = self._places.get(layer_idx)
        if place is None:
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return self._crossing.update(key_states, value_states, place)


def visible(inputs: Mapping[str, Tensor], tokens: int) -> Tensor:
    """Which tiles each of so many tokens sees, ``[1, T, pictures, tiles]``."""
    mask = inputs["cross_attention_mask"]
    return torch.cat([mask, mask[:, -1:].expand(-1, tokens - mask.shape[1], -1, -1)], 1)


def seen(model: Any, inputs: Mapping[str, Tensor], rows: int) -> Tensor:
    """What the text attends to: ``[B, C, D]``.

    Args:
        model: Mllama.
        inputs: ``pixel_values`` and what belongs to it, one row of each.
        rows: B.
    """
    core = model.model
    names = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")
    states = core.vision_model(**{name: inputs[name] for name in names}).last_hidden_state
    states = core.multi_modal_projector(states)
    return states.reshape(1, -1, states.shape[-1]).expand(rows, -1, -1)


def logits(
    model: Any, inputs: Mapping[str, Tensor], ids: Tensor, states: Tensor, cache: Cache | None
) -> Tensor:
    """``[B, T, V]`` of ids ``[B, T]``; what stands behind the prompt sees what its end sees."""
    known = isinstance(cache, CrossedCache) and cache.filled
    return model(
        input_ids=ids,
        cross_attention_states=None if known else states,
        cross_attention_mask=visible(inputs, ids.shape[1]),
        past_key_values=cache,
        use_cache=cache is not None,
        return_dict=True,
    ).logits
