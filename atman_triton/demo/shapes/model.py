"""The model's shape, its processor, and loading what is shipped."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from ..tokenizer import CONTEXT, train_tokenizer
from .pictures import SIZE, make_picture
from .questions import PROMPTS, colour_question, liking_question, name_question, presence_question

MODEL_FOLDER = Path(__file__).parent / "model"
IMAGE = "<image>"
PATCH = 8  # side of a patch, in pixels
GRID = SIZE // PATCH  # patches along a side of a picture, 12 as in the paper

# Where each head of each tower layer looks at first: patches down and to the right.
_NEIGHBOURS = (((0, 1), (0, -1), (1, 0), (-1, 0)), ((1, 1), (1, -1), (-1, 1), (-1, -1)))
_SHARPNESS = 1.1  # of that look; about e^7 : 1 against the neighbour's own neighbours
_VOCABULARY = 600  # at most: 258 bytes and special tokens, then all words of the questions


def make_processor() -> LlavaProcessor:
    """Resizes any picture to 96 × 96 pixels, and knows the words of the questions."""
    tokenizer = train_tokenizer(_sample_texts(), _VOCABULARY)
    tokenizer.add_special_tokens({"extra_special_tokens": [IMAGE]})
    images = CLIPImageProcessorPil(
        size={"height": SIZE, "width": SIZE},
        do_center_crop=False,
        crop_size={"height": SIZE, "width": SIZE},
    )
    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        image_token=IMAGE,
        num_additional_image_tokens=1,
    )


def _sample_texts() -> list[str]:
    """Texts of the shape that the model reads, for the tokenizer."""
    rng = random.Random("tokenizer")
    texts = []
    for _ in range(400):
        picture = make_picture(rng)
        answer = rng.random() < 0.5
        asked = [
            *(name_question(picture, 0, prompt) for prompt in PROMPTS),
            presence_question(rng, picture, answer),
            liking_question(rng, picture, answer),
            colour_question(rng, picture),
        ]
        texts += [question.text + question.answer for question in asked if question]
    return texts


def make_model(
    processor: LlavaProcessor, *, width: int = 128, layers: int = 4, tower: int = 2
) -> LlavaForConditionalGeneration:
    """An untrained float32 LLaVA: a CLIP tower, two projections and a Llama decoder.

    Args:
        processor: of :func:`make_processor`; its tokenizer gives the vocabulary.
        width: hidden size of the decoder.
        layers: decoder layers.
        tower: layers of the vision tower. Few, so that a patch knows its object and little else.
    """
    tokenizer = processor.tokenizer
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=tower,
        num_attention_heads=4,
        image_size=SIZE,
        patch_size=PATCH,
        projection_dim=width,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=processor.image_token_id,
        image_seq_length=GRID**2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
        dtype=torch.float32,
    )
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        _start_local(model.model.vision_tower)
        decoder = model.model.language_model
        # Embeddings as large as what layers add, or the residual stream loses its own token.
        decoder.embed_tokens.weight.normal_(std=0.5)
        decoder.norm.weight.fill_(0.2)
        for name, weight in decoder.named_parameters():
            # What writes into the residual stream keeps its small start.
            if "_proj" in name and "o_proj" not in name and "down_proj" not in name:
                weight.normal_(std=width**-0.5)
    return model


def _start_local(tower: Any) -> None:
    """Let each head of the tower look at one neighbour of a patch, as a convolution would.

    An object is known by what is next to a patch, which a small tower otherwise takes long to
    find. The first channels hold cosines and sines of a patch's place; a head's query turns them
    by its offset. Source: ConViT, d'Ascoli et al., 2021, whose heads start likewise.
    """
    frequency = torch.arange(1, 8) * (2 * math.pi / (GRID + 4))
    row, column = (torch.arange(GRID**2)[:, None] // GRID, torch.arange(GRID**2)[:, None] % GRID)
    angle = torch.cat([row * frequency, column * frequency], 1)
    count = angle.shape[1]
    tower.embeddings.patch_embedding.weight[: 2 * count] = 0.0
    place = tower.embeddings.position_embedding.weight
    place[0, : 2 * count] = 0.0
    place[1:, : 2 * count] = torch.cat([angle.cos(), angle.sin()], 1)
    for layer, offsets in zip(tower.encoder.layers, _NEIGHBOURS, strict=False):
        heads = [
            projection.weight.mul_(0.1).view(len(offsets), -1, projection.in_features)
            for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj)
        ]
        for query, key, (down, right) in zip(*heads, offsets, strict=True):
            turn = torch.cat([down * frequency, right * frequency])
            for weight, by in ((query, turn), (key, torch.zeros(count))):
                cos, sin = torch.diag(by.cos()), torch.diag(by.sin())
                turned = torch.cat([torch.cat([cos, -sin], 1), torch.cat([sin, cos], 1)])
                weight[: 2 * count, : 2 * count] += _SHARPNESS * turned


def load_shapes_model(
    folder: str | Path = MODEL_FOLDER,
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Load the shipped model.

    Args:
        folder: where to load from, in the form that ``from_pretrained`` reads.
    Returns: the model, float32 on the CPU in evaluation mode, and its processor.
    """
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    processor = LlavaProcessor.from_pretrained(folder)
    if Path(folder) == MODEL_FOLDER:  # a name that means the same on every machine
        model.config.name_or_path = "atman_triton shapes model"
    return model.eval(), processor
