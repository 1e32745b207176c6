"""The reader model's shape, its tokenizer, and loading what is shipped."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

MODEL_FOLDER = Path(__file__).parent / "model"
END_OF_TEXT, PAD = "<|endoftext|>", "<|pad|>"
CONTEXT = 2048
VOCABULARY = 2560

# Digits in pairs, so that every number is a few well-trained tokens; words and symbols with the space before them.
_PIECES = r" ?\p{N}{1,2}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def train_tokenizer(
    texts: Iterable[str], vocabulary: int = VOCABULARY
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer: common words of ``texts`` become one token, any other text goes by bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [
            pre_tokenizers.Split(Regex(_PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=PAD,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def make_model(tokenizer: PreTrainedTokenizerFast, *, width: int = 128, layers: int = 4) -> LlamaForCausalLM:
    """An untrained Llama-shaped reader with 4 query and 2 key-value heads and tied embeddings, float32."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype=torch.float32,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        # Embeddings as large as what the layers add, or the residual stream loses which token it stands on.
        model.model.embed_tokens.weight.normal_(std=0.5)
        model.model.norm.weight.fill_(0.2)
        for layer in model.model.layers:
            for matrix in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj, layer.mlp.gate_proj, layer.mlp.up_proj):
                matrix.weight.normal_(std=width**-0.5)
    return model


def load_demo_model(
    folder: str | Path = MODEL_FOLDER,
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Load the shipped reader.

    Args:
        folder: where to load from, in the form that ``from_pretrained`` reads.
    Returns: the model, float32 on the CPU in evaluation mode, and its tokenizer.
    """
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    return model.eval(), tokenizer
