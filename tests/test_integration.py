"""manipulate(): where factors go, when they stop, and what is refused."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo
import torch._dynamo.testing
import transformers as tf
from families import FAMILIES, LAYERS, VOCAB, WINDOW, eager_reference
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaAttention

import atman_triton.layers
from atman_triton.integration import UnsupportedModelError, manipulate

TOKENS = 10
ROUNDING = 1e-9  # float64


@pytest.fixture
def llama() -> Any:
    return FAMILIES["llama"].build("sdpa")  # its eager softmax is float32


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Any:
    yield
    torch._dynamo.reset()


def _ids(batch: int = 2, tokens: int = TOKENS) -> Tensor:
    return torch.randint(3, VOCAB, (batch, tokens), generator=torch.Generator().manual_seed(5))


def _factor(value: float = 0.1, column: int = 3, batch: int = 2, tokens: int = TOKENS) -> Tensor:
    factor = torch.ones(batch, tokens)
    factor[:, column] = value
    return factor


@torch.no_grad()
def _logits(model: Any, ids: Tensor | None = None, **inputs: Any) -> Tensor:
    return model(_ids() if ids is None else ids, use_cache=False, **inputs).logits


def _manipulated(model: Any, factor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    with manipulate(model, factor, *args, **kwargs):
        return _logits(model)


def _close(actual: Tensor, expected: Tensor) -> bool:
    return bool((actual - expected).abs().max() < ROUNDING)


# --- where factors go ---------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["multiplicative", "min_shift", "log_additive"])
def test_nested_contexts_multiply(llama: Any, mode: str) -> None:
    first, second = _factor(0.5, 2, tokens=6), _factor(0.2, 4, batch=1)
    product = second.repeat(2, 1)
    product[:, :6] *= first
    with manipulate(llama, first, mode), manipulate(llama, second, mode):
        nested = _logits(llama)
    assert _close(nested, _manipulated(llama, product, mode))
    assert not _close(nested, _manipulated(llama, second.repeat(2, 1), mode))


def test_an_inner_context_ends_before_the_outer(llama: Any) -> None:
    with manipulate(llama, _factor(0.5)):
        outer = _logits(llama)
        with manipulate(llama, _factor(0.5)):
            assert _close(_logits(llama), _manipulated_alone(llama, _factor(0.25)))
        assert torch.equal(_logits(llama), outer)


def _manipulated_alone(model: Any, factor: Tensor) -> Tensor:
    """In another thread, where no context is open."""
    results: list[Tensor] = []
    thread = threading.Thread(target=lambda: results.append(_manipulated(model, factor)))
    thread.start()
    thread.join()
    return results[0]


def test_layers_and_heads_add_up(llama: Any) -> None:
    factor = _factor()
    whole = _manipulated(llama, factor)
    with manipulate(llama, factor, layers=[0]):
        one_layer = _logits(llama)
        with manipulate(llama, factor, layers=[1]):
            assert _close(_logits(llama), whole)
    with manipulate(llama, factor, heads=[0, 2]):
        some_heads = _logits(llama)
        with manipulate(llama, factor, heads=[1, 3]):
            assert _close(_logits(llama), whole)
    for part in (one_layer, some_heads):
        assert not _close(part, whole)
        assert not _close(part, _logits(llama))


def test_factors_per_head(llama: Any) -> None:
    per_head = torch.ones(2, 4, TOKENS)
    per_head[:, 2] = _factor()
    expected = _manipulated(llama, _factor(), heads=[2])
    assert _close(_manipulated(llama, per_head), expected)
    assert _close(_manipulated(llama, per_head, heads=[1, 2]), expected)
    assert _close(_manipulated(llama, per_head, heads=[1]), _logits(llama))


def test_short_factors_are_continued_with_ones_and_long_ones_wait(llama: Any) -> None:
    expected = _manipulated(llama, _factor())
    assert _close(_manipulated(llama, _factor(tokens=4)), expected)
    longer = torch.cat([_factor(), torch.zeros(2, 5)], 1)
    assert _close(_manipulated(llama, longer), expected)


def test_one_row_serves_a_batch_and_a_row_its_neighbours(llama: Any) -> None:
    expected = _manipulated(llama, _factor())
    assert _close(_manipulated(llama, _factor(batch=1)), expected)
    rows = torch.cat([_factor(0.1, 2, batch=1), _factor(0.1, 5, batch=1)])
    with manipulate(llama, rows):
        actual = _logits(llama, _ids().repeat_interleave(3, 0))
    assert _close(actual, _manipulated(llama, rows).repeat_interleave(3, 0))
    with (
        pytest.raises(
            ValueError, match="key_factor has 2 rows, but the model runs on a batch of 3"
        ),
        manipulate(llama, rows),
    ):
        _logits(llama, _ids(3))


def test_only_the_text_stack_of_a_vision_language_model(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 3}
    vision = tf.CLIPVisionConfig(**sizes, num_attention_heads=2, image_size=8, patch_size=4)
    text = FAMILIES["llama"].make()[0]
    torch.manual_seed(0)
    config = tf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=VOCAB - 1)
    config._attn_implementation = "atman"
    model = tf.LlavaForConditionalGeneration(config).eval().double()
    for parameter in model.parameters():
        parameter.data.normal_(0.0, 0.25)
    ids = _ids(1)
    ids[:, 2:6] = VOCAB - 1
    pixels = torch.randn(1, 3, 8, 8, dtype=torch.float64)

    calls: list[bool] = []
    plain_op = atman_triton.layers.attention

    def spy(query: Tensor, key: Tensor, value: Tensor, factor: Tensor | None, **kw: Any) -> Any:
        calls.append(factor is not None)
        return plain_op(query, key, value, factor, **kw)

    monkeypatch.setattr(atman_triton.layers, "attention", spy)
    before = _logits(model, ids, pixel_values=pixels)
    calls.clear()
    with manipulate(model, _factor(0.1, 3, batch=1)):
        after = _logits(model, ids, pixel_values=pixels)
    assert calls.count(True) == LAYERS
    assert calls.count(False) == 3  # its vision tower
    assert not _close(after, before)


def test_a_mask_that_the_outer_model_made() -> None:
    """PaliGemma makes the mask, with its image block, outside the text stack, which asks again."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    vision = tf.SiglipVisionConfig(**sizes, num_attention_heads=2, image_size=8, patch_size=4)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    text = tf.GemmaConfig(vocab_size=VOCAB, **sizes, **heads)
    token = {"image_token_id": VOCAB - 1, "image_token_index": VOCAB - 1}
    config = tf.PaliGemmaConfig(text_config=text, vision_config=vision, projection_dim=32, **token)
    torch.manual_seed(0)
    model = tf.PaliGemmaForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0.0, 0.25)
    ids = _ids()
    ids[:, 2:6] = VOCAB - 1
    inputs = {"pixel_values": torch.randn(2, 3, 8, 8), "token_type_ids": torch.zeros_like(ids)}
    plain = _logits(model, ids, **inputs)
    with manipulate(model, torch.ones(1, 1)):
        assert torch.allclose(_logits(model, ids, **inputs), plain, atol=1e-4)
    with manipulate(model, _factor()):
        assert (_logits(model, ids, **inputs) - plain).abs().max() > 100 * 1e-4


