"""Persistent grids: the same bits as with a program per block, and balanced shares."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

pytest.importorskip("triton", reason="the fused kernels need triton")

import triton
import triton.language as tl
from kernel_cases import DEVICE, MODES, Case, make_inputs, pairwise, poison

from atman_triton.kernels import forward, persistent
from atman_triton.kernels.configs import forward_config
from atman_triton.kernels.launch import RowNumbers, prepare
from atman_triton.kernels.persistent import Resources, even_sections, resident_programs, section_of
from atman_triton.kernels.primitives import block_of_turn

__all__ = ["poison"]  # an autouse fixture

INTERPRETED = DEVICE == "cpu"


@pytest.fixture
def by_turns(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Make every forward launch persistent; the numbers of programs that were asked for."""

    def choose(*problem):
        return replace(forward_config(*problem), persistent=True)

    counts: list[int] = []

    def counted(*given):
        counts.append(persistent.programs_at_once(*given))
        return counts[-1]

    monkeypatch.setattr(forward, "prepare", partial(prepare, choose_config=choose))
    monkeypatch.setattr(forward, "programs_at_once", counted)
    return counts


def launch(case: Case, saves: RowNumbers | None = None) -> list[torch.Tensor]:
    tensors, options = make_inputs(case)
    mask = options.pop("mask", None)
    if mask is not None:
        options["key_padding" if mask.dim() == 2 else "block_mask"] = mask
    return list(forward.attention_fwd(*tensors, **options, saves=saves or RowNumbers()))


@pairwise(
    mode=MODES,
    band=["full", "causal", "window", "window_full", "upper_left"],
    factors=["none", "some", "per_head", "one"],
    heads=[(2, 2), (4, 2), (3, 1)],
    mask=["none", "left", "right", "holes", "rows"],
    tokens=[(1, 131), (70, 150), (150, 70), (193, 193)],
    layout=["plain", "tokens_first", "shared_keys"],
    batch=[1, 3],
    dims=[(16, 16), (40, 24)],
)
def test_turns_change_no_bit(
    request, mode, band, factors, heads, mask, tokens, layout, batch, dims
) -> None:
    case = Case(tokens, dims, heads, batch, mode=mode, factors=factors, band=band, mask=mask)
    case = replace(case, layout=layout)
    expected = launch(case)
    counts = request.getfixturevalue("by_turns")
    got = launch(case)
    assert len(counts) == 1  # the second launch was persistent, and only it
    for ours, one_each in zip(got, expected, strict=True):
        assert torch.equal(ours, one_each)


def test_what_training_saves_changes_no_bit(request) -> None:
    case = Case((150, 150), (16, 16), (2, 1), mode="min_shift", factors="some")

    def saved() -> list[torch.Tensor]:
        minimum = torch.full((2, 2, 150), torch.nan, device=DEVICE)
        argmin, rest = torch.zeros_like(minimum, dtype=torch.int32), minimum.clone()
        launch(case, RowNumbers(minimum, argmin, rest))
        return [minimum, argmin, rest]

    expected = saved()
    request.getfixturevalue("by_turns")
    for ours, one_each in zip(saved(), expected, strict=True):
        assert torch.equal(ours, one_each)
    assert expected[0].isfinite().all()


@triton.jit
def _turns_kernel(
    found_ptr, rows, lines, section, heads, group, shared, SIZE: tl.constexpr, BLOCK_M: tl.constexpr
):
    turn = tl.minimum(tl.arange(0, SIZE), tl.cdiv(rows, BLOCK_M) * lines - 1)
    batch, head, start_m = block_of_turn(  # pyright: ignore
        turn, rows, lines, section, heads, group, shared != 0, BLOCK_M, True
    )
    tl.store(found_ptr + 3 * turn, batch)
    tl.store(found_ptr + 3 * turn + 1, head)
    tl.store(found_ptr + 3 * turn + 2, start_m)


def turns(
    rows: int, batch: int, heads: int, group: int, section: int, shared: bool = False
) -> list[tuple[int, ...]]:
    """Batch row, head and first row of each turn, with blocks of 64 rows."""
    total = -(-rows // 64) * batch * heads
    found = torch.full((total, 3), -1, dtype=torch.int32, device=DEVICE)
    sizes = (rows, batch * heads, section, heads, group, int(shared))
    _turns_kernel[(1,)](found, *sizes, triton.next_power_of_2(total), 64)
    return [tuple(turn) for turn in found.tolist()]


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("heads", "group"), [(4, 2), (3, 3), (5, 1)])
def test_every_block_has_one_turn(heads, group, shared):
    for section in (1, group, 2 * group, 3 * heads):
        found = turns(300, 3, heads, group, section, shared)
        every = {(b, h, row) for b in range(3) for h in range(heads) for row in range(0, 300, 64)}
        assert len(found) == len(every) and set(found) == every


