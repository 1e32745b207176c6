"""manipulate(): where factors go, when they stop, and that generate() keeps them."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import pytest
import torch
import torch._dynamo
import torch._dynamo.testing
import transformers as tf
from families import FAMILIES, LAYERS, VOCAB, WINDOW, eager_reference
from manipulated import (
    TOKENS,
    a_factor,
    is_close,
    logits_of,
    logits_under,
    some_ids,
    state_of,
)
from torch import Tensor, nn

import atman_triton.layers
from atman_triton.integration import manipulate


@pytest.fixture
def llama() -> Any:
    return FAMILIES["llama"].build("sdpa")  # its eager softmax is float32


# --- where factors go ---------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["multiplicative", "min_shift", "log_additive"])
def test_nested_contexts_multiply(llama: Any, mode: str) -> None:
    first, second = a_factor(0.5, 2, tokens=6), a_factor(0.2, 4, batch=1)
    product = second.repeat(2, 1)
    product[:, :6] *= first
    with manipulate(llama, first, mode), manipulate(llama, second, mode):
        nested = logits_of(llama)
    assert is_close(nested, logits_under(llama, product, mode))
    assert not is_close(nested, logits_under(llama, second.repeat(2, 1), mode))


def test_an_inner_context_ends_before_the_outer(llama: Any) -> None:
    with manipulate(llama, a_factor(0.5)):
        outer = logits_of(llama)
        with manipulate(llama, a_factor(0.5)):
            assert is_close(logits_of(llama), _manipulated_alone(llama, a_factor(0.25)))
        assert torch.equal(logits_of(llama), outer)


def _manipulated_alone(model: Any, factor: Tensor) -> Tensor:
    """In another thread, where no context is open."""
    results: list[Tensor] = []
    thread = threading.Thread(target=lambda: results.append(logits_under(model, factor)))
    thread.start()
    thread.join()
    return results[0]


def test_layers_and_heads_add_up(llama: Any) -> None:
    factor = a_factor()
    whole = logits_under(llama, factor)
    with manipulate(llama, factor, layers=[0]):
        one_layer = logits_of(llama)
        with manipulate(llama, factor, layers=[1]):
            assert is_close(logits_of(llama), whole)
    with manipulate(llama, factor, heads=[0, 2]):
        some_heads = logits_of(llama)
        with manipulate(llama, factor, heads=[1, 3]):
            assert is_close(logits_of(llama), whole)
    for part in (one_layer, some_heads):
        assert not is_close(part, whole)
        assert not is_close(part, logits_of(llama))


def test_factors_per_head(llama: Any) -> None:
    per_head = torch.ones(2, 4, TOKENS)
    per_head[:, 2] = a_factor()
    expected = logits_under(llama, a_factor(), heads=[2])
    assert is_close(logits_under(llama, per_head), expected)
    assert is_close(logits_under(llama, per_head, heads=[1, 2]), expected)
    assert is_close(logits_under(llama, per_head, heads=[1]), logits_of(llama))


def test_short_factors_are_continued_with_ones_and_long_ones_wait(llama: Any) -> None:
    expected = logits_under(llama, a_factor())
    assert is_close(logits_under(llama, a_factor(tokens=4)), expected)
    longer = torch.cat([a_factor(), torch.zeros(2, 5)], 1)
    assert is_close(logits_under(llama, longer), expected)


def test_one_row_serves_a_batch_and_a_row_its_neighbours(llama: Any) -> None:
    expected = logits_under(llama, a_factor())
    assert is_close(logits_under(llama, a_factor(batch=1)), expected)
    rows = torch.cat([a_factor(0.1, 2, batch=1), a_factor(0.1, 5, batch=1)])
    with manipulate(llama, rows):
        actual = logits_of(llama, some_ids().repeat_interleave(3, 0))
    assert is_close(actual, logits_under(llama, rows).repeat_interleave(3, 0))
    with (
        pytest.raises(
            ValueError, match="key_factor has 2 rows, but the model runs on a batch of 3"
        ),
        manipulate(llama, rows),
    ):
        logits_of(llama, some_ids(3))


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
    ids = some_ids(1)
    ids[:, 2:6] = VOCAB - 1
    pixels = torch.randn(1, 3, 8, 8, dtype=torch.float64)

    calls: list[bool] = []
    plain_op = atman_triton.layers.attention

    def spy(query: Tensor, key: Tensor, value: Tensor, factor: Tensor | None, **kw: Any) -> Any:
        calls.append(factor is not None)
        return plain_op(query, key, value, factor, **kw)

    monkeypatch.setattr(atman_triton.layers, "attention", spy)
    before = logits_of(model, ids, pixel_values=pixels)
    calls.clear()
    with manipulate(model, a_factor(0.1, 3, batch=1)):
        after = logits_of(model, ids, pixel_values=pixels)
    assert calls.count(True) == LAYERS
    assert calls.count(False) == 3  # its vision tower
    assert not is_close(after, before)


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
    ids = some_ids()
    ids[:, 2:6] = VOCAB - 1
    inputs = {"pixel_values": torch.randn(2, 3, 8, 8), "token_type_ids": torch.zeros_like(ids)}
    plain = logits_of(model, ids, **inputs)
    with manipulate(model, torch.ones(1, 1)):
        assert torch.allclose(logits_of(model, ids, **inputs), plain, atol=1e-4)
    with manipulate(model, a_factor()):
        assert (logits_of(model, ids, **inputs) - plain).abs().max() > 100 * 1e-4


def test_the_model_may_be_given_as_its_text_stack_or_compiled(llama: Any) -> None:
    expected = logits_under(llama, a_factor())
    with manipulate(llama.model, a_factor()):
        assert is_close(logits_of(llama), expected)
    compiled = torch.compile(llama, backend="eager")
    with manipulate(compiled, a_factor()):
        assert is_close(logits_of(llama), expected)
    torch._dynamo.reset()


def test_gradients_reach_factors_and_weights(llama: Any) -> None:
    factor = a_factor().requires_grad_()
    with manipulate(llama, factor, "min_shift"):
        llama(some_ids()).logits.square().sum().backward()
    assert factor.grad is not None
    step = 1e-3
    losses = []
    for sign in (1, -1):
        shifted = a_factor()
        shifted[0, 3] += sign * step
        losses.append(logits_under(llama, shifted, "min_shift").square().sum().item())
    numeric = (losses[0] - losses[1]) / (2 * step)
    assert factor.grad[0, 3].item() == pytest.approx(numeric, rel=1e-2)
    assert llama.model.layers[0].self_attn.q_proj.weight.grad.abs().max() > 0


# --- when they stop -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gptj"])
def test_undone_after_an_exception(name: str) -> None:
    model = FAMILIES[name].build()
    before, state = logits_of(model), state_of(model)
    try:
        with manipulate(model, a_factor()), manipulate(model, a_factor()):
            assert state_of(model) != state
            raise KeyError
    except KeyError:
        pass
    assert state_of(model) == state
    assert torch.equal(logits_of(model), before)


def test_models_that_share_a_config_do_not_switch_each_other_off() -> None:
    config, model_class = FAMILIES["llama"].make()
    config._attn_implementation = "eager"
    first, second = (model_class(config).eval() for _ in range(2))
    with manipulate(first, a_factor()):
        with manipulate(second, a_factor()):
            logits_of(second)
        assert config._attn_implementation == "atman"
        logits_of(first)
    assert config._attn_implementation == "eager"


def test_the_users_own_choice_of_implementation_stays(llama: Any) -> None:
    plain = logits_of(llama)
    llama.set_attn_implementation("atman")
    assert is_close(logits_of(llama), plain)
    logits_under(llama, a_factor())
    assert llama.config._attn_implementation == "atman"
    assert is_close(logits_of(llama), plain)


@pytest.mark.parametrize("name", ["llama", "gptj"])
def test_threads_have_their_own_factors(name: str) -> None:
    """Two threads with different factors and one without, on one model at the same time."""
    model = FAMILIES[name].build("atman")
    factors = [a_factor(0.1, 2), a_factor(3.0, 6), None]
    expected = [logits_of(model) if f is None else logits_under(model, f) for f in factors]
    barrier, wrong = threading.Barrier(3, timeout=120), []

    def work(index: int) -> None:
        factor = factors[index]
        for _ in range(4):
            if factor is None:
                barrier.wait()
                actual = logits_of(model)
                barrier.wait()
            else:
                with manipulate(model, factor):
                    barrier.wait()
                    actual = logits_of(model)
                    barrier.wait()
            if not is_close(actual, expected[index]):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert not is_close(expected[0], expected[1])


@pytest.mark.parametrize("entering", [True, False])
@pytest.mark.parametrize("name", ["llama", "mistral", "gptj", "gpt_neo", "bloom", "falcon-alibi"])
def test_a_pass_in_another_thread_stays_as_it_began(name: str, entering: bool) -> None:
    """Between its layers, a context is opened, or closed; it would notice: it asks for weights."""
    model = FAMILIES[name].build()
    plain = model(some_ids(), use_cache=False, output_attentions=True)
    amid, go_on = threading.Event(), threading.Event()
    results: list[Any] = []

    def pause(*_: Any) -> None:
        if threading.current_thread() is thread:
            amid.set()
            assert go_on.wait(120)

    def other() -> None:
        try:
            results.append(model(some_ids(), use_cache=False, output_attentions=True))
        except (RuntimeError, TypeError, ValueError) as error:
            results.append(error)
        amid.set()

    thread = threading.Thread(target=other)
    layers = next(m for m in model.modules() if isinstance(m, nn.ModuleList))
    handle = layers[0].register_forward_hook(pause)
    context = manipulate(model, a_factor())
    if entering:
        thread.start()
        assert amid.wait(120)
        context.__enter__()
    else:
        context.__enter__()
        thread.start()
        assert amid.wait(120)
    manipulated = logits_of(model)
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
    assert not is_close(manipulated, plain.logits)


def test_hooks_seen_while_another_thread_removes_them(llama: Any) -> None:
    """torch then calls them without keyword arguments."""
    with manipulate(llama, a_factor()):
        expected = logits_of(llama)
        stack = llama.get_decoder()
        flags = dict(stack._forward_pre_hooks_with_kwargs), dict(stack._forward_hooks_with_kwargs)
        plain: list[Tensor] = []

        def other() -> None:
            stack._forward_pre_hooks_with_kwargs.clear()
            stack._forward_hooks_with_kwargs.clear()
            plain.append(logits_of(llama))

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        stack._forward_pre_hooks_with_kwargs.update(flags[0])
        stack._forward_hooks_with_kwargs.update(flags[1])
        assert torch.equal(logits_of(llama), expected)
    assert torch.equal(plain[0], logits_of(llama))


def test_a_copy_of_the_config_made_meanwhile_is_an_ordinary_one(llama: Any) -> None:
    with manipulate(llama, a_factor()):
        logits_of(llama)
        copies = copy.deepcopy(llama.config), pickle.loads(pickle.dumps(llama.config))
    for copied in copies:
        assert type(copied) is tf.LlamaConfig
        assert copied._attn_implementation == "sdpa"
        assert copied.to_dict() == llama.config.to_dict()


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
    ids, padding = some_ids(), torch.ones(2, TOKENS, dtype=torch.long)
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
    factor = torch.cat([a_factor(0.1, 4, batch=1), a_factor(4.0, 6, batch=1)])
    options = {"max_new_tokens": 5, "num_beams": 3, "num_return_sequences": 2, "do_sample": False}
    with manipulate(llama, factor):
        together = llama.generate(some_ids(), **options)
    for row in range(2):
        with manipulate(llama, factor[row : row + 1]):
            alone = llama.generate(some_ids()[row : row + 1], **options)
        assert torch.equal(together[2 * row : 2 * row + 2, : alone.shape[1]], alone)
    assert not torch.equal(together, llama.generate(some_ids(), **options))
