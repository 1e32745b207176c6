"""Tiny random models of every family that is proven, and an eager reference for each.

Widths are small, but nothing is idle: windows are shorter than the text, soft caps bite, sinks are
not zero, and weights are large enough for a manipulation to show.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import transformers as tf
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

VOCAB, HIDDEN, HEADS, LAYERS, WINDOW = 101, 32, 2, 2, 4
_IDS = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SIZE = {
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 64,
} | _IDS
_GROUPED = _SIZE | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
_SLIDING = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}


@dataclass(frozen=True)
class Family:
    """How to build a tiny model, and by which code of its own it computes attention."""

    name: str
    make: Callable[[], Any]
    own: str = "eager"  # implementation that is the reference for plain attention
    own_code: bool = False  # never asks the attention interface
    post_scale: float = 1.0  # by which its own code multiplies raw products later
    rounding: float = 1e-9  # of a float64 model; more where part of its own code is float32

    def build(self, implementation: str | None = None) -> Any:
        """The model with its weights drawn, in eval mode; float64 unless its own code is fp32."""
        torch.manual_seed(7)
        config, model_class = self.make()
        config._attn_implementation = implementation or self.own
        config._experts_implementation = "eager"  # the grouped product has no float64
        model = model_class(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0.0, 0.25)
                elif name.endswith(("bias", "sinks")):
                    parameter.normal_(0.0, 0.5)
        model = model.eval()
        return model.float() if self.own_code else model.double()


def _bloom() -> Any:
    sizes = {"hidden_size": HIDDEN, "n_layer": LAYERS, "n_head": HEADS}
    return tf.BloomConfig(**_IDS, **sizes), tf.BloomForCausalLM


def _cohere2() -> Any:
    return tf.Cohere2Config(**_GROUPED, **_SLIDING), tf.Cohere2ForCausalLM


def _deepseek_v3() -> Any:
    config = tf.DeepseekV3Config(
        **_SIZE,
        num_key_value_heads=HEADS,
        moe_intermediate_size=16,
        n_routed_experts=4,
        n_shared_experts=1,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=16,
    )
    return config, tf.DeepseekV3ForCausalLM


def _falcon(**kind: Any) -> Callable[[], Any]:
    sizes = {k: v for k, v in _SIZE.items() if k != "intermediate_size"}
    if kind.get("new_decoder_architecture"):
        sizes |= {"num_attention_heads": 4, "num_kv_heads": 2, "hidden_size": 64}
    return lambda: (tf.FalconConfig(**sizes, **kind), tf.FalconForCausalLM)


def _gemma2() -> Any:
    config = tf.Gemma2Config(
        **_GROUPED, **_SLIDING, attn_logit_softcapping=1.5, query_pre_attn_scalar=16
    )
    return config, tf.Gemma2ForCausalLM


def _gemma3() -> Any:
    config = tf.Gemma3TextConfig(**_GROUPED, **_SLIDING, query_pre_attn_scalar=16)
    return config, tf.Gemma3ForCausalLM


def _glm4() -> Any:
    return tf.Glm4Config(**_GROUPED), tf.Glm4ForCausalLM


def _gpt2() -> Any:
    sizes = {"n_embd": HIDDEN, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 64}
    config = tf.GPT2Config(**_IDS, **sizes, scale_attn_by_inverse_layer_idx=True)
    return config, tf.GPT2LMHeadModel


def _gpt_neo() -> Any:
    config = tf.GPTNeoConfig(
        **_IDS,
        hidden_size=HIDDEN,
        num_layers=LAYERS,
        num_heads=HEADS,
        attention_types=[[["global", "local"], LAYERS // 2]],
        window_size=WINDOW,
        max_position_embeddings=64,
    )
    return config, tf.GPTNeoForCausalLM


def _gpt_neox() -> Any:
    return tf.GPTNeoXConfig(**_SIZE), tf.GPTNeoXForCausalLM


def _gpt_oss() -> Any:
    config = tf.GptOssConfig(**_GROUPED, **_SLIDING, num_local_experts=4, num_experts_per_tok=2)
    return config, tf.GptOssForCausalLM


def _gptj() -> Any:
    sizes = {"n_embd": HIDDEN, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 64}
    return tf.GPTJConfig(**_IDS, **sizes, rotary_dim=8), tf.GPTJForCausalLM


def _mixtral() -> Any:
    config = tf.MixtralConfig(**_GROUPED, num_local_experts=4, num_experts_per_tok=2)
    return config, tf.MixtralForCausalLM


def _opt() -> Any:
    config = tf.OPTConfig(
        **_IDS,
        hidden_size=HIDDEN,
        ffn_dim=48,
        word_embed_proj_dim=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=64,
    )
    return config, tf.OPTForCausalLM


def _smollm3() -> Any:
    return tf.SmolLM3Config(**_GROUPED, no_rope_layers=[1, 0]), tf.SmolLM3ForCausalLM


def _grouped(name: str, **more: Any) -> Callable[[], Any]:
    config_class, model_class = getattr(tf, f"{name}Config"), getattr(tf, f"{name}ForCausalLM")
    return lambda: (config_class(**_GROUPED, **more), model_class)


_ROOT = (HIDDEN // HEADS) ** -0.5

FAMILIES = {
    family.name: family
    for family in (
        Family("llama", _grouped("Llama")),
        Family("mistral", _grouped("Mistral", sliding_window=WINDOW)),
        Family("qwen2", _grouped("Qwen2")),
        Family("qwen3", _grouped("Qwen3")),
        Family("gemma2", _gemma2),
        Family("gemma3", _gemma3),
        Family("phi3", _grouped("Phi3", sliding_window=WINDOW)),
        Family("gpt2", _gpt2),
        Family("gpt_neox", _gpt_neox),
        Family("gptj", _gptj, own_code=True, post_scale=_ROOT, rounding=1e-4),
        Family("gpt_neo", _gpt_neo, own_code=True, rounding=1e-4),
        Family("opt", _opt),
        Family("bloom", _bloom, own_code=True, rounding=1e-4),
        # Its eager code adds ALiBi twice, once with the mask; the default, sdpa, does not.
        Family(
            "falcon-alibi",
            _falcon(alibi=True, multi_query=False, new_decoder_architecture=False),
            own="sdpa",
            own_code=True,
            rounding=1e-4,
        ),
        Family(
            "falcon-multi-query",
            _falcon(alibi=False, multi_query=True, new_decoder_architecture=False),
            own_code=True,
            post_scale=_ROOT,
            rounding=1e-4,
        ),
        Family(
            "falcon-new",
            _falcon(alibi=False, new_decoder_architecture=True),
            own_code=True,
            post_scale=_ROOT,
            rounding=1e-4,
        ),
        Family("mixtral", _mixtral),
        Family("gpt_oss", _gpt_oss),
        Family("deepseek_v3", _deepseek_v3, rounding=1e-5),
        Family("olmo2", _grouped("Olmo2")),
        Family("cohere2", _cohere2),
        Family("smollm3", _smollm3),
        Family("glm4", _glm4),
    )
}


# --- the reference: eager attention with the modifier matrix -------------------------------------


def modify(
    scores: Tensor, visible: Tensor, factor: Tensor | None, mode: str, first_row: int = 0
) -> Tensor:
    """Apply the s × s modifier matrix to ``[B, H, T, T]``: 1 above ``first_row``, then factors."""
    if factor is None:
        return scores
    matrix = factor.to(scores.dtype)[:, None, None, :].repeat(1, 1, scores.shape[2], 1)
    matrix[:, :, :first_row] = 1.0
    matrix = matrix.expand_as(scores)
    if mode == "multiplicative":
        return matrix * scores
    if mode == "log_additive":
        return scores + matrix.log()
    hidden_high = torch.where(visible, scores, torch.inf)
    minimum = hidden_high.amin(-1, keepdim=True)
    minimum = torch.where(minimum.isinf(), 0.0, minimum)
    return minimum + matrix * (scores - minimum)


_PLAIN: dict[str, Any] = {"factor": None, "mode": "multiplicative", "first_row": 0}
_MODIFIER = dict(_PLAIN)


def _modified_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    visible = attention_mask == 0
    scores = modify(scores, visible, **_MODIFIER)
    scores = torch.where(visible, scores, -torch.inf)
    if s_aux is not None:
        sinks = s_aux.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sinks], -1)
    weights = scores.softmax(-1).nan_to_num(0.0)[..., : key.shape[2]]
    return (weights @ value).transpose(1, 2), None


AttentionInterface.register("eager_modifier", _modified_attention)
AttentionMaskInterface.register("eager_modifier", eager_mask)


class _OwnCodeModifier(TorchFunctionMode):
    """Puts the modifier matrix between a family's own product of queries and keys and the rest."""

    def __init__(self, family: Family, factor: Tensor | None, mode: str, first_row: int) -> None:
        super().__init__()
        self.family, self.how = family, (factor, mode, first_row)
        self.visible: Tensor | None = None  # set while scores are awaited

    def watch(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        mask = kwargs["attention_mask"]
        self.visible = mask > torch.finfo(mask.dtype).min / 2
        if getattr(module, "attention_type", None) == "local":
            tokens = mask.shape[-1]
            distance = torch.arange(tokens)[:, None] - torch.arange(tokens)[None]
            self.visible = self.visible & (distance < WINDOW)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        visible = self.visible
        if visible is None:
            return func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            self.visible = None
            query, key, value = args
            scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
            scores = modify(scores, visible, *self.how) + kwargs["attn_mask"]
            return scores.softmax(-1) @ value
        if func is Tensor.baddbmm:
            self.visible = None
            bias, product = args[0], kwargs["batch1"] @ kwargs["batch2"] * kwargs["alpha"]
            scores = product.view(visible.shape[0], -1, *product.shape[1:])
            return modify(scores, visible, *self.how).view_as(product) + bias
        result = func(*args, **kwargs)
        if func in (torch.matmul, Tensor.matmul, Tensor.__matmul__) and result.dim() == 4:
            self.visible = None
            scaled = modify(result * self.family.post_scale, visible, *self.how)
            return scaled / self.family.post_scale
        return result


_OWN_ATTENTION = ("GPTJAttention", "GPTNeoSelfAttention", "BloomAttention", "FalconAttention")


@contextmanager
def eager_reference(
    family: Family,
    model: Any,
    factor: Tensor | None,
    mode: str = "multiplicative",
    first_row: int = 0,
) -> Iterator[None]:
    """Run ``model`` eagerly with the modifier matrix, without any code of ours.

    The matrix is 1 in the rows before ``first_row``: what only later queries feel.
    """
    if family.own_code:
        modifier = _OwnCodeModifier(family, factor, mode, first_row)
        layers = [m for m in model.modules() if type(m).__name__ in _OWN_ATTENTION]
        assert len(layers) == LAYERS
        hooks = [m.register_forward_pre_hook(modifier.watch, with_kwargs=True) for m in layers]
        try:
            with modifier:
                yield
        finally:
            for hook in hooks:
                hook.remove()
        return
    before = model.config._attn_implementation
    model.set_attn_implementation("eager_modifier")
    _MODIFIER.update(factor=factor, mode=mode, first_row=first_row)
    try:
        yield
    finally:
        _MODIFIER.update(_PLAIN)
        model.set_attn_implementation(before)


@torch.no_grad()
def eager_logprobs(
    family: Family,
    model: Any,
    inputs: dict[str, Tensor],
    target: Sequence[int],
    columns: Sequence[Sequence[int]],
    factor: float,
    mode: str,
    effect: str = "total",
) -> Tensor:
    """Log-probabilities ``[U, T]`` of a target, one row of a plain batch per perturbation.

    Args:
        inputs: of the prompt, ``[1, P]``: input_ids, perhaps attention_mask and position_ids.
        columns: which tokens of the prompt and target each perturbation suppresses.
        effect: ``total`` suppresses in every row, ``direct`` in those that predict the target.
    """
    ids = inputs["input_ids"]
    prompt = ids.shape[1]
    read = torch.tensor([target[:-1]], dtype=torch.long)
    text = {"input_ids": torch.cat([ids, read], 1)}
    if "attention_mask" in inputs:
        text["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones_like(read)], 1)
    if "position_ids" in inputs:
        given = inputs["position_ids"]
        steps = torch.arange(1, len(target))[None]
        text["position_ids"] = torch.cat([given, given[:, -1:] + steps], 1)
    factors = torch.ones(len(columns), prompt + len(target) - 1)
    for row, suppressed in zip(factors, columns, strict=True):
        row[list(suppressed)] = factor
    batch = {name: value.expand(len(columns), -1) for name, value in text.items()}
    with eager_reference(family, model, factors, mode, prompt - 1 if effect == "direct" else 0):
        logits = model(**batch, use_cache=False).logits[:, prompt - 1 :]
    return logits.log_softmax(-1)[:, torch.arange(len(target)), list(target)]
