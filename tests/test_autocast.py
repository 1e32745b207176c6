"""Under autocast a model's layers get other dtypes than their weights'."""

import copy

import pytest
import torch
from toy_models import llama

import atman_triton as atman

IDS = torch.arange(3, 27).reshape(2, 12)
AUTOCAST = {"device_type": "cpu", "dtype": torch.bfloat16}


def _gradients(model, implementation: str, mixed: bool = True):
    model.set_attn_implementation(implementation)
    model.zero_grad()
    with torch.autocast(**AUTOCAST, enabled=mixed):
        output = model(IDS, labels=IDS)
    output.loss.backward()
    return output.logits, [parameter.grad.clone() for parameter in model.parameters()]


def test_training_in_mixed_precision_is_as_exact_as_that_of_sdpa():
    model = llama()
    exact, exact_gradients = _gradients(model, "sdpa", mixed=False)
    sdpa, sdpa_gradients = _gradients(model, "sdpa")
    logits, gradients = _gradients(model, "atman")
    assert 0 < (logits - exact).norm() <= 2 * (sdpa - exact).norm()
    for true, other, ours in zip(exact_gradients, sdpa_gradients, gradients, strict=True):
        assert 0 < (ours - true).norm() <= 2 * (other - true).norm()


@pytest.mark.parametrize("method", ["exact", "direct"])
def test_an_explanation_in_mixed_precision_is_no_worse_than_in_half(method: str):
    model = llama()
    prompt, target = IDS[0].tolist(), IDS[1, :3].tolist()

    def explain(model):
        found = atman.Explainer(model, method=method, progress=False).explain(prompt, target)
        return found.suppressed_logprobs.nan_to_num()

    full = explain(model)
    with torch.autocast(**AUTOCAST):
        mixed = explain(model)
    half = explain(copy.deepcopy(model).to(torch.bfloat16))
    print(f"error: mixed {(mixed - full).norm():.3g}, bfloat16 {(half - full).norm():.3g}")
    assert 0 < (mixed - full).norm() <= 2 * (half - full).norm()
