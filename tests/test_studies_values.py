"""Values scaled by hooks, against a forward that says what it does; sums by hand."""

from typing import Any

import pytest
import torch

pytest.importorskip("matplotlib")

from toy_models import llama
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from atman_triton.demo import load_demo_model
from bench.studies import common, values
from bench.studies.values import FACTORS, GAP, PRECISION

IDS, TARGET, UNITS = [5, 6, 7, 8, 9], [20, 21, 22], [(0,), (2, 3), (4,), (5,), (6,)]
_factors = {}


def _attention(module, query, key, value, attention_mask, scaling, **_):
    """Plain attention in which a row of queries may see scaled values: ``[S, S]`` factors."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    weights = (query @ key.transpose(2, 3) * scaling + attention_mask).softmax(-1)
    return ((weights * _factors["now"]) @ value).transpose(1, 2), None


AttentionInterface.register("scaled_by_row", _attention)
AttentionMaskInterface.register("scaled_by_row", eager_mask)


@pytest.mark.parametrize("factor", [0.0, 0.3])
@pytest.mark.parametrize("effect", ["exact", "direct"])
def test_values_are_scaled_as_said(monkeypatch, effect, factor):
    monkeypatch.setattr(values, "_ROWS", 2)  # several batches
    model = llama()
    found = values.suppressed(model, IDS, TARGET, UNITS, factor, effect)
    model.set_attn_implementation("scaled_by_row")
    read = [*IDS, *TARGET[:-1]]
    for own, unit in zip(found, UNITS, strict=True):
        factors = torch.ones(len(read), len(read))
        factors[len(IDS) - 1 if effect == "direct" else 0 :, list(unit)] = factor
        _factors["now"] = factors
        with torch.no_grad():
            logits = model(torch.tensor([read]), use_cache=False).logits[0, -len(TARGET) :]
        wanted = logits.log_softmax(-1)[torch.arange(len(TARGET)), torch.tensor(TARGET)]
        torch.testing.assert_close(own, wanted)


def test_factor_one_changes_nothing_and_hooks_are_gone():
    model: Any = llama()
    with torch.no_grad():
        logits = model(torch.tensor([[*IDS, *TARGET[:-1]]])).logits[0, -len(TARGET) :]
    wanted = logits.log_softmax(-1)[torch.arange(len(TARGET)), torch.tensor(TARGET)]
    for effect in values.EFFECTS:
        found = values.suppressed(model, IDS, TARGET, UNITS, 1.0, effect)
        torch.testing.assert_close(found, wanted.expand_as(found))
    assert all(not layer.self_attn.v_proj._forward_hooks for layer in model.model.layers)


def test_what_is_not_read_stays_unmeasured():
    model, tokenizer = load_demo_model()
    (case,) = common.documents(model, tokenizer, 1)
    like = common.explain(model, tokenizer, case, method="direct")
    found = values.by_values(model, tokenizer, case, like, 0.1, "direct")
    assert torch.equal(found.scores.isnan(), like.scores.isnan())
    assert found.units == like.units and torch.equal(found.base_logprobs, like.base_logprobs)
    assert not torch.equal(found.scores, like.scores)
    assert common.label_precision(found, case) > 0.5


def test_differences_by_hand():
    def document(gap):
        found = {
            values._key(kind, factor, effect): {GAP: 1.0, PRECISION: 0.5}
            for kind in (*values.MODES, values.VALUES)
            for factor in FACTORS
            for effect in values.EFFECTS
        }
        found[values._key("values", 0.1, "exact")] = {GAP: gap, PRECISION: 0.75}
        return found

    rows = values.rows_of([document(4.0), document(0.0)])
    what = "values less min_shift, factor 0.1"
    gap, precision = common.pick(rows, part="difference", what=what, method="exact")
    assert (gap.measure, gap.value, gap.count) == (GAP, 1.0, 2)
    assert (precision.value, precision.low, precision.high) == (0.25, 0.25, 0.25)
    others = common.pick(rows, part="difference", method="direct")
    assert [each.value for each in others] == [0.0] * 4


def test_a_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(values, "EFFECTS", ("direct",))
    values.main(["--documents", "2", "--out", str(tmp_path)])
    said = capsys.readouterr().out
    assert "values less min_shift, factor 0.1, direct: removal gap" in said
    assert (tmp_path / "studies-values.csv").exists()
    assert (tmp_path / "studies-values.png").stat().st_size > 20_000
