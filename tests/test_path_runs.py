"""Paths as runs: what they cost, what they leave behind, what is refused."""

from __future__ import annotations

import threading

import pytest
import torch
from test_path import (
    DOCUMENT,
    PROMPT,
    TARGET,
    TOKENIZER,
    UNITS,
    attributed,
    explained,
    started,
)
from toy_models import MODELS, in_float64, llama

from atman_triton import Explainer, gradients, line
from atman_triton.engine import undisturbed
from atman_triton.integration import manipulate
from atman_triton.stacks import UnsupportedModelError

# --- cost ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 4, 8, 32])
def test_the_cost_does_not_depend_on_the_number_of_units(steps):
    costs = []
    for only in (None, [0], [3, 4, 5]):
        e = explained(explain_only=only, steps=steps)
        costs.append(e.provenance["forwards"])
        assert e.provenance["backward_runs"] == steps * len(e.targets)
    words = len(TOKENIZER(DOCUMENT).input_ids)
    rows = len(e.targets)
    passes = 2 + line.looks(steps) + steps * rows * (1 + 2 + 1)  # forward, backward, run again
    assert costs == 3 * [pytest.approx(passes * (words + rows - 1) / words)]


def test_the_bar_counts_what_is_run(monkeypatch):
    from atman_triton.progress import TokenProgress

    told, done = [], []
    monkeypatch.setattr(TokenProgress, "expect", lambda self, tokens: told.append(tokens))
    monkeypatch.setattr(TokenProgress, "advance", lambda self, tokens: done.append(tokens))
    e = explained(target=None, targets=["23 euros", "weeks"], steps=4)
    words = len(TOKENIZER(DOCUMENT).input_ids)
    assert sum(told) == sum(done) == round(e.provenance["forwards"] * words)


def crowded(most):
    """A model that has memory for a few rows only."""
    model = llama()

    def hook(module, args, kwargs):
        if kwargs["input_ids"].shape[0] > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    model.register_forward_pre_hook(hook, with_kwargs=True)
    return model


@pytest.mark.parametrize("most", [1, 3])
def test_batches_are_halved_when_memory_runs_out(most):
    engine, found = attributed(crowded(most), steps=8)
    plain, expected = attributed(llama(), steps=8)
    torch.testing.assert_close(found.scores, expected.scores, rtol=1e-3, atol=1e-4, equal_nan=True)
    assert max(engine.record.batch_sizes) == most
    assert max(plain.record.batch_sizes) > 8
    assert engine.record.tokens == plain.record.tokens


def test_memory_that_cannot_be_had_is_said():
    with pytest.raises(torch.OutOfMemoryError, match="batch_size 4 with 12 tokens each does not"):
        attributed(crowded(3), steps=8, batch_size=4)
    with pytest.raises(torch.OutOfMemoryError, match="not even one row of 12 tokens fits"):
        attributed(crowded(0), steps=8)


def test_a_batch_size_is_kept():
    engine, found = attributed(llama(), steps=8, batch_size=3)
    assert max(engine.record.batch_sizes) == 3
    _, expected = attributed(llama(), steps=8)
    torch.testing.assert_close(found.scores, expected.scores, rtol=1e-3, atol=1e-4, equal_nan=True)


def test_only_the_inputs_of_layers_are_kept(monkeypatch):
    """Bytes that autograd saves at the top, with and without checkpoints."""

    def saved():
        kept = {}

        def pack(tensor):
            kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
            return tensor

        slopes = gradients._slopes

        def watched(runner, points):
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                forward = runner.logprobs_of

                def only_forward(*arguments):
                    found = forward(*arguments)
                    total.append(sum(kept.values()))
                    return found

                monkeypatch.setattr(runner, "logprobs_of", only_forward)
                return slopes(runner, points)

        total = []
        monkeypatch.setattr(gradients, "_slopes", watched)
        engine, _ = attributed(llama(num_hidden_layers=6), steps=1)
        monkeypatch.setattr(gradients, "_slopes", slopes)
        return total[0], engine.record.activations

    held, text = saved()
    assert text is not None and "only the inputs of 6 layers are kept" in text
    monkeypatch.setattr(gradients, "_checkpoint", lambda layer: lambda: None)
    assert held < saved()[0] / 3


# --- nothing is left behind ---------------------------------------------------------------------


def snapshot(model):
    return {
        "forward": [module.__dict__.get("forward") for module in model.modules()],
        "training": [module.training for module in model.modules()],
        "weights": [weight.requires_grad for weight in model.parameters()],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        "attention": model.config._attn_implementation,
        "enabled": torch.is_grad_enabled(),
    }


def lived_in():
    """A model amid its user's training, one layer frozen, another under a library's own forward."""
    model = llama().train()
    model.model.layers[0].requires_grad_(False)
    model.model.layers.get_submodule("1.mlp").eval()
    own = model.model.layers[1].forward
    model.model.layers[1].forward = lambda *args, **kwargs: own(*args, **kwargs)
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    return model


