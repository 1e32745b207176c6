"""AttnLRP through lxt against its rules written out in a Llama's forward, with torch alone.

lxt itself is rarely installed, so a stand-in of two functions with its interface is used too.
"""

from __future__ import annotations

import importlib.util
import textwrap
from typing import Any

import pytest
import torch
from test_baselines_gradient import PROMPT, TARGETS, embedded, expected_of, rated, state_of
from test_multimodal import SMALL
from torch import nn
from toy_images import seeing
from toy_models import MODELS, llama
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from atman_triton.baselines import Baseline
from atman_triton.baselines.attn_lrp import attn_lrp
from atman_triton.stacks import UnsupportedModelError

STAND_IN = """
    import torch


    class _Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value, inputs, slope):
            ctx.slope = slope
            return value

        @staticmethod
        def backward(ctx, gradient):
            return None, gradient * ctx.slope, None


    def divide_gradient(input, factor=2):
        return _Scaled.apply(input.detach(), input, 1 / factor)


    def identity_rule_implicit(fn, input):
        with torch.no_grad():
            value = fn(input)
            slope = value / (input + 1e-10)
        return _Scaled.apply(value, input, slope)
"""
INSTALLED = importlib.util.find_spec("lxt") is not None


def write(folder, rules):
    package = folder / "lxt" / "efficient"
    package.mkdir(parents=True)
    (folder / "lxt" / "__init__.py").write_text("")
    (package / "__init__.py").write_text("raise ImportError('not beside these transformers')\n")
    if rules is not None:
        (package / "rules.py").write_text(textwrap.dedent(rules))


@pytest.fixture(
    params=[
        "stand-in",
        pytest.param("lxt", marks=pytest.mark.skipif(not INSTALLED, reason="lxt is missing")),
    ]
)
def rules(request, tmp_path, monkeypatch):
    if request.param == "stand-in":
        write(tmp_path, STAND_IN)
        monkeypatch.syspath_prepend(tmp_path)


def exact():
    """A Llama of two layers and shared heads all of whose parts stay in float64."""
    model = llama().double()
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child).__name__ == "LlamaRMSNorm":
                norm = nn.RMSNorm(32, eps=1e-6, dtype=torch.float64)
                with torch.no_grad():
                    norm.weight.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(7))
                setattr(parent, name, norm)
    return model


def shared(value, by):
    """The same value, whose gradient is divided."""
    return value / by + (value - value / by).detach()


def ruled_logits(model: Any, x):
    """A Llama's forward whose gradient times input is relevance: ``[S, V]``."""

    def normed(norm, states):
        scale = (states.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt().detach()
        return norm.weight * states * scale

    tokens = x.shape[1]
    turns = model.model.rotary_emb(x, torch.arange(tokens)[None])
    turns = [each.double() for each in turns]
    future = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    states = x
    for layer in model.model.layers:
        own, read = layer.self_attn, normed(layer.input_layernorm, states)
        query, key, value = (
            projection(read).view(1, tokens, -1, 8).transpose(1, 2)
            for projection in (own.q_proj, own.k_proj, own.v_proj)
        )
        query, key = apply_rotary_pos_emb(query, key, *turns)
        key, value = (part.repeat_interleave(2, 1) for part in (key, value))
        # half to each of queries and keys, of the half that weights get of weights and values
        scores = shared(query, 4) @ shared(key, 4).transpose(2, 3) / 8**0.5
        weights = scores.masked_fill(future, -torch.inf).softmax(-1)
        mixed = (weights @ shared(value, 2)).transpose(1, 2).reshape(1, tokens, -1)
        states = states + own.o_proj(mixed)
        read = normed(layer.post_attention_layernorm, states)
        gate = layer.mlp.gate_proj(read)
        gate = gate * gate.sigmoid().detach()
        states = states + layer.mlp.down_proj(shared(gate * layer.mlp.up_proj(read), 2))
    return model.lm_head(normed(model.model.norm, states))[0]


def test_against_rules_written_out(rules):
    model = exact()
    found, case = rated(attn_lrp, model)
    per_target = []
    for target in TARGETS:
        maps = []
        for t, token in enumerate(target):
            x = embedded(model, target).requires_grad_()
            logit = ruled_logits(model, x)[len(PROMPT) - 1 + t, token]
            torch.testing.assert_close(
                logit, case.values(len(per_target), x)[0, t], rtol=1e-6, atol=1e-6
            )
            (slope,) = torch.autograd.grad(logit, x)
            maps.append((slope * x).sum(-1)[0].detach())
        per_target.append(torch.stack(maps))
    expected = expected_of(case, per_target)
    largest = float(expected.nan_to_num().abs().max())
    # the rule divides by the input + 1e-10, and rotations are made in float32
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 * largest, equal_nan=True)


