"""Baselines from attention weights, against forwards in which the weights are written out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
import toy_models
from families import FAMILIES, LAYERS
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

import atman_triton as atman
from atman_triton.baselines import Baseline, Case
from atman_triton.baselines.attention import _relevance
from atman_triton.demo import demo_prompt, load_demo_model
from atman_triton.demo.shapes import DEMO_PROMPT, demo_picture, load_shapes_model
from atman_triton.stacks import UnsupportedModelError

METHODS = ("chefer", "rollout", "last_attention")
PROMPT, TARGET = [5, 6, 7, 8, 9, 10, 11, 12], [20, 21, 22]


def scores(model: Any, method: str, **options: Any) -> Tensor:
    """``[M, U]`` float32."""
    baseline = Baseline(model, None, method=method, progress=False, **options)
    return baseline.explain(PROMPT, target=TARGET).scores


# --- the definitions, with whole matrices and full logits ----------------------------------------


def expected(
    method: str,
    weights: Sequence[Tensor],
    logits: Tensor,
    target: Sequence[int],
    output: str = "logit",
) -> Tensor:
    """``[T, S]`` from weights ``[1, H, S, S]`` and the logits ``[S, V]`` made of them."""
    places = range(len(logits) - len(target), len(logits))
    identity = torch.eye(len(logits), dtype=weights[0].dtype)
    if method == "last_attention":
        return weights[-1].mean(1)[0][list(places)].detach()
    if method == "rollout":
        product = identity
        for own in weights:
            mixed = (own.mean(1)[0].detach() + identity) / 2
            product = (mixed / mixed.sum(1, keepdim=True)) @ product
        return product[list(places)]
    rows = []
    for place, token in zip(places, target, strict=True):
        scored = logits[place].log_softmax(0) if output == "logprob" else logits[place]
        slopes = torch.autograd.grad(scored[token], list(weights), retain_graph=True)
        relevance = identity
        for own, slope in zip(weights, slopes, strict=True):
            relevance = relevance + (slope * own).relu().mean(1)[0].detach() @ relevance
        rows.append(relevance[place] - identity[place])
    return torch.stack(rows)


def before(found: Tensor) -> Tensor:
    """``[T, S]`` float32, NaN where a token of the target does not stand before the scored one."""
    later = torch.ones_like(found, dtype=torch.bool).triu(found.shape[1] - len(found) + 1)
    return found.float().masked_fill(later, torch.nan)


# --- worked by hand -------------------------------------------------------------------------------


def test_the_rule_of_chefer_on_two_tokens():
    first = torch.tensor([[[[1, 0], [0.5, 0.5]], [[1, 0], [0.5, 0.5]]]])
    first_slope = torch.tensor([[[[0, 9], [4, -1]], [[-3, 0], [-7, 0]]]])  # Ā [[0, 0], [1, 0]]
    second = torch.tensor([[[[1, 0], [0.25, 0.75]], [[1, 0], [1, 0]]]])
    second_slope = torch.tensor([[[[6, 0], [4, 8]], [[4, 0], [1, 5]]]])  # Ā [[5, 0], [1, 3]]
    # R = (I + [[5, 0], [1, 3]]) (I + [[0, 0], [1, 0]]) = [[6, 0], [1, 4]] [[1, 0], [1, 1]]
    #   = [[6, 0], [5, 4]], and less I [[5, 0], [5, 3]].
    weights, slopes = [first, second], [first_slope.float(), second_slope.float()]
    assert _relevance(weights, slopes, 0).tolist() == [5, 0]
    assert _relevance(weights, slopes, 1).tolist() == [5, 3]


def test_rollout_and_last_attention_on_three_tokens():
    model: Any = toy_models.llama().double()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.zero_()  # so everything visible gets the same weight
    found = {
        method: Baseline(model, method=method, progress=False).explain([3, 4, 5], target=[6]).scores
        for method in METHODS[1:]
    }
    torch.testing.assert_close(found["last_attention"], torch.full((1, 3), 1 / 3))
    # (A + I) / 2 = [[1, 0, 0], [1/4, 3/4, 0], [1/6, 1/6, 2/3]], whose square ends with
    # [1/6 + 1/24 + 1/9, 1/8 + 1/9, 4/9].
    torch.testing.assert_close(found["rollout"], torch.tensor([[23, 17, 32]]) / 72)


def rotated(states: Tensor) -> Tensor:
    """Rotary positions of ``[H, S, D]``, base 10 000."""
    _, tokens, width = states.shape
    speed = 10_000.0 ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
    angle = (torch.arange(tokens)[:, None] * speed).repeat(1, 2)
    left, right = states.chunk(2, -1)
    return states * angle.cos() + torch.cat([-right, left], -1) * angle.sin()


def llama_by_hand(model: Any, ids: Sequence[int]) -> tuple[list[Tensor], Tensor]:
    """Weights of every layer ``[1, H, S, S]`` and logits ``[S, V]`` of ``toy_models.llama``."""
    heads, groups = 4, 2

    def normed(module: Any, states: Tensor) -> Tensor:
        power = states.pow(2).mean(-1, keepdim=True) + module.variance_epsilon
        return states * power.rsqrt() * module.weight

    def split(states: Tensor) -> Tensor:
        return states.view(len(ids), -1, 8).transpose(0, 1)

    hidden = model.model.embed_tokens.weight[list(ids)]
    weights = []
    for layer in model.model.layers:
        own, states = layer.self_attn, normed(layer.input_layernorm, hidden)
        query = rotated(split(states @ own.q_proj.weight.T))
        key = rotated(split(states @ own.k_proj.weight.T)).repeat_interleave(heads // groups, 0)
        value = split(states @ own.v_proj.weight.T).repeat_interleave(heads // groups, 0)
        raw = query @ key.transpose(1, 2) / 8**0.5
        raw = raw.masked_fill(torch.ones(len(ids), len(ids)).triu(1).bool(), -torch.inf)
        weights.append(raw.softmax(-1)[None])
        mixed = (weights[-1][0] @ value).transpose(0, 1).reshape(len(ids), -1)
        hidden = hidden + mixed @ own.o_proj.weight.T
        states, mlp = normed(layer.post_attention_layernorm, hidden), layer.mlp
        gate = states @ mlp.gate_proj.weight.T
        inner = gate * gate.sigmoid() * (states @ mlp.up_proj.weight.T)
        hidden = hidden + inner @ mlp.down_proj.weight.T
    return weights, normed(model.model.norm, hidden) @ model.lm_head.weight.T


@pytest.mark.parametrize("output", ["logit", "logprob"])
@pytest.mark.parametrize("method", METHODS)
def test_a_forward_written_by_hand(method, output):
    model = toy_models.in_float64("llama")
    weights, logits = llama_by_hand(model, [*PROMPT, *TARGET[:-1]])
    options = {"output": output} if method == "chefer" else {}
    found = scores(model, method, **options)
    wanted = before(expected(method, weights, logits, TARGET, output))
    torch.testing.assert_close(found, wanted, equal_nan=True)
    assert found[:, : len(PROMPT)].std() > 0.01


# --- other families: weights are caught where they are made ---------------------------------------


class Softmaxes(TorchFunctionMode):
    """Keeps what a model's own code makes of its scores."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.nn.functional.softmax and result.dim() == 4:
            self.found.append(result)
        return result