def test_the_model_may_be_given_as_its_text_stack_or_compiled(llama: Any) -> None:
    expected = _manipulated(llama, _factor())
    with manipulate(llama.model, _factor()):
        assert _close(_logits(llama), expected)
    compiled = torch.compile(llama, backend="eager")
    with manipulate(compiled, _factor()):
        assert _close(_logits(llama), expected)


def test_gradients_reach_factors_and_weights(llama: Any) -> None:
    factor = _factor().requires_grad_()
    with manipulate(llama, factor, "min_shift"):
        llama(_ids()).logits.square().sum().backward()
    assert factor.grad is not None
    step = 1e-3
    losses = []
    for sign in (1, -1):
        shifted = _factor()
        shifted[0, 3] += sign * step
        losses.append(_manipulated(llama, shifted, "min_shift").square().sum().item())
    numeric = (losses[0] - losses[1]) / (2 * step)
    assert factor.grad[0, 3].item() == pytest.approx(numeric, rel=1e-2)
    assert llama.model.layers[0].self_attn.q_proj.weight.grad.abs().max() > 0


# --- when they stop -----------------------------------------------------------------------------


def _state(model: Any) -> tuple[Any, ...]:
    stack = model.get_decoder()
    hooks = len(stack._forward_pre_hooks), len(stack._forward_hooks)
    kinds = [type(module) for module in model.modules()]
    return model.config._attn_implementation, hooks, kinds


