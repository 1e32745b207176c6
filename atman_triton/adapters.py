"""Attention layers of model families that never ask transformers' attention interface.

GPT-J, GPT-Neo, BLOOM and Falcon compute attention in their own code, and so does BLIP, see
:mod:`.adapters_blip`. For each there is a subclass that projects as the original does and leaves
the rest to the interface. It is entered in the family's own table of implementations, where there
is one, so that a model can be built with ``attn_implementation="atman"``; and :func:`adapt` puts it
in place of the original layers for a while. The layers of the families in this file take no further
arguments, so factors ride on the mask object.

Legend: B batch, H heads, Tq/Tk query/key tokens, D head dim.
"""

from __future__ import annotations

import math
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.bloom.modeling_bloom import BloomAttention, dropout_add
from transformers.models.falcon import modeling_falcon as falcon
from transformers.models.gpt_neo import modeling_gpt_neo as gpt_neo
from transformers.models.gptj import modeling_gptj as gptj

from . import adapters_blip
from .interface import NAME, attend, refuse_weights, switched
from .masks import AttentionMask, dense_visibility

CARRIES_IN_MASK = frozenset({"gptj", "gpt_neo", "bloom", "falcon"})
"""``config.model_type`` of the families above."""

KEEPS_OWN_LAYERS = frozenset({"bloom"})
"""Families without a table: built with "atman" they still run their own layers, on dense masks."""


def _fit(alibi: Tensor, batch: int, heads: int, key_tokens: int) -> Tensor:
    """ALiBi as ``[B, H, 1, Tk]``; the empty slots of a static cache, never visible, get 0."""
    bias = alibi.reshape(batch, heads, 1, -1)[..., :key_tokens]
    return F.pad(bias, (0, key_tokens - bias.shape[-1]))


class AtmanGPTJAttention(gptj.GPTJAttention):
    """GPT-J's attention through the interface."""

    def forward(self, *args: Any, output_attentions: bool | None = False, **kwargs: Any) -> Any:
        """As the original, without attention weights."""
        if not switched(self):
            kwargs["output_attentions"] = output_attentions
            return gptj.GPTJAttention.forward(self, *args, **kwargs)
        if output_attentions:
            refuse_weights()
        return gptj.GPTJAttention.forward(self, *args, **kwargs)

    def _attn(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None) -> Any:
        if not switched(self):
            return gptj.GPTJAttention._attn(self, query, key, value, attention_mask)
        output = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attn_dropout.p if self.training else 0.0,
            scaling=1.0 / float(self.scale_attn),
        )
        return output.transpose(1, 2), None


class AtmanGPTJFlashAttention2(AtmanGPTJAttention):
    """The same in place of the class for flash attention."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the original, without attention weights."""
        if not switched(self):
            return gptj.GPTJFlashAttention2.forward(self, *args, **kwargs)  # pyright: ignore
        return AtmanGPTJAttention.forward(self, *args, **kwargs)


class AtmanGPTNeoAttention(gpt_neo.GPTNeoSelfAttention):
    """GPT-Neo's attention, global or local, through the interface."""

    def forward(self, *args: Any, output_attentions: bool = False, **kwargs: Any) -> Any:
        """As the original, without attention weights."""
        if not switched(self):
            kwargs["output_attentions"] = output_attentions
            return gpt_neo.GPTNeoSelfAttention.forward(self, *args, **kwargs)
        if output_attentions:
            refuse_weights()
        return gpt_neo.GPTNeoSelfAttention.forward(self, *args, **kwargs)

    def _attn(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None) -> Any:
        if not switched(self):
            return gpt_neo.GPTNeoSelfAttention._attn(self, query, key, value, attention_mask)
        window = self.config.window_size if self.attention_type == "local" else None
        bias = None
        if isinstance(attention_mask, AttentionMask):
            mask = attention_mask._replace(window=window)
        else:  # the original is causal whatever the mask says
            key_tokens, offset = key.shape[2], key.shape[2] - query.shape[2]
            dense = None
            if attention_mask is not None:
                dense, bias = dense_visibility(attention_mask)
            mask = AttentionMask(key_tokens, 0, offset, causal=True, window=window, dense=dense)
        output = attend(
            self,
            query,
            key,
            value,
            mask,
            dropout=self.attn_dropout.p if self.training else 0.0,
            scaling=1.0,
            position_bias=bias,
        )
        return output.transpose(1, 2), None


class AtmanGPTNeoFlashAttention2(AtmanGPTNeoAttention):
    """The same in place of the class for flash attention."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the original, without attention weights."""
        if not switched(self):
            return gpt_neo.GPTNeoFlashAttention2.forward(self, *args, **kwargs)  # pyright: ignore
        return AtmanGPTNeoAttention.forward(self, *args, **kwargs)