WRITTEN_OUT: list[Tensor] = []


def written_out(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention in as many words, its weights kept."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    raw = query @ key.transpose(2, 3) * scaling
    raw = raw if softcap is None else softcap * torch.tanh(raw / softcap)
    raw = torch.exp(torch.where(attention_mask == 0, raw, -torch.inf))
    sink = 0 if s_aux is None else s_aux.view(1, -1, 1, 1).exp()
    weights = raw / (raw.sum(-1, keepdim=True) + sink)
    WRITTEN_OUT.append(weights)
    return (weights @ value).transpose(1, 2), None


AttentionInterface.register("written_out", written_out)
AttentionMaskInterface.register("written_out", eager_mask)


@contextmanager
def catching(model: Any, text: Any, own_code: bool = False) -> Iterator[list[Tensor]]:
    """The weights of all that is run inside.

    Args:
        text: the configuration of the text stack.
        own_code: the model never asks the attention interface.
    """
    WRITTEN_OUT.clear()
    if own_code:
        with Softmaxes() as caught:
            yield caught.found
        return
    implementation = text._attn_implementation
    text._attn_implementation = "written_out"
    try:
        yield WRITTEN_OUT
    finally:
        text._attn_implementation = implementation


@cache
def built(name: str) -> Any:
    return FAMILIES[name].build()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "name", ["mistral", "gemma2", "gpt_oss", "gpt2", "cohere2", "bloom", "gptj", "gpt_neo"]
)
def test_families(name, method):
    model, family = built(name), FAMILIES[name]
    ids = torch.tensor([[*PROMPT, *TARGET[:-1]]])
    with catching(model, model.config, family.own_code) as weights:
        logits = model(ids, use_cache=False).logits[0]
    assert len(weights) == LAYERS
    wanted = before(expected(method, weights, logits, TARGET))
    found, largest = scores(model, method), wanted.nan_to_num().max()
    # transformers' eager attention takes its softmaxes in float32
    torch.testing.assert_close(found / largest, wanted / largest, equal_nan=True)
    assert wanted.isfinite().sum() == found.isfinite().sum() == 3 * len(PROMPT) + 3


