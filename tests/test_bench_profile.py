"""What is made of a profiler's trace, on made intervals; and live citations of the explain set."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bench import gpu_live, profiled
from bench.explaining import LlamaShape
from bench.gpu_explain import TINY_SIZES, TOY, Findings
from bench.profiled import Profile, Work, clipped, gaps, own_times, union

CPU = torch.device("cpu")


def test_overlapping_intervals_count_once() -> None:
    assert union([(5, 7), (0, 2), (1, 3), (3, 4), (6, 6.5)]) == [(0, 4), (5, 7)]
    assert union([]) == []
    two_streams = (
        Work("a", 10, 20, 7),
        Work("b", 12, 30, 13),  # over the end of a
        Work("a", 22, 25, 7),  # within b
        Work("c", 40, 44, 7),
    )
    found = Profile(two_streams, (8, 50), 1e-4)
    assert found.busy == 24 and found.share == 24 / 42
    assert found.share_alone == pytest.approx(0.24)
    assert found.gaps == [10, 6, 2]
    assert found.by_name() == {"b": (18, 1), "a": (13, 2), "c": (4, 1)}


def test_what_lies_outside_a_window_is_cut_off() -> None:
    work = [Work("a", 0, 10), Work("b", 15, 30), Work("c", 40, 50)]
    assert clipped(work, (5, 20)) == [(5, 10), (15, 20)]
    assert gaps(work, (5, 20)) == [(10, 15)]
    assert gaps(work, (32, 36)) == [(32, 36)]
    assert gaps([], (1, 2)) == [(1, 2)]


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 9)), max_size=20))
def test_busy_and_gaps_fill_the_window(drawn: list[tuple[int, int]]) -> None:
    work = [
        Work("k", start, start + length, place % 3) for place, (start, length) in enumerate(drawn)
    ]
    found = Profile(tuple(work), (10, 35), 1.0)
    points = {tick for each in work for tick in range(int(each.start), int(each.stop))}
    assert found.busy == len(points & set(range(10, 35)))
    assert found.busy + sum(found.gaps) == 25


def test_an_operator_is_not_charged_for_those_within() -> None:
    work = [
        Work("linear", 0, 10, "thread"),
        Work("mm", 2, 6, "thread"),
        Work("copy", 3, 4, "thread"),
        Work("add", 7, 9, "thread"),
        Work("mm", 2, 6, "another"),
    ]
    own = {(each.name, each.line): spent for each, spent in own_times(work)}
    assert own == {
        ("linear", "thread"): 4,
        ("mm", "thread"): 3,
        ("copy", "thread"): 1,
        ("add", "thread"): 2,
        ("mm", "another"): 4,
    }


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_NNT", "matrix products"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize64x64x64", "matrix products"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm>", "matrix products"),
        ("aten::addmm", "matrix products"),
        ("_packed_fwd_kernel", "attention"),
        ("_shared_prefix_fwd_kernel", "attention"),
        ("_factor_tiles_kernel", "attention"),
        ("void pytorch_flash::flash_fwd_kernel<cutlass::bfloat16_t>", "attention"),
        ("fmha_cutlassF_bf16_aligned_64x128_rf_sm80", "attention"),
        ("void at::native::vectorized_elementwise_kernel<4>", "the rest"),
        ("aten::mul", "the rest"),
    ],
)
def test_kernels_have_a_kind(name: str, kind: str) -> None:
    assert profiled.kind_of(name) == kind


def event(category: str, name: str, start: float, length: float, line: int = 7) -> dict[str, Any]:
    return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": length} | {
        "pid": 0,
        "tid": line,
    }


def test_a_trace_of_a_gpu_is_read() -> None:
    """The time starts with the host's first call; what is no work of the device is left out."""
    events = [
        {"ph": "M", "name": "process_name"},
        event("cuda_runtime", "cudaLaunchKernel", 100, 5, 1),
        event("kernel", "nvjet_a", 110, 20),
        event("kernel", "_packed_fwd_kernel", 120, 20, 13),
        event("gpu_memcpy", "Memcpy HtoD", 150, 5),
        event("gpu_user_annotation", "whole", 0, 1000),
        event("python_function", "forward", 0, 1000),
        event("cuda_runtime", "cudaDeviceSynchronize", 106, 54, 1),
    ]
    found = profiled.read_trace({"traceEvents": events}, "cuda", 1e-4)
    assert found.window == (100, 160)
    assert found.busy == 35 and len(found.work) == 3
    assert found.gaps == [10, 10, 5]
    assert found.by_kind() == pytest.approx(
        {"attention": 20 / 45, "matrix products": 20 / 45, "the rest": 5 / 45}
    )
    rows = {row.metric: row.median for row in profiled.rows_of(found, "n", "s", torch.float32, CPU)}
    assert rows["busy share of the profiled time"] == pytest.approx(35 / 60, abs=1e-4)
    assert rows["busy share of the time without a profiler"] == 0.35
    assert rows["longest gap, ms"] == 0.01 and rows["gaps, ms"] == 0.025
    text = "\n".join(profiled.lines_of(found, "n"))
    assert "busy 35% of 0.1 ms (58% under the profiler)" in text and "nvjet_a" in text


def test_nothing_recorded_is_said() -> None:
    empty = profiled.read_trace({"traceEvents": []}, "cuda", 1.0)
    assert profiled.rows_of(empty, "n", "s", torch.float32, CPU) == []
    assert profiled.lines_of(empty, "n") == ["  n: the profiler recorded no work of the device"]


def test_a_call_is_profiled_here(tmp_path: Path) -> None:
    left = torch.randn(64, 64)
    kept = tmp_path / "folder" / "trace.json.gz"
    found = profiled.profiled(lambda: (left @ left).exp(), CPU, 1.0, kept)
    assert {"aten::mm", "aten::exp"} <= set(found.by_name())
    assert 0 < found.share <= 1
    assert json.loads(gzip.decompress(kept.read_bytes()))["traceEvents"]


def test_wrong_live_citations_fail_the_set(monkeypatch: pytest.MonkeyPatch) -> None:
    shape: LlamaShape = TINY_SIZES[0]
    gpu_live.checked(shape, torch.float32, CPU, gpu_live.TOY)
    right = gpu_live.Case.live

    def off(case: gpu_live.Case) -> Any:
        found = right(case)
        return [token._replace(logprobs=token.logprobs * 1.001) for token in found]

    monkeypatch.setattr(gpu_live.Case, "live", off)
    monkeypatch.setattr(gpu_live.Case, "check", lambda case: None)
    with pytest.raises(AssertionError, match="live citations, min_shift"):
        gpu_live.checked(shape, torch.float32, CPU, gpu_live.TOY)
    findings = Findings(TOY, torch.float32, CPU, 1e12, ends=0.0)
    findings.add(shape)
    assert findings.failures[0].startswith("live citations of llama-toy: live citations, min_shift")
    assert "  live citations: wrong, so not timed" in findings.lines
    assert "  profile: left out, 8.5 minutes have passed" in findings.lines
