"""What layers have in common is made once per pass, and anew where anything has changed."""

from __future__ import annotations

import threading
from typing import Literal

import pytest
import torch
from toy_models import llama

from atman_triton import layers, manipulate
from atman_triton.engine import Engine, Settings, Unit, undisturbed
from atman_triton.kernels.once import Once, kept_in, made_once
from atman_triton.testing import count_launches


class Counted:
    """Sums a tensor, and counts how often."""

    def __init__(self) -> None:
        self.times = 0

    def of(self, tensor: torch.Tensor, kind: str = "sum") -> float:
        def make() -> float:
            self.times += 1
            return float(tensor.sum())

        return made_once(kind, tensor, make)


def test_the_same_view_of_unchanged_memory_is_read_once() -> None:
    factor, counted = torch.ones(4, 6), Counted()
    with kept_in(Once()):
        assert counted.of(factor[:, :3]) == counted.of(factor[:, :3]) == 12
        assert counted.times == 1
        assert counted.of(factor[:, :3], "another kind") == 12 and counted.times == 2
        assert counted.of(factor[:, 3:]) == 12 and counted.times == 3
        assert counted.of(factor[:, :2]) == 8 and counted.times == 4


@pytest.mark.parametrize("through", ["itself", "a view", "its base"])
def test_changed_numbers_are_read_again(through: str) -> None:
    base, counted = torch.ones(4, 6), Counted()
    factor = base[:, :3]
    with kept_in(Once()):
        assert counted.of(factor) == 12
        {"itself": factor, "a view": factor[:1], "its base": base}[through][0, 0] = 0
        assert counted.of(factor) == 11


def test_memory_that_is_used_again_is_no_mistake() -> None:
    """The first tensor is kept as long as what was made of it, so the second lies elsewhere."""
    once, counted = Once(), Counted()
    with kept_in(once):
        for number in range(20):
            assert counted.of(torch.full((4, 6), float(number))) == 24 * number
    assert counted.times == 20


def test_nothing_is_kept_where_nobody_keeps_or_changes_are_not_counted() -> None:
    factor, counted = torch.ones(2, 3), Counted()
    assert counted.of(factor) == counted.of(factor) == 6 and counted.times == 2
    once = Once()
    with kept_in(once):
        with torch.inference_mode():
            other = torch.ones(2, 3)
            assert counted.of(other) == 6
            other[0, 0] = 0
            assert counted.of(other) == 5
        assert torch.func.vmap(lambda t: t * made_once("k", t, lambda: 2.0))(factor).sum() == 12
        counted.of(factor)
        times = counted.times
        seen = []
        thread = threading.Thread(target=lambda: seen.append(counted.of(factor)))
        thread.start()
        thread.join()
        assert seen == [6] and counted.times == times + 1  # another thread keeps nothing here
        once.clear()
        counted.of(factor)
        assert counted.times == times + 2


def counting_columns(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes that factors are cut to, one for each time that it is done."""
    found, cut = [], layers.present_columns

    def counted(*arguments):
        found.append(tuple(arguments[0].shape))
        return cut(*arguments)

    monkeypatch.setattr(layers, "present_columns", counted)
    return found


def test_factors_are_cut_once_per_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama(num_hidden_layers=3)
    inputs = {"input_ids": torch.arange(5)[None]}
    with undisturbed(model):
        engine = Engine(model, inputs, [[7, 8]], Settings(0.1, "min_shift"))
        found = counting_columns(monkeypatch)
        engine.perturb([Unit((1,)), Unit((2,))])
    assert len(found) == 1


def test_factors_that_change_between_passes_are_felt() -> None:
    """In place and under one context; each pass continues them with ones, which makes a copy."""
    model = llama(num_hidden_layers=3)
    ids = torch.arange(9)[None]
    factor = torch.ones(1, 7)
    with torch.no_grad():
        with manipulate(model, factor, "min_shift"):
            plain = model(ids).logits
            factor[0, 2] = 0.1
            changed = model(ids).logits
            factor.data[0, 2] = 0.5  # which PyTorch does not count
            again = model(ids).logits
        for found, number in ((plain, 1.0), (changed, 0.1), (again, 0.5)):
            fresh = torch.ones(1, 9)
            fresh[0, 2] = number
            with manipulate(model, fresh, "min_shift"):
                assert torch.equal(found, model(ids).logits)
    assert not torch.equal(plain, changed)
    assert not torch.equal(again, changed)


@pytest.mark.parametrize("effect", ["total", "direct"])
def test_the_layers_of_a_pass_share_their_tiles(effect: Literal["total", "direct"]) -> None:
    """Also where each layer's factors are another view of the same memory."""
    model = llama(num_hidden_layers=3)
    inputs = {"input_ids": torch.arange(24)[None]}
    units = [Unit((6,)), Unit((7,)), Unit((20,))]
    found = {}
    with undisturbed(model):
        for backend in ("torch", "triton"):
            settings = Settings(0.1, "min_shift", backend=backend)
            engine = Engine(model, inputs, [[7, 8]], settings)
            with count_launches() as launches:
                found[backend] = engine.perturb(units, effect)
    passes = len(engine.record.batch_sizes) - 1
    assert launches.attention == 3 * passes
    assert launches["_factor_tiles_kernel"] == passes
    torch.testing.assert_close(found["triton"], found["torch"], rtol=0, atol=1e-5)
