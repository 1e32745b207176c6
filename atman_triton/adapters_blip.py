"""BLIP's attention, of its image encoder and of its text stacks, through the interface.

See :mod:`.adapters`. Factors are looked up by module: the text layers take no further arguments.

Legend: B batch, H heads, Tq/Tk query/key tokens, D head dim.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import EncoderDecoderCache
from transformers.models.blip.modeling_blip import BlipAttention
from transformers.models.blip.modeling_blip_text import BlipTextSelfAttention

from .interface import attend, switched


class AtmanBlipAttention(BlipAttention):
    """The image encoder's attention; it sees all patches."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As the original, without attention weights."""
        if not switched(self):
            return BlipAttention.forward(self, hidden_states, *args, **kwargs)
        batch, tokens, width = hidden_states.shape
        split = self.qkv(hidden_states).reshape(batch, tokens, 3, self.num_heads, self.head_dim)
        query, key, value = split.permute(2, 0, 3, 1, 4)  # [B, H, T, D] each
        output = attend(
            self,
            query,
            key,
            value,
            None,
            dropout=self.dropout.p if self.training else 0.0,
            scaling=self.scale,
            is_causal=False,
            **{name: kwargs[name] for name in ("key_factor",) if name in kwargs},
        )
        return self.projection(output.reshape(batch, tokens, width)), None


class AtmanBlipTextSelfAttention(BlipTextSelfAttention):
    """The text stacks' attention to their own tokens, or to those of an encoder."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Any = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Any = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Any:
        """As the original, without attention weights."""
        if not switched(self):
            return BlipTextSelfAttention.forward(
                self,
                hidden_states,
                attention_mask,
                encoder_hidden_states,
                encoder_attention_mask,
                past_key_values,
                **kwargs,
            )
        crossing = encoder_hidden_states is not None
        states = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        key, value = self._keys_and_values(states, crossing, past_key_values)
        output = attend(
            self,
            self._split(self.query(hidden_states)),
            key,
            value,
            # The second is None in transformers 5.23, whose BlipTextAttention does not pass it on:
            # the model sees padding of its encoder, with a manipulation or without.
            encoder_attention_mask if crossing else attention_mask,
            dropout=self.dropout.p if self.training else 0.0,
            scaling=self.attention_head_size**-0.5,
            is_causal=False,  # where there is no mask, all keys are visible
        )
        return output.flatten(2), None

    def _split(self, states: Tensor) -> Tensor:
        """Heads apart: ``[B, H, T, D]``."""
        return states.unflatten(-1, (-1, self.attention_head_size)).transpose(1, 2)

    def _keys_and_values(self, states: Tensor, crossing: bool, cache: Any) -> tuple[Tensor, Tensor]:
        """Of all tokens; those of an encoder are computed once and then read from the cache."""
        layer: Any = self.layer_idx
        pair = cache if isinstance(cache, EncoderDecoderCache) else None
        if pair is not None:
            cache = pair.cross_attention_cache if crossing else pair.self_attention_cache
            if crossing and pair.is_updated.get(layer):
                return cache.layers[layer].keys, cache.layers[layer].values
        key, value = self._split(self.key(states)), self._split(self.value(states))
        if pair is not None and crossing:
            pair.is_updated[layer] = True
        return (key, value) if cache is None else cache.update(key, value, layer)


ADAPTED: dict[type[nn.Module], type[nn.Module]] = {
    BlipAttention: AtmanBlipAttention,
    BlipTextSelfAttention: AtmanBlipTextSelfAttention,
}
