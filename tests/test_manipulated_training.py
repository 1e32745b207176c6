"""Training with "atman", and under manipulate(): dropout, checkpointed layers, compiled graphs."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
import torch._dynamo
import torch._dynamo.testing
import transformers as tf
from families import FAMILIES, LAYERS, VOCAB
from manipulated import (
    ROUNDING,
    TOKENS,
    a_factor,
    checkpoint_layers,
    fresh_dynamo,
    is_close,
    llama,
    logits_of,
    logits_under,
    some_ids,
    state_of,
    without_dropout,
)
from torch import Tensor, nn

import atman_triton.layers
from atman_triton.integration import manipulate

__all__ = ["fresh_dynamo", "llama"]  # fixtures


# --- checkpointed ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gptj"])
def test_a_backward_pass_after_the_context_recomputes_with_the_factors(name: str) -> None:
    def gradients(checkpointing: bool) -> list[Tensor]:
        model = FAMILIES[name].build()
        state = state_of(model)
        without_dropout(model)
        if checkpointing:
            checkpoint_layers(model)
        model.train()
        with manipulate(model, a_factor(), "min_shift"):
            loss = model(some_ids(), use_cache=False).logits.square().mean()
        loss.backward()
        del loss
        assert state_of(model) == state
        return [p.grad for p in model.parameters() if p.grad is not None]

    plain, recomputed = gradients(False), gradients(True)
    assert len(plain) == len(recomputed) > 0
    assert all(torch.allclose(a, b, rtol=1e-4) for a, b in zip(plain, recomputed, strict=True))


# --- trained with dropout -----------------------------------------------------------------------


_DROPS = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob", "dropout_rate")


def _bert(name: str) -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
    config = getattr(tf, f"{name}Config")(vocab_size=VOCAB, num_hidden_layers=LAYERS, **sizes)
    return config, getattr(tf, f"{name}ForMaskedLM")


def _t5_config() -> Any:
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": LAYERS, "num_heads": 2}
    config = tf.T5Config(vocab_size=VOCAB, decoder_start_token_id=0, **sizes)
    return config, tf.T5ForConditionalGeneration


_TRAINED = {
    "bert": lambda: _bert("Bert"),
    "roberta": lambda: _bert("Roberta"),
    "t5": _t5_config,
    **{name: FAMILIES[name].make for name in ("llama", "gpt2", "gptj", "gpt_neo", "falcon-alibi")},
}


def _training(name: str, implementation: str, drop: float) -> Any:
    """A model in train mode, in float64, with no dropout but that of attention."""
    config, model_class = _TRAINED[name]()
    for key in _DROPS:
        if hasattr(config, key):
            setattr(config, key, drop)
    config._attn_implementation = implementation
    torch.manual_seed(7)
    model = model_class(config)
    kept = ("attn_dropout", "attention_dropout", "attention.self.dropout")
    for module_name, module in model.named_modules():
        if isinstance(module, nn.Dropout) and not module_name.endswith(kept):
            module.p = 0.0
    model.train()
    return model.float() if name in ("gptj", "gpt_neo", "falcon-alibi") else model.double()


def _loss(model: Any) -> Tensor:
    """With padding on the left of one row, where the family takes any."""
    padding = torch.ones(2, TOKENS, dtype=torch.long)
    padding[0, :3] = 0
    inputs = {"decoder_input_ids": some_ids()} if model.config.is_encoder_decoder else {}
    return model(some_ids(), attention_mask=padding, **inputs).logits[1].square().mean()


def _seen_dropout(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    seen: list[float] = []
    plain_op = atman_triton.layers.attention

    def spy(*args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs["dropout"])
        return plain_op(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(atman_triton.layers, "attention", spy)
        _loss(model)
    return seen


@pytest.mark.parametrize("name", _TRAINED)
def test_attention_dropout_in_training_and_none_in_evaluation(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _training(name, "atman", 0.25)
    calls = LAYERS * (3 if name == "t5" else 1)
    assert _seen_dropout(model, monkeypatch) == [0.25] * calls
    assert not torch.equal(_loss(model), _loss(model))
    assert _seen_dropout(model.eval(), monkeypatch) == [0.0] * calls
    assert torch.equal(_loss(model), _loss(model))


@pytest.mark.parametrize("name", _TRAINED)
def test_training_without_dropout_has_the_gradients_of_the_own_code(name: str) -> None:
    grads = []
    for implementation in ("eager", "atman"):
        if name in ("llama", "falcon-alibi") and implementation == "eager":
            implementation = "sdpa"  # eager overflows in float64, and adds ALiBi twice
        model = _training(name, implementation, 0.0)
        _loss(model).backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(grads[0]) == len(grads[1]) > 10
    for own, ours in zip(*grads, strict=True):
        torch.testing.assert_close(ours, own, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(
    ("name", "manipulated"),
    [("bert", False)]  # manipulate() is for decoders
    + [(name, how) for name in ("llama", "gpt2", "gptj", "gpt_neo") for how in (False, True)],
)
def test_checkpointed_training_repeats_dropout(
    name: str, manipulated: bool, reentrant: bool
) -> None:
    """Also where the backward pass runs after the context."""
    grads = []
    for checkpointing in (False, True):
        model = _training(name, "atman", 0.25)
        if checkpointing:
            checkpoint_layers(model, reentrant)
        torch.manual_seed(3)
        if manipulated:
            with manipulate(model, a_factor(), "min_shift"):
                loss = _loss(model)
        else:
            loss = _loss(model)
        torch.rand(5)  # the backward pass finds the generator elsewhere
        loss.backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(grads[0]) == len(grads[1]) > 10
    assert any(grad.abs().max() > 0 for grad in grads[0])
    for plain, recomputed in zip(*grads, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=1e-4, atol=1e-7)


# --- compiled -----------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["eager", "atman"])
@pytest.mark.parametrize("name", ["llama", "gpt_neo"])
def test_compiled_whole_before_during_and_after(name: str, implementation: str) -> None:
    """dynamo does not guard on hooks; a graph must serve other factors without a new one."""
    model = FAMILIES[name].build(implementation)
    counter = torch._dynamo.testing.CompileCounter()
    compiled: Any = torch.compile(model, backend=counter, fullgraph=True)
    plain = logits_of(model)
    # gpt_neo's own code takes its softmax in float32
    rounding = ROUNDING if name == "llama" else 1e-4
    assert (logits_of(compiled) - plain).abs().max() < rounding
    for value in (0.1, 0.5, 3.0):
        expected = logits_under(model, a_factor(value))
        with manipulate(model, a_factor(value)):
            assert (logits_of(compiled) - expected).abs().max() < rounding
        assert (expected - plain).abs().max() > 100 * rounding
    assert (logits_of(compiled) - plain).abs().max() < rounding
    assert counter.frame_count == 2


def test_compiled_graphs_belong_to_their_thread(llama: Any) -> None:
    llama.set_attn_implementation("atman")
    compiled: Any = torch.compile(llama, backend="eager", fullgraph=True)
    plain, expected = logits_of(llama), logits_under(llama, a_factor(0.5))
    seen: list[Tensor] = []

    def elsewhere() -> None:
        seen.append(logits_of(compiled))
        with manipulate(llama, a_factor(0.5)):
            seen.append(logits_of(compiled))

    with manipulate(llama, a_factor(0.1)):
        first = logits_of(compiled)
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        assert torch.equal(logits_of(compiled), first)
    assert is_close(seen[0], plain)
    assert is_close(seen[1], expected)
    assert not is_close(first, expected)


def test_compiled_with_checkpointing(llama: Any) -> None:
    checkpoint_layers(llama)
    llama.train()
    compiled: Any = torch.compile(llama, backend="aot_eager", fullgraph=True)
    grads = []
    for model in (llama, compiled):
        llama.zero_grad()
        with manipulate(llama, a_factor()):
            loss = model(some_ids(), use_cache=False).logits.square().mean()
        loss.backward()
        grads.append(llama.model.layers[0].self_attn.k_proj.weight.grad.clone())
    assert torch.allclose(grads[0], grads[1])
