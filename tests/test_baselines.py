"""Baselines as users meet them: the same question as an explainer, results that can be used.

Legend: U units, M scored tokens.
"""

from __future__ import annotations

import importlib

import pytest
import torch
from PIL import Image
from seq2seq_models import t5
from test_baselines_case import assert_close
from test_multimodal import SMALL
from toy_images import seeing
from toy_models import in_float64, llama
from toy_tokenizers import byte_level
from transformers import LlamaConfig, LlamaForSequenceClassification

from atman_triton import Explainer, Explanation, load
from atman_triton.baselines import BASELINES, Baseline, Case, ablation
from atman_triton.perturbations import RunFailed
from atman_triton.stacks import UnsupportedModelError

QUICK = ("leave_one_out", "occlusion", "lime", "kernel_shap", "context_cite", "random")
TEXT = "The pay per hour is"


def baseline(method="leave_one_out", model=None, **settings):
    settings = {"progress": False} | settings
    return Baseline(model or in_float64("llama"), byte_level(), method=method, **settings)


@pytest.mark.parametrize("method", BASELINES)
def test_every_name_has_a_function_and_a_source(method):
    own = BASELINES[method]
    assert callable(own.load()) and own.source and own.of
    module = importlib.import_module(f"atman_triton.baselines.{own.module}")
    assert own.load() is getattr(module, own.function)


@pytest.mark.parametrize("method", QUICK)
def test_results_are_those_of_an_explainer_but_for_scores(method, tmp_path, capsys):
    settings = {"budget": 24} if method in ("lime", "kernel_shap", "context_cite") else {}
    found = baseline(method, **settings).explain(TEXT, " 23 euros", "word")
    explained = Explainer(in_float64("llama"), byte_level(), progress=False).explain(
        TEXT, " 23 euros", "word"
    )
    assert isinstance(found, Explanation)
    assert found.text == explained.text and found.method == method
    assert found.targets == explained.targets and found.left_out == explained.left_out
    assert [u.tokens for u in found.units] == [u.tokens for u in explained.units]
    assert {u.effect for u in found.units} == {"baseline"} == {found.effect}
    assert_close(found.base_logprobs, explained.base_logprobs)
    prompt = [u for u, unit in enumerate(found.units) if unit.part == "prompt"]
    assert bool(found.scores[:, prompt].isfinite().all())
    later = [u for u in range(len(found.units)) if u not in prompt]
    assert later  # units of the target, some without any score
    if method not in ("occlusion", "random"):
        assert bool(found.scores[:, later].isnan().all())
    found.save(tmp_path / "found.json")
    assert load(tmp_path / "found.json") == found
    found.show()
    assert "The pay" in capsys.readouterr().out.replace("\n", " ")
    found.plot(tmp_path / "found.png")
    with Image.open(tmp_path / "found.png") as drawn:
        assert drawn.width > 100
    assert method in found.to_html()
    assert len(found.to_dataframe()) == len(found.units)


def test_scores_are_what_the_method_gives():
    found = baseline("leave_one_out").explain(TEXT, targets=[" 23", " four weeks"])
    case = Case.of(in_float64("llama"), byte_level(), TEXT, found)
    scores = ablation.leave_one_out(case, baseline().options)
    # kept as base - score in float32
    step = torch.finfo(torch.float32).eps * float(case.base_logprobs.abs().max()) * 4
    torch.testing.assert_close(
        found.scores.T.nan_to_num(7.0), scores.float().nan_to_num(7.0), rtol=0, atol=step
    )


def test_what_was_done_is_written_down():
    found = baseline("lime", budget=24, seed=3).explain(TEXT, " 23")
    facts = found.provenance
    assert facts["method"] == "lime" and facts["source"] == "Ribeiro et al. 2016"
    assert facts["effect"] == "a baseline, made of removed units"
    assert (facts["budget"], facts["seed"]) == (24, 3) and "steps" not in facts
    assert 2 < facts["forwards"] <= 25
    assert baseline("random").explain(TEXT, " 23").provenance["forwards"] == 1.0


def test_pictures_and_generated_answers():
    model, processor = seeing("llava")
    found = Baseline(model, processor, method="occlusion", progress=False).explain(
        [SMALL, "a picture of"], max_new_tokens=2, image_granularity="2x2"
    )
    tiles = [unit for unit in found.units if unit.image == 0]
    assert {unit.level for unit in tiles} == {"tile"} and len(found.targets) == 2
    assert bool(found.relevance[: len(tiles)].isfinite().all())


def test_the_same_passage_and_reading_can_be_asked_for():
    found = baseline("random", seed=1).explain(
        TEXT, " 23", explain_only="per hour", reduction="sum", postprocessing="absolute"
    )
    assert found.reduction == "sum" and found.postprocessing == "absolute"
    assert "".join(unit.text for unit in found.units).strip() == "per hour"


# --- what is refused ------------------------------------------------------------------------------


def _classifier():
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    return LlamaForSequenceClassification(config)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (t5, "T5ForConditionalGeneration"),
        (lambda: seeing("mllama")[0], "MllamaForConditionalGeneration"),
        (_classifier, "LlamaForSequenceClassification"),
    ],
    ids=["encoder-decoder", "beside", "classifier"],
)
def test_other_kinds_of_models_are_refused_by_name(make, name):
    with pytest.raises(UnsupportedModelError, match=rf"decoders alone.*got {name}; atman_triton"):
        Baseline(make(), method="random")


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"method": "saliency"}, ValueError, "method must be one of input_x_gradient, "),
        ({"method": "lime", "budget": 1}, ValueError, "budget must be at least 2, got 1"),
        ({"method": "lime", "budget": 2.5}, TypeError, "budget must be an int, got 2.5"),
        ({"method": "lime", "budget": True}, TypeError, "budget must be an int, got True"),
        ({"method": "lime", "seed": -1}, ValueError, "seed must be at least 0, got -1"),
        ({"method": "random", "budget": 9}, ValueError, "budget is for lime, kernel_shap, "),
        ({"method": "lime", "steps": 3}, ValueError, "steps is for integrated_gradients, but"),
        (
            {"method": "integrated_gradients", "steps": 0},
            ValueError,
            "steps must be at least 1, got 0",
        ),
        ({"method": "grad_cam", "layer": 2}, ValueError, r"layer must lie in \[-1, 1\], got 2"),
        ({"method": "grad_cam", "layer": -2}, ValueError, r"layer must lie in \[-1, 1\], got -2"),
        (
            {"method": "grad_cam", "output": "odds"},
            ValueError,
            "output must be one of logprob, logit, got 'odds'",
        ),
        ({"method": "occlusion", "output": "logit"}, ValueError, "output is for input_x_gradient,"),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_wrong_settings_are_named(settings, error, message):
    with pytest.raises(error, match=message):
        Baseline(llama(), **settings)


def test_scores_that_are_no_numbers_are_refused(monkeypatch):
    def broken(case, options):
        scores = torch.zeros(case.measured.shape, dtype=torch.float64)
        scores[1] = torch.inf
        return scores

    monkeypatch.setattr(ablation, "leave_one_out", broken)
    with pytest.raises(RunFailed, match=r"leave_one_out gives .* no finite score.*in float64"):
        baseline().explain(TEXT, " 23")
