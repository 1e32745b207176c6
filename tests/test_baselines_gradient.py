"""Baselines made of gradients against gradients taken by hand.

Legend: S tokens that are read, T tokens of a target, D width.
"""

from __future__ import annotations

import sys
from functools import cache
from itertools import chain, count
from typing import Any

import numpy as np
import pytest
import torch
import toy_models
from test_multimodal import SMALL, behind, encoded, mark
from toy_images import seeing
from toy_models import llama

from atman_triton import Explainer
from atman_triton.baselines import Baseline
from atman_triton.baselines.case import Case
from atman_triton.baselines.gradient import (
    _copies,
    grad_cam,
    input_x_gradient,
    integrated_gradients,
)
from atman_triton.baselines.methods import Options
from atman_triton.demo import load_demo_model
from atman_triton.stacks import UnsupportedModelError

METHODS = ("input_x_gradient", "integrated_gradients", "grad_cam")
ONE_STEP = torch.finfo(torch.float32).eps
PROMPT, TARGETS = [3, 50, 7, 200, 11], ([4, 6, 90], [8, 2])
SETTINGS: dict[str, Any] = {"integrated_gradients": {"steps": 4}}


def close(found, expected):
    """Equal up to float64's rounding; what is known to be NaN or 0 is."""
    torch.testing.assert_close(
        found.nan_to_num(7.25), expected.nan_to_num(7.25), rtol=1e-10, atol=1e-12
    )


def rated(function, model, prompt=PROMPT, targets=TARGETS, processor=None, **options):
    """Scores ``[U, M]`` float64, as the method gives them, and the case."""
    asked = {"targets": [list(target) for target in targets]}
    if processor is not None:
        asked = {"targets": list(targets)}
    explainer = Explainer(model, processor, method="direct", progress=False)
    case = Case.of(model, processor, prompt, explainer.explain(prompt, **asked))
    return function(case, Options(**options)), case


def expected_of(case, per_target):
    """Tokens' values ``[T, S]`` of each target as scores of units, worked out apart from Case."""
    found = torch.full(case.measured.shape, torch.nan, dtype=torch.float64)
    for k, values in enumerate(per_target):
        for t, row in enumerate(case.rows[k]):
            for u, unit in enumerate(case.units):
                before = max(unit.tokens) < case.prompt_tokens + t
                if unit.branch in (None, k) and before:
                    found[u, row] = values[t, list(unit.tokens)].sum()
    return found


def logits_of(model, embeddings, tokens):
    """``[B, T]``: the last rows' logits of some tokens, by transformers' own attention."""
    before = model.config._attn_implementation
    model.set_attn_implementation("sdpa")
    try:
        logits = model(inputs_embeds=embeddings, use_cache=False).logits[:, -len(tokens) :]
    finally:
        model.set_attn_implementation(before)
    return logits[:, range(len(tokens)), list(tokens)]


def embedded(model, target):
    """``[1, S, D]``."""
    ids = torch.tensor([[*PROMPT, *target[:-1]]])
    return model.get_input_embeddings()(ids).detach()


def slopes(model, embeddings, target):
    """``[T, S, D]``, a graph of its own for every token."""
    found = []
    for t in range(len(target)):
        own = embeddings.clone().requires_grad_()
        found.append(torch.autograd.grad(logits_of(model, own, target)[0, t], own)[0][0])
    return torch.stack(found)


# --- a linear model -----------------------------------------------------------------------------


@cache
def linear():
    """One layer that sees all tokens alike, without norms and MLP: everything is linear."""
    model: Any = llama(num_hidden_layers=1).double()
    layer: Any = model.model.layers[0]
    with torch.no_grad():
        for weight in (layer.self_attn.q_proj.weight, layer.mlp.down_proj.weight):
            weight.zero_()
    layer.input_layernorm = torch.nn.Identity()
    model.model.norm = torch.nn.Identity()
    return model


def linear_parts(target):
    """What a linear model's tokens say for each target token: ``[T, S]``, worked out by hand."""
    model: Any = linear()
    attention = model.model.layers[0].self_attn
    x = embedded(model, target)[0]
    values = attention.v_proj.weight.view(2, 8, 32).repeat_interleave(2, 0).reshape(32, 32)
    through = attention.o_proj.weight @ values  # [D, D]: two query heads share each of v's
    found = torch.zeros(len(target), len(x), dtype=torch.float64)
    for t, token in enumerate(target):
        place, wanted = len(PROMPT) - 1 + t, model.lm_head.weight[token]
        for j in range(place + 1):
            found[t, j] = wanted @ through @ x[j] / (place + 1)
        found[t, place] += wanted @ x[place]
    return found.detach()


