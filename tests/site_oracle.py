"""Logits of encoders and encoder-decoders under factors per source, without any code of ours.

Each attention layer is found by its full name; eager attention, registered as an implementation of
its own, multiplies its scores by the modifier matrix of the source that its keys are tokens of.

Legend: B batch, Hq heads, Tq/Tk query/key tokens, D head dim.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

# full names of attention layers -> (source, kind); the first group is the layer
_SEQ2SEQ = (
    (r"(?:.*\.)?encoder\.(?:layers|block)\.(\d+)\..*(?:self_attn|SelfAttention)", "encoder"),
    (r"(?:.*\.)?decoder\.(?:layers|block)\.(\d+)\..*(?:encoder_attn|EncDecAttention)", "cross"),
    (r"(?:.*\.)?decoder\.(?:layers|block)\.(\d+)\..*(?:self_attn|SelfAttention)", "decoder"),
    (r"encoder\.layers\.(\d+)\.attention", "encoder"),  # the last three of an image captioner
    (r"decoder\.bert\.encoder\.layer\.(\d+)\.crossattention\.self", "cross"),
    (r"decoder\.bert\.encoder\.layer\.(\d+)\.attention\.self", "decoder"),
)
_BLIP = (
    (r"vision_model\.encoder\.layers\.(\d+)\.self_attn", "image", "encoder"),
    (r"text_encoder\.encoder\.layer\.(\d+)\.crossattention\.self", "image", "cross"),
    (r"text_(?:encoder|model)\.encoder\.layer\.(\d+)\.attention\.self", "text", "encoder"),
    (r"text_decoder\.bert\.encoder\.layer\.(\d+)\.crossattention\.self", None, "cross"),
    (r"text_decoder\.bert\.encoder\.layer\.(\d+)\.attention\.self", "decoder", "decoder"),
)
_MLLAMA = (
    (r"model\.language_model\.layers\.(\d+)\.cross_attn", "image", "cross"),
    (r"model\.language_model\.layers\.(\d+)\.self_attn", "decoder", "decoder"),
)
_TEXT_TOWER = r"text_model\..*layers\.(\d+)\.self_attn"
_ALONE = (
    r"(?:.*\.)?(?:layers?)\.(\d+)\.(?:(?:attention\.)?attention|self_attn|attn|attention\.self)"
)
_INPUTS = {"pixel_values": "image", "input_features": "audio"}

Kinds = Mapping[nn.Module, tuple[str, str, int]]
"""Of each attention layer: the source of its keys, what kind it is, its index."""


def attention_layers(model: Any) -> Kinds:
    """The attention layers of a model by what they read.

    Raises: AssertionError: if there are none.
    """
    first = _INPUTS.get(model.main_input_name, "text")
    found: dict[nn.Module, tuple[str, str, int]] = {}
    both = hasattr(model, "text_model") and hasattr(model, "vision_model")
    for name, module in model.named_modules():
        if model.config.model_type == "mllama":
            for pattern, source, kind in _MLLAMA:
                if match := re.fullmatch(pattern, name):
                    found[module] = (source, kind, int(match[1]))
        elif model.config.model_type == "blip":
            for pattern, source, kind in _BLIP:
                if match := re.fullmatch(pattern, name):
                    read = source or ("text" if hasattr(model, "text_encoder") else "image")
                    found[module] = (read, kind, int(match[1]))
        elif model.config.is_encoder_decoder:
            for pattern, kind in _SEQ2SEQ:
                if match := re.fullmatch(pattern, name):
                    source = "decoder" if kind == "decoder" else first
                    found[module] = (source, kind, int(match[1]))
                    break
        elif match := re.fullmatch(_ALONE, name):
            source = first
            if both:
                source = "text" if re.fullmatch(_TEXT_TOWER, name) else "image"
            found[module] = (source, "encoder", int(match[1]))
    assert found, f"no attention layers found in {type(model).__name__}"
    return found


_FACTORS: dict[nn.Module, Tensor] = {}
_MODE = ["multiplicative"]


def modified(scores: Tensor, visible: Tensor, factor: Tensor | None, mode: str) -> Tensor:
    """Scores ``[B, Hq, Tq, Tk]`` under the modifier matrix of a factor ``[B, (Hq,) Tk]``."""
    if factor is None:
        return scores
    factor = factor.to(scores.dtype)
    matrix = factor[:, None, None] if factor.dim() == 2 else factor[:, :, None]
    missing = scores.shape[-1] - matrix.shape[-1]
    if missing > 0:
        matrix = torch.cat([matrix, matrix.new_ones(*matrix.shape[:-1], missing)], -1)
    matrix = matrix[..., : scores.shape[-1]]
    if mode == "multiplicative":
        return matrix * scores
    if mode == "log_additive":
        return scores + matrix.log()
    seen = scores if mode == "min_shift_full" else torch.where(visible, scores, torch.inf)
    least = seen.amin(-1, keepdim=True)
    return least + matrix * (scores - least)


def oracle_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    position_bias: Tensor | None = None,
    is_causal: bool | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Eager attention in the dtype of its inputs: ``[B, Tq, Hq, D]``."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    visible = torch.ones_like(scores, dtype=torch.bool)
    if attention_mask is not None:
        visible = (attention_mask > torch.finfo(attention_mask.dtype).min / 2).expand_as(scores)
    scores = modified(scores, visible, _FACTORS.get(module), _MODE[0])
    if position_bias is not None:
        scores = scores + position_bias
    weights = torch.where(visible, scores, -torch.inf).softmax(-1).nan_to_num(0.0)
    return (weights @ value).transpose(1, 2), None


AttentionInterface.register("site_oracle", oracle_attention)
AttentionMaskInterface.register("site_oracle", eager_mask)


def _blip_attention(module: Any) -> Any:
    """BLIP's own eager attention with a modifier matrix, to stand for ``module.forward``."""

    def heads_of(projection: nn.Module, states: Tensor) -> Tensor:
        return projection(states).unflatten(-1, (-1, module.attention_head_size)).transpose(1, 2)

    def of_text(
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **_: Any,
    ) -> Any:
        assert past_key_values is None or not past_key_values.get_seq_length()  # whole texts only
        states = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        mask = attention_mask if encoder_hidden_states is None else encoder_attention_mask
        key, value = heads_of(module.key, states), heads_of(module.value, states)
        query = heads_of(module.query, hidden_states)
        return oracle_attention(module, query, key, value, mask)[0].flatten(2), None

    def of_patches(hidden_states: Tensor, **_: Any) -> Any:
        split = module.qkv(hidden_states).unflatten(-1, (3, module.num_heads, -1))
        query, key, value = (split[:, :, part].transpose(1, 2) for part in range(3))
        output = oracle_attention(module, query, key, value, None)[0]
        return module.projection(output.flatten(2)), None

    return of_patches if hasattr(module, "qkv") else of_text


