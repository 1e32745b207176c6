"""Pictures of made rows: what is drawn, and that a CSV is enough to draw it again."""

from __future__ import annotations

import dataclasses
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import gpu, gpu_plots, scaling
from bench.gpu_explain import WHAT as EXPLAINED
from bench.harness import Row, summarise, write_rows
from bench.live import LIVE, PLAIN
from bench.live import WHAT as LIVE_WHAT
from bench.rivals import OURS_HOPPER
from bench.scaling_run import Found

CPU = torch.device("cpu")


def made(what: str, shape: str, metric: str, **numbers: float) -> list[Row]:
    """Rows of made-up numbers, with 10% of spread."""
    times = {name: [0.9 * number, number, 1.1 * number] for name, number in numbers.items()}
    options: dict[str, Any] = {"dtype": torch.bfloat16, "device": CPU, "metric": metric}
    return summarise(times, what=what, shape=shape, **options)


def kernel_rows() -> list[Row]:
    rows = made("matrix product", "8192x8192x8192", "TFLOP/s", **{"torch.mm": 700})
    providers = ("atman (triton)", "k·m + SDPA cuDNN", "k·m + SDPA FLASH", "k·m + SDPA EFFICIENT")
    for kind, share in (("causal", 0.7), ("full", 1.0)):
        for dim, heads in ((64, 32), (128, 16), (256, 8)):
            for tokens in (512, 1024, 2048, 4096, 8192, 16384):
                speed = 700 * share * math.log2(tokens) / 14
                numbers = {name: speed * (1 - 0.1 * i) for i, name in enumerate(providers)}
                if tokens in (2048, 8192):
                    numbers["FlexAttention"] = 0.5 * speed
                numbers["eager, modifier matrix"] = 0.05 * speed
                rows += made(
                    f"attention forward, {kind}, one key per row, min_shift",
                    f"B{16384 // tokens}-Hq{heads}-Hk{heads}-T{tokens}-D{dim}",
                    "TFLOP/s",
                    **numbers,
                )
    return rows


def explain_rows() -> list[Row]:
    rows = []
    for size, model in ((1.0, "llama-1B"), (6.0, "llama-6B")):
        numbers = {
            "exact": 3 * size,
            "direct": 0.1 * size,
            "exact without target_logits (128 of 1024 units, scaled)": 9 * size,
            "exact without batching (32 of 1024 units, scaled)": 30 * size,
            "exact without shared_prefix (128 of 1024 units, scaled)": 6 * size,
            "eager loop, full logits (10 of 1024 units, scaled)": 160 * size,
        }
        rows += made(EXPLAINED, f"{model}-prompt1024-target4", "s", **numbers)
        shape = f"{model}-prompt1024-new64-units20-every1"
        rows += made(LIVE_WHAT, shape, "tokens/s", **{PLAIN: 60 / size, LIVE: 45 / size})
    return rows


def long_rows() -> list[Row]:
    rows = []
    for mode, slower in (("multiplicative", 1.0), ("min_shift", 1.1)):
        what = f"attention forward, causal, long, {mode}"
        for tokens in (1 << 16, 1 << 18, 1 << 20):
            shape = f"B1-Hq8-Hk2-T{tokens}-D128"
            rows += made(what, shape, "ms", **{"atman (auto)": slower * (tokens / 65536) ** 2})
            rows += made(what, shape, "GiB", **{"atman (auto)": tokens * 5e-6})
    what = "explanation of a long document, min_shift"
    for count in (1, 2, 4, 8, 16):
        for kind in ("shared", "copied") if count < 8 else ("shared",):
            name = f"direct, {count} chunks in a batch, prefix {kind}"
            memory = 1 + count * (0.01 if kind == "shared" else 4)
            for metric, number in (("s", 0.1 * count**0.5), ("GiB", memory)):
                rows += made(what, "llama-8B-layers32", metric, **{name: number})
    return rows


