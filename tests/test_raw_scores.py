"""The share of negative raw scores, against scores that an eager attention writes down."""

import pytest
import torch
from toy_models import MODELS
from toy_tokenizers import sentencepiece
from transformers import AttentionInterface, AttentionMaskInterface, GPTJConfig, GPTJForCausalLM
from transformers.masking_utils import eager_mask

from atman_triton import raw_scores
from atman_triton.engine import undisturbed
from atman_triton.explain import Explainer
from atman_triton.masks import AttentionMask
from atman_triton.raw_scores import count_negative, negative_share

INPUTS = {"input_ids": torch.arange(3, 17)[None]}
written = []


def _writing_attention(module, query, key, value, attention_mask, scaling, softcap=None, **_):
    groups = query.shape[1] // key.shape[1]
    key, value = (part.repeat_interleave(groups, dim=1) for part in (key, value))
    scores = query @ key.transpose(2, 3) * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    written.append((scores, (attention_mask == 0).expand_as(scores)))
    return (torch.softmax(scores + attention_mask, -1) @ value).transpose(1, 2), None


AttentionInterface.register("writing_eager", _writing_attention)
AttentionMaskInterface.register("writing_eager", eager_mask)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("layers", [None, [1]])
@pytest.mark.parametrize("heads", [None, [0, 3]])
def test_share_is_that_of_the_scores_themselves(monkeypatch, name, layers, heads):
    monkeypatch.setattr(raw_scores, "_ROWS_PER_BLOCK", 4)
    model = MODELS[name]()
    with undisturbed(model):
        share = negative_share(model, INPUTS, layers, heads)
        before = model.config._attn_implementation
        model.set_attn_implementation("writing_eager")
        written.clear()
        model(**INPUTS, use_cache=False)
        model.set_attn_implementation(before)
    chosen = [written[layer] for layer in layers or range(2)]
    negative = sum(int((s < 0).logical_and(v)[:, heads or range(4)].sum()) for s, v in chosen)
    visible = sum(int(v[:, heads or range(4)].sum()) for _, v in chosen)
    assert share == negative / visible
    assert 0.1 < share < 0.9


def test_padding_and_dense_masks():
    query, key = torch.ones(1, 2, 3, 4), torch.ones(1, 1, 3, 4)
    key[:, :, 1] = -1.0
    padding = AttentionMask(3, 0, 0, causal=True, padding=torch.tensor([[False, True, True]]))
    assert count_negative(query, key, padding) == (2 * 2, 2 * 3)
    dense = AttentionMask(3, 0, 0, dense=torch.eye(3, dtype=torch.bool)[None, None])
    assert count_negative(query, key, dense) == (2, 2 * 3)
    window = AttentionMask(3, 0, 0, causal=True, window=1)
    assert count_negative(query, key, window) == (2, 2 * 3)


def test_models_with_adapters_are_counted_too():
    config = GPTJConfig(
        vocab_size=60, n_embd=16, n_layer=2, n_head=2, rotary_dim=4, bos_token_id=0, eos_token_id=0
    )
    model = GPTJForCausalLM(config).eval()
    with undisturbed(model):
        assert 0 < negative_share(model, INPUTS) < 1


def test_it_is_told_with_a_multiplicative_explanation_only():
    model, tokenizer = MODELS["llama"](), sentencepiece()
    told = Explainer(model, tokenizer, preset="paper").explain("The pay is", "23").provenance
    assert 0 < told["negative_scores"] < 1
    silent = Explainer(model, tokenizer).explain("The pay is", "23").provenance
    assert "negative_scores" not in silent
