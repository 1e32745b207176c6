"""manipulate(): what is refused, and by which words."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo
import torch._dynamo.testing
import transformers as tf
from families import FAMILIES, LAYERS, VOCAB
from manipulated import (
    a_factor,
    checkpoint_layers,
    fresh_dynamo,
    is_close,
    llama,
    logits_of,
    logits_under,
    some_ids,
    state_of,
)
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaAttention

from atman_triton.integration import UnsupportedModelError, manipulate

__all__ = ["fresh_dynamo", "llama"]  # fixtures


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
        manipulate(model, a_factor()),
    ):
        logits_of(model)
    with manipulate(model, a_factor(), layers=[0]):
        logits_of(model)
    with pytest.raises(UnsupportedModelError), manipulate(model, a_factor(), layers=[1]):
        logits_of(model)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_layer_that_does_not_listen_is_named_when_compiled(
    llama: Any, checkpointing: bool
) -> None:
    model = _with_one_deaf_layer(llama)
    if checkpointing:
        checkpoint_layers(model)
        model.train()
    compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
    for _ in range(2):  # traced, then from the cache
        with (
            pytest.raises(UnsupportedModelError, match=r"layers \[1\] of \[0, 1\]"),
            manipulate(model, a_factor()),
        ):
            compiled(some_ids(), use_cache=False)


def test_a_context_in_which_the_model_never_ran_is_an_error(llama: Any) -> None:
    def elsewhere() -> None:  # another thread's pass is plain
        thread = threading.Thread(target=lambda: logits_of(llama))
        thread.start()
        thread.join()

    with (
        pytest.raises(UnsupportedModelError, match=r"LlamaForCausalLM: .* reached no layer"),
        manipulate(llama, a_factor()),
    ):
        elsewhere()


def _led() -> Any:
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "d_model": 16, "attention_window": 4}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    return tf.LEDForConditionalGeneration(tf.LEDConfig(vocab_size=VOCAB, **sizes, **heads))


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
        (_led, "LEDForConditionalGeneration: LEDEncoder computes attention in its own code"),
        (_ctrl, "CTRLLMHeadModel"),
        (lambda: _tiny("Mamba", state_size=8), "MambaForCausalLM has no layers with softmax"),
        (lambda: _tiny("RecurrentGemma", lru_width=32), "RecurrentGemmaForCausalLM has no layers"),
        (lambda: _tiny("ModernBertDecoder"), "ModernBertDecoderForCausalLM: its text stack"),
        (lambda: nn.Linear(2, 2), "Linear"),
    ],
    ids=["led", "ctrl", "mamba", "recurrent_gemma", "modernbert_decoder", "linear"],
)
def test_unsupported_models_are_refused_by_name(make: Any, name: str) -> None:
    model = make()
    with pytest.raises(UnsupportedModelError, match=name), manipulate(model, a_factor()):
        pass


def test_a_model_that_works_on_masks_itself_is_refused_by_name() -> None:
    model = _tiny("Doge", num_key_value_heads=2)
    with (
        pytest.raises(UnsupportedModelError, match="DogeForCausalLM changes the mask"),
        manipulate(model, a_factor()),
    ):
        logits_of(model)


def test_errors_of_the_callers_own_pass_through(llama: Any) -> None:
    with pytest.raises(TypeError, match="mine"), manipulate(llama, a_factor()):
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
    state = state_of(llama)
    with pytest.raises(error, match=message), manipulate(llama, factor, **kwargs):
        pass
    assert state_of(llama) == state


def test_numpy_integers_name_layers_and_heads(llama: Any) -> None:
    expected = logits_under(llama, a_factor(), layers=[1], heads=[0, 2])
    actual = logits_under(llama, a_factor(), layers=[np.int64(1)], heads=np.array([0, 2]))
    assert torch.equal(actual, expected)


def test_a_model_on_the_meta_device_is_refused(llama: Any) -> None:
    model = llama.to("meta")
    with (
        pytest.raises(ValueError, match="model is on the meta device"),
        manipulate(model, a_factor()),
    ):
        pass


def test_a_model_that_is_none_is_refused() -> None:
    model: Any = "gpt2"
    with (
        pytest.raises(TypeError, match="must be a transformers model, got str"),
        manipulate(model, a_factor()),
    ):
        pass


def test_nested_contexts_must_fit(llama: Any) -> None:
    with (
        pytest.raises(ValueError, match=r"around this one, 'multiplicative', got 'min_shift'"),
        manipulate(llama, a_factor()),
        manipulate(llama, a_factor(), "min_shift"),
    ):
        pass
    with (
        pytest.raises(ValueError, match=r"rows as that of the context around it, 2, got 3"),
        manipulate(llama, a_factor()),
        manipulate(llama, a_factor(batch=3)),
    ):
        pass


def test_attention_weights_are_refused(llama: Any) -> None:
    with pytest.raises(ValueError, match="output_attentions=True"), manipulate(llama, a_factor()):
        logits_of(llama, output_attentions=True)


@pytest.mark.parametrize("name", ["llama", "bloom"])
def test_attention_weights_asked_for_by_the_config_are_refused(name: str) -> None:
    model = FAMILIES[name].build("eager")
    model.config.output_attentions = True
    advice = r"outside of manipulate\(\), .* attn_implementation='eager'"
    with pytest.raises(ValueError, match=advice), manipulate(model, a_factor()):
        logits_of(model)
    assert len(model(some_ids()).attentions) == LAYERS  # the advice is right
    with manipulate(model, a_factor()):
        logits_of(model, output_attentions=False)


def test_min_shift_full_does_not_use_a_cache(llama: Any) -> None:
    full = logits_under(llama, a_factor(), "min_shift_full")
    assert not is_close(full, logits_under(llama, a_factor(), "min_shift"))
    with torch.no_grad(), manipulate(llama, a_factor(), "min_shift_full"):
        past = llama(some_ids()).past_key_values
        with pytest.raises(ValueError, match="cannot use a cache"):
            llama(some_ids()[:, :1], past_key_values=past)
