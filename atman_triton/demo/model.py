"""The reader's shape, and loading what is shipped."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from .tokenizer import CONTEXT, END_OF_TEXT, PAD

MODEL_FOLDER = Path(__file__).parent / "model"


def make_model(
    tokenizer: PreTrainedTokenizerFast, *, width: int = 128, layers: int = 4
) -> LlamaForCausalLM:
    """An untrained float32 Llama with 4 query and 2 key-value heads and tied embeddings."""
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
        eos_token_id=tokenizer.backend_tokenizer.token_to_id(END_OF_TEXT),
        pad_token_id=tokenizer.backend_tokenizer.token_to_id(PAD),
        dtype=torch.float32,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        # Embeddings as large as what layers add, or the residual stream loses its own token.
        model.model.embed_tokens.weight.normal_(std=0.5)
        model.model.norm.weight.fill_(0.2)
        for name, weight in model.named_parameters():
            # What writes into the residual stream keeps its small start.
            if "_proj" in name and "o_proj" not in name and "down_proj" not in name:
                weight.normal_(std=width**-0.5)
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
    if Path(folder) == MODEL_FOLDER:  # a name that means the same on every machine
        model.config.name_or_path = "atman_triton demo reader"
    return model.eval(), tokenizer