@pytest.mark.parametrize("method", ["path", "score_gradient"])
@pytest.mark.parametrize("error", [None, KeyboardInterrupt, ZeroDivisionError])
@pytest.mark.parametrize("when", ["forward", "backward"])
def test_the_model_is_left_as_it_was(monkeypatch, method, error, when):
    model = lived_in()
    before = snapshot(model)
    passed = []

    def fail(*_):
        passed.append(torch.is_grad_enabled())
        assert not any(weight.requires_grad for weight in model.parameters()) or not passed[-1]
        if error is not None and passed[-1]:
            raise error

    # A layer runs twice with gradients: in the forward pass, and again in the backward pass.
    seen = [0]

    def hook(module, args):
        if torch.is_grad_enabled():
            seen[0] += 1
            if seen[0] == (1 if when == "forward" else 2):
                fail()

    handle = model.model.layers.get_submodule("1.mlp").register_forward_pre_hook(hook)
    before["hooks"] = snapshot(model)["hooks"]
    if error is None:
        Explainer(model, method=method, progress=False).explain(PROMPT, TARGET)
    else:
        with pytest.raises(error):
            Explainer(model, method=method, progress=False).explain(PROMPT, TARGET)
    assert passed == [True]
    assert snapshot(model) == before
    handle.remove()
    gradients_left = [n for n, weight in model.named_parameters() if weight.grad is not None]
    assert gradients_left == ["lm_head.weight"]
    assert torch.equal(model.lm_head.weight.grad, torch.ones_like(model.lm_head.weight))
    assert gradients._LOCK.acquire(blocking=False)
    gradients._LOCK.release()


def test_a_layer_is_run_again_in_another_thread_as_autograd_does_on_a_gpu():
    """There the model's own implementation would answer, which knows no factors."""
    model = llama()
    engine = started(model)
    runner = engine._runners[0]
    found = []
    factors = torch.full((1, 12), 0.5).requires_grad_()
    with (
        undisturbed(model),
        gradients._differentiable(runner),
        torch.enable_grad(),
        runner.manipulated(factors),
    ):
        loss = runner.logprobs_of([0], 1).sum()
        (expected,) = torch.autograd.grad(loss, factors, retain_graph=True)

        def backward():
            found.append(torch.autograd.grad(loss, factors)[0])

        thread = threading.Thread(target=backward)
        thread.start()
        thread.join()
    torch.testing.assert_close(found[0], expected, rtol=0, atol=0)
    assert expected.abs().max() > 1e-2


def test_another_thread_runs_the_model_as_ever():
    model = llama()
    ids = torch.tensor([PROMPT])
    with torch.no_grad():
        expected = model(ids).logits
    found = []
    runner = started(model)._runners[0]

    def other():
        found.append(model(ids).logits.detach())

    with undisturbed(model), gradients._differentiable(runner):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    torch.testing.assert_close(found[0], expected)


def test_inference_mode_around_it_does_not_matter():
    model = llama()
    expected = Explainer(model, method="path", progress=False).explain(PROMPT, TARGET).scores
    with torch.inference_mode():
        found = Explainer(model, method="path", progress=False).explain(PROMPT, TARGET).scores
    torch.testing.assert_close(found, expected, equal_nan=True)


def test_a_user_s_manipulation_around_it_is_kept():
    """The product of both factors is what moves."""
    model = in_float64("llama")
    around = torch.linspace(0.3, 1.2, len(PROMPT) + 2)[None]
    with manipulate(model, around, "min_shift"):
        engine, found = attributed(model, UNITS, 64)
    rise = (engine.base_logprobs - found.together).double()
    off = (found.scores.double().nansum(0) - rise).abs().sum()
    assert off < 0.02 * rise.abs().sum()
    plain, _ = attributed(model, UNITS, 1)
    assert (plain.base_logprobs - engine.base_logprobs).abs().max() > 1e-2


# --- refusals -----------------------------------------------------------------------------------


def test_a_model_without_gradients_is_refused():
    model = llama()
    forward = model.model.layers[0].forward
    model.model.layers[0].forward = torch.no_grad()(forward)
    forward_1 = model.model.layers[1].forward
    model.model.layers[1].forward = torch.no_grad()(forward_1)
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM runs without gradients"):
        attributed(model, steps=1)


def test_a_model_that_cannot_be_differentiated_is_refused():
    class Opaque(torch.autograd.Function):
        @staticmethod
        def forward(ctx, states):
            return states.clone()

        @staticmethod
        def backward(ctx, *_):
            raise NotImplementedError("no derivative here")

    model = llama()
    forward = model.model.norm.forward
    model.model.norm.forward = lambda hidden_states: Opaque.apply(forward(hidden_states))
    match = r"LlamaForCausalLM cannot be differentiated.*take|use method='exact'. \(no derivative"
    with pytest.raises(UnsupportedModelError, match=match):
        attributed(model, steps=1)


def test_layers_that_cannot_be_found_are_said(monkeypatch):
    model = llama()
    model.config.num_hidden_layers = 3
    with pytest.raises(UnsupportedModelError, match="decoder layers of LlamaModel cannot be found"):
        gradients.decoder_layers(model)


def test_an_engine_without_gradients_refuses():
    with pytest.raises(ValueError, match=r"needs an engine with Settings\(gradients=True\)"):
        attributed(llama(), gradients=False)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"method": "exact", "steps": 8}, ValueError, "steps is for path, but method is 'exact'"),
        ({"method": "score_gradient", "steps": 1}, ValueError, "steps is for path, but method is"),
        ({"steps": 0}, ValueError, "steps must be at least 1, got 0"),
        ({"steps": True}, TypeError, "steps must be an int or None, got True"),
        ({"steps": 2.0}, TypeError, "steps must be an int or None, got 2.0"),
        (
            {"budget": 0.5},
            ValueError,
            "budget is for hybrid and hierarchical, but method is 'path'",
        ),
        ({"mode": "min_shift_full"}, ValueError, "method='path' needs that no token acts on those"),
    ],
)
def test_bad_settings_are_refused(changes, error, message):
    with pytest.raises(error, match=message):
        Explainer(MODELS["llama"](), **{"method": "path"} | changes)
