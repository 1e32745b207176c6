"""What a model's forward takes for a prompt, and for the prompt with more tokens behind it.

Legend: B prompts of as many tokens, P each, N further ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

TOKEN_TYPES = frozenset({"token_type_ids", "mm_token_type_ids"})  # 0 is text, 1 an image
# `model_type` of models whose token types tell the prompt, which sees all of itself, from the rest.
_ANSWER_IS_1 = frozenset({"paligemma"})


def continued(inputs: Mapping[str, Any], ids: Sequence[int], model_type: str) -> dict[str, Any]:
    """The same with text behind it.

    Args:
        inputs: Of the prompt, ``input_ids`` ``[B, P]`` among them.
        ids: ``N`` tokens.
        model_type: The model's family, by which token types are read.
    Returns: those of ``[B, P + N]`` tokens; what does not count tokens stays as it is.
    """
    longer = dict(inputs)
    prompt: Tensor = inputs["input_ids"]
    longer["input_ids"] = torch.cat([prompt, prompt.new_tensor(ids).expand(len(prompt), -1)], 1)
    for name in inputs:
        if name == "attention_mask" or name in TOKEN_TYPES:
            fill = 1 if name == "attention_mask" or model_type in _ANSWER_IS_1 else 0
            longer[name] = filled_up(inputs[name], len(ids), fill)
        if name == "cross_attention_mask":  # [1, P, images, tiles]; text attends as what it follows
            asks: Tensor = inputs[name]
            more = asks[:, -1:].expand(-1, len(ids), *asks.shape[2:])
            longer[name] = torch.cat([asks, more], 1)
    places = inputs.get("position_ids")
    if places is not None:
        steps = torch.arange(1, len(ids) + 1, device=places.device, dtype=places.dtype)
        longer["position_ids"] = torch.cat([places, places[..., -1:] + steps], -1)
    return longer


def filled_up(value: Any, more: int, fill: int) -> Tensor | None:
    """``[B, P]`` continued with ``more`` equal values; None stays None."""
    if value is None:
        return None
    return torch.cat([value, value.new_full((len(value), more), fill)], 1)


def moved(inputs: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The same on a device."""
    return {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in inputs.items()
    }
