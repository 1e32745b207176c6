"""Small random encoder-decoders in float64, and a plain loop that runs each of them whole.

Nothing here asks the package how it finds a model's parts: attention modules are listed by hand,
and every perturbation is one full eager forward with all logits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    BartConfig,
    BartForConditionalGeneration,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForQuestionAnswering,
    MarianConfig,
    MarianMTModel,
    T5Config,
    T5ForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
)
from transformers.masking_utils import eager_mask
from transformers.models.blip.modeling_blip import BlipAttention
from transformers.models.blip.modeling_blip_text import BlipTextSelfAttention

VOCABULARY = 96
START = 2


def _sharpened(model: Any, seed: int) -> Any:
    """Weights large enough that suppressing a token shows far above rounding."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                scale = 1.2 / math.prod(parameter.shape[1:]) ** 0.5
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    model.tie_weights()
    return model.double().eval()


@cache
def t5(**changes: Any) -> Any:
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=16,
        d_kv=6,
        d_ff=24,
        num_layers=2,
        num_decoder_layers=3,
        num_heads=2,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=16,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
        **changes,
    )
    return _sharpened(T5ForConditionalGeneration(config), 1)


@cache
def bart() -> Any:
    config = BartConfig(
        vocab_size=VOCABULARY,
        d_model=16,
        encoder_layers=3,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        max_position_embeddings=48,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2,
        decoder_start_token_id=START,
        forced_eos_token_id=None,
    )
    return _sharpened(BartForConditionalGeneration(config), 2)


@cache
def marian() -> Any:
    """Separate tables for what is read and what is written."""
    config = MarianConfig(
        vocab_size=VOCABULARY,
        decoder_vocab_size=VOCABULARY,
        share_encoder_decoder_embeddings=False,
        tie_word_embeddings=False,
        d_model=16,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        max_position_embeddings=48,
        pad_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        forced_eos_token_id=None,
    )
    return _sharpened(MarianMTModel(config), 3)


@cache
def whisper() -> Any:
    config = WhisperConfig(
        vocab_size=VOCABULARY,
        num_mel_bins=4,
        d_model=16,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        max_source_positions=9,
        max_target_positions=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
        decoder_start_token_id=START,
    )
    return _sharpened(WhisperForConditionalGeneration(config), 4)


def _blip_config() -> BlipConfig:
    return BlipConfig(
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 12,
            "patch_size": 4,
        },
        text_config={
            "vocab_size": VOCABULARY,
            "hidden_size": 16,
            "encoder_hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 48,
            "bos_token_id": START,
            "eos_token_id": 3,
            "sep_token_id": 3,
            "pad_token_id": 0,
        },
        projection_dim=8,
    )


@cache
def blip() -> Any:
    return _sharpened(BlipForConditionalGeneration(_blip_config()), 5)


@cache
def blip_vqa() -> Any:
    return _sharpened(BlipForQuestionAnswering(_blip_config()), 6)


MODELS = {
    "t5": t5,
    "bart": bart,
    "marian": marian,
    "whisper": whisper,
    "blip": blip,
    "blip_vqa": blip_vqa,
}


def _numbers(*shape: int, seed: int = 7) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


TEXT = [31, 41, 59, 26, 53, 58, 97 - 5, 93, 1]


def inputs_of(name: str, padded: int = 0) -> dict[str, Any]:
    """What each model reads; a text with so many padded tokens behind it."""
    ids = torch.tensor([TEXT + [0] * padded])
    mask = torch.tensor([[1] * len(TEXT) + [0] * padded])
    text = {"input_ids": ids, "attention_mask": mask}
    pixels = {"pixel_values": _numbers(1, 3, 12, 12)}
    several = {"decoder_input_ids": torch.tensor([[START, 70, 71]])}
    return {
        "t5": text,
        "bart": text,
        "marian": text,
        "whisper": {"input_features": _numbers(1, 4, 18)} | several,
        "blip": pixels | several,
        "blip_vqa": pixels | text,
    }[name]


def sizes_of(name: str, padded: int = 0) -> dict[str, int]:
    """Tokens of each source, the decoder's start tokens last."""
    text = {"text": len(TEXT) + padded, "decoder": 1}
    return {
        "whisper": {"audio": 9, "decoder": 3},
        "blip": {"image": 10, "decoder": 3},
        "blip_vqa": {"image": 10} | text,
    }.get(name, text)


def start_of(name: str) -> list[int]:
    """What the decoder reads before an answer."""
    given = inputs_of(name).get("decoder_input_ids")
    return {"t5": [0], "marian": [1]}.get(name, [START]) if given is None else given[0].tolist()


# --- one eager forward, scores multiplied by full matrices of factors ---------------------------

_plan: dict[Any, Any] = {}


