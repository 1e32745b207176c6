"""What attention layers with code of their own call in its place: transformers' interface.

Legend: B batch, H heads, Tq query tokens, D head dim.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface

NAME = "atman"
"""The attention implementation's name in transformers' interfaces and tables."""


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
) -> Tensor:
    """Call the registered attention function; returns ``[B, Tq, H, D]``."""
    return AttentionInterface()[NAME](module, query, key, value, mask, **kwargs)[0]


def refuse_weights() -> None:
    """Raise the error for ``output_attentions=True``."""
    raise ValueError(
        "output_attentions=True is not possible with the attention implementation 'atman', which "
        "never holds the weights; ask for them outside of manipulate(), from a model loaded with "
        "attn_implementation='eager'."
    )


def switched(module: Any) -> bool:
    """Whether this thread runs "atman"; layers that another thread has replaced stay as they were.

    The originals are then called by name: `super()` fails once the class has been put back.
    """
    return module.config._attn_implementation == NAME
