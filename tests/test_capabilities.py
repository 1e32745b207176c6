"""What is refused, what runs in full, and that it then gives the numbers of a plain loop."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import torch._dynamo
import transformers as tf
from test_engine import WithoutLogitsToKeep, close, started
from torch import nn
from toy_models import MODELS, WINDOW, gpt2, llama
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from atman_triton.capabilities import (
    check_causal,
    context_window,
    keeps_logits,
    vocabulary_size,
    why_not_branches,
    why_not_prefix,
)
from atman_triton.engine import Unit, undisturbed
from atman_triton.integration import UnsupportedModelError, manipulate

SIZE: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
PROMPT = [3, 41, 59, 26, 53, 58, 97, 93, 23, 84]
TARGETS = [[84, 62, 64], [7], [30, 11]]
UNITS = [Unit((0,)), Unit((4, 5)), Unit((9,)), Unit((10,), 0), Unit((10,), 2)]


# --- models that keep more than keys and values -------------------------------------------------


def _jamba():
    config = tf.JambaConfig(
        **SIZE,
        attn_layer_period=2,
        attn_layer_offset=1,
        num_experts=1,
        num_experts_per_tok=1,
        mamba_d_state=8,
        mamba_dt_rank=4,
    )
    return tf.JambaForCausalLM(config)


def _falcon_h1():
    config = tf.FalconH1Config(
        **SIZE,
        head_dim=8,
        mamba_d_ssm=32,
        mamba_n_heads=4,
        mamba_d_head=8,
        mamba_d_state=8,
        mamba_chunk_size=4,
    )
    return tf.FalconH1ForCausalLM(config)


def _qwen3_next():
    config = tf.Qwen3NextConfig(
        **SIZE,
        head_dim=16,
        layer_types=["linear_attention", "full_attention"],
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    )
    config._experts_implementation = "eager"  # the grouped product has no float64
    return tf.Qwen3NextForCausalLM(config)


def _gemma3n():
    config = tf.Gemma3nTextConfig(
        **SIZE | {"num_hidden_layers": 4},
        head_dim=8,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=101,
        altup_num_inputs=2,
        laurel_rank=4,
        num_kv_shared_layers=2,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention"] * 2,
        activation_sparsity_pattern=[0.0] * 4,
    )
    return tf.Gemma3nForCausalLM(config)


def _phi3(trained=8):
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "factor": 8.0,
        "short_factor": [1.0] * 4,
        "long_factor": [4.0] * 4,
        "original_max_position_embeddings": trained,
    }
    config = tf.Phi3Config(
        **SIZE, pad_token_id=0, rope_parameters=rope, original_max_position_embeddings=trained
    )
    return tf.Phi3ForCausalLM(config)


STATEFUL = {
    "jamba": (_jamba, "JambaForCausalLM keeps a state besides attention keys"),
    "falcon-h1": (_falcon_h1, "FalconH1ForCausalLM keeps a state besides attention keys"),
    "qwen3-next": (_qwen3_next, "Qwen3NextForCausalLM keeps a state besides attention keys"),
    "gemma3n": (_gemma3n, "Gemma3nForCausalLM shares keys between layers"),
    "phi3": (_phi3, "the rotary frequencies of Phi3ForCausalLM change beyond 8 tokens"),
}


@cache
def sharp(build) -> Any:
    """Float64, with weights large enough for a suppression to show."""
    model = build().eval().double()
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                drawn = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(1.5 / parameter.shape[-1] ** 0.5 * drawn)
    return model


@torch.no_grad()
def full_forwards(model, prompt, targets, units):
    """``[1 + U, M]`` of whole forward passes under ``manipulate``; NaN as the engine has it."""
    table = []
    for unit in (None, *units):
        row = []
        for k, target in enumerate(targets):
            ids = torch.tensor([prompt + target[:-1]])
            found = torch.full((len(target),), torch.nan, dtype=torch.float64)
            if unit is None or unit.branch in (None, k):
                factor = torch.ones(ids.shape)
                factor[0, list(unit.positions) if unit else []] = 0.1
                with manipulate(model, factor, "min_shift"):
                    logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 :]
                found = logits.double().log_softmax(-1)[range(len(target)), target]
                found[: max(0, max(unit.positions) - len(prompt) + 1) if unit else 0] = torch.nan
            row.append(found)
        table.append(torch.cat(row))
    return torch.stack(table)


def check_in_full(model, reason, prompt=None, units=UNITS, targets=TARGETS, **changes):
    """The engine runs every pass whole, says why, and is right; direct effects are refused."""
    prompt, passes = prompt or PROMPT, []
    run = started(model, targets, prompt, **changes)
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: passes.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    with undisturbed(model):
        found = run.perturb(units)
    hook.remove()
    expected = full_forwards(model, prompt, targets, units)
    found = torch.cat([run.base_logprobs[None], found])
    assert torch.equal(found.isnan(), expected.isnan())
    known = ~expected.isnan()
    moved = (expected[1:] - expected[0]).abs().nan_to_num(0.0).amax(1)
    assert moved.min() > 100 * 2e-6
    close(found[known], expected[known])
    assert set(run.record.runners) == {"full"}
    assert any(reason in each for each in run.record.reasons)
    assert set(passes) <= {len(prompt) + len(target) - 1 for target in targets}
    assert run.record.prefix_bytes == 0
    with undisturbed(model), pytest.raises(UnsupportedModelError, match=type(model).__name__):
        run.perturb(units[:1], "direct")


@pytest.mark.parametrize("name", STATEFUL)
def test_models_with_a_state_run_in_full(name):
    build, reason = STATEFUL[name]
    check_in_full(sharp(build), reason)


def test_rotary_frequencies_that_stay_allow_a_prefix():
    model = sharp(_phi3)
    assert why_not_prefix(model, 8) is None
    assert why_not_prefix(model, 9) is not None
    prompt, targets = PROMPT[:6], [[84, 62, 64]]  # together 8
    run = started(model, targets, prompt)
    assert run.record.runners == ["shared_prefix"]
    with undisturbed(model):
        found = run.perturb([UNITS[0], Unit((5,))])
    expected = full_forwards(model, prompt, targets, [UNITS[0], Unit((5,))])
    close(found, expected[1:])
    longer = started(model, [[84, 62, 64, 30]], prompt)
    assert longer.record.runners == ["full"]


class AddsTheMean(LlamaDecoderLayer):
    """Adds the mean of the states so far; nothing of its configuration tells."""

    def forward(self, hidden_states, *args, **kwargs):
        output = super().forward(hidden_states, *args, **kwargs)
        count = torch.arange(1, output.shape[1] + 1)[:, None]
        return output + output.cumsum(1) / count


class AddsTheTokenBefore(LlamaDecoderLayer):
    """Shifts tokens as RWKV does: only the first token behind a cut is wrong by itself."""

    def forward(self, hidden_states, *args, **kwargs):
        output = super().forward(hidden_states, *args, **kwargs)
        return output + 0.5 * nn.functional.pad(output, (0, 0, 1, 0))[:, :-1]


@cache
def with_layers(kind):
    model = llama(vocab_size=101).double()
    for layer in model.model.layers:
        layer.__class__ = kind
    return model


@pytest.mark.parametrize("kind", [AddsTheMean, AddsTheTokenBefore])
def test_models_that_silently_do_not_split_are_found_out(kind):
    reason = "LlamaForCausalLM gives other logits when its input comes in two pieces"
    check_in_full(with_layers(kind), reason)


@pytest.mark.parametrize("kind", [AddsTheMean, AddsTheTokenBefore])
def test_they_are_found_out_behind_a_prompt_of_one_token(kind):
    """There is no prompt to cut, but units of the target are run from their start on."""
    units = [Unit((3,), 0), Unit((4, 5), 0)]
    model = with_layers.__wrapped__(kind)  # not probed yet
    run = started(model, [PROMPT], [5], batch_size=1)
    with undisturbed(model):
        found = run.perturb(units)
    expected = full_forwards(model, [5], [PROMPT], units)[1:]
    known = ~expected.isnan()
    close(found[known], expected[known])


@pytest.mark.parametrize("kind", [AddsTheMean, AddsTheTokenBefore])
def test_they_are_found_out_in_bfloat16(kind):
    model = llama(vocab_size=101).bfloat16()
    for layer in model.model.layers:
        layer.__class__ = kind
    assert started(model, TARGETS, PROMPT).record.runners[0] == "full"
    assert started(llama().bfloat16(), TARGETS, PROMPT).record.runners == ["shared_prefix"]


def test_a_compiled_model_runs_in_full():
    compiled = torch.compile(llama(vocab_size=101).double(), backend="eager")
    run = started(compiled, TARGETS[:1], PROMPT)
    with undisturbed(compiled):
        found = run.perturb(UNITS[:4])
    assert run.record.runners == ["full"]
    assert run.record.reasons == ["the model is compiled"]
    plain = full_forwards(compiled._orig_mod, PROMPT, TARGETS[:1], UNITS[:4])
    close(found.nan_to_num(), plain[1:].nan_to_num())
    with undisturbed(compiled), pytest.raises(UnsupportedModelError, match="is compiled; use"):
        run.perturb(UNITS[:1], "direct")
    torch._dynamo.reset()


# --- what a model says of itself ----------------------------------------------------------------


def test_a_prefix_can_be_shared_by_models_of_plain_attention():
    for build in MODELS.values():
        assert why_not_prefix(build(), 10_000) is None
        assert why_not_branches(build()) is None


def test_logits_at_the_last_positions():
    assert keeps_logits(MODELS["llama"]())
    assert keeps_logits(torch.compile(llama(), backend="eager"))
    assert not keeps_logits(llama(WithoutLogitsToKeep))


BERT: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
}


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: tf.BertForMaskedLM(tf.BertConfig(**BERT)),
            "BertForMaskedLM does not predict next tokens; load it with AutoModelForCausalLM",
        ),
        (
            lambda: tf.GPT2ForSequenceClassification(
                tf.GPT2Config(vocab_size=60, n_embd=8, n_layer=1, n_head=2)
            ),
            "GPT2ForSequenceClassification does not predict next tokens",
        ),
        (
            lambda: tf.BertLMHeadModel(tf.BertConfig(**BERT)),
            "the attention of this BertLMHeadModel looks both ways",
        ),
        (
            lambda: tf.T5ForConditionalGeneration(
                tf.T5Config(vocab_size=60, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
            ),
            "T5ForConditionalGeneration has an encoder and a decoder",
        ),
    ],
    ids=["masked", "classifier", "two-sided", "encoder-decoder"],
)
def test_models_that_are_not_causal_are_refused(build, message):
    with pytest.raises(UnsupportedModelError, match=message):
        check_causal(build())


@pytest.mark.parametrize("thing", [object(), nn.Linear(2, 2)], ids=["object", "module"])
def test_what_is_no_model_is_refused(thing):
    name = type(thing).__name__
    with pytest.raises(TypeError, match=f"transformers causal language model, got {name}"):
        check_causal(thing)


def test_causal_models_are_accepted():
    config = tf.GPTNeoXConfig(**BERT)
    check_causal(tf.GPTNeoXForCausalLM(config))  # its config says is_decoder=False
    check_causal(tf.BertLMHeadModel(tf.BertConfig(**BERT, is_decoder=True)))
    for build in MODELS.values():
        check_causal(build())


def test_what_a_model_says_of_its_size():
    assert context_window(MODELS["llama"]()) == context_window(gpt2()) == WINDOW
    config = tf.BloomConfig(vocab_size=60, hidden_size=8, n_layer=1, n_head=2)
    bloom = tf.BloomForCausalLM(config)
    assert context_window(bloom) is None  # ALiBi
    assert vocabulary_size(bloom) == 60
    assert why_not_branches(bloom) == "BloomForCausalLM counts positions by itself"
