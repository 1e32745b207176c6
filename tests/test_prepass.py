"""Flagged tiles and visible key ranges against plain Python."""

import pytest
import torch

pytest.importorskip("triton", reason="the fused kernels need triton")

from atman_triton.kernels.prepass import factor_tiles, key_ranges

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("keys", [1, 16, 17, 600])
@pytest.mark.parametrize("heads", [1, 3])
def test_factor_tiles(keys, heads):
    generator = torch.Generator().manual_seed(keys)
    factor = torch.ones(2, heads, keys)
    factor[torch.rand(factor.shape, generator=generator) < 0.02] = 0.5
    factor[1, 0, -1] = 1.5
    strided = torch.zeros(2, heads, 2 * keys)[..., ::2].copy_(factor).to(DEVICE)
    before, flagged = factor_tiles(strided, 16)
    tiles = -(-keys // 16)
    assert before.shape == (2, heads, tiles + 1)
    for b in range(2):
        for h in range(heads):
            rows = factor[b, h].split(16)
            expected = [t for t in range(tiles) if (rows[t] != 1).any()]
            assert flagged[b, h, : len(expected)].tolist() == expected
            counts = [sum(e < t for e in expected) for t in range(tiles + 1)]
            assert before[b, h].tolist() == counts


def test_factor_tiles_of_a_broadcast_row():
    factor = torch.ones(1, 1, 40, device=DEVICE)
    factor[..., 35] = 0.0
    before, flagged = factor_tiles(factor.expand(3, -1, -1), 16)
    assert before.tolist() == [[[0, 0, 0, 1]]] * 3
    assert flagged[:, 0, 0].tolist() == [2, 2, 2]


def test_key_ranges():
    padding = torch.zeros(5, 9000, dtype=torch.bool)
    padding[0] = True
    padding[1, 4100:] = True
    padding[2, :7] = True
    padding[3, [3, 5, 8500]] = True
    ranges = key_ranges(padding.to(DEVICE))
    assert ranges.tolist() == [
        [0, 9000, 1],
        [4100, 9000, 1],
        [0, 7, 1],
        [3, 8501, 0],
        [9000, 0, 0],
    ]
