"""The gradients of the fused attention against the oracle's, every feature in combination.

Of each gradient the error may be 3 times that of plain PyTorch in the same dtype. Runs compiled on
a GPU and under Triton's interpreter elsewhere (fp32 and fp16 there). Legend: B batch, Hq/Hk heads,
Tq/Tk tokens, Tp prefix tokens, D head dim.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="the fused kernels need triton")

from backward_cases import BackwardCase, check, check_nearly, make_problem
from kernel_cases import DEVICE, LEVELS, covering, poison, tiles

__all__ = ["poison"]  # an autouse fixture

CHOICES = LEVELS | {
    # two tiles either way
    "tokens": [(66, 131), (131, 66), (1, 131), (65, 64), (40, 90), (70, 40)],
    "heads": [(2, 2), (4, 2), (2, 1)],
    "prefix": [0, 1, 64, 77],
    "place": ["all", "own"],
    "dropout": [0.0, 0.3],
    "wants": ["all", "factor", "query", "keys"],
    "loss": ["both", "out", "lse"],
    "cotangent": ["plain", "strided", "expanded"],
}


def from_row(row: dict) -> BackwardCase:
    """A case with a key of its own behind the prefix, and something to differentiate."""
    case = BackwardCase(**row)
    if case.tokens[0] == 1:
        # not a row that sees nothing: test_backward_modes has those; and of one row and one batch
        # row the largest error of eager is luck
        case = replace(case, batch=4, mask="rows" if case.mask == "heads" else case.mask)
    if case.layout == "shared_keys":
        case = replace(case, batch=2)
    if case.wants == "factor" and case.factors == "none":
        case = replace(case, factors="some")
    return replace(case, prefix=min(case.prefix, case.tokens[1] - 1))


COVERING = [from_row(row) for row in covering(CHOICES, tiles)]


@pytest.mark.parametrize("case", COVERING, ids=str)
def test_features_in_combination(case):
    check(case)


ODD = BackwardCase(batch=1, heads=(2, 2))


@pytest.mark.parametrize(
    "case",
    [
        replace(ODD, tokens=tokens, mode=mode, dtype=dtype, band=band)
        for tokens, mode, dtype, band in [
            ((1, 1), "min_shift", torch.float32, "causal"),
            ((1, 1), "multiplicative", torch.float16, "full"),
            ((1, 1), "log_additive", torch.float32, "full"),
            ((239, 1), "min_shift", torch.float16, "causal"),
            ((239, 1), "log_additive", torch.float32, "full"),
            ((1, 239), "min_shift", torch.float32, "window"),
            ((799, 3), "multiplicative", torch.float32, "upper_left"),
            ((799, 3), "min_shift", torch.float16, "full"),
            ((3, 799), "min_shift", torch.float32, "causal"),
            ((3, 799), "log_additive", torch.float16, "window"),
            ((113, 203), "min_shift", torch.float32, "causal"),
            ((1023, 1024), "min_shift", torch.float16, "window"),
        ]
    ],
    ids=str,
)
def test_odd_shapes(case):
    check(replace(case, factors="one" if max(case.tokens) > 500 else "some"))


@pytest.mark.parametrize(
    ("causal", "window", "mode"),
    [
        (False, None, "multiplicative"),
        *[(causal, window, "multiplicative") for causal in (False, True) for window in (1, 64)],
        (True, None, "multiplicative"),
        (True, None, "min_shift"),
        (True, 64, "min_shift"),
        (False, 64, "min_shift"),
    ],
)
def test_band_at_tile_borders(causal, window, mode):
    """Both ends of what rows see on, before and behind a tile's border.

    One key too many or too few is an error of order 1.
    """
    case = BackwardCase(tokens=(66, 131), dims=(16, 16), heads=(1, 1), batch=1, mode=mode)
    problem = make_problem(replace(case, factors="none" if mode == "multiplicative" else "some"))
    problem.options |= {"causal": causal, "window": window}
    for offset in [-1, 0, 62, 63, 64] if causal or window else [0]:
        problem.options["query_offset"] = offset
        check_nearly(problem, 1e-5)


@pytest.mark.parametrize(
    ("prefix", "start"),
    [(0, 63), (0, 64), (0, 65), (0, 128), (64, 64), (64, 65), (70, 64), (70, 70), (70, 71)],
)
def test_padding_at_the_borders_of_tiles_and_segments(prefix, start):
    case = BackwardCase(tokens=(3, 130), dims=(16, 16), heads=(1, 1), band="full", prefix=prefix)
    problem = make_problem(replace(case, mode="min_shift", factors="some"))
    column = torch.arange(130, device=DEVICE)
    problem.options["mask"] = torch.stack([column >= start, column < start])
    check_nearly(problem, 1e-5)


@settings(max_examples=4, deadline=None, derandomize=True, database=None)
@given(
    case=st.builds(
        BackwardCase,
        # of fewer rows the largest error of eager is luck; test_odd_shapes has those
        tokens=st.tuples(st.integers(32, 100), st.integers(2, 100)),
        dims=st.tuples(st.integers(16, 100), st.integers(16, 100)),
        heads=st.sampled_from([(1, 1), (2, 1)]),
        batch=st.integers(1, 2),
        prefix=st.integers(0, 80),
        **{
            name: st.sampled_from(CHOICES[name])
            for name in CHOICES
            if name not in ("tokens", "dims", "heads", "batch", "prefix")
        },
    ),
    seed=st.integers(0, 1000),
)
def test_drawn_shapes_and_features(case, seed):
    check(from_row(case.__dict__), seed)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("case", COVERING, ids=str)
def test_features_in_combination_in_bf16(case):
    check(replace(case, dtype=torch.bfloat16))