class AtmanBloomAttention(BloomAttention):
    """BLOOM's attention through the interface; ALiBi goes in as position bias."""

    def forward(
        self,
        hidden_states: Tensor,
        residual: Tensor,
        alibi: Tensor,
        attention_mask: Any,
        layer_past: Any = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> Any:
        """As the original, without attention weights."""
        if not isinstance(attention_mask, AttentionMask):  # another thread's, without a factor
            return BloomAttention.forward(
                self,
                hidden_states,
                residual,
                alibi,
                attention_mask,
                layer_past,
                use_cache,
                output_attentions,
                **kwargs,
            )
        if output_attentions:
            refuse_weights()
        batch, query_tokens, _ = hidden_states.shape
        query, key, value = self._reshape(self.query_key_value(hidden_states))
        if layer_past is not None:
            key, value = layer_past.update(key, value, self.layer_idx)
        output = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout.p if self.training else 0.0,
            scaling=self.inv_norm_factor,
            position_bias=_fit(alibi, batch, self.num_heads, attention_mask.key_tokens),
        )
        output = self.dense(output.reshape(batch, query_tokens, -1))
        return dropout_add(output, residual, self.hidden_dropout, self.training), None


class AtmanFalconAttention(falcon.FalconAttention):
    """Falcon's attention, rotary or ALiBi, through the interface."""

    def forward(
        self,
        hidden_states: Tensor,
        alibi: Tensor | None,
        attention_mask: Any,
        position_ids: Tensor | None = None,
        layer_past: Any = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the original, without attention weights."""
        if not switched(self):
            return falcon.FalconAttention.forward(
                self,
                hidden_states,
                alibi,  # pyright: ignore[reportArgumentType]
                attention_mask,
                position_ids,  # pyright: ignore[reportArgumentType]
                layer_past,
                use_cache,
                output_attentions,
                position_embeddings,  # pyright: ignore[reportArgumentType]
                **kwargs,
            )
        if output_attentions:
            refuse_weights()
        split = self._split_heads(self.query_key_value(hidden_states))
        query, key, value = (states.transpose(1, 2) for states in split)  # [B, heads, T, D]
        batch, _, query_tokens, head_dim = query.shape
        if alibi is None:
            assert position_embeddings is not None  # FalconModel always passes them
            query, key = falcon.apply_rotary_pos_emb(query, key, *position_embeddings)
        if layer_past is not None:
            key, value = layer_past.update(key, value, self.layer_idx)
        bias, dropout = None, 0.0
        # FalconModel has put ALiBi into a dense mask already; the original adds it once more, to
        # the scores, in eager only. It belongs there once.
        if alibi is not None:
            dropout = self.attention_dropout.p if self.training else 0.0
            if isinstance(attention_mask, AttentionMask):
                bias = _fit(alibi, batch, self.num_heads, attention_mask.key_tokens)
                bias = bias * self.inv_norm_factor
        output = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=1.0 / math.sqrt(head_dim),
            position_bias=bias,
        )
        return self.dense(output.reshape(batch, query_tokens, -1)), None


class AtmanFalconFlashAttention2(AtmanFalconAttention):
    """The same in place of the class for flash attention."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the original, without attention weights."""
        if not switched(self):
            return falcon.FalconFlashAttention2.forward(self, *args, **kwargs)  # pyright: ignore
        return AtmanFalconAttention.forward(self, *args, **kwargs)


_ADAPTED: dict[type[nn.Module], type[nn.Module]] = {
    gptj.GPTJAttention: AtmanGPTJAttention,
    gptj.GPTJFlashAttention2: AtmanGPTJFlashAttention2,
    gpt_neo.GPTNeoSelfAttention: AtmanGPTNeoAttention,
    gpt_neo.GPTNeoFlashAttention2: AtmanGPTNeoFlashAttention2,
    BloomAttention: AtmanBloomAttention,
    falcon.FalconAttention: AtmanFalconAttention,
    falcon.FalconFlashAttention2: AtmanFalconFlashAttention2,
    **adapters_blip.ADAPTED,
}


def register() -> None:
    """Let these families be built with ``attn_implementation="atman"``."""
    gptj.GPTJ_ATTENTION_CLASSES[NAME] = AtmanGPTJAttention
    gpt_neo.GPT_NEO_ATTENTION_CLASSES[NAME] = AtmanGPTNeoAttention
    falcon.FALCON_ATTENTION_CLASSES[NAME] = AtmanFalconAttention


def knows(stack: nn.Module) -> bool:
    """Whether the attention layers of a stack have subclasses here."""
    known = {*_ADAPTED, *_ADAPTED.values()}
    return any(type(module) in known for module in stack.modules())


def adapt(stack: nn.Module) -> list[tuple[nn.Module, type[nn.Module]]]:
    """Put our subclasses in place of the original attention layers; weights stay where they are.

    Returns: what :func:`restore` needs to undo it.
    """
    changed = [(m, type(m)) for m in stack.modules() if type(m) in _ADAPTED]
    for module, original in changed:
        module.__class__ = _ADAPTED[original]
    return changed


def restore(changed: list[tuple[nn.Module, type[nn.Module]]]) -> None:
    """Undo :func:`adapt`."""
    for module, original in changed:
        module.__class__ = original
