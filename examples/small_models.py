"""Small random models of real classes, for examples that run without a download.

They have learnt nothing, so what they say and what supports it is noise; only shapes are right.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from tokenizers.decoders import ByteLevel
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForQuestionAnswering,
    BlipProcessor,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizer,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

NOTE = "No model was named, so this is a small random one: what it says is noise."
_CORPUS = [
    "translate English to German: The house is wonderful. Das Haus ist wunderbar.",
    "The tower is 324 metres tall, about the same height as an 81-storey building.",
    "Mr. Quilter is the apostle of the middle classes. A red circle and a blue square.",
    "What is in the picture? How many are there? This is a picture of two cats.",
]


def _byte_level(special: list[str], closing: str) -> tuple[Tokenizer, dict[str, int]]:
    """A trained tokenizer whose first ids are special tokens, one behind every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    ids = {token: place for place, token in enumerate(special)}
    tokenizer.post_processor = processors.TemplateProcessing(
        single=closing, special_tokens=[(token, ids[token]) for token in special]
    )
    return tokenizer, ids


def _random(model: Any, seed: int = 1) -> Any:
    """The model with weights that are large enough to make a difference."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                scale = 1.2 / weight[0].numel() ** 0.5
                weight.copy_(scale * torch.randn(weight.shape, generator=generator))
    model.tie_weights()
    return model.eval()


def _readable(model: Any, tokenizer: Any) -> Any:
    """The model, which from now on writes words only: bytes alone make no text."""
    texts = [tokenizer.decode([token]) for token in range(len(tokenizer))]
    odd = {token for token, text in enumerate(texts) if not text.strip().isalpha()}
    model.generation_config.suppress_tokens = sorted(odd - {model.config.eos_token_id})
    return model


def t5() -> tuple[Any, Any]:
    """A T5 and its tokenizer."""
    tokenizer, _ = _byte_level(["<pad>", "</s>", "<unk>"], "$A </s>")
    config = T5Config(
        vocab_size=400,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
    )
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    model = T5ForConditionalGeneration(config)
    model.generation_config.decoder_start_token_id = 0
    return _readable(_random(model), wrapped), wrapped


def bart() -> tuple[Any, Any]:
    """A BART and its tokenizer."""
    tokenizer, _ = _byte_level(["<s>", "<pad>", "</s>", "<unk>"], "<s> $A </s>")
    config = BartConfig(
        vocab_size=400,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_position_embeddings=128,
    )
    special = {
        "bos_token": "<s>",
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    return _readable(_random(BartForConditionalGeneration(config)), wrapped), wrapped


def whisper() -> tuple[Any, Any]:
    """A Whisper that hears one second, and its processor."""
    end = "<|endoftext|>"
    language, task = "<|en|>", "<|transcribe|>"
    special = [end, "<|startoftranscript|>", language, task, "<|notimestamps|>"]
    trained, ids = _byte_level(special, "$A <|endoftext|>")
    bpe = json.loads(trained.to_str())["model"]
    tokenizer = WhisperTokenizer(
        vocab=bpe["vocab"],
        merges=[tuple(pair) for pair in bpe["merges"]],
        language="english",
        task="transcribe",
        additional_special_tokens=special[1:],
    )
    extractor = WhisperFeatureExtractor(feature_size=16, chunk_length=1)
    config = WhisperConfig(
        vocab_size=400,
        num_mel_bins=16,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_source_positions=50,
        max_target_positions=64,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
        decoder_start_token_id=ids["<|startoftranscript|>"],
        begin_suppress_tokens=None,
    )
    model = _readable(_random(WhisperForConditionalGeneration(config)), tokenizer)
    return model, WhisperProcessor(extractor, tokenizer)


def _word_pieces(*more: str) -> BertTokenizer:
    """A trained tokenizer of BERT's kind, with more special tokens behind BERT's own."""
    pieces = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    pieces.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *more]
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    pieces.train_from_iterator([line.lower() for line in _CORPUS], trainer)
    return BertTokenizer(vocab=pieces.get_vocab(), additional_special_tokens=list(more))


def _blip_parts() -> tuple[BlipConfig, Any]:
    tokenizer = _word_pieces("[DEC]")
    config = BlipConfig(
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 48,
            "patch_size": 8,
        },
        text_config={
            "vocab_size": 300,
            "hidden_size": 32,
            "encoder_hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "bos_token_id": 5,
            "eos_token_id": 3,
            "sep_token_id": 3,
            "pad_token_id": 0,
        },
        projection_dim=16,
    )
    images = BlipImageProcessorPil(size={"height": 48, "width": 48})
    return config, BlipProcessor(images, tokenizer)


def blip() -> tuple[Any, Any]:
    """A BLIP that writes captions, and its processor."""
    config, processor = _blip_parts()
    return _random(BlipForConditionalGeneration(config)), processor


def blip_vqa() -> tuple[Any, Any]:
    """A BLIP that answers questions, and its processor."""
    config, processor = _blip_parts()
    return _random(BlipForQuestionAnswering(config)), processor


def _labelled(*labels: str) -> dict[str, Any]:
    """What a configuration says of its classes."""
    return {
        "id2label": dict(enumerate(labels)),
        "label2id": {label: index for index, label in enumerate(labels)},
    }


def bert() -> tuple[Any, Any]:
    """A BERT that classifies texts, and its tokenizer."""
    config = BertConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        **_labelled("negative", "neutral", "positive"),
    )
    return _random(BertForSequenceClassification(config)), _word_pieces()


def vit() -> tuple[Any, Any]:
    """A ViT that classifies pictures, and its image processor."""
    config = ViTConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=48,
        patch_size=8,
        **_labelled("circle", "square", "triangle"),
    )
    images = ViTImageProcessorPil(size={"height": 48, "width": 48})
    return _random(ViTForImageClassification(config)), images