def test_windows_and_sinks_show():
    """The cases above are no cases without either."""
    far = scores(built("mistral"), "last_attention")[0]
    assert (far[: len(PROMPT) - 4] == 0).all() and (far[len(PROMPT) - 4 : len(PROMPT)] > 0).all()
    sink = scores(built("gpt_oss"), "last_attention")[0, : len(PROMPT)].sum()
    assert 0.5 < sink < 0.99
    mixed = scores(built("gpt_oss"), "rollout")[0, : len(PROMPT)].sum()
    assert mixed == pytest.approx(1)


# --- pictures, words, several targets -------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_pictures_are_seen_by_the_text_stack(method):
    model: Any
    model, processor = load_shapes_model()
    baseline = Baseline(model, processor, method=method, progress=False)
    prompt = [demo_picture().image, DEMO_PROMPT]
    explanation = baseline.explain(prompt, target=" blue square")
    case = Case.of(model, processor, prompt, explanation)
    inputs, target = case.inputs(0), case.targets[0]
    with catching(model, model.config.get_text_config()) as weights:
        logits = model(**inputs, use_cache=False).logits[0]
    wanted = expected(method, weights, logits, target)
    assert len(target) > 1 and len(weights) == model.config.text_config.num_hidden_layers
    patches = [unit for unit in explanation.units if unit.image is not None]
    assert len(patches) == 144
    for row, own in enumerate(explanation.scores):
        measured = own.isfinite()
        places = [unit.tokens[0] for unit in explanation.units]
        torch.testing.assert_close(own[measured], wanted[row, places].float()[measured])
    assert (explanation.scores[:, :144] > 0).any()


@pytest.mark.parametrize("method", METHODS)
def test_several_targets_and_words(method):
    model, tokenizer = load_demo_model()
    baseline = Baseline(model, tokenizer, method=method, progress=False)
    answers = [" 23 euros", " four weeks", " yes"]
    several = baseline.explain(demo_prompt(), targets=answers)
    alone = [baseline.explain(demo_prompt(), target=answer) for answer in answers]
    words = baseline.explain(demo_prompt(), target=answers[0], granularity="word")
    for k, each in enumerate(alone):
        torch.testing.assert_close(several.branch(k).scores, each.scores, equal_nan=True)
    place = {unit.tokens[0]: index for index, unit in enumerate(alone[0].units)}
    assert any(len(unit.tokens) > 1 for unit in words.units)
    for index, unit in enumerate(words.units):
        if unit.part == "prompt":
            summed = alone[0].scores[:, [place[token] for token in unit.tokens]].sum(1)
            torch.testing.assert_close(words.scores[:, index], summed)


@pytest.mark.parametrize(("method", "backward"), [("chefer", 2), ("rollout", 0)])
def test_costs(method, backward):
    """A forward pass for each target, and a backward one that counts as two for each token."""
    explained = Baseline(toy_models.llama(), method=method, progress=False).explain(
        PROMPT, targets=[[20], [21, 22]]
    )
    looked = 8 + 9  # tokens that the case itself runs to see what the model says
    tokens = looked + 8 * (1 + backward) + 9 * (1 + 2 * backward)
    assert explained.provenance["forwards"] == tokens / len(PROMPT)


