"""Randomised weights: what is replaced, what is compared, and a run in small."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("captum")
pytest.importorskip("matplotlib")

from atman_triton.demo import load_demo_model
from atman_triton.pieces import Unit
from bench.studies import common, sanity
from bench.studies.common import Labelled


@pytest.fixture(scope="module")
def demo():
    return load_demo_model()


def test_layers_are_replaced_from_the_last_one_up(demo):
    model, tokenizer = demo
    kept = {name: weight.clone() for name, weight in model.named_parameters()}
    found = sanity.randomised(model, tokenizer)
    assert list(found) == [
        *("layer 3", "layers 2 to 3", "layers 1 to 3", "layers 0 to 3", "all", "all, shuffled")
    ]
    for first, changed in zip((3, 2, 1, 0), found.values(), strict=False):
        for name, weight in changed.named_parameters():
            replaced = ".layers." in name and int(name.split(".")[2]) >= first
            norm = "layernorm" in name  # which begins as ones, and may have stayed there
            assert torch.equal(weight, kept[name]) != replaced or norm, name
    assert all(torch.equal(weight, kept[name]) for name, weight in model.named_parameters())
    for name, weight in found["all, shuffled"].named_parameters():
        assert torch.equal(weight.flatten().sort()[0], kept[name].flatten().sort()[0])
        assert torch.equal(weight, kept[name]) == (weight.dim() == 1)
    embedded = found["all"].model.embed_tokens.weight
    assert not torch.equal(embedded, kept["model.embed_tokens.weight"])


def test_comparisons_by_hand():
    case = Labelled("One two.", "Which?", " four", ((0, 8),), (0,))
    pieces = ("One", " two.", " Q:", " Which?", " A:", " four")
    units, start = [], 0
    for number, piece in enumerate(pieces):
        part = "target" if number == 5 else "prompt"
        units.append(Unit(piece, (number,), start, start + len(piece), part))
        start += len(piece)

    def explained(*relevance):
        return SimpleNamespace(units=units, relevance=torch.tensor(relevance))

    before = explained(1.0, 2.0, 3.0, 4.0, 5.0, 9.0)
    same = sanity.compare(before, explained(2.0, 4.0, 6.0, 8.0, 10.0, 0.0), case)
    assert same == {"rank correlation": 1, "in document": 1, "top 5": 1, "precision": 1}
    turned = sanity.compare(before, explained(5.0, 4.0, 3.0, 2.0, 1.0, 9.0), case)
    assert turned["rank correlation"] == turned["in document"] == -1


def test_chance_is_drawn_anew(demo):
    model, tokenizer = demo
    (case,) = common.documents(model, tokenizer, 1)
    first, second = (sanity.explain(model, tokenizer, case, "random", seed) for seed in (0, 1))
    assert sanity.compare(first, first, case)["rank correlation"] == pytest.approx(1)
    assert abs(sanity.compare(first, second, case)["rank correlation"]) < 0.5


def test_a_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sanity, "METHODS", ("direct", "chefer", "random"))
    monkeypatch.setattr(sanity, "_COLOURS", ("blue", "red", "grey"))
    sanity.main(["--documents", "2", "--out", str(tmp_path)])
    said = capsys.readouterr().out
    assert "layers 2 to 3" in said and "all, shuffled, top 5: above chance" in said
    assert (tmp_path / "studies-sanity.csv").exists()
    assert (tmp_path / "studies-sanity.png").stat().st_size > 20_000
