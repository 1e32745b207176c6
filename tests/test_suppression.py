"""Correlated suppression: the rules, the neighbourhoods, and what an explanation makes of them.

Legend: S columns, D width of embeddings, U units, M scored tokens.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from atman_triton.suppression import RULES, factor_row, neighbourhoods

STEP = torch.finfo(torch.float32).eps
PROMPT = [3, 141, 59, 26, 59, 58, 97, 141, 23, 84]
TARGETS = [(84, 62, 64, 3), (7,), (59, 5, 9)]
MODES = ["min_shift", "multiplicative", "log_additive"]


# --- by hand ------------------------------------------------------------------------------------


def cosine(a, b):
    """Of two vectors, in plain float64; 0 where one has no direction."""
    norms = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(x * x for x in b))
    return sum(x * y for x, y in zip(a, b, strict=True)) / norms if norms else 0.0


def by_token(vectors, i, factor, threshold, rule):
    """Factors of all tokens when token i is suppressed, as the table of the rules says."""
    row = []
    for k, vector in enumerate(vectors):
        # rounding apart, equal directions have similarity 1
        s = round(min(1.0, max(-1.0, cosine(vectors[i], vector))), 9)
        if rule == "released":
            row.append(factor if k == i else 1 - (1 - factor) * s if s >= threshold else 1.0)
        elif k != i and threshold <= s:
            row.append(1 - s)
        elif k != i:
            row.append(1 - threshold)
        else:
            row.append(1.0)
    return row


def by_hand(vectors, unit, factor, threshold, rule):
    """Of a unit of several tokens the strongest factor wins."""
    rows = [by_token(vectors, i, factor, threshold, rule) for i in unit]
    return [min(column) for column in zip(*rows, strict=True)]


def rows_of(vectors, units, factor, threshold, rule, block_bytes=None):
    vectors = torch.as_tensor(vectors)
    found = neighbourhoods(vectors, units, threshold, block_bytes=block_bytes)
    reach = torch.ones(len(vectors), dtype=torch.bool)
    pairs = zip(units, found, strict=True)
    return torch.stack([factor_row(u, n, factor, threshold, rule, reach) for u, n in pairs])


@pytest.mark.parametrize("rule", RULES)
def test_a_small_case(rule):
    """Tokens 0 and 1 are alike (0.8), 2 is at right angles to 0, 3 is 0's opposite, 4 is nothing,
    5 is 0 again."""
    vectors = [[1.0, 0.0], [8.0, 6.0], [0.0, 0.5], [-1.0, 0.0], [0.0, 0.0], [2.0, 0.0]]
    units = [[0], [4], [0, 1], [2, 3]]
    expected = {
        "released": [
            [0.1, 0.28, 1.0, 1.0, 1.0, 0.1],
            [1.0, 1.0, 1.0, 1.0, 0.1, 1.0],
            [0.1, 0.1, 0.46, 1.0, 1.0, 0.1],
            [1.0, 0.46, 0.1, 0.1, 1.0, 1.0],
        ],
        "paper": [
            [1.0, 0.2, 0.5, 0.5, 0.5, 0.0],
            [0.5, 0.5, 0.5, 0.5, 1.0, 0.5],
            [0.2, 0.2, 0.4, 0.5, 0.5, 0.0],
            [0.5, 0.4, 0.5, 0.5, 0.5, 0.5],
        ],
    }[rule]
    found = rows_of(vectors, units, 0.1, 0.5, rule)
    torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=2 * STEP)
    hand = [by_hand(vectors, unit, 0.1, 0.5, rule) for unit in units]
    torch.testing.assert_close(torch.tensor(hand), torch.tensor(expected), rtol=0, atol=1e-6)


def test_a_similarity_of_just_the_threshold_counts():
    """3-4-5 vectors have the cosine 0.6 without any rounding."""
    vectors = torch.tensor([[1.0, 0.0], [3.0, 4.0], [3.0, -4.0]])
    (near,) = neighbourhoods(vectors.double(), [[0]], 0.6)
    assert near.columns.tolist() == [1, 2]
    assert neighbourhoods(vectors.double(), [[0]], 0.6 + 1e-9)[0].columns.tolist() == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_equal_tokens_have_similarity_1_whatever_their_size(dtype, scale):
    if dtype == torch.float16 and scale != 1.0:
        scale = 1e-4 if scale < 1 else 1e4
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randn(7, 1000, generator=generator, dtype=torch.float64) * scale
    vectors = torch.cat([drawn, drawn]).to(dtype)
    for i, near in enumerate(neighbourhoods(vectors, [[i] for i in range(14)], 1.0)):
        assert near.columns.tolist() == [(i + 7) % 14]
        assert near.similarity.tolist() == [1.0]


vector = st.lists(st.integers(-3, 3), min_size=3, max_size=3)


@given(
    vectors=st.lists(vector, min_size=1, max_size=9),
    threshold=st.sampled_from([0.25, 0.5, 0.6, 0.7, 1.0]),
    factor=st.sampled_from([0.0, 0.1, 0.9]),
    rule=st.sampled_from(RULES),
    block=st.integers(1, 400),
    data=st.data(),
)
@settings(max_examples=150, deadline=None)
def test_rows_are_those_of_a_plain_loop(vectors, threshold, factor, rule, block, data):
    """Small whole numbers: many equal directions, right angles, zeros, and cosines at κ."""
    places = st.sets(st.integers(0, len(vectors) - 1), min_size=1)
    units = [sorted(unit) for unit in data.draw(st.lists(places, min_size=1, max_size=5))]
    # κ itself is met by rounding only, so it is moved to where no cosine of such vectors is
    threshold = threshold if threshold == 1.0 else threshold - 1e-6
    found = rows_of(torch.tensor(vectors).double(), units, factor, threshold, rule, block)
    hand = [by_hand(vectors, unit, factor, threshold, rule) for unit in units]
    torch.testing.assert_close(found, torch.tensor(hand), rtol=0, atol=1e-6)


def test_autocast_does_not_blur_similarities():
    """In bfloat16 they would be off by some thousandths."""
    vectors = torch.randn(30, 64, generator=torch.Generator().manual_seed(1))
    (expected,) = neighbourhoods(vectors, [[0]], 0.01)
    with torch.autocast("cpu", torch.bfloat16):
        (found,) = neighbourhoods(vectors, [[0]], 0.01)
    assert len(found.columns) > 10
    torch.testing.assert_close(found.similarity, expected.similarity, rtol=0, atol=1e-6)


# --- memory -------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """Notes the most bytes of one tensor that an operator makes."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(tensor, torch.Tensor):
                size = tensor.untyped_storage().nbytes()
                self.bytes = max(self.bytes, size)
        return made


