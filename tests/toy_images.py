"""Tiny random vision-language models of real classes, each with the inputs of one small image."""

from typing import Any

import torch
import toy_processors
import transformers as tf

IMAGE, BEGIN, END, VIDEO = 100, 101, 102, 103  # token ids
_TEXT: dict[str, Any] = {
    "vocab_size": 120,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_TOWER: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 12,
    "patch_size": 4,
}
_QWEN_TOWER: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 32,
    "in_channels": 3,
}
_QWEN_TOKENS = {
    "image_token_id": IMAGE,
    "vision_start_token_id": BEGIN,
    "vision_end_token_id": END,
    "video_token_id": VIDEO,
}


def _drawn(model: Any) -> Any:
    """Weights large enough that suppressing a token shows far above rounding."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.25)
    return model.eval().double()


def _pixels(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def llava():
    """Image tokens in a plain causal text."""
    vision = tf.CLIPVisionConfig(**_TOWER, projection_dim=16)
    config = tf.LlavaConfig(
        vision_config=vision,
        text_config=tf.LlamaConfig(**_TEXT),
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        image_seq_length=9,
    )
    ids = torch.tensor([[1, 5, 6, *[IMAGE] * 9, 7, 8, 9, 11]])
    return _drawn(tf.LlavaForConditionalGeneration(config)), {
        "input_ids": ids,
        "pixel_values": _pixels(1, 3, 12, 12),
    }


def _qwen_inputs(patches):
    ids = torch.tensor([[1, 5, BEGIN, *[IMAGE] * (patches // 4), END, 7, 8, 9]])
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == IMAGE).long(),
        "pixel_values": _pixels(patches, 3 * 2 * 16),
        "image_grid_thw": torch.tensor([[1, 4, patches // 4]]),
    }


def qwen2_5():
    """Positions on three axes."""
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    config = tf.Qwen2_5_VLConfig(
        vision_config=_QWEN_TOWER | {"depth": 2, "window_size": 16, "fullatt_block_indexes": [1]},
        text_config=_TEXT | {"rope_parameters": rope},
        **_QWEN_TOKENS,
    )
    return _drawn(tf.Qwen2_5_VLForConditionalGeneration(config)), _qwen_inputs(24)


def qwen3():
    """Three axes, and image embeddings added in deeper layers too."""
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4}
    deep = {"depth": 3, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}
    config = tf.Qwen3VLConfig(
        vision_config=_QWEN_TOWER | deep,
        text_config=_TEXT | {"head_dim": 8, "rope_parameters": rope},
        **_QWEN_TOKENS,
    )
    return _drawn(tf.Qwen3VLForConditionalGeneration(config)), _qwen_inputs(24)


def gemma3():
    """An image's tokens see each other both ways, in sliding layers too."""
    text = _TEXT | {
        "head_dim": 8,
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention"],
        "query_pre_attn_scalar": 8,
    }
    config = tf.Gemma3Config(
        vision_config=_TOWER,
        text_config=text,
        mm_tokens_per_image=9,
        image_token_index=IMAGE,
        boi_token_index=BEGIN,
        eoi_token_index=END,
    )
    ids = torch.tensor([[1, 5, BEGIN, *[IMAGE] * 9, END, 7, 8, 9]])
    return _drawn(tf.Gemma3ForConditionalGeneration(config)), {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "token_type_ids": (ids == IMAGE).long(),
        "pixel_values": _pixels(1, 3, 12, 12),
    }


def paligemma():
    """The whole prompt sees itself both ways."""
    config = tf.PaliGemmaConfig(
        vision_config=_TOWER | {"projection_dim": 32},
        text_config=_TEXT | {"head_dim": 8, "model_type": "gemma"},
        image_token_index=IMAGE,
        projection_dim=32,
        hidden_size=32,
    )
    ids = torch.tensor([[*[IMAGE] * 9, 1, 7, 8, 9]])
    return _drawn(tf.PaliGemmaForConditionalGeneration(config)), {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "token_type_ids": torch.zeros_like(ids),
        "pixel_values": _pixels(1, 3, 12, 12),
    }