@pytest.mark.parametrize("function", [input_x_gradient, integrated_gradients])
def test_of_a_linear_model_a_token_gets_what_it_says(function):
    found, case = rated(function, linear(), steps=3)
    expected = expected_of(case, [linear_parts(target) for target in TARGETS])
    # captum keeps the lengths of its steps in float32
    error = 4 * ONE_STEP if function is integrated_gradients else 1e-10
    torch.testing.assert_close(found, expected, rtol=error, atol=1e-12, equal_nan=True)
    sums = torch.cat([case.values(k, case.embeddings(k))[0] for k in range(len(TARGETS))])
    torch.testing.assert_close(found.nansum(0), sums.detach().double(), rtol=error, atol=1e-12)


def test_grad_cam_of_a_linear_model():
    """Behind the one layer, token y's mean gradient is w_y / S."""
    found, case = rated(grad_cam, linear())
    model: Any = linear()
    per_target = []
    for target in TARGETS:
        x = embedded(model, target)[0]
        attention = model.model.layers[0].self_attn
        values = attention.v_proj.weight.view(2, 8, 32).repeat_interleave(2, 0).reshape(32, 32)
        before = x.cumsum(0) / torch.arange(1, len(x) + 1)[:, None]
        states = x + before @ values.T @ attention.o_proj.weight.T
        wanted = model.lm_head.weight[list(target)]
        per_target.append((states @ wanted.T / len(x)).clamp(min=0).T.detach())
    close(found, expected_of(case, per_target))


# --- a small Llama: groups of heads, several targets of several tokens ---------------------------


def test_input_x_gradient_against_autograd():
    model = toy_models.in_float64("llama")
    found, case = rated(input_x_gradient, model)
    per_target = []
    for target in TARGETS:
        x = embedded(model, target)
        per_target.append((x * slopes(model, x, target)).sum(-1))
    close(found, expected_of(case, per_target))
    assert found.isnan().any()  # units of the targets, where they come too late


def test_integrated_gradients_against_a_sum_by_hand():
    model = toy_models.in_float64("llama")
    found, case = rated(integrated_gradients, model, steps=5)
    places, lengths = np.polynomial.legendre.leggauss(5)
    per_target = []
    for target in TARGETS:
        x = embedded(model, target)
        total = torch.zeros(len(target), *x.shape[1:], dtype=torch.float64)
        for place, length in zip(places, lengths, strict=True):
            step = float(np.float32(length / 2))  # captum keeps it so
            total += step * slopes(model, x * (1 + place) / 2, target)
        per_target.append((x * total).sum(-1))
    close(found, expected_of(case, per_target))


def test_integrated_gradients_are_complete():
    """What all tokens get is what the output rises by, the closer the more steps there are.

    GPT-2 adds positions behind the embeddings, so nothing breaks where these are zero.
    """
    model = toy_models.in_float64("gpt2")
    errors = []
    for steps in (2, 8, 48):
        found, case = rated(integrated_gradients, model, steps=steps)
        rise = []
        for k in range(len(TARGETS)):
            x = case.embeddings(k)
            rise.append((case.values(k, x) - case.values(k, 0 * x)).detach()[0])
        errors.append(float((found.nansum(0) - torch.cat(rise)).abs().max()))
    largest = float(torch.cat(rise).abs().max())
    print([error / largest for error in errors])
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < ONE_STEP * largest  # as captum keeps the lengths of its steps


@pytest.mark.parametrize("layer", [0, 1, -1])
def test_grad_cam_against_hooks(layer):
    model = toy_models.in_float64("llama")
    found, case = rated(grad_cam, model, layer=layer)
    per_target = []
    for target in TARGETS:
        kept: list[Any] = []
        hook = model.model.layers[layer].register_forward_hook(
            lambda module, args, output: kept.append(output)  # noqa: B023
        )
        logits = logits_of(model, embedded(model, target), target)[0]
        hook.remove()
        maps = []
        for logit in logits:
            (slope,) = torch.autograd.grad(logit, kept[0], retain_graph=True)
            channels = slope[0].mean(0)  # [D]
            maps.append((kept[0][0] @ channels).clamp(min=0))
        per_target.append(torch.stack(maps).detach())
    close(found, expected_of(case, per_target))
    assert float(found.nan_to_num().max()) > 0


def test_log_probabilities_may_be_differentiated_instead():
    """p's slope is the logit's less the mean of all, weighted by what the model expects."""
    model = toy_models.in_float64("llama")
    found, case = rated(input_x_gradient, model, targets=([4],), output="logprob")
    x = embedded(model, [4]).requires_grad_()
    logprobs = model(inputs_embeds=x, use_cache=False).logits[0, -1].log_softmax(-1)
    (slope,) = torch.autograd.grad(logprobs[4], x)
    expected = expected_of(case, [(slope * x).sum(-1).detach()])
    close(found, expected)