@pytest.mark.parametrize("name", ["llama", "gptj"])
def test_undone_after_an_exception(name: str) -> None:
    model = FAMILIES[name].build()
    before, state = _logits(model), _state(model)
    try:
        with manipulate(model, _factor()), manipulate(model, _factor()):
            assert _state(model) != state
            raise KeyError
    except KeyError:
        pass
    assert _state(model) == state
    assert torch.equal(_logits(model), before)


def test_models_that_share_a_config_do_not_switch_each_other_off() -> None:
    config, model_class = FAMILIES["llama"].make()
    config._attn_implementation = "eager"
    first, second = (model_class(config).eval() for _ in range(2))
    with manipulate(first, _factor()):
        with manipulate(second, _factor()):
            _logits(second)
        assert config._attn_implementation == "atman"
        _logits(first)
    assert config._attn_implementation == "eager"


def test_the_users_own_choice_of_implementation_stays(llama: Any) -> None:
    plain = _logits(llama)
    llama.set_attn_implementation("atman")
    assert _close(_logits(llama), plain)
    _manipulated(llama, _factor())
    assert llama.config._attn_implementation == "atman"
    assert _close(_logits(llama), plain)


@pytest.mark.parametrize("name", ["llama", "gptj"])
def test_threads_have_their_own_factors(name: str) -> None:
    """Two threads with different factors and one without, on one model at the same time."""
    model = FAMILIES[name].build("atman")
    factors = [_factor(0.1, 2), _factor(3.0, 6), None]
    expected = [_logits(model) if f is None else _manipulated(model, f) for f in factors]
    barrier, wrong = threading.Barrier(3, timeout=120), []

    def work(index: int) -> None:
        factor = factors[index]
        for _ in range(4):
            if factor is None:
                barrier.wait()
                actual = _logits(model)
                barrier.wait()
            else:
                with manipulate(model, factor):
                    barrier.wait()
                    actual = _logits(model)
                    barrier.wait()
            if not _close(actual, expected[index]):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert not _close(expected[0], expected[1])


@pytest.mark.parametrize("entering", [True, False])
@pytest.mark.parametrize("name", ["llama", "mistral", "gptj", "gpt_neo", "bloom", "falcon-alibi"])
def test_a_pass_in_another_thread_stays_as_it_began(name: str, entering: bool) -> None:
    """Between its layers, a context is opened, or closed; it would notice: it asks for weights."""
    model = FAMILIES[name].build()
    plain = model(_ids(), use_cache=False, output_attentions=True)
    amid, go_on = threading.Event(), threading.Event()
    results: list[Any] = []

    def pause(*_: Any) -> None:
        if threading.current_thread() is thread:
            amid.set()
            assert go_on.wait(120)

    def other() -> None:
        try:
            results.append(model(_ids(), use_cache=False, output_attentions=True))
        except (RuntimeError, TypeError, ValueError) as error:
            results.append(error)
        amid.set()

    thread = threading.Thread(target=other)
    layers = next(m for m in model.modules() if isinstance(m, nn.ModuleList))
    handle = layers[0].register_forward_hook(pause)
    context = manipulate(model, _factor())
    if entering:
        thread.start()
        assert amid.wait(120)
        context.__enter__()
    else:
        context.__enter__()
        thread.start()
        assert amid.wait(120)
    manipulated = _logits(model)
    if entering:
        go_on.set()
        thread.join()
    context.__exit__(None, None, None)
    go_on.set()
    thread.join()
    handle.remove()
    assert not isinstance(results[0], Exception), results[0]
    assert torch.equal(results[0].logits, plain.logits)
    assert all(
        torch.equal(a, b) for a, b in zip(results[0].attentions, plain.attentions, strict=True)
    )
    assert not _close(manipulated, plain.logits)