@contextmanager
def oracle(
    model: Any,
    factors: Mapping[str, Tensor],
    mode: str = "min_shift",
    attention: str | None = None,
    layers: Collection[int] | None = None,
) -> Iterator[None]:
    """Run ``model`` eagerly under factors ``[B, (Hq,) T]`` by source, as ``manipulate`` should."""
    own_code = []
    left_out = {"encoder": "cross", "cross": "encoder"}.get(attention or "both")
    for module, (source, kind, layer) in attention_layers(model).items():
        if model.config.model_type == "blip":
            module.forward = _blip_attention(module)
            own_code.append(module)
        named = source in factors and kind != left_out
        if named and (layers is None or layer in layers):
            _FACTORS[module] = factors[source]
    _MODE[0] = mode
    before = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    internal = {key: config._attn_implementation_internal for key, config in before.items()}
    for config in before.values():
        config._attn_implementation_internal = "site_oracle"
    try:
        yield
    finally:
        _FACTORS.clear()
        for module in own_code:
            del module.forward
        for key, config in before.items():
            config._attn_implementation_internal = internal[key]


@torch.no_grad()
def oracle_logits(
    model: Any,
    inputs: Mapping[str, Any],
    factors: Mapping[str, Tensor],
    mode: str = "min_shift",
    attention: str | None = None,
    layers: Collection[int] | None = None,
) -> Tensor:
    """The model's logits (of CLIP's kind, for each image) under factors by source."""
    with oracle(model, factors, mode, attention, layers):
        return logits_of(model, inputs)


def logits_of(model: Any, inputs: Mapping[str, Any]) -> Tensor:
    """The model's logits, or what stands for them.

    Of BLIP's models with a decoder that decoder's: one that answers questions does not return them.
    """
    caught: list[Any] = []
    hooks = []
    here = threading.get_ident()

    def catch(module: nn.Module, args: Any, output: Any) -> None:
        if threading.get_ident() == here:
            caught.append(output)

    if hasattr(model, "text_decoder"):
        hooks.append(model.text_decoder.register_forward_hook(catch))
    try:
        caught.append(model(**inputs))
    finally:
        for hook in hooks:
            hook.remove()
    names = ("logits", "logits_per_image", "itm_score", "last_hidden_state")
    return next(getattr(caught[0], name) for name in names if hasattr(caught[0], name))