@pytest.mark.parametrize("method", METHODS)
def test_a_word_gets_what_its_tokens_get(method):
    model, tokenizer = load_demo_model()
    prompt = "The pay per hour is $ 20.10. Q: What is the pay per hour? A:"
    by_token, by_word = (
        Baseline(model, tokenizer, method=method, progress=False, **SETTINGS.get(method, {}))
        .explain(prompt, " $ 20.10", granularity=granularity)
        for granularity in ("token", "word")
    )  # fmt: skip
    assert len(by_word.units) < len(by_token.units)
    values = {tokens: row for row, unit in enumerate(by_token.units) for tokens in unit.tokens}
    for u, unit in enumerate(by_word.units):
        own = by_token.scores[:, [values[token] for token in unit.tokens]].sum(1)
        seen = ~by_word.scores[:, u].isnan()
        largest = float(by_token.scores.nan_to_num().abs().max())
        torch.testing.assert_close(
            by_word.scores[seen, u], own[seen], rtol=1e-5, atol=1e-6 * largest
        )


# --- pictures -------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [input_x_gradient, grad_cam])
def test_pictures_are_input_too(function):
    model, processor = seeing("llava")
    text = f"{mark('llava', processor)}This is a picture of a"
    prompt, target = [SMALL, "This is a picture of a"], " red circle"
    found, case = rated(function, model, prompt, (target,), processor, layer=0)
    ids = list(case.targets[0])
    inputs = behind("llava", encoded("llava", processor, text, [SMALL]), ids)
    seen: list[Any] = []
    before = model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"].detach()),
        with_kwargs=True,
    )
    with torch.no_grad():
        model(**inputs)
    before.remove()
    x, states = seen[0].requires_grad_(), []
    text_model = model.get_decoder()
    hook = text_model.layers[0].register_forward_hook(
        lambda module, args, output: states.append(output)
    )
    last = text_model(inputs_embeds=x).last_hidden_state
    hook.remove()
    logits = model.lm_head(last)[0, range(x.shape[1] - len(ids), x.shape[1]), ids]
    rows = []
    for logit in logits:
        if function is input_x_gradient:
            (slope,) = torch.autograd.grad(logit, x, retain_graph=True)
            rows.append((slope * x).sum(-1)[0])
        else:
            (slope,) = torch.autograd.grad(logit, states[0], retain_graph=True)
            rows.append((states[0][0] @ slope[0].mean(0)).clamp(min=0))
    close(found, expected_of(case, [torch.stack(rows).detach()]))
    patches = [u for u, unit in enumerate(case.units) if unit.level == "patch"]
    assert len(patches) == 36 and bool((found[patches] != 0).any(0).all())


# --- costs, and what stays as it was --------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_what_runs_is_what_is_counted(method, monkeypatch):
    """Rows times tokens that went into the stack, and back out of its first and last layer."""
    model = toy_models.in_float64("llama")
    monkeypatch.setattr("atman_triton.memory.tokens_per_batch", lambda device: 15)
    there, back = [], []

    def forward(module, args, output):
        there.append(output.shape[0] * output.shape[1])

    def behind_layer(module, args, output):
        if output.requires_grad:
            output.register_hook(lambda slope: back.append(slope.shape[0] * slope.shape[1]))

    hooks = [model.model.layers[0].register_forward_hook(forward)]
    hooks += [layer.register_forward_hook(behind_layer) for layer in model.model.layers]
    try:
        found = Baseline(model, method=method, progress=False, **SETTINGS.get(method, {})).explain(
            PROMPT, targets=[list(target) for target in TARGETS]
        )
    finally:
        for hook in hooks:
            hook.remove()
    print(there, back)
    read = [len(PROMPT) + len(target) - 1 for target in TARGETS]
    base = sum(read)
    runs = {"integrated_gradients": 4}.get(method, 1)
    prepared = sum(there) - base * (1 + runs)
    assert prepared == 0
    whole = sum(back) / 2  # both layers
    assert whole == (0 if method == "grad_cam" else runs * (read[0] * 3 + read[1] * 2))
    assert found.provenance["forwards"] * len(PROMPT) == pytest.approx(sum(there) + 2 * whole)
    assert found.provenance["backward_runs"] == runs * 5


def test_grad_cam_counts_the_layers_that_it_runs_back_through():
    model = toy_models.in_float64("llama")  # of two layers
    costs = [
        Baseline(model, method="grad_cam", layer=layer, progress=False)
        .explain(PROMPT, [4])
        .provenance["forwards"]
        for layer in (0, 1)
    ]
    # the base run, its own, and half of a backward pass, rounded to whole tokens
    assert costs == [2 + 2 * 2 / 5, 2]