MODELS = {
    "llava": llava,
    "qwen2.5-vl": qwen2_5,
    "qwen3-vl": qwen3,
    "gemma3": gemma3,
    "paligemma": paligemma,
}


# --- with the family's real processor, whose vocabulary and sizes the model has -------------------

_WIDE: dict[str, Any] = {"max_position_embeddings": 1024}


def _tower_of(processor):
    images = processor.image_processor
    size = getattr(images, "max_image_size", None) or images.size
    if getattr(images, "do_center_crop", False):
        size = images.crop_size
    edges = {edge for edge in dict(size).values() if edge}
    return _TOWER | {"image_size": edges.pop()}


def _text_of(processor):
    return _TEXT | _WIDE | {"vocab_size": len(processor.tokenizer)}


def _llava_config(processor):
    return tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(**_tower_of(processor), projection_dim=16),
        text_config=tf.LlamaConfig(**_text_of(processor)),
        image_token_index=processor.image_token_id,
        vision_feature_layer=-1,
    )


def _qwen_config(processor):
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    return tf.Qwen2_5_VLConfig(
        vision_config=_QWEN_TOWER | {"depth": 2, "window_size": 16, "fullatt_block_indexes": [1]},
        text_config=_text_of(processor) | {"rope_parameters": rope},
        **_qwen_ids(processor),
    )


def _qwen2_config(processor):
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    tower = {"depth": 2, "embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2}
    return tf.Qwen2VLConfig(
        vision_config=_QWEN_TOWER | tower,
        text_config=_text_of(processor) | {"rope_parameters": rope},
        **_qwen_ids(processor),
    )


def _qwen3_config(processor):
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4}
    deep = {"depth": 3, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}
    return tf.Qwen3VLConfig(
        vision_config=_QWEN_TOWER | deep,
        text_config=_text_of(processor) | {"head_dim": 8, "rope_parameters": rope},
        **_qwen_ids(processor),
    )


def _qwen_ids(processor):
    names = ["image_pad", "vision_start", "vision_end", "video_pad"]
    ids = processor.tokenizer.convert_tokens_to_ids([f"<|{name}|>" for name in names])
    return dict(zip(_QWEN_TOKENS, ids, strict=True))


def _gemma3_config(processor):
    ids = processor.tokenizer
    return tf.Gemma3Config(
        vision_config=_tower_of(processor),
        text_config=_text_of(processor) | {"head_dim": 8, "sliding_window": 24},
        mm_tokens_per_image=processor.image_seq_length,
        image_token_index=ids.image_token_id,
        boi_token_index=ids.boi_token_id,
        eoi_token_index=ids.eoi_token_id,
    )


def _paligemma_config(processor):
    return tf.PaliGemmaConfig(
        vision_config=_tower_of(processor) | {"projection_dim": 32},
        text_config=_text_of(processor) | {"head_dim": 8, "model_type": "gemma"},
        image_token_index=processor.image_token_id,
        projection_dim=32,
        hidden_size=32,
    )


def _llava_next_config(processor):
    return tf.LlavaNextConfig(
        vision_config=tf.CLIPVisionConfig(**_tower_of(processor), projection_dim=16),
        text_config=tf.LlamaConfig(**_text_of(processor)),
        image_token_index=processor.image_token_id,
        image_grid_pinpoints=processor.image_processor.image_grid_pinpoints,
        vision_feature_layer=-1,
    )


def _llava_onevision_config(processor):
    images = processor.image_processor
    return tf.LlavaOnevisionConfig(
        vision_config=tf.SiglipVisionConfig(**_tower_of(processor)),
        text_config=tf.Qwen2Config(**_text_of(processor)),
        image_token_index=processor.image_token_id,
        video_token_index=processor.video_token_id,
        image_grid_pinpoints=images.image_grid_pinpoints,
        vision_aspect_ratio=processor.vision_aspect_ratio,
        vision_feature_layer=-1,
    )


