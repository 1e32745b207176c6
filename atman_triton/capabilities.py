"""What a model says of itself: whether it can be explained, and with which savings."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from .stacks import UnsupportedModelError, find_stack

_PLAIN_ATTENTION = frozenset({"full_attention", "sliding_attention", "chunked_attention"})
# Rotary frequencies that change for all tokens once the input is longer than in training.
_SWITCHING_ROPE = frozenset({"longrope", "dynamic"})


def check_causal(model: Any) -> None:
    """Refuse what is no causal language model.

    Raises:
        TypeError: if it is no transformers model.
        UnsupportedModelError: naming the class and what is missing.
    """
    name = type(getattr(model, "_orig_mod", model)).__name__
    if not isinstance(model, nn.Module) or not hasattr(model, "config"):
        raise TypeError(f"model must be a transformers causal language model, got {name}.")
    config: Any = model.config
    can_generate: Any = getattr(model, "can_generate", None)
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"model must be a decoder alone, but {name} has an encoder and a decoder, which is "
            "not supported."
        )
    if can_generate is None or not can_generate():
        raise UnsupportedModelError(
            f"model must be a causal language model, but {name} does not predict next tokens; "
            "load it with AutoModelForCausalLM."
        )
    # GPT-NeoX leaves is_decoder False and is causal all the same; its layers say so.
    two_sided = any(getattr(module, "is_causal", None) is False for module in model.modules())
    if getattr(text_config(model), "is_decoder", None) is False and two_sided:
        raise UnsupportedModelError(
            f"model must be causal, but the attention of this {name} looks both ways; load it "
            "with is_decoder=True."
        )


def why_not_prefix(model: nn.Module, length: int) -> str | None:
    """Why perturbations of this model cannot share a prefix; None if they can, as far as it says.

    Args:
        length: Tokens of the input.
    """
    name = type(model).__name__
    if hasattr(model, "_orig_mod"):
        return "the model is compiled"
    config = text_config(model)
    if getattr(model, "_is_stateful", False):
        return f"{name} keeps a state besides attention keys"
    layers = getattr(config, "layer_types", None) or ()
    others = sorted({kind for kind in layers if kind not in _PLAIN_ATTENTION})
    _, stack = find_stack(model)
    if others or len(stack.layers) < config.num_hidden_layers:
        kinds = ", ".join(others) or "layers without attention"
        return f"{name} has layers other than attention over all its keys: {kinds}"
    if getattr(config, "num_kv_shared_layers", 0):
        return f"{name} shares keys between layers"
    switch = _longest_unswitched(config)
    if switch is not None and length > switch:
        return f"the rotary frequencies of {name} change beyond {switch} tokens"
    return None


def why_not_branches(model: nn.Module) -> str | None:
    """Why targets of several tokens cannot stand side by side behind one prompt; None if they can.

    Their positions must be set from outside.
    """
    original: Any = getattr(model, "_orig_mod", model)
    if "position_ids" not in inspect.signature(original.forward).parameters:
        return f"{type(original).__name__} counts positions by itself"
    if getattr(text_config(model), "alibi", False):
        return f"{type(original).__name__} biases scores by column"
    return None


def keeps_logits(model: nn.Module) -> bool:
    """Whether the model's forward can be told to compute logits at the last positions only."""
    original = getattr(model, "_orig_mod", model)  # torch.compile's wrapper
    if hasattr(original, "get_base_model"):  # adapters (PEFT)
        original = original.get_base_model()  # pyright: ignore[reportCallIssue]
    return "logits_to_keep" in inspect.signature(original.forward).parameters


def context_window(model: nn.Module) -> int | None:
    """The most tokens the model can read; None if it names no limit, as with ALiBi."""
    config = text_config(model)
    for name in ("max_position_embeddings", "max_seq_len"):
        limit = getattr(config, name, None)
        if isinstance(limit, int) and limit > 0:
            return limit
    return None


def vocabulary_size(model: nn.Module) -> int:
    """How many token ids the model's input embedding knows."""
    embedding: Any = model.get_input_embeddings()  # pyright: ignore[reportCallIssue]
    return int(embedding.weight.shape[0])


def text_config(model: nn.Module) -> Any:
    """The configuration of the model's text stack."""
    config: Any = model.config
    return config.get_text_config(decoder=True)


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first weights are."""
    return next(model.parameters()).device


def dtype_of(model: nn.Module) -> torch.dtype:
    """The dtype of the model's first weights."""
    return next(model.parameters()).dtype


def _longest_unswitched(config: Any) -> int | None:
    """The longest input whose rotary frequencies are those of any shorter one; None if all are."""
    given = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    several = [given, *(value for value in given.values() if isinstance(value, dict))]
    limits = []
    for rope in several:
        if rope.get("rope_type", rope.get("type")) in _SWITCHING_ROPE:
            trained = rope.get("original_max_position_embeddings") or getattr(
                config, "original_max_position_embeddings", None
            )
            limits.append(int(trained or config.max_position_embeddings))
    return min(limits, default=None)