def test_hooks_seen_while_another_thread_removes_them(llama: Any) -> None:
    """torch then calls them without keyword arguments."""
    with manipulate(llama, _factor()):
        expected = _logits(llama)
        stack = llama.get_decoder()
        flags = dict(stack._forward_pre_hooks_with_kwargs), dict(stack._forward_hooks_with_kwargs)
        plain: list[Tensor] = []

        def other() -> None:
            stack._forward_pre_hooks_with_kwargs.clear()
            stack._forward_hooks_with_kwargs.clear()
            plain.append(_logits(llama))

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        stack._forward_pre_hooks_with_kwargs.update(flags[0])
        stack._forward_hooks_with_kwargs.update(flags[1])
        assert torch.equal(_logits(llama), expected)
    assert torch.equal(plain[0], _logits(llama))


def test_a_copy_of_the_config_made_meanwhile_is_an_ordinary_one(llama: Any) -> None:
    with manipulate(llama, _factor()):
        _logits(llama)
        copies = copy.deepcopy(llama.config), pickle.loads(pickle.dumps(llama.config))
    for copied in copies:
        assert type(copied) is tf.LlamaConfig
        assert copied._attn_implementation == "sdpa"
        assert copied.to_dict() == llama.config.to_dict()


@pytest.mark.parametrize("name", ["llama", "gptj"])
def test_a_backward_pass_after_the_context_recomputes_with_the_factors(name: str) -> None:
    def gradients(checkpointing: bool) -> list[Tensor]:
        model = FAMILIES[name].build()
        state = _state(model)
        _no_dropout(model)
        if checkpointing:
            _checkpoint(model)
        model.train()
        with manipulate(model, _factor(), "min_shift"):
            loss = model(_ids(), use_cache=False).logits.square().mean()
        loss.backward()
        del loss
        assert _state(model) == state
        return [p.grad for p in model.parameters() if p.grad is not None]

    plain, recomputed = gradients(False), gradients(True)
    assert len(plain) == len(recomputed) > 0
    assert all(torch.allclose(a, b, rtol=1e-4) for a, b in zip(plain, recomputed, strict=True))


def _checkpoint(model: Any, reentrant: bool = False) -> None:
    """Under its present name, or the one before."""
    enable = getattr(model, "activation_checkpointing_enable", None)
    enable = enable or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})


def _no_dropout(model: Any) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


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
    inputs = {"decoder_input_ids": _ids()} if model.config.is_encoder_decoder else {}
    return model(_ids(), attention_mask=padding, **inputs).logits[1].square().mean()


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
            _checkpoint(model, reentrant)
        torch.manual_seed(3)
        if manipulated:
            with manipulate(model, _factor(), "min_shift"):
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
    plain = _logits(model)
    # gpt_neo's own code takes its softmax in float32
    rounding = ROUNDING if name == "llama" else 1e-4
    assert (_logits(compiled) - plain).abs().max() < rounding
    for value in (0.1, 0.5, 3.0):
        expected = _manipulated(model, _factor(value))
        with manipulate(model, _factor(value)):
            assert (_logits(compiled) - expected).abs().max() < rounding
        assert (expected - plain).abs().max() > 100 * rounding
    assert (_logits(compiled) - plain).abs().max() < rounding
    assert counter.frame_count == 2


def test_compiled_graphs_belong_to_their_thread(llama: Any) -> None:
    llama.set_attn_implementation("atman")
    compiled: Any = torch.compile(llama, backend="eager", fullgraph=True)
    plain, expected = _logits(llama), _manipulated(llama, _factor(0.5))
    seen: list[Tensor] = []

    def elsewhere() -> None:
        seen.append(_logits(compiled))
        with manipulate(llama, _factor(0.5)):
            seen.append(_logits(compiled))

    with manipulate(llama, _factor(0.1)):
        first = _logits(compiled)
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        assert torch.equal(_logits(compiled), first)
    assert _close(seen[0], plain)
    assert _close(seen[1], expected)
    assert not _close(first, expected)


def test_compiled_with_checkpointing(llama: Any) -> None:
    _checkpoint(llama)
    llama.train()
    compiled: Any = torch.compile(llama, backend="aot_eager", fullgraph=True)
    grads = []
    for model in (llama, compiled):
        llama.zero_grad()
        with manipulate(llama, _factor()):
            loss = model(_ids(), use_cache=False).logits.square().mean()
        loss.backward()
        grads.append(llama.model.layers[0].self_attn.k_proj.weight.grad.clone())
    assert torch.allclose(grads[0], grads[1])