def _places(model: Any) -> dict[int, tuple[str, str, int]]:
    """Of every attention module, its source, its kind and its layer, each listed by hand."""
    found: dict[int, tuple[str, str, int]] = {}

    def note(modules: Any, source: str, kind: str) -> None:
        for layer, module in enumerate(modules):
            found[id(module)] = (source, kind, layer)

    kind = model.config.model_type
    if kind == "t5":
        note((b.layer[0].SelfAttention for b in model.encoder.block), "text", "encoder")
        note((b.layer[1].EncDecAttention for b in model.decoder.block), "text", "cross")
        note((b.layer[0].SelfAttention for b in model.decoder.block), "decoder", "decoder")
    elif kind == "blip":
        tower = model.vision_model.encoder.layers
        note((layer.self_attn for layer in tower), "image", "encoder")
        answers, read = model.text_decoder.bert.encoder.layer, "image"
        if _asks(model):
            questions, read = model.text_encoder.encoder.layer, "text"
            note((layer.crossattention.self for layer in questions), "image", "cross")
            note((layer.attention.self for layer in questions), "text", "encoder")
        note((layer.crossattention.self for layer in answers), read, "cross")
        note((layer.attention.self for layer in answers), "decoder", "decoder")
    else:
        source = "audio" if kind == "whisper" else "text"
        note((layer.self_attn for layer in model.model.encoder.layers), source, "encoder")
        note((layer.encoder_attn for layer in model.model.decoder.layers), source, "cross")
        note((layer.self_attn for layer in model.model.decoder.layers), "decoder", "decoder")
    return found


def _manipulated(module: Any, scores: Tensor, mask: Tensor | None) -> Tensor:
    """Scores ``[1, H, Tq, Tk]`` before any mask or bias, as the plan says."""
    source, kind, layer = _plan["places"][id(module)]
    matrix = _plan["factors"].get(source)
    out = {"encoder": "cross", "cross": "encoder"}.get(_plan["attention"])
    layers, heads = _plan["layers"], _plan["heads"]
    if matrix is None or kind == out or (layers is not None and layer not in layers):
        return scores
    factors = matrix.to(scores.dtype).expand_as(scores).clone()
    if heads is not None:
        factors[:, [head for head in range(scores.shape[1]) if head not in heads]] = 1.0
    mode = _plan["mode"]
    if mode == "multiplicative":
        return scores * factors
    if mode == "log_additive":
        return scores + factors.log()
    seen = scores
    if mode == "min_shift" and mask is not None:
        seen = scores.masked_fill(mask < -1e30, torch.inf)
    least = seen.amin(-1, keepdim=True)
    return least + (scores - least) * factors


def _plain_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    position_bias: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = _manipulated(module, query @ key.transpose(2, 3) * scale, attention_mask)
    if position_bias is not None:
        scores = scores + position_bias
    if attention_mask is not None:
        scores = scores + attention_mask
    return (scores.softmax(-1) @ value).transpose(1, 2), None


AttentionInterface.register("plain_sources", _plain_attention)
AttentionMaskInterface.register("plain_sources", eager_mask)


def _plain_blip_text(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """BLIP's attention in texts, which asks no interface."""
    states = hidden_states if encoder_hidden_states is None else encoder_hidden_states

    def heads(of: Tensor) -> Tensor:
        return of.unflatten(-1, (self.num_attention_heads, -1)).transpose(1, 2)

    query = heads(self.query(hidden_states))
    key, value = heads(self.key(states)), heads(self.value(states))
    output = _plain_attention(self, query, key, value, attention_mask)[0]
    return output.flatten(2), None


def _plain_blip_vision(self: Any, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
    """The same in its vision tower."""
    mixed = self.qkv(hidden_states).unflatten(-1, (3, self.num_heads, -1))  # [1, T, 3, H, D]
    output = _plain_attention(self, *mixed.permute(2, 0, 3, 1, 4), None)[0]
    return self.projection(output.flatten(2)), None


@contextmanager
def _plainly(model: Any) -> Iterator[None]:
    """Let the model compute attention by the plain function."""
    before = model.config._attn_implementation
    if model.config.model_type != "blip":
        model.set_attn_implementation("plain_sources")
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(BlipTextSelfAttention, "forward", _plain_blip_text)
            patch.setattr(BlipAttention, "forward", _plain_blip_vision)
            yield
    finally:
        if model.config.model_type != "blip":
            model.set_attn_implementation(before)


@torch.no_grad()
def plain_logprobs(
    model: Any,
    inputs: dict[str, Any],
    start: list[int],
    target: list[int],
    factors: dict[str, Tensor],
    mode: str = "min_shift",
    attention: str = "both",
    layers: tuple[int, ...] | None = None,
    heads: tuple[int, ...] | None = None,
) -> Tensor:
    """Log-probabilities ``[T]`` of one whole eager forward; ``factors`` holds a row per source."""
    read = torch.tensor([start + target[:-1]])
    given = {name: value for name, value in inputs.items() if name != "decoder_input_ids"}
    caption = model.config.model_type == "blip" and not _asks(model)
    given["input_ids" if caption else "decoder_input_ids"] = read
    if not _asks(model):
        given["use_cache"] = False
    _plan.update(
        places=_places(model),
        factors=factors,
        mode=mode,
        attention=attention,
        layers=layers,
        heads=heads,
    )
    with _plainly(model):
        logits = _answers(model, given) if _asks(model) else model(**given).logits[0]
    logprobs = logits[len(start) - 1 :].log_softmax(-1)
    return logprobs[torch.arange(len(target)), torch.tensor(target)]


def _asks(model: Any) -> bool:
    """Whether it is BLIP for questions."""
    return hasattr(model, "text_encoder")


def _answers(model: Any, given: dict[str, Any]) -> Tensor:
    """The logits of BLIP's answer, which its output leaves out."""
    found = []
    hook = model.text_decoder.register_forward_hook(
        lambda module, args, output: found.append(output.logits)
    )
    try:
        model(**given)
    finally:
        hook.remove()
    return found[0][0]