def test_kernels_have_a_panel_per_head_dim_and_direction() -> None:
    [(name, figure)] = list(gpu_plots.kernels(kernel_rows()))
    assert name == "kernels-forward-min_shift"
    panels = figure.axes
    titles = [axes.get_title() for axes in panels]
    assert len(panels) == 6 and titles[0] == "D 64, Hq 32, Hk 32, causal"
    ours, cudnn = panels[0].lines[:2]
    assert list(ours.get_xdata()) == [512, 1024, 2048, 4096, 8192, 16384]
    assert ours.get_ydata()[-1] == pytest.approx(490)
    assert cudnn.get_ydata()[-1] == pytest.approx(441)
    drawn = {line.get_color() for line in panels[0].lines}
    assert len(drawn) == 7  # five providers, eager, the matrix product: no colour twice
    legend = figure.legends[0]
    assert [text.get_text() for text in legend.get_texts()][-1] == "torch.mm"
    figure.canvas.draw()
    box = legend.get_window_extent()
    assert not any(box.overlaps(axes.get_window_extent()) for axes in panels)


def test_no_two_providers_look_alike() -> None:
    styles = list(gpu_plots.STYLES.values())
    assert len({marker for _, marker in styles if marker != "o"}) == len(styles) - 2
    assert len({colour for colour, _ in styles}) == len(styles)
    assert gpu_plots._style(OURS_HOPPER) == gpu_plots.STYLES[OURS_HOPPER]


def test_explanations_have_a_logarithmic_axis_and_live_citations() -> None:
    [(name, figure)] = list(gpu_plots.explain(explain_rows()))
    seconds, speeds = figure.axes[:2]
    assert name == "explain" and seconds.get_xscale() == "log"
    assert seconds.patches[0].get_width() == 3
    assert [patch.get_width() for patch in speeds.patches] == [60, 45]
    assert [text.get_text() for text in speeds.get_yticklabels()] == [
        "plain generation",
        "live citations",
    ]
    # rows of the benchmarks that run on a CPU are no explanations of this set
    assert not list(gpu_plots.explain(made(EXPLAINED, "llama-34M", "ms", atman=1)))


def test_long_inputs_show_time_and_memory() -> None:
    [(name, figure)] = list(gpu_plots.long(long_rows()))
    time, memory, seconds, peaks = figure.axes
    assert name == "long"
    assert list(time.lines[0].get_xdata()) == [1 << 16, 1 << 18, 1 << 20]
    assert [text.get_text() for text in time.get_xticklabels()] == ["64k", "256k", "1M"]
    assert memory.lines[0].get_ydata()[-1] == pytest.approx((1 << 20) * 5e-6, rel=1e-4)
    assert list(seconds.lines[0].get_xdata()) == [1, 2, 4, 8, 16]
    assert list(peaks.lines[1].get_xdata()) == [1, 2, 4]  # copies ran out of memory


def test_pictures_are_drawn_again_from_a_csv(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [*kernel_rows(), *explain_rows(), *long_rows()]
    old = [dataclasses.replace(row, median=1.0) for row in rows]
    path = write_rows(old, tmp_path)
    write_rows(rows, tmp_path)
    read = gpu_plots.read_rows(path)
    assert read == [*old, *rows]
    assert gpu_plots.latest(read) == rows
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    job = scaling.jobs_of([scaling.SHAPES["llama-1M"]], (16,), scaling.BATCHES, device="cpu")[0]
    scaling.write(
        [scaling.summarised(job, [Found(1e8, 2.0, 3.0, "A chip")])],
        tmp_path / "scaling.csv",
    )
    gpu.main(["plot", "--out", str(tmp_path)])
    pictures = sorted(each.name for each in tmp_path.glob("*.png"))
    assert [name.split("-")[0] for name in pictures] == ["explain", "kernels", "long", "scaling"]
    said = capsys.readouterr().out
    assert all(name in said for name in pictures)


def test_without_matplotlib_rows_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_rows(long_rows(), tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert gpu.draw(tmp_path, [path]) == []
    assert "no pictures: matplotlib is not installed" in capsys.readouterr().err