# --- refused ------------------------------------------------------------------------------------


class _OwnMindedAttention(LlamaAttention):
    """Looks like an attention layer, and computes by itself."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Any:
        return super().forward(
            hidden_states,
            position_embeddings=kwargs["position_embeddings"],
            attention_mask=kwargs["attention_mask"],
        )


def _with_one_deaf_layer(llama: Any) -> Any:
    llama.model.layers[1].self_attn.__class__ = _OwnMindedAttention
    return llama


def test_a_layer_that_does_not_listen_is_named(llama: Any) -> None:
    model = _with_one_deaf_layer(llama)
    with (
        pytest.raises(UnsupportedModelError, match=r"LlamaForCausalLM: .* \[1\] of \[0, 1\]"),
        manipulate(model, _factor()),
    ):
        _logits(model)
    with manipulate(model, _factor(), layers=[0]):
        _logits(model)
    with pytest.raises(UnsupportedModelError), manipulate(model, _factor(), layers=[1]):
        _logits(model)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_layer_that_does_not_listen_is_named_when_compiled(
    llama: Any, checkpointing: bool
) -> None:
    model = _with_one_deaf_layer(llama)
    if checkpointing:
        _checkpoint(model)
        model.train()
    compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
    for _ in range(2):  # traced, then from the cache
        with (
            pytest.raises(UnsupportedModelError, match=r"layers \[1\] of \[0, 1\]"),
            manipulate(model, _factor()),
        ):
            compiled(_ids(), use_cache=False)


def test_a_context_in_which_the_model_never_ran_is_an_error(llama: Any) -> None:
    def elsewhere() -> None:  # another thread's pass is plain
        thread = threading.Thread(target=lambda: _logits(llama))
        thread.start()
        thread.join()

    with (
        pytest.raises(UnsupportedModelError, match=r"LlamaForCausalLM: .* reached no layer"),
        manipulate(llama, _factor()),
    ):
        elsewhere()


def _blip() -> Any:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    text = {"vocab_size": VOCAB, "num_hidden_layers": 1, "encoder_hidden_size": 16} | sizes
    vision = {"num_hidden_layers": 1, "image_size": 8, "patch_size": 4} | sizes
    return tf.BlipForConditionalGeneration(tf.BlipConfig(text_config=text, vision_config=vision))


def _t5() -> Any:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    return tf.T5ForConditionalGeneration(tf.T5Config(vocab_size=VOCAB, **sizes))


def _ctrl() -> Any:
    sizes = {"n_embd": 16, "dff": 16, "n_layer": 1, "n_head": 2, "n_positions": 16}
    return tf.CTRLLMHeadModel(tf.CTRLConfig(vocab_size=VOCAB, **sizes))


def _tiny(family: str, **changes: Any) -> Any:
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2} | changes
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if family != "Mamba":
        sizes |= {"intermediate_size": 48, "num_attention_heads": 4}
    config = getattr(tf, f"{family}Config")(**sizes, **tokens)
    return getattr(tf, f"{family}ForCausalLM")(config).eval()


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (_blip, "BlipForConditionalGeneration"),
        (_t5, "T5ForConditionalGeneration"),
        (_ctrl, "CTRLLMHeadModel"),
        (lambda: _tiny("Mamba", state_size=8), "MambaForCausalLM has no layers with softmax"),
        (lambda: _tiny("RecurrentGemma", lru_width=32), "RecurrentGemmaForCausalLM has no layers"),
        (lambda: _tiny("ModernBertDecoder"), "ModernBertDecoderForCausalLM: its text stack"),
        (lambda: nn.Linear(2, 2), "Linear"),
    ],
    ids=["blip", "t5", "ctrl", "mamba", "recurrent_gemma", "modernbert_decoder", "linear"],
)
def test_unsupported_models_are_refused_by_name(make: Any, name: str) -> None:
    model = make()
    with pytest.raises(UnsupportedModelError, match=name), manipulate(model, _factor()):
        pass


def test_a_model_that_works_on_masks_itself_is_refused_by_name() -> None:
    model = _tiny("Doge", num_key_value_heads=2)
    with (
        pytest.raises(UnsupportedModelError, match="DogeForCausalLM changes the mask"),
        manipulate(model, _factor()),
    ):
        _logits(model)


def test_errors_of_the_callers_own_pass_through(llama: Any) -> None:
    with pytest.raises(TypeError, match="mine"), manipulate(llama, _factor()):
        raise TypeError("mine")


@pytest.mark.parametrize(
    ("factor", "kwargs", "error", "message"),
    [
        ([[1.0]], {}, TypeError, "key_factor must be a tensor, got list."),
        (torch.ones(2, 3).long(), {}, TypeError, "floating dtype, got torch.int64"),
        (
            torch.ones(3),
            {},
            ValueError,
            r"\[batch, tokens\] or .*, got \[3\]",
        ),
        (torch.ones(2, 0), {}, ValueError, r"got \[2, 0\]"),
        (torch.ones(2, 3, 5), {}, ValueError, r"must have 4 heads .* got shape \[2, 3, 5\]"),
        (torch.tensor([[1.0, torch.nan]]), {}, ValueError, "finite, got NaN or infinity"),
        (torch.tensor([[1.0, torch.inf]]), {}, ValueError, "finite, got NaN or infinity"),
        (-torch.ones(1, 2), {"mode": "log_additive"}, ValueError, "at least 0 .*log_additive"),
        (torch.ones(1, 2), {"mode": "additive"}, ValueError, "mode must be one of .*'additive'"),
        (torch.ones(1, 2), {"backend": "cuda"}, ValueError, "backend must be one of .*'cuda'"),
        (torch.ones(1, 2), {"layers": [0, 2]}, ValueError, r"layers must be among 0\.\.1 .* got 2"),
        (torch.ones(1, 2), {"layers": [-1]}, ValueError, "got -1"),
        (torch.ones(1, 2), {"layers": []}, ValueError, "layers must name at least one"),
        (torch.ones(1, 2), {"layers": ["0"]}, TypeError, "layers must be integers, got '0'"),
        (torch.ones(1, 2), {"layers": 1}, TypeError, "layers must be an iterable of .*, got 1"),
        (torch.ones(1, 2), {"heads": 1}, TypeError, "heads must be an iterable of .*, got 1"),
        (torch.ones(1, 2), {"heads": "01"}, TypeError, "heads must be an iterable .*, got '01'"),
        (torch.ones(1, 2), {"layers": np.ones(2, bool)}, TypeError, "layers must be integers"),
        (torch.ones(1, 2), {"layers": [1.0]}, TypeError, r"layers must be integers, got 1\.0"),
        (torch.ones(1, 2, device="meta"), {}, ValueError, "key_factor is on the meta device"),
        (torch.ones(1, 2), {"heads": [4]}, ValueError, r"heads must be within 0\.\.3, got 4"),
        (torch.ones(1, 2), {"heads": [True]}, TypeError, "heads must be integers, got True"),
    ],
)
def test_bad_arguments_are_named(
    llama: Any, factor: Any, kwargs: dict[str, Any], error: type[Exception], message: str
) -> None:
    state = _state(llama)
    with pytest.raises(error, match=message), manipulate(llama, factor, **kwargs):
        pass
    assert _state(llama) == state


def test_numpy_integers_name_layers_and_heads(llama: Any) -> None:
    expected = _manipulated(llama, _factor(), layers=[1], heads=[0, 2])
    actual = _manipulated(llama, _factor(), layers=[np.int64(1)], heads=np.array([0, 2]))
    assert torch.equal(actual, expected)


def test_a_model_on_the_meta_device_is_refused(llama: Any) -> None:
    model = llama.to("meta")
    with (
        pytest.raises(ValueError, match="model is on the meta device"),
        manipulate(model, _factor()),
    ):
        pass


def test_a_model_that_is_none_is_refused() -> None:
    model: Any = "gpt2"
    with (
        pytest.raises(TypeError, match="must be a transformers model, got str"),
        manipulate(model, _factor()),
    ):
        pass


def test_nested_contexts_must_fit(llama: Any) -> None:
    with (
        pytest.raises(ValueError, match=r"around this one, 'multiplicative', got 'min_shift'"),
        manipulate(llama, _factor()),
        manipulate(llama, _factor(), "min_shift"),
    ):
        pass
    with (
        pytest.raises(ValueError, match=r"rows as that of the context around it, 2, got 3"),
        manipulate(llama, _factor()),
        manipulate(llama, _factor(batch=3)),
    ):
        pass


def test_attention_weights_are_refused(llama: Any) -> None:
    with pytest.raises(ValueError, match="output_attentions=True"), manipulate(llama, _factor()):
        _logits(llama, output_attentions=True)


@pytest.mark.parametrize("name", ["llama", "bloom"])
def test_attention_weights_asked_for_by_the_config_are_refused(name: str) -> None:
    model = FAMILIES[name].build("eager")
    model.config.output_attentions = True
    advice = r"outside of manipulate\(\), .* attn_implementation='eager'"
    with pytest.raises(ValueError, match=advice), manipulate(model, _factor()):
        _logits(model)
    assert len(model(_ids()).attentions) == LAYERS  # the advice is right
    with manipulate(model, _factor()):
        _logits(model, output_attentions=False)


def test_min_shift_full_does_not_use_a_cache(llama: Any) -> None:
    full = _manipulated(llama, _factor(), "min_shift_full")
    assert not _close(full, _manipulated(llama, _factor(), "min_shift"))
    with torch.no_grad(), manipulate(llama, _factor(), "min_shift_full"):
        past = llama(_ids()).past_key_values
        with pytest.raises(ValueError, match="cannot use a cache"):
            llama(_ids()[:, :1], past_key_values=past)


# --- generate -----------------------------------------------------------------------------------


@torch.no_grad()
def _greedy_by_hand(name: str, model: Any, ids: Tensor, padding: Tensor, factor: Tensor) -> Tensor:
    """Greedy tokens from full eager passes with the modifier matrix, without a cache."""
    for _ in range(6):
        longer = torch.ones(ids.shape[0], ids.shape[1])
        longer[:, : factor.shape[1]] = factor
        positions = (padding.cumsum(1) - 1).clamp_min(0)
        with eager_reference(FAMILIES[name], model, longer, "min_shift"):
            output = model(ids, attention_mask=padding, position_ids=positions, use_cache=False)
        ids = torch.cat([ids, output.logits[:, -1:].argmax(-1)], 1)
        padding = torch.cat([padding, torch.ones_like(padding[:, :1])], 1)
    return ids


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
def test_generate_keeps_factors_with_their_tokens(name: str, cache: str) -> None:
    model = FAMILIES[name].build()
    ids, padding = _ids(), torch.ones(2, TOKENS, dtype=torch.long)
    padding[0, :3] = 0
    factor = torch.ones(2, TOKENS)
    factor[:, 5:9] = torch.tensor([[0.1, 4.0, 1.0, 0.3], [3.0, 0.2, 0.1, 1.0]])
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": VOCAB + 1}
    options |= {"cache_implementation": "static"} if cache == "static" else {}
    plain = model.generate(ids, attention_mask=padding, **options)
    with manipulate(model, factor, "min_shift"):
        actual = model.generate(ids, attention_mask=padding, **options)
    assert actual.shape[1] == TOKENS + 6 > TOKENS + WINDOW
    assert torch.equal(actual, _greedy_by_hand(name, model, ids, padding, factor))
    assert not torch.equal(actual, plain)


def test_beams_keep_the_factors_of_their_prompt(llama: Any) -> None:
    factor = torch.cat([_factor(0.1, 4, batch=1), _factor(4.0, 6, batch=1)])
    options = {"max_new_tokens": 5, "num_beams": 3, "num_return_sequences": 2, "do_sample": False}
    with manipulate(llama, factor):
        together = llama.generate(_ids(), **options)
    for row in range(2):
        with manipulate(llama, factor[row : row + 1]):
            alone = llama.generate(_ids()[row : row + 1], **options)
        assert torch.equal(together[2 * row : 2 * row + 2, : alone.shape[1]], alone)
    assert not torch.equal(together, llama.generate(_ids(), **options))
