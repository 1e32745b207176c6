"""What the packed-prefix launcher decides: flagged tiles, splits, tile sizes, width of offsets."""

import itertools

import pytest
import torch

pytest.importorskip("triton", reason="the fused kernels need triton")

from atman_triton.kernels import packed_launch
from atman_triton.kernels.packed_configs import PackedConfig, packed_config, split_count
from atman_triton.kernels.packed_prepass import packed_tiles

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MODES = ("plain", "multiplicative", "min_shift", "log_additive")


@pytest.mark.parametrize("factor_heads", [1, 4])
def test_packed_tiles(factor_heads):
    """Flagged tiles of a block of rows are those of any of its batch rows and heads."""
    rows, heads, key_heads, keys = 3, 4, 2, 600
    generator = torch.Generator().manual_seed(factor_heads)
    factor = torch.ones(7, factor_heads, keys)
    factor[torch.rand(factor.shape, generator=generator) < 0.004] = 0.5
    config = PackedConfig(16, 16, 16, num_warps=4, num_stages=1)
    before, tiles = packed_tiles(factor.to(DEVICE), rows, heads, key_heads, config)
    count = -(-keys // 16)
    packed_rows = 7 * 2 * rows
    blocks = -(-packed_rows // 16)
    assert before.shape == (key_heads if factor_heads > 1 else 1, blocks, count + 1)
    plain = 0
    for key_head, block in itertools.product(range(before.shape[0]), range(blocks)):
        flagged = set()
        for r in range(block * 16, min(packed_rows, block * 16 + 16)):
            batch, head = r // rows // 2, key_head * 2 + r // rows % 2
            parts = factor[batch, head % factor_heads].split(16)
            flagged |= {t for t, part in enumerate(parts) if (part != 1).any()}
        others = sorted(set(range(count)) - flagged, reverse=True)
        plain += len(others)
        assert tiles[key_head, block].tolist() == sorted(flagged) + others
        counts = [sum(t < stop for t in flagged) for stop in range(count + 1)]
        assert before[key_head, block].tolist() == counts
    assert plain > 0


def test_split_counts():
    assert split_count(programs=2000, tiles=1000, processors=132) == 1
    assert split_count(programs=8, tiles=1000, processors=132) == 33
    assert split_count(programs=8, tiles=10, processors=132) == 2
    assert split_count(programs=8, tiles=0, processors=132) == 1
    assert split_count(programs=0, tiles=10, processors=132) == 2


@pytest.mark.parametrize("architecture", ["interpreter", "sm_80", "sm_90", "sm_100", "gfx942"])
def test_tiles_fit_the_kernel(architecture):
    """Powers of two of at least 16, as matrix products need, and whole edge tiles in a tile."""
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    counts = (1, 17, 40, 100, 10**5)
    for dim, dtype, mode, packed_rows, load in itertools.product(
        (64, 128, 192, 256), dtypes, MODES, counts, (0, 1, 2)
    ):
        config = packed_config(architecture, dim, dim, dtype, mode, packed_rows, load)
        for size in (config.block_m, config.block_n, config.edge_n):
            assert size >= 16 and size & (size - 1) == 0
        assert config.edge_n <= config.block_n
        assert config.block_m <= max(32, 2 * packed_rows)


def test_which_spans_need_64_bits():
    config = PackedConfig(64, 64, 32, num_warps=4, num_stages=1)
    near = torch.zeros(1, 1, 1, 1)
    spans = packed_launch._spans_beyond_int32
    big = torch.empty(0).as_strided((0, 3), (1 << 26, 1))
    assert not spans((big, None), (near,), config)  # no row, no span
    meta = torch.empty(1, device="meta")
    assert not spans((meta.as_strided((31, 1), (1 << 26, 1)),), (near,), config)
    assert spans((meta.as_strided((32, 1), (1 << 26, 1)),), (near,), config)
    # of more batch rows than a tile has rows, only a tile's count
    assert not spans((meta.as_strided((1000, 1), (1 << 24, 1)),), (near,), config)
    assert spans((near,), (meta.as_strided((1, 1, 4, 4), (0, 0, 1 << 22, 1)),), config)
    assert not spans((near,), (meta.as_strided((1, 1, 4, 4), (0, 0, 1 << 21, 1)),), config)
