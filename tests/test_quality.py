"""The benchmark of quality in small: its metrics by hand, and what it promises of the methods."""

import csv
import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("pandas")

from atman_triton.demo import load_demo_model
from bench import quality, removal


class Counting:
    """Gives token 1 the logit that is the number of 1s in the input, and token 0 none."""

    def __call__(self, ids, logits_to_keep, use_cache):
        ones = (ids == 1).sum(1).float()
        logits = torch.stack([torch.zeros_like(ones), ones], -1)
        return SimpleNamespace(logits=logits[:, None].expand(-1, logits_to_keep, -1))


def _loss(ones):
    return math.log1p(math.exp(-ones))


def test_removal_gap_by_hand():
    ids, positions = [1, 0, 1, 0], [0, 1, 2, 3]
    orders = [[0, 2, 1, 3], [3, 0, 1, 2], [1, 0, 2, 3]]
    gaps = removal.removal_gaps(Counting(), ids, [1], positions, orders)
    gap = _loss(1) - _loss(2)
    assert gaps == pytest.approx([gap, -gap, 0], abs=1e-6)
    rises = removal.leave_one_out(Counting(), ids, [1], positions)
    assert rises == pytest.approx([gap, 0, gap, 0], abs=1e-6)


def test_tenth_of_the_units_is_removed():
    assert [removal.removed_count(units) for units in (3, 10, 26, 104)] == [1, 1, 3, 10]


def test_ties_follow_the_permutation():
    assert removal.ranking([1.0, 2.0, 1.0, 1.0], [3, 0, 1, 2]) == [1, 3, 0, 2]
    assert removal.rank_correlation([1, 1, 2], [1, 2, 3]) == pytest.approx(math.sqrt(3) / 2)


def test_small_run(tmp_path, monkeypatch):
    monkeypatch.setitem(quality.EXPLAINED, "hybrid 1.0", ("hybrid", 1.0))
    model, tokenizer = load_demo_model()
    cases = removal.answered_cases(model, tokenizer, 8)
    methods = ("exact", "direct", "hybrid 1.0", "hierarchical", "leave-one-out", "random")
    found = [quality.examine(model, tokenizer, case, methods, n) for n, case in enumerate(cases)]
    for each in found:
        assert each["hierarchical"].runs_share <= 0.25
        assert each["hybrid 1.0"].gap == each["exact"].gap
        assert each["hybrid 1.0"].top5_recall == each["exact"].top5_as_tokens == 1
        assert each["leave-one-out"].rank_correlation == pytest.approx(1)
    quality.write(quality.summarise("small", found), tmp_path / "quality.csv")
    with (tmp_path / "quality.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == list(methods)
    assert list(rows[0]) == [field.name for field in dataclasses.fields(quality.Row)]
    assert all(value not in ("", "nan") for row in rows for value in row.values())
    quality.draw(quality.summarise("small", found), tmp_path / "quality.png")
    assert (tmp_path / "quality.png").stat().st_size > 10_000