def test_a_long_input_is_compared_in_blocks():
    count, block = 20_000, 1 << 22
    generator = torch.Generator().manual_seed(1)
    vectors = torch.randn(count, 8, generator=generator)
    vectors[count // 2 :] = vectors[: count // 2]  # every token stands twice
    units = [[i] for i in range(0, count - 3000, 50)] + [list(range(count - 3000, count))]
    with Largest() as seen:
        found = neighbourhoods(vectors, units, 1.0, block_bytes=block)
    assert seen.bytes <= block < count * count
    for unit, near in zip(units[:-1], found, strict=False):
        assert near.columns.tolist() == [(unit[0] + count // 2) % count]
    assert found[-1].columns.tolist() == list(range(count // 2 - 3000, count // 2))


@pytest.mark.parametrize("block", [1, 100, 1000, 10**6])
def test_blocks_change_nothing(block):
    vectors = torch.randn(40, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    units = [[0], [3, 7, 8], list(range(10, 25)), [39], [26, 38]]
    whole, parts = (
        neighbourhoods(vectors, units, 0.5, block_bytes=size) for size in (1 << 20, block)
    )
    for one, other in zip(whole, parts, strict=True):
        assert torch.equal(one.columns, other.columns)
        torch.testing.assert_close(one.similarity, other.similarity, rtol=0, atol=1e-6)
    assert sum(len(near.columns) for near in whole) > 20
