"""Whatever interrupts a run, the model is left as it was, and the next explanation is right."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, VOCAB
from toy_models import llama

from atman_triton import Explainer, runner
from atman_triton.layers import THREAD
from atman_triton.stacks import find_stack

PROMPT = [3, 41, 59, 26, 53, 58, 97, 93, 23, 84]
ANSWER = [84, 62, 64]


def snapshot(model):
    modules = list(model.modules())
    return {
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in modules],
        "training": [m.training for m in modules],
        "classes": [type(m) for m in modules],
        "configs": [type(m.config) for m in modules if hasattr(m, "config")],
        "attention": model.config._attn_implementation,
        "generation": model.generation_config.to_dict(),
        "thread": (THREAD.stacks, dict(THREAD.by_config), dict(THREAD.switched)),
        "manipulation": find_stack(model)[1].current.manipulation,
        "gradients": torch.is_grad_enabled(),
        "weights": [p.requires_grad for p in model.parameters()],
    }


class Interrupter:
    """Raises in the n-th pass through the last module of a model's text stack."""

    def __init__(self, model, module, error):
        self.error, self.at, self.passes = error, 0, 0  # never
        self.model = model
        module.register_forward_pre_hook(self)

    def __call__(self, module, args):
        assert not self.model.training
        self.passes += 1
        if self.passes == self.at:
            raise self.error


def build(name):
    if name == "llama":
        model = llama(vocab_size=VOCAB)
        model.model.layers[1].requires_grad_(False)
        return model, model.model.norm
    model = FAMILIES[name].build()  # whose layers are of other classes meanwhile
    return model, model.transformer.ln_f


@pytest.mark.parametrize("method", ["exact", "direct", "hybrid"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError, torch.OutOfMemoryError])
@pytest.mark.parametrize("name", ["llama", "gptj"])
def test_the_model_is_left_as_it_was(name, error, method):
    """In the probe (three passes), the base run, and every batch of perturbations."""
    model, last = build(name)
    expected = Explainer(model, method=method, batch_size=3, budget=_budget(method)).explain(
        PROMPT, ANSWER
    )
    interrupter = Interrupter(model, last, error())
    model.train()
    model.get_decoder().get_submodule("layers.1" if name == "llama" else "h.1").eval()
    before, interrupted = snapshot(model), 0
    while True:
        interrupter.passes, interrupter.at = 0, interrupted + 1
        runner._PROBED.clear()
        explainer = Explainer(model, method=method, batch_size=3, budget=_budget(method))
        try:
            found = explainer.explain(PROMPT, ANSWER)
        except error:
            assert snapshot(model) == before
            interrupted += 1
            continue
        break
    assert interrupted == interrupter.passes == 3 + len(expected.provenance["batch_sizes"])
    assert snapshot(model) == before
    assert torch.equal(found.scores.nan_to_num(), expected.scores.nan_to_num())


def _budget(method):
    return 4 if method == "hybrid" else None


def test_generating_can_be_interrupted_too():
    model, last = build("llama")
    interrupter = Interrupter(model, last, KeyboardInterrupt())
    model.train()
    before, interrupter.at = snapshot(model), 2
    with pytest.raises(KeyboardInterrupt):
        Explainer(model).explain(PROMPT, max_new_tokens=4)
    assert snapshot(model) == before


def test_the_model_can_be_trained_afterwards():
    model = llama().train()
    Explainer(model).explain(PROMPT, targets=[ANSWER, [7], [5, 6]])
    model(input_ids=torch.tensor([PROMPT])).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
