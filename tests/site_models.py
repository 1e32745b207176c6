"""Tiny random encoders and encoder-decoders of the proven families, and inputs for each.

All in float64, with weights large enough for a manipulation to show; encoder and decoder differ in
depth, BART's also in heads; the text is padded on the right in one row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as tf
from torch import Tensor

VOCAB, TOKENS, ANSWER = 101, 7, 5
_IDS = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SIZE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
_IMAGE = _SIZE | {"image_size": 16, "patch_size": 4}
_BART = _IDS | {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "decoder_start_token_id": 1,
}
_T5 = _IDS | {
    "d_model": 32,
    "d_kv": 16,
    "d_ff": 48,
    "num_layers": 3,  # with fewer than the decoder's, transformers makes a cache too short
    "num_decoder_layers": 2,
    "num_heads": 2,
    "relative_attention_num_buckets": 8,
    "decoder_start_token_id": 1,
}
_WHISPER = _BART | {"num_mel_bins": 8, "max_source_positions": 12, "max_target_positions": 16}
_TEXT = _SIZE | _IDS


@dataclass(frozen=True)
class Case:
    """A family: how to build a model, what it is given, and how many tokens each source has."""

    name: str
    make: Callable[[], tuple[Any, Any]]
    inputs: Callable[[], dict[str, Tensor]]
    sources: dict[str, int]
    rounding: float = 1e-9  # of a float64 model; more where part of its own code is float32

    def build(self) -> Any:
        """The model, in eval mode."""
        config, model_class = self.make()
        return drawn(config, model_class)

    def factors(self, batch: int = 2) -> dict[str, Tensor]:
        """For each source factors that suppress two tokens and amplify one, by row others."""
        generator = torch.Generator().manual_seed(3)
        given = {}
        for source, tokens in self.sources.items():
            factor = torch.ones(batch, tokens)
            for row in factor:
                chosen = torch.randperm(min(tokens, 5), generator=generator)[:3]
                row[chosen] = torch.tensor([0.1, 0.0, 2.5])
            given[source] = factor
        return given


def drawn(config: Any, model_class: Any) -> Any:
    """A float64 model in eval mode with its weights drawn."""
    config._attn_implementation = "eager"
    # The eager code of some takes float32 softmaxes; under sdpa, UMT5's decoder in transformers
    # 5.17 sees the tokens behind.
    if getattr(model_class, "_supports_sdpa", False) and config.model_type != "umt5":
        config._attn_implementation = "sdpa"
    torch.manual_seed(11)
    model = model_class(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.25)
            elif name.endswith(("bias", "gate")):
                parameter.normal_(0.0, 0.5)
    return model.eval().double()


def _random(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def some_ids(tokens: int, batch: int = 2, seed: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (batch, tokens), generator=generator)


def picture() -> dict[str, Tensor]:
    return {"pixel_values": _random(2, 3, 16, 16)}


def text() -> dict[str, Tensor]:
    padding = torch.ones(2, TOKENS, dtype=torch.long)
    padding[0, 5:] = 0
    return {"input_ids": some_ids(TOKENS), "attention_mask": padding}


def _answer() -> dict[str, Tensor]:
    return {"decoder_input_ids": some_ids(ANSWER, seed=6)}


def _sound() -> dict[str, Tensor]:
    return {"input_features": _random(2, 8, 24)} | _answer()


def _vision(family: str, head: str = "ForImageClassification") -> Callable[[], Any]:
    more = {"num_register_tokens": 2} if "Registers" in family or "DINOv3" in family else {}
    config = getattr(tf, f"{family}Config")
    return lambda: (config(**_IMAGE, **more), getattr(tf, f"{family}{head}"))


def _paired(family: str, head: str) -> Callable[[], Any]:
    config = getattr(tf, f"{family}Config")
    pair = {"vision_config": _IMAGE, "text_config": _TEXT}
    return lambda: (config(**pair), getattr(tf, f"{family}{head}"))


def _bert(family: str) -> Callable[[], Any]:
    more = {"cls_token_id": 1, "sep_token_id": 2} if family == "ModernBert" else {}
    config = getattr(tf, f"{family}Config")
    return lambda: (config(**_TEXT, **more), getattr(tf, f"{family}ForSequenceClassification"))


def _seq2seq(family: str, sizes: dict[str, Any]) -> Callable[[], Any]:
    positions = {"max_position_embeddings": 64} if sizes is _BART else {}
    config = getattr(tf, f"{family}Config")
    name = "MarianMTModel" if family == "Marian" else f"{family}ForConditionalGeneration"
    return lambda: (config(**sizes, **positions), getattr(tf, name))


def _blip(head: str) -> Callable[[], Any]:
    depth = {"num_hidden_layers": 3, "encoder_hidden_size": 32, "sep_token_id": 2}
    pair = {"vision_config": _IMAGE, "text_config": _TEXT | depth}
    return lambda: (tf.BlipConfig(**pair, image_text_hidden_size=16), getattr(tf, f"Blip{head}"))


def _caption() -> dict[str, Tensor]:
    padding = torch.ones(2, ANSWER, dtype=torch.long)
    padding[0, 4:] = 0
    return picture() | {"input_ids": some_ids(ANSWER, seed=6), "attention_mask": padding}


def _captioner() -> Any:
    config = tf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        tf.ViTConfig(**_IMAGE),
        tf.BertConfig(
            **_TEXT | {"num_hidden_layers": 3}, is_decoder=True, add_cross_attention=True
        ),
    )
    return config, tf.VisionEncoderDecoderModel


_PATCHES = 17  # 4 x 4 and the class token
_TEXT_ONLY = {"text": TOKENS}
_TRANSLATING = {"text": TOKENS, "decoder": ANSWER}

ENCODERS = {
    case.name: case
    for case in (
        Case("vit", _vision("ViT"), picture, {"image": _PATCHES}),
        Case("deit", _vision("DeiT"), picture, {"image": _PATCHES + 1}),
        Case("dinov2", _vision("Dinov2"), picture, {"image": _PATCHES}),
        Case("dinov2-registers", _vision("Dinov2WithRegisters"), picture, {"image": _PATCHES + 2}),
        Case("dinov3", _vision("DINOv3ViT", "Model"), picture, {"image": _PATCHES + 2}),
        Case("siglip", _paired("Siglip", "ForImageClassification"), picture, {"image": 16}),
        Case("clip", _paired("CLIP", "ForImageClassification"), picture, {"image": _PATCHES}),
        Case(
            "clip-pair",
            _paired("CLIP", "Model"),
            lambda: picture() | text(),
            {"image": _PATCHES, "text": TOKENS},
        ),
        Case("bert", _bert("Bert"), text, _TEXT_ONLY),
        Case("roberta", _bert("Roberta"), text, _TEXT_ONLY),
        Case("modernbert", _bert("ModernBert"), text, _TEXT_ONLY),
    )
}
SEQ2SEQ = {
    case.name: case
    for case in (
        Case("bart", _seq2seq("Bart", _BART), lambda: text() | _answer(), _TRANSLATING),
        Case("marian", _seq2seq("Marian", _BART), lambda: text() | _answer(), _TRANSLATING),
        Case("t5", _seq2seq("T5", _T5), lambda: text() | _answer(), _TRANSLATING),
        Case("umt5", _seq2seq("UMT5", _T5), lambda: text() | _answer(), _TRANSLATING, 1e-6),
        Case("whisper", _seq2seq("Whisper", _WHISPER), _sound, {"audio": 12, "decoder": ANSWER}),
        Case(
            "captioner",
            _captioner,
            lambda: picture() | _answer(),
            {"image": _PATCHES, "decoder": ANSWER},
        ),
    )
}


def _mllama() -> Any:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_global_layers": 1}
    heads = {"attention_heads": 2, "intermediate_size": 48, "vision_output_dim": 64}
    tiles = {"image_size": 16, "patch_size": 4, "max_num_tiles": 4}
    layers = {"num_hidden_layers": 4, "cross_attention_layers": [1, 3]}
    grouped = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = tf.MllamaConfig(
        vision_config=sizes | heads | tiles | {"intermediate_layers_indices": [0]},
        text_config=_TEXT | layers | grouped,
        image_token_index=VOCAB,  # the last of its embeddings
    )
    return config, tf.MllamaForConditionalGeneration


def _tiles() -> dict[str, Tensor]:
    """One picture of two tiles and one of one, of at most two; a text that begins without it."""
    asks = torch.zeros(2, TOKENS, 1, 4, dtype=torch.long)
    asks[0, 2:, :, :2], asks[1, 1:, :, :1] = 1, 1
    return text() | {
        "pixel_values": _random(2, 1, 4, 3, 16, 16),
        "aspect_ratio_ids": torch.tensor([[2], [1]]),
        "aspect_ratio_mask": torch.tensor([[[1, 1, 0, 0]], [[1, 0, 0, 0]]]),
        "cross_attention_mask": asks,
    }


MLLAMA = Case("mllama", _mllama, _tiles, {"image": 4 * _PATCHES, "decoder": TOKENS}, 1e-6)

BLIP = {
    case.name: case
    for case in (
        Case(
            "blip-captions",
            _blip("ForConditionalGeneration"),
            _caption,
            {"image": _PATCHES, "decoder": ANSWER},
        ),
        Case(
            "blip-vqa",
            _blip("ForQuestionAnswering"),
            lambda: picture() | text() | _answer(),
            {"image": _PATCHES, "text": TOKENS, "decoder": ANSWER},
        ),
        Case(
            "blip-retrieval",
            _blip("ForImageTextRetrieval"),
            lambda: picture() | text(),
            {"image": _PATCHES, "text": TOKENS},
        ),
        Case(
            "blip-pair",
            _blip("Model"),
            lambda: picture() | text(),
            {"image": _PATCHES, "text": TOKENS},
        ),
    )
}
