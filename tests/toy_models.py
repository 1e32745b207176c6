"""Small random models whose attention matters, and a slow, independent way to perturb them."""

from functools import cache
from typing import Any

import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.masking_utils import eager_mask

VOCABULARY = 512
WINDOW = 64  # tokens that every model can read


def _sharpened(model, seed):
    """Weights large enough that suppressing a token shows far above rounding."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                scale = 1.5 / parameter.shape[-1] ** 0.5
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = None
    return model.eval()


def llama(model_class=LlamaForCausalLM, **changes):
    """Grouped heads, rotary positions."""
    config: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": WINDOW,
    }
    return _sharpened(model_class(LlamaConfig(**config | changes)), seed=1)


def gpt2():
    """Learned positions, biases."""
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=WINDOW)
    return _sharpened(GPT2LMHeadModel(config), seed=2)


def gemma2(**changes):
    """Sliding window in every other layer, soft-capped scores, logits capped after the head."""
    config: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": WINDOW,
        "sliding_window": 5,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 5.0,
        "query_pre_attn_scalar": 8,
    }
    return _sharpened(Gemma2ForCausalLM(Gemma2Config(**config | changes)), seed=3)


MODELS = {"llama": cache(llama), "gpt2": cache(gpt2), "gemma2": cache(gemma2)}


@cache
def in_float64(name):
    """One of ``MODELS`` again; of what runs in float64 only the result rounds to float32."""
    return {"llama": llama, "gpt2": gpt2, "gemma2": gemma2}[name]().double()


# --- one eager forward per unit, scores multiplied by a full matrix of factors ------------------

_perturbation: dict[str, Any] = dict.fromkeys(("matrix", "mode", "layers", "heads"))


def _eager_attention(module, query, key, value, attention_mask, scaling, softcap=None, **_):
    groups = query.shape[1] // key.shape[1]
    key, value = (part.repeat_interleave(groups, dim=1) for part in (key, value))
    scores = query @ key.transpose(2, 3) * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    matrix, mode = _perturbation["matrix"], _perturbation["mode"]
    layers, heads = _perturbation["layers"], _perturbation["heads"]
    if layers is None or module.layer_idx in layers:
        factors = matrix.to(scores.dtype).expand_as(scores).clone()  # [1, Hq, S, S]
        if heads is not None:
            factors[:, [head for head in range(scores.shape[1]) if head not in heads]] = 1.0
        if mode == "multiplicative":
            scores = scores * factors
        elif mode == "log_additive":
            scores = scores + factors.log()
        else:
            seen = scores
            if mode == "min_shift":
                seen = scores.masked_fill(attention_mask < 0, torch.inf)
            least = seen.amin(-1, keepdim=True)
            scores = least + (scores - least) * factors
    weights = torch.softmax(scores + attention_mask, dim=-1)
    return (weights @ value).transpose(1, 2), None


AttentionInterface.register("plain_eager", _eager_attention)
AttentionMaskInterface.register("plain_eager", eager_mask)


@torch.no_grad()
def plain_logits(model, input_ids, matrix=None, mode="min_shift", layers=None, heads=None):
    """Logits ``[S, V]`` of one eager forward; own eager code would round to float32 in float64."""
    before = model.config._attn_implementation
    model.set_attn_implementation("plain_eager")
    matrix = torch.ones(len(input_ids), len(input_ids)) if matrix is None else matrix
    _perturbation.update(matrix=matrix, mode=mode, layers=layers, heads=heads)
    try:
        return model(input_ids=torch.tensor([input_ids]), use_cache=False).logits[0]
    finally:
        model.set_attn_implementation(before)


def plain_loop(
    model, input_ids, target_ids, units, factor, mode, layers=None, heads=None, first_row=0
):
    """Log-probabilities ``[1 + U, T]``, the base run first, with full logits.

    Queries before ``first_row`` feel no factor.
    """
    rows = []
    for tokens in [(), *units]:
        matrix = torch.ones(len(input_ids), len(input_ids))
        matrix[first_row:, list(tokens)] = factor
        logits = plain_logits(model, input_ids, matrix, mode, layers, heads)
        logprobs = logits[-len(target_ids) :].log_softmax(-1)
        rows.append(logprobs[torch.arange(len(target_ids)), torch.tensor(target_ids)])
    return torch.stack(rows)