@pytest.mark.parametrize("shared", [False, True])
def test_sections_hold_heads_that_share_keys(shared):
    """The last section begins with the last rows of all its heads, the one before ends with it."""
    sharing = 6 if shared else 2
    found = turns(300, 3, 4, 2, section=sharing, shared=shared)
    parts = [found[start : start + 5 * sharing] for start in range(0, len(found), 5 * sharing)]
    for number, part in enumerate(reversed(parts)):
        assert len({(0 if shared else batch, head // 2) for batch, head, _ in part}) == 1
        starts = [row for *_, row in part]
        assert starts == sorted(starts, reverse=number % 2 == 0)


@pytest.mark.parametrize(
    ("tokens", "batch", "heads", "group", "fits"),
    [
        (8192, 1, 16, 1, 6),
        (8192, 1, 32, 4, 6),  # eight sets of keys
        (16384, 1, 16, 1, 3),
        (2048, 8, 16, 1, 25),
        (8192, 1, 16, 16, 6),  # one set
    ],
)
def test_shares_are_balanced(tokens, batch, heads, group, fits):
    """The most key tiles that one of 132 programs visits, beside the mean."""
    blocks = tokens // 64
    section = even_sections(batch * heads // group, group, fits, blocks, 132)
    found = turns(tokens, batch, heads, group, section)
    work = [row // 64 + 1 for *_, row in found]
    most = max(sum(work[program::132]) for program in range(132))
    assert most <= 1.05 * sum(work) / 132
    # where all sections begin with the longest, some program gets the longest of each
    size = section * blocks
    falling = [sorted(work[at : at + size], reverse=True) for at in range(0, len(work), size)]
    if len(falling) > 2:
        jumps = [length for lengths in falling for length in lengths]
        assert max(sum(jumps[program::132]) for program in range(132)) > most


def test_a_section_is_a_round_at_least():
    assert even_sections(64, 1, 1, blocks=4, programs=132) == 32  # 33 would be, and one section odd
    assert even_sections(64, 2, 4, blocks=64, programs=132) == 8
    assert even_sections(1, 7, 1, blocks=64, programs=132) == 4
    assert even_sections(1, 1, 1, blocks=64, programs=132) == 1


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "programs"),
    [
        (255, 1 << 10, 8, 1),  # 65536 / (256 * 256)
        (128, 1 << 10, 8, 2),
        (129, 1 << 10, 8, 1),  # 136 are handed out
        (64, 100 << 10, 4, 2),  # 228 KB, and 1 KB more for each
        (16, 1 << 10, 8, 8),  # 2048 threads
        (255, 1 << 20, 16, 1),  # never none
    ],
)
def test_how_many_programs_fit(registers, shared, warps, programs):
    have = Resources(1 << 16, 228 << 10, 1 << 10, 2048, 32)
    assert resident_programs(registers, shared, warps, have) == programs


@pytest.mark.skipif(not INTERPRETED, reason="a GPU has a cache of its own size")
def test_sections_fit_the_cache():
    key = torch.zeros(12, 3, 64, 16)  # 8 KB with the value, of 32 that are taken for keys
    assert section_of(key, key, heads=6, blocks=8, programs=3) == 2 * 4  # of 36 sets: 10 sections
    first = key[:1].expand(12, -1, -1, -1)
    assert section_of(first, key, heads=6, blocks=8, programs=3) == 24 * 2  # 3 sets, 2 sections
    long = torch.zeros(1, 1, 4096, 16).expand(2, 3, -1, -1).clone()
    assert section_of(long, long, heads=6, blocks=8, programs=3) == 2  # a set of keys at least
    none = torch.zeros(2, 3, 0, 16)
    assert section_of(none, none, heads=6, blocks=8, programs=3) == 6


def test_a_variant_is_asked_once(monkeypatch):
    """Registers come from the compiled kernel, and shared memory from what it says of itself."""
    if INTERPRETED:
        monkeypatch.setattr("triton.knobs.runtime.interpret", False)
    monkeypatch.setattr(persistent, "_known", {})

    class Compiled:
        n_regs = 128
        metadata = type("Metadata", (), {"shared": 40 << 10})
        asked = 0

        def warmup(self, *arguments, grid, **options):
            assert arguments == (1, 2) and grid == (1,) and options["num_warps"] == 4
            Compiled.asked += 1
            return self

        def _init_handles(self):
            pass

    properties = type("Properties", (), {"multi_processor_count": 10})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    have = Resources(1 << 16, 228 << 10, 1 << 10, 2048, 32)
    monkeypatch.setattr(persistent, "_resources", lambda properties: have)
    query = torch.zeros(1)
    options = {"SPEC": "a variant", "num_warps": 4}
    for _ in range(2):
        assert persistent.programs_at_once(Compiled(), (1, 2), options, query) == 10 * 4
    assert Compiled.asked == 1
    persistent.programs_at_once(Compiled(), (1, 2), options | {"SPEC": "another"}, query)
    assert Compiled.asked == 2