def _idefics3_config(processor, kind: Any = tf.Idefics3Config):
    return kind(
        vision_config=_tower_of(processor),
        text_config=_text_of(processor) | {"model_type": "llama"},
        scale_factor=2,
        image_token_id=processor.image_token_id,
        pad_token_id=0,
    )


def _smolvlm_config(processor):
    return _idefics3_config(processor, tf.SmolVLMConfig)


def _internvl_config(processor):
    return tf.InternVLConfig(
        vision_config=_tower_of(processor),
        text_config=_text_of(processor) | {"model_type": "qwen2"},
        image_token_id=processor.image_token_id,
        image_seq_length=processor.image_seq_length,
        downsample_ratio=0.5,
    )


def _mllama_config(processor):
    tower = _tower_of(processor) | {
        "attention_heads": 2,
        "num_global_layers": 1,
        "intermediate_layers_indices": [0],
        "vision_output_dim": 32,
        "max_num_tiles": processor.image_processor.max_image_tiles,
    }
    return tf.MllamaConfig(
        vision_config=tower,
        text_config=_text_of(processor) | {"num_hidden_layers": 3, "cross_attention_layers": [1]},
        image_token_index=processor.image_token_id,
    )


_CONFIGS = {
    "llava": (tf.LlavaForConditionalGeneration, _llava_config),
    "qwen2-vl": (tf.Qwen2VLForConditionalGeneration, _qwen2_config),
    "qwen2.5-vl": (tf.Qwen2_5_VLForConditionalGeneration, _qwen_config),
    "qwen3-vl": (tf.Qwen3VLForConditionalGeneration, _qwen3_config),
    "gemma3": (tf.Gemma3ForConditionalGeneration, _gemma3_config),
    "paligemma": (tf.PaliGemmaForConditionalGeneration, _paligemma_config),
    "llava-next": (tf.LlavaNextForConditionalGeneration, _llava_next_config),
    "llava-onevision": (tf.LlavaOnevisionForConditionalGeneration, _llava_onevision_config),
    "idefics3": (tf.Idefics3ForConditionalGeneration, _idefics3_config),
    "smolvlm": (tf.SmolVLMForConditionalGeneration, _smolvlm_config),
    "internvl": (tf.InternVLForConditionalGeneration, _internvl_config),
    "mllama": (tf.MllamaForConditionalGeneration, _mllama_config),
}


def seeing(name, processor=None, **changes):
    """A family's model and the processor that prepares prompts for it.

    Args:
        processor: Another than the one with the usual settings.
        changes: What else the model's configuration says.
    """
    processor = processor or toy_processors.PROCESSORS[name]()
    kind, configured = _CONFIGS[name]
    config = configured(processor)
    for setting, value in changes.items():
        setattr(config, setting, value)
    return _drawn(kind(config)), processor


# --- prompts of a few tokens, prepared by their processors ----------------------------------------


def _prepared(name, *sizes, **settings):
    def made():
        model, processor = seeing(name, toy_processors.PROCESSORS[name](**settings))
        pictures = [toy_processors.noisy(size, seed) for seed, size in enumerate(sizes)]
        inputs = dict(toy_processors.encoded(processor, [pictures], "is a"))
        inputs["pixel_values"] = inputs["pixel_values"].double()
        inputs.pop("labels", None)  # PaliGemma's, for training
        return model, inputs

    return made


TILED = {
    "llava-next": _prepared("llava-next", (20, 9), shown=12),
    "llava-onevision": _prepared("llava-onevision", (14, 27), shown=14, most=1),
    "idefics3": _prepared("idefics3", (20, 9), shown=16),
    "smolvlm": _prepared("smolvlm", (20, 9), shown=16),
    "internvl": _prepared("internvl", (20, 9), shown=16),
    "qwen2.5-vl-two": _prepared("qwen2.5-vl", (30, 16), (16, 24)),
    "gemma3-two": _prepared("gemma3", (30, 16), (16, 24)),
    "paligemma-two": _prepared("paligemma", (30, 16), (16, 24)),
}