# --- the model is left as it was, and refused where it does not answer ----------------------------


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "atman"])
@pytest.mark.parametrize("method", METHODS)
def test_the_model_is_left_as_it_was(method, implementation):
    model = toy_models.llama()
    before = scores(model, method)
    model.set_attn_implementation(implementation)
    model.train()
    model.model.layers[1].eval()
    model.requires_grad_(False)
    model.lm_head.requires_grad_(True)
    modes = [module.training for module in model.modules()]
    with torch.inference_mode():
        found = scores(model, method)
    torch.testing.assert_close(found, before, equal_nan=True)
    assert model.config._attn_implementation == implementation
    assert [module.training for module in model.modules()] == modes
    assert [name for name, own in model.named_parameters() if own.requires_grad] == [
        "lm_head.weight"
    ]
    assert all(own.grad is None for own in model.parameters())
    assert not model.get_input_embeddings()._forward_hooks


def test_parts_of_a_model_get_back_their_own_implementation():
    model: Any
    model, processor = load_shapes_model()
    parts = (model.config, model.config.text_config, model.config.vision_config)
    names = ("eager", "atman", "sdpa")
    for part, name in zip(parts, names, strict=True):
        part._attn_implementation_internal = name
    baseline = Baseline(model, processor, method="chefer", progress=False)
    baseline.explain([demo_picture().image, DEMO_PROMPT], target=" circle")
    assert tuple(part._attn_implementation for part in parts) == names


def test_also_after_an_error():
    model = toy_models.llama()
    model.set_attn_implementation("atman")

    def fail(*_: Any) -> None:
        if model.config._attn_implementation == "eager":
            raise KeyboardInterrupt

    model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        scores(model, "chefer")
    assert model.config._attn_implementation == "atman"
    assert not model.get_input_embeddings()._forward_hooks


def test_half_precision():
    model = toy_models.llama()
    whole = scores(model, "chefer")
    half = scores(model.bfloat16(), "chefer")
    near = torch.corrcoef(torch.stack([whole[0, :8], half[0, :8]]))[0, 1]
    assert near > 0.99


def answering(change: Callable[[Any], Any]) -> Any:
    """A model whose output is changed where it gives attention weights."""
    model: Any = toy_models.llama()
    own = model.forward

    def forward(input_ids: Any = None, logits_to_keep: int = 0, **more: Any) -> Any:
        found = own(input_ids=input_ids, logits_to_keep=logits_to_keep, **more)
        return change(found) if more.get("output_attentions") else found

    model.forward = forward
    return model


def without_weights(found: Any) -> Any:
    found.attentions = None
    return found


def with_one_layer(found: Any) -> Any:
    found.attentions = (found.attentions[0], None)
    return found


def with_fewer_heads(found: Any) -> Any:
    found.attentions = tuple(own[:, :2] for own in found.attentions)
    return found


def with_scores(found: Any) -> Any:
    found.attentions = tuple(own.log() for own in found.attentions)
    return found


def with_copies(found: Any) -> Any:
    found.attentions = tuple(own * 1 for own in found.attentions)
    return found


def with_other_logits(found: Any) -> Any:
    found.logits = found.logits * 1.01
    return found


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without_weights, "LlamaForCausalLM has 2 layers, but gives the attention weights of 0."),
        (with_one_layer, "has 2 layers, but gives the attention weights of 1."),
        (with_fewer_heads, r"of shape \[1, 2, 10, 10\] in layer 0, not \[1, 4, 10, 10\]"),
        (with_scores, "gives no softmax for its attention in layer 0"),
        (with_copies, r"without the attention weights it gives of layer \[0, 1\]"),
        (with_other_logits, r"other log-probabilities with eager attention \(by 0"),
    ],
)
def test_weights_that_are_none_are_refused(change, said):
    with pytest.raises(UnsupportedModelError, match=said):
        scores(answering(change), "chefer")


@pytest.mark.parametrize("method", METHODS)
def test_other_attention_than_the_models_own_is_refused(method):
    """Falcon's eager code adds ALiBi twice."""
    model = FAMILIES["falcon-alibi"].build("sdpa")
    with pytest.raises(UnsupportedModelError, match="FalconForCausalLM gives other log-prob"):
        scores(model, method)


def test_no_gradients_are_refused():
    model = toy_models.llama()
    own = model.model.forward
    model.model.forward = torch.no_grad()(own)
    with pytest.raises(UnsupportedModelError, match="runs without gradients"):
        scores(model, "chefer")
    assert scores(model, "rollout").isfinite().any()


def test_a_manipulated_model_is_refused():
    baseline = Baseline(toy_models.llama(), method="rollout", progress=False)
    with pytest.raises(ValueError, match="leave out controls"):
        baseline.explain(PROMPT, target=TARGET, controls=[atman.TokenControl(2, 0.1)])