def state_of(model):
    """All that a method could leave behind."""
    hooks = [
        (name, kind, len(found))
        for name, module in model.named_modules()
        for kind, found in vars(module).items()
        if "hooks" in kind and found
    ]
    weights = [(n, w.requires_grad, w.grad, w.data_ptr()) for n, w in model.named_parameters()]
    own = [(name, "forward" in vars(module)) for name, module in model.named_modules()]
    return hooks, weights, own, [module.training for module in model.modules()]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("broken", [None, "there", "back"])
def test_the_model_stays_as_it_was(method, broken):
    model = llama()
    model.lm_head.weight.requires_grad_(False)
    model.train()
    before = state_of(model)
    explainer = Baseline(model, method=method, progress=False, **SETTINGS.get(method, {}))
    runs = count()

    def fail(*_):
        raise ZeroDivisionError

    def fail_later(module, args, output):
        if next(runs) == 0:
            return  # the base run
        if broken == "there":
            fail()
        output.register_hook(fail)

    if broken is None:
        explainer.explain(PROMPT, [4, 6])
    else:
        hook = model.model.norm.register_forward_hook(fail_later)
        with pytest.raises(ZeroDivisionError):
            explainer.explain(PROMPT, [4, 6])
        hook.remove()
    assert state_of(model) == before
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("method", METHODS)
def test_works_in_the_users_inference_mode(method):
    model = toy_models.MODELS["llama"]()
    explainer = Baseline(model, method=method, progress=False, **SETTINGS.get(method, {}))
    expected = explainer.explain(PROMPT, [4, 6]).scores
    with torch.inference_mode():
        found = explainer.explain(PROMPT, [4, 6]).scores
    torch.testing.assert_close(found, expected, equal_nan=True)


def test_batches_of_places_change_nothing(monkeypatch):
    model = toy_models.in_float64("llama")
    together, _ = rated(integrated_gradients, model, steps=5)
    monkeypatch.setattr("atman_triton.memory.tokens_per_batch", lambda device: 1)
    alone, _ = rated(integrated_gradients, model, steps=5)
    close(alone, together)


# --- what goes wrong --------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_captum_is_named_where_it_is_missing(method, monkeypatch):
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    explainer = Baseline(toy_models.MODELS["llama"](), method=method, progress=False)
    with pytest.raises(ImportError, match=r"captum is not installed.*atman_triton\[eval\]"):
        explainer.explain(PROMPT, [4])


@pytest.mark.parametrize("method", METHODS)
def test_a_model_without_gradients_is_refused(method):
    model = llama()
    whole = model.model.norm.forward
    model.model.norm.forward = torch.no_grad()(whole)
    with pytest.raises(UnsupportedModelError, match=r"runs without gradients.*leave_one_out"):
        Baseline(model, method=method, progress=False).explain(PROMPT, [4])


@pytest.mark.parametrize("method", METHODS)
def test_a_model_that_cannot_be_differentiated_is_refused(method):
    class OneWay(torch.autograd.Function):
        @staticmethod
        def forward(ctx, states):
            return states.clone()

    model = llama()
    model.model.norm.register_forward_hook(lambda module, args, output: OneWay.apply(output))
    with pytest.raises(UnsupportedModelError, match=r"cannot be differentiated.*leave_one_out"):
        Baseline(model, method=method, progress=False).explain(PROMPT, [4])


def test_copies_share_one_run_but_not_their_gradients():
    """y = x² for two inputs of one number, each read in two rows that weigh it differently."""
    rows = torch.tensor([[2.0], [2.0], [3.0], [3.0]], dtype=torch.float64, requires_grad=True)
    inputs = rows.detach()[::2].clone().requires_grad_()
    outputs = torch.cat([inputs**2, 5 * inputs], 1)  # [N, T]
    runs = []
    found = _copies(rows, inputs, outputs, lambda: runs.append(1))
    assert found.tolist() == [4, 10, 9, 15]
    (slopes,) = torch.autograd.grad(found @ torch.tensor([1.0, 10, 100, 1000]).double(), rows)
    assert slopes.flatten().tolist() == [4, 50, 600, 5000]
    assert len(runs) == 2


def test_every_gradient_is_finite():
    model = toy_models.MODELS["gemma2"]()
    for method in METHODS:
        explainer = Baseline(model, method=method, progress=False, **SETTINGS.get(method, {}))
        found = explainer.explain(PROMPT, [4, 6]).scores
        read = chain.from_iterable(found.tolist())
        assert sum(np.isfinite(list(read))) == found.numel() - 1
