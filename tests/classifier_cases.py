"""Tiny random classifiers of real classes, and a slow, independent way to perturb them."""

from typing import Any

import torch
import transformers as tf
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

LABELS = ("sports", "politics", "weather", "art")
LAYERS, HEADS = 2, 4
SIZE, PATCH = 24, 4  # pixels a side; 6 x 6 patches
_LABELLED = {
    "id2label": dict(enumerate(LABELS)),
    "label2id": {label: index for index, label in enumerate(LABELS)},
}
_WIDTHS: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
}
_IDS = {"vocab_size": 200, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_TEXT = _WIDTHS | _IDS | {"max_position_embeddings": 48} | _LABELLED
_IMAGE = _WIDTHS | {"image_size": SIZE, "patch_size": PATCH}
_DISTIL = {"dim": 32, "hidden_dim": 48, "n_layers": LAYERS, "n_heads": HEADS}
_GPT2 = {"n_embd": 32, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 48}
_LOCAL = {"cls_token_id": 1, "sep_token_id": 2, "local_attention": 6}


def _bert(**more):
    return tf.BertConfig(**_TEXT | more)


MAKERS = {
    "bert": lambda **more: tf.BertForSequenceClassification(_bert(**more)),
    "bert-tokens": lambda **more: tf.BertForTokenClassification(_bert(**more)),
    "roberta": lambda **more: tf.RobertaForSequenceClassification(
        tf.RobertaConfig(**_TEXT | {"pad_token_id": 1} | more)
    ),
    "modernbert": lambda **more: tf.ModernBertForSequenceClassification(
        tf.ModernBertConfig(**_TEXT | _LOCAL | {"classifier_pooling": "mean"} | more)
    ),
    "modernbert-tokens": lambda **more: tf.ModernBertForTokenClassification(
        tf.ModernBertConfig(**_TEXT | _LOCAL | more)
    ),
    "electra": lambda **more: tf.ElectraForSequenceClassification(
        tf.ElectraConfig(**_TEXT | {"embedding_size": 16} | more)
    ),
    "distilbert": lambda **more: tf.DistilBertForSequenceClassification(
        tf.DistilBertConfig(vocab_size=200, pad_token_id=0, **_DISTIL | _LABELLED | more)
    ),
    "deberta": lambda **more: tf.DebertaV2ForSequenceClassification(
        tf.DebertaV2Config(**_TEXT | more)
    ),
    "llama": lambda **more: tf.LlamaForSequenceClassification(tf.LlamaConfig(**_TEXT | more)),
    "gpt2": lambda **more: tf.GPT2ForSequenceClassification(
        tf.GPT2Config(**_IDS | _GPT2 | _LABELLED | {"pad_token_id": None} | more)
    ),
    "vit": lambda **more: tf.ViTForImageClassification(tf.ViTConfig(**_IMAGE | _LABELLED | more)),
    "deit": lambda **more: tf.DeiTForImageClassification(
        tf.DeiTConfig(**_IMAGE | _LABELLED | more)
    ),
    "dinov2": lambda **more: tf.Dinov2ForImageClassification(
        tf.Dinov2Config(**_IMAGE | _LABELLED | more)
    ),
    "dinov2-registers": lambda **more: tf.Dinov2WithRegistersForImageClassification(
        tf.Dinov2WithRegistersConfig(num_register_tokens=3, **_IMAGE | _LABELLED | more)
    ),
    "siglip": lambda **more: tf.SiglipForImageClassification(
        tf.SiglipConfig(text_config=_WIDTHS | _IDS, vision_config=_IMAGE, **_LABELLED | more)
    ),
    "clip": lambda **more: tf.CLIPForImageClassification(
        tf.CLIPConfig(text_config=_WIDTHS | _IDS, vision_config=_IMAGE, **_LABELLED | more)
    ),
}
TEXT = ("bert", "roberta", "modernbert", "electra", "distilbert", "llama", "gpt2")
IMAGE = ("vit", "deit", "dinov2", "dinov2-registers", "siglip", "clip")


def make(name, **more):
    """A float64 model whose weights are large enough for a suppressed token to show."""
    model = MAKERS[name](**more)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                scale = 1.5 / parameter[0].numel() ** 0.5
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return model.double().eval()


def make_seq2seq():
    """A classifier that reads both an encoder and a decoder."""
    sizes = {"d_model": 16, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "vocab_size": 50}
    layers = {"encoder_layers": 1, "decoder_layers": 1}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    return tf.BartForSequenceClassification(tf.BartConfig(**sizes, **layers, **heads))


def inputs_of(name, tokens=9, padding=0):
    """A row of what the model reads, and how many tokens that is."""
    generator = torch.Generator().manual_seed(6)
    if name in IMAGE:
        pixels = torch.randn(1, 3, SIZE, SIZE, generator=generator)
        extra = {"vit": 1, "deit": 2, "dinov2": 1, "dinov2-registers": 4, "siglip": 0, "clip": 1}
        return {"pixel_values": pixels}, (SIZE // PATCH) ** 2 + extra[name]
    ids = torch.randint(10, 190, (1, tokens), generator=generator)
    if not padding:
        return {"input_ids": ids}, tokens
    pad = 1 if name == "roberta" else 0
    ids = torch.cat([ids, torch.full((1, padding), pad)], 1)
    return {"input_ids": ids, "attention_mask": (ids != pad).long()}, tokens + padding


# --- one eager forward per unit, scores multiplied by a full matrix of factors ------------------

_perturbation: dict[str, Any] = {}


def _eager_attention(module, query, key, value, attention_mask, scaling=None, **_):
    layer = _perturbation["calls"]
    _perturbation["calls"] += 1
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = query @ key.transpose(2, 3) * scaling
    mask = torch.zeros_like(scores) if attention_mask is None else attention_mask
    mask = mask.to(scores.dtype).expand_as(scores)
    _perturbation["signs"].append((scores < 0)[mask == 0])
    matrix, mode = _perturbation["matrix"], _perturbation["mode"]
    layers, heads = _perturbation["layers"], _perturbation["heads"]
    if layers is None or layer in layers:
        factors = matrix.to(scores.dtype).expand_as(scores).clone()  # [1, Hq, S, S]
        if heads is not None:
            factors[:, [head for head in range(scores.shape[1]) if head not in heads]] = 1.0
        if mode == "multiplicative":
            scores = scores * factors
        elif mode == "log_additive":
            scores = scores + factors.log()
        else:
            seen = scores if mode == "min_shift_full" else scores.masked_fill(mask < 0, torch.inf)
            least = seen.amin(-1, keepdim=True)
            scores = least + (scores - least) * factors
    weights = torch.softmax(scores + mask, dim=-1)
    return (weights @ value).transpose(1, 2), None


AttentionInterface.register("plain_classifier", _eager_attention)
AttentionMaskInterface.register("plain_classifier", eager_mask)


def plain_logits(model, inputs, row=None, mode="min_shift", layers=None, heads=None):
    """Logits of one eager forward in which every query feels ``row``, a factor per key."""
    before = model.config._attn_implementation
    model.set_attn_implementation("plain_classifier")
    matrix = torch.ones(1, 1) if row is None else row.expand(len(row), -1)
    _perturbation.update(matrix=matrix, mode=mode, layers=layers, heads=heads, calls=0, signs=[])
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    try:
        logits = model(**inputs).logits
        assert _perturbation["calls"] == LAYERS
        return logits[0]
    finally:
        model.set_attn_implementation(before)


def negative_share(model, inputs):
    """Of the scores that the queries of a plain forward see."""
    with torch.no_grad():
        plain_logits(model, inputs)
    return float(torch.cat(_perturbation["signs"]).double().mean())


# --- real image processors of small sizes ---------------------------------------------------------

_SQUARE = {"height": SIZE, "width": SIZE}
PROCESSORS = {
    "stretched": lambda: tf.ViTImageProcessorPil(size=_SQUARE),
    "cropped": lambda: tf.BitImageProcessorPil(size={"shortest_edge": 30}, crop_size=_SQUARE),
    "middle": lambda: tf.CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size=_SQUARE),
    "stretched and cropped": lambda: tf.DeiTImageProcessorPil(
        size={"height": 32, "width": 32}, crop_size=_SQUARE
    ),
    "share": lambda: tf.ConvNextImageProcessorPil(size={"shortest_edge": SIZE}, crop_pct=0.8),
    "siglip": lambda: tf.SiglipImageProcessorPil(size=_SQUARE),
    "as it is": lambda: tf.ViTImageProcessorPil(do_resize=False),
}