def test_what_the_model_says_stays_the_same(rules, monkeypatch):
    """The rules change gradients alone; a Qwen3 normalises queries and keys as well."""
    config = Qwen3Config(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(config).double().eval()
    seen = []
    hook = model.lm_head.register_forward_hook(
        lambda module, args, output: seen.append(output.detach())
    )
    found = Baseline(model, method="attn_lrp", progress=False).explain(PROMPT, [4, 6])
    hook.remove()
    base, ruled = seen
    torch.testing.assert_close(ruled[:, -2:], base[:, -2:], rtol=1e-12, atol=1e-12)
    assert found.provenance["backward_runs"] == 2
    assert found.provenance["forwards"] == 6 * (1 + 1 + 2 * 2) / 5


def test_pictures_are_input_too(rules):
    model, processor = seeing("llava")
    explainer = Baseline(model, processor, method="attn_lrp", progress=False)
    found = explainer.explain([SMALL, "This is a picture of a"], " red circle")
    patches = [u for u, unit in enumerate(found.units) if unit.level == "patch"]
    assert len(patches) == 36 and bool((found.scores[:, patches] != 0).all())


@pytest.mark.parametrize("broken", [False, True])
def test_the_model_stays_as_it_was(rules, broken):
    model = llama()
    before = state_of(model)
    runs = iter(range(9))

    def fail(module, args):
        if next(runs) == 1:  # behind the base run
            raise ZeroDivisionError

    explainer = Baseline(model, method="attn_lrp", progress=False)
    if broken:
        hook = model.lm_head.register_forward_pre_hook(fail)
        with pytest.raises(ZeroDivisionError):
            explainer.explain(PROMPT, [4, 6])
        hook.remove()
    else:
        explainer.explain(PROMPT, [4, 6])
    assert state_of(model) == before


def test_models_without_rules_are_refused(rules):
    with pytest.raises(UnsupportedModelError, match="llama, mistral, qwen2, qwen3, got gpt2; use"):
        Baseline(MODELS["gpt2"](), method="attn_lrp", progress=False).explain(PROMPT, [4])
    model = llama()
    gated: Any = model.model.layers[1].mlp
    del gated.act_fn
    gated.act_fn = nn.functional.silu
    before = state_of(model)
    with pytest.raises(UnsupportedModelError, match=r"2 layers with gated MLP .*, got 1; use"):
        Baseline(model, method="attn_lrp", progress=False).explain(PROMPT, [4])
    assert state_of(model) == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"no file .*rules\.py, as version 2\.1 has: pip install lxt==2\.1"),
        ("divide_gradient = None", r"has no identity_rule_implicit, .*pip install lxt==2\.1"),
    ],
)
def test_another_lxt_is_named(tmp_path, monkeypatch, content, message):
    write(tmp_path, content)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match=message):
        Baseline(MODELS["llama"](), method="attn_lrp", progress=False).explain(PROMPT, [4])


def test_a_missing_lxt_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"not installed: pip install lxt .*--no-deps lxt"):
        Baseline(MODELS["llama"](), method="attn_lrp", progress=False).explain(PROMPT, [4])
