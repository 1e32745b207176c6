"""What the tests of manipulate() share: texts, factors, logits under them, a model's state."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._dynamo
from families import FAMILIES, VOCAB
from torch import Tensor, nn

from atman_triton.integration import manipulate

TOKENS = 10
ROUNDING = 1e-9  # float64


@pytest.fixture
def llama() -> Any:
    return FAMILIES["llama"].build("sdpa")  # its eager softmax is float32


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Any:
    yield
    torch._dynamo.reset()


def some_ids(batch: int = 2, tokens: int = TOKENS) -> Tensor:
    return torch.randint(3, VOCAB, (batch, tokens), generator=torch.Generator().manual_seed(5))


def a_factor(value: float = 0.1, column: int = 3, batch: int = 2, tokens: int = TOKENS) -> Tensor:
    factor = torch.ones(batch, tokens)
    factor[:, column] = value
    return factor


@torch.no_grad()
def logits_of(model: Any, ids: Tensor | None = None, **inputs: Any) -> Tensor:
    return model(some_ids() if ids is None else ids, use_cache=False, **inputs).logits


def logits_under(model: Any, factor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    with manipulate(model, factor, *args, **kwargs):
        return logits_of(model)


def is_close(actual: Tensor, expected: Tensor) -> bool:
    return bool((actual - expected).abs().max() < ROUNDING)


def state_of(model: Any) -> tuple[Any, ...]:
    stack = model.get_decoder()
    hooks = len(stack._forward_pre_hooks), len(stack._forward_hooks)
    kinds = [type(module) for module in model.modules()]
    return model.config._attn_implementation, hooks, kinds


def checkpoint_layers(model: Any, reentrant: bool = False) -> None:
    """Under its present name, or the one before."""
    enable = getattr(model, "activation_checkpointing_enable", None)
    enable = enable or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})


def without_dropout(model: Any) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
