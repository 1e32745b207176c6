"""Suppression in some layers and heads only: where, and what is said of it."""

import math

import pytest

pytest.importorskip("matplotlib")

from atman_triton.demo import load_demo_model
from bench.studies import common, layers, slowly
from bench.studies.layers import DIFFERENCE, GAP, LARGEST, PRECISION


def test_every_place_is_tried_once():
    found = layers.layer_settings(4)
    assert list(found) == [
        *("only 0", "only 1", "only 2", "only 3", "from 1", "up to 1", "from 2", "up to 2", "all")
    ]
    assert found["from 2"] == {"layers": [2, 3]} and found["up to 2"] == {"layers": [0, 1, 2]}
    assert found["all"] == {}
    places = [tuple(each.get("layers", range(4))) for each in found.values()]
    assert len(set(places)) == len(places)
    heads = layers.head_settings(2, 3)
    assert len(heads) == 2 * 3 + 3
    assert heads["layer 1, head 2"] == {"layers": [1], "heads": [2]}
    assert heads["head 2"] == {"heads": [2]}


def test_exact_explanations_may_be_of_the_first_documents_alone():
    assert slowly.methods(("direct", "exact"), 2, 3) == ("direct", "exact")
    assert list(slowly.methods(("direct", "exact", "rollout"), 3, 3)) == ["direct", "rollout"]
    assert slowly.methods(("direct", "exact"), 99, None) == ("direct", "exact")
    with pytest.raises(ValueError, match="exact_documents must be at least 1, got 0"):
        slowly.methods(("exact",), 0, 0)
    found = [{"a": {"gap": 1.0}, "b": {"gap": 2.0}}, {"a": {"gap": 3.0}}]
    assert slowly.measured(found, "a", "gap") == [1.0, 3.0]
    first, second = slowly.measured(found, "b", "gap")
    assert first == 2.0 and math.isnan(second)


def document(gap, others):
    keys = [("layers", what, method) for what in ("only 0", "all") for method in layers.METHODS]
    keys.append(("heads", "head 0", "direct"))
    found = {key: {GAP: others, PRECISION: 0.5, LARGEST: 1.0} for key in keys}
    found["layers", "only 0", "direct"] = {GAP: gap, PRECISION: 1.0, LARGEST: 2.0}
    return found


def test_places_are_chosen_on_one_half_and_reported_on_the_other():
    several = [document(1.0, 2.0), document(9.0, 2.0), document(3.0, 4.0), document(9.0, 2.0)]
    rows = layers.chosen_rows(several)  # documents 1 and 3 choose
    (difference,) = common.pick(rows, what="layers: only 0", method="direct", measure=DIFFERENCE)
    assert (difference.value, difference.count) == (-1.0, 2)
    (gap,) = common.pick(rows, what="layers: only 0", method="direct", measure=GAP)
    assert gap.value == 2.0
    assert layers.verdicts(rows)[0].startswith("layers: only 0, direct: chosen on half")


@pytest.fixture
def quick(monkeypatch):
    """Without the exact method, which takes as long as all else."""
    monkeypatch.setattr(layers, "METHODS", ("direct",))


@pytest.mark.usefixtures("quick")
def test_a_run(tmp_path, capsys):
    layers.main(["--documents", "2", "--out", str(tmp_path)])
    said = capsys.readouterr().out
    assert "only 2" in said and "layer 2, head 1" in said and "chosen on half" in said
    assert (tmp_path / "studies-layers.csv").exists()
    assert (tmp_path / "studies-layers.png").stat().st_size > 20_000


@pytest.mark.usefixtures("quick")
def test_one_document_by_hand():
    model, tokenizer = load_demo_model()
    (case,) = common.documents(model, tokenizer, 1)
    found = layers.examine(model, tokenizer, case, 0)
    own = common.explain(model, tokenizer, case, method="direct", layers=[2])
    assert found["layers", "only 2", "direct"][LARGEST] == pytest.approx(
        max(own.relevance.tolist()), abs=1e-6
    )
    assert found["layers", "only 2", "direct"][PRECISION] == pytest.approx(
        common.label_precision(own, case), abs=1e-4
    )
    nothing = found["layers", "only 0", "direct"]
    assert nothing[LARGEST] < 1e-5 and math.isnan(nothing[PRECISION])
    words = found["layers", "", "random"][PRECISION]
    assert 0.02 < words < 0.4  # of a dozen sentences one
