"""Products by oneDNN: the same numbers, only where it serves, and nothing left behind."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from toy_models import MODELS

from atman_triton import Explainer, products
from atman_triton.engine import undisturbed
from atman_triton.products import fast_products
from atman_triton.testing import assert_close_to_oracle

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="PyTorch without oneDNN"
)
ROWS, IN, OUT = 58, 40, 24  # a block of 32, one of 16, and ten rows


@pytest.fixture
def served(monkeypatch):
    """The products that oneDNN was asked for, on any processor."""
    monkeypatch.setattr(products, "helps", lambda: True)
    monkeypatch.setattr(products, "BLOCKS", (32, 16))
    found, product = [], products._product

    def counted(rows, weight, bias=None):
        found.append(tuple(rows.shape))
        return product(rows, weight, bias)

    monkeypatch.setattr(products, "_product", counted)
    return found


def drawn(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)), dtype=dtype)


LAYOUTS = {
    "rows": lambda: drawn(ROWS, IN),
    "batch": lambda: drawn(3, ROWS, IN),
    "transposed": lambda: drawn(ROWS, 3, IN).transpose(0, 1),
    "sliced": lambda: drawn(3, ROWS, 2 * IN)[..., ::2],
    "expanded": lambda: drawn(1, ROWS, IN).expand(3, -1, -1),
    "one number": lambda: drawn(3, ROWS, 1).expand(-1, -1, IN),
}
WEIGHTS = {
    "plain": lambda: drawn(OUT, IN),
    "transposed": lambda: drawn(IN, OUT).T,
    "sliced": lambda: drawn(OUT, 2 * IN)[:, IN:],
}


@pytest.mark.parametrize(
    ("rows", "weight", "bias"), list(itertools.product(LAYOUTS, WEIGHTS, [False, True]))
)
def test_the_numbers_are_those_of_a_linear_layer(served, rows, weight, bias):
    x, w = LAYOUTS[rows](), WEIGHTS[weight]()
    b = drawn(OUT) if bias else None
    with torch.no_grad(), fast_products():
        found = F.linear(x, w, b)
    assert served == [tuple(x.shape)]
    truth = F.linear(x.double(), w.double(), None if b is None else b.double())
    assert_close_to_oracle(found, F.linear(x, w, b), truth)
    assert found.stride() == F.linear(x, w, b).stride()


def test_onednn_sees_two_sizes(served, monkeypatch):
    """It keeps what it makes for every size: more of them would take memory without end."""
    sizes, block = set(), products._block

    def noted(rows, weight, bias):
        sizes.add(tuple(rows.shape))
        return block(rows, weight, bias)

    monkeypatch.setattr(products, "_block", noted)
    with torch.no_grad(), fast_products():
        for count in range(16, 80):
            F.linear(drawn(count, IN), drawn(OUT, IN))
    assert sizes == {(32, IN), (16, IN)} and len(served) == 64


def test_nan_and_infinity_come_through(served):
    x = drawn(ROWS, IN)
    x[3, 5], x[4, 6] = torch.nan, torch.inf
    with torch.no_grad(), fast_products():
        found = F.linear(x, drawn(OUT, IN).abs())
    assert found[3].isnan().all() and (found[4] == torch.inf).all() and len(served) == 1
    assert found[torch.arange(ROWS) > 4].isfinite().all()


OTHERS = {
    "few rows": (lambda: (drawn(1, 15, IN), drawn(OUT, IN)), {}),
    "float64": (lambda: (drawn(ROWS, IN).double(), drawn(OUT, IN).double()), {}),
    "bfloat16": (lambda: (drawn(ROWS, IN).bfloat16(), drawn(OUT, IN).bfloat16()), {}),
    "meta": (lambda: (drawn(ROWS, IN).to("meta"), drawn(OUT, IN).to("meta")), {}),
    "a vector": (lambda: (drawn(IN), drawn(OUT, IN)), {}),
    "a weight of one row": (lambda: (drawn(ROWS, IN), drawn(IN)), {}),
}


@pytest.mark.parametrize("case", OTHERS)
def test_other_products_are_pytorchs(served, case):
    x, w = OTHERS[case][0]()
    with torch.no_grad(), fast_products():
        found = F.linear(x, w)
    assert not served
    assert found.device.type == "meta" or torch.equal(found, F.linear(x, w))


def test_under_autocast_the_product_is_of_its_dtype(served):
    with torch.no_grad(), fast_products(), torch.autocast("cpu", torch.bfloat16):
        found = F.linear(drawn(ROWS, IN), drawn(OUT, IN))
    assert found.dtype == torch.bfloat16 and not served


@pytest.mark.parametrize("needs", ["rows", "weight", "bias"])
def test_what_needs_a_gradient_has_one(served, needs):
    given = {"rows": drawn(ROWS, IN), "weight": drawn(OUT, IN), "bias": drawn(OUT)}
    given[needs].requires_grad_()
    with fast_products():
        F.linear(*given.values()).sum().backward()
    assert given[needs].grad is not None and not served
    with torch.no_grad(), fast_products():
        F.linear(*given.values())
    assert len(served) == 1


def test_wrong_shapes_are_refused_as_ever(served):
    with torch.no_grad(), fast_products(), pytest.raises(RuntimeError, match="cannot be mult"):
        F.linear(drawn(ROWS, IN), drawn(OUT, IN + 1))
    with torch.no_grad(), fast_products(), pytest.raises(RuntimeError, match=r"shape|size"):
        F.linear(drawn(ROWS, IN), drawn(OUT, IN), drawn(OUT + 1))
    assert not served


def test_it_can_be_switched_off(served, monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    with torch.no_grad(), fast_products():
        F.linear(drawn(ROWS, IN), drawn(OUT, IN))
    assert not served


def test_nothing_stays_after_an_exception_and_once_is_enough(served):
    layer = nn.Linear(IN, OUT)

    def broken():
        with undisturbed(layer), undisturbed(layer):
            layer(drawn(ROWS, IN))
            assert len(torch.overrides._get_current_function_mode_stack()) == 1
            raise KeyError

    with pytest.raises(KeyError):
        broken()
    assert len(served) == 1
    with torch.no_grad():
        layer(drawn(ROWS, IN))
    assert len(served) == 1 and not torch.overrides._get_current_function_mode_stack()


def test_on_other_processors_nothing_is_entered(monkeypatch):
    monkeypatch.setattr(products, "helps", lambda: False)
    with fast_products():
        assert not torch.overrides._get_current_function_mode_stack()


@pytest.mark.parametrize(
    ("text", "capability", "expected"),
    [
        ("vendor_id : AuthenticAMD", "AVX512", True),
        ("vendor_id : GenuineIntel", "AVX512", False),
        ("vendor_id : AuthenticAMD", "AVX2", False),
    ],
)
def test_which_processors_it_is_for(monkeypatch, text, capability, expected):
    monkeypatch.setattr(products, "_processor", lambda: text)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    assert products.helps.__wrapped__() is expected


@pytest.mark.parametrize("method", ["exact", "direct", "path"])
def test_explanations_are_the_same(served, monkeypatch, method):
    ids, answer = list(range(3, 40)), [5, 6]
    model = MODELS["llama"]()

    def scores():
        found = Explainer(model, method=method, progress=False).explain(ids, answer).scores
        return found[:, : len(ids)]  # none has a NaN: all stand before the answer

    by_onednn = scores()
    assert served
    monkeypatch.setattr(products, "helps", lambda: False)
    by_mkl = scores()
    try:
        model.double()
        truth = scores().double()
    finally:
        model.float()
    assert_close_to_oracle(by_onednn, by_mkl, truth)


def test_a_model_of_another_dtype_is_left_alone(monkeypatch):
    """As one on a GPU: the host would see every call of a function for nothing."""
    monkeypatch.setattr(products, "helps", lambda: True)
    for dtype, modes in ((torch.float32, 1), (torch.bfloat16, 0)):
        with undisturbed(nn.Linear(IN, OUT, dtype=dtype)):
            assert len(torch.overrides._get_current_function_mode_stack()) == modes
