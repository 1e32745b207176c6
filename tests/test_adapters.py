"""Families that compute attention in their own code: what is put in its place, and undone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES, LAYERS, VOCAB
from torch import Tensor

from atman_triton import layers
from atman_triton.integration import UnsupportedModelError, manipulate

OWN_CODE = [name for name, family in FAMILIES.items() if family.own_code]


def _ids() -> Tensor:
    return torch.randint(3, VOCAB, (2, 8), generator=torch.Generator().manual_seed(8))


def _factor() -> Tensor:
    factor = torch.ones(2, 8)
    factor[:, 3] = 0.1
    return factor


def _adapted(model: Any) -> int:
    return sum(type(module).__name__.startswith("Atman") for module in model.modules())


@pytest.mark.parametrize("name", OWN_CODE)
def test_layers_are_replaced_for_a_while(name: str) -> None:
    model = FAMILIES[name].build()
    plain = model(_ids()).logits
    with manipulate(model, _factor()):
        assert _adapted(model) == LAYERS
        assert not torch.equal(model(_ids()).logits, plain)
    assert _adapted(model) == 0
    assert torch.equal(model(_ids()).logits, plain)


@pytest.mark.parametrize("name", OWN_CODE)
def test_built_with_the_implementation(name: str) -> None:
    model = FAMILIES[name].build("atman")
    assert model.config._attn_implementation == "atman"
    assert _adapted(model) == (0 if name == "bloom" else LAYERS)  # BLOOM's layers have no table
    with manipulate(model, _factor()):
        model(_ids())
        assert _adapted(model) == LAYERS


@pytest.mark.parametrize("name", OWN_CODE)
def test_attention_weights_are_refused(name: str) -> None:
    model = FAMILIES[name].build()
    with pytest.raises(ValueError, match="output_attentions=True"), manipulate(model, _factor()):
        model(_ids(), output_attentions=True)
    if name == "bloom":  # has no table to be built with "atman" from
        return
    model = FAMILIES[name].build("atman")
    with pytest.raises(ValueError, match="output_attentions=True"):
        model(_ids(), output_attentions=True)


@pytest.mark.parametrize("name", OWN_CODE)
def test_dropout_is_that_of_the_own_code(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Falcon without ALiBi has none in training either."""
    model = FAMILIES[name].build().train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.1
    seen: list[float] = []
    plain_op = layers.attention

    def spy(*args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs["dropout"])
        return plain_op(*args, **kwargs)

    monkeypatch.setattr(layers, "attention", spy)
    drops = name not in ("falcon-multi-query", "falcon-new")
    with manipulate(model, _factor()):
        model(_ids())
        assert seen == [0.1 if drops else 0.0] * LAYERS
        model.eval()(_ids())
    assert seen[LAYERS:] == [0.0] * LAYERS


@pytest.mark.parametrize("name", ["gptj", "falcon-new"])
def test_a_dense_mask_cannot_carry_factors(name: str) -> None:
    model = FAMILIES[name].build()
    mask = torch.ones(8, 8).tril().bool().expand(2, 1, -1, -1)
    with (
        pytest.raises(ValueError, match="needs a 2-D attention_mask"),
        manipulate(model, _factor()),
    ):
        model(_ids(), attention_mask=mask, use_cache=False)


def test_a_subclass_that_nobody_knows_is_named() -> None:
    """An attention class derived from GPT-J's keeps its own code, so it is not manipulated."""
    model = FAMILIES["gptj"].build()
    layer = model.transformer.h[1].attn
    layer.__class__ = type("MyAttention", (type(layer),), {"_attn": _plain_attention})
    with (
        pytest.raises(UnsupportedModelError, match=r"GPTJForCausalLM.* \[1\] of \[0, 1\]"),
        manipulate(model, _factor()),
    ):
        model(_ids())


def _plain_attention(
    self: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None
) -> tuple[Tensor, None]:
    sdpa = torch.nn.functional.scaled_dot_product_attention
    return sdpa(query, key, value, is_causal=True), None
