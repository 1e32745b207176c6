"""The table of backends, filled from results: what is taken, what is refused, what stays."""

import csv
import dataclasses
from pathlib import Path

import pytest
import torch

from atman_triton import backend_table as table
from bench import backend_table, rivals
from bench.harness import Row

OURS, PORTABLE = rivals.OURS, rivals.OURS_PORTABLE
BARE = Row(
    what="attention forward, causal, one key per row, multiplicative",
    provider=OURS,
    shape="B2-Hq16-Hk16-T8192-D128",
    dtype="bfloat16",
    metric="ms",
    median=2.5,
    p20=2.4,
    p80=2.6,
    device="Made GPU",
    torch="2.11.0+cu130",
    triton="3.6.0",
    transformers="5.17.0",
    commit="0123456789",
    date="2026-01-02",
)


def row(provider: str = OURS, **changes: object) -> Row:
    return dataclasses.replace(BARE, provider=provider, **changes)


def pair(times: tuple[float, float] = (2.5, 2.0), **changes: object) -> list[Row]:
    """Of the fused kernels and of scaled keys."""
    return [
        row(name, median=milliseconds, **changes)
        for name, milliseconds in zip((OURS, PORTABLE), times, strict=True)
    ]


def results(folder: Path, *rows: Row) -> Path:
    path = folder / "made-gpu.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(Row)])
        writer.writeheader()
        writer.writerows(dataclasses.asdict(each) for each in rows)
    return path


def fill(folder: Path, *rows: Row) -> list[table.MeasuredRow]:
    """Run the command on a table that may be there already; its rows afterwards."""
    path = folder / "table.csv"
    if not path.exists():
        table.write_table([], path)
    backend_table.main([str(results(folder, *rows)), "--table", str(path)])
    return table.read_table(path)


def test_a_gpu_times_the_backend_itself() -> None:
    """Not only what it would call: with scaled keys, the one way in which it is fast there."""
    offers = {
        mode: rivals.providers(mode, True, torch.device("cuda"))
        for mode in ("multiplicative", "min_shift", "log_additive")
    }
    assert [mode for mode, offer in offers.items() if PORTABLE in offer] == ["multiplicative"]
    assert all(OURS in offer for offer in offers.values())


def test_rows_of_our_backends_are_taken(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    others = [
        row("k·m + SDPA cuDNN"),
        row("torch.mm", what="matrix product", metric="TFLOP/s"),
        row(metric="TFLOP/s"),
        row(PORTABLE, what="attention forward, causal, multiplicative"),  # of another benchmark
        row("atman (auto)"),
        row("atman (reference)"),
    ]
    fused, portable = sorted(fill(tmp_path, *others, *pair()), key=lambda each: -each.milliseconds)
    assert fused == table.MeasuredRow(
        device="Made GPU",
        triton="3.6",
        torch="2.11",
        dtype="bfloat16",
        head_dim=128,
        value_dim=128,
        mode="multiplicative",
        factors="one key per row",
        causal=True,
        grouped=False,
        direction="forward",
        queries=8192,
        tokens=8192,
        shape="B2-Hq16-Hk16-T8192-D128",
        backend="triton",
        milliseconds=2.5,
        commit="0123456789",
        date="2026-01-02",
    )
    assert portable == dataclasses.replace(fused, backend="torch", milliseconds=2.0)
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("2 rows of 1 setups in ")
    assert said[1] == (
        "  B2-Hq16-Hk16-T8192-D128 forward, causal, one key per row, multiplicative: "
        "torch of triton 2.5 ms, torch 2 ms"
    )


def test_rows_of_the_hopper_kernel_are_taken(tmp_path: Path) -> None:
    """And go where a later run has none of it, as when it could not run."""
    what = "attention forward, causal, one key per row, min_shift"
    gain = row(rivals.OURS_HOPPER, metric="times as fast as atman (triton)", median=1.25)
    shapes = {"shape": "B4-Hq16-Hk16-T4096-D128"}, {}
    for changes in shapes:
        some = [row(OURS, what=what, **changes), row(rivals.OURS_HOPPER, median=2.0, what=what)]
        found = fill(tmp_path, some[0], dataclasses.replace(some[1], **changes), gain)
    assert sorted((each.tokens, each.backend, each.milliseconds) for each in found) == [
        (4096, "hopper", 2.0),
        (4096, "triton", 2.5),
        (8192, "hopper", 2.0),
        (8192, "triton", 2.5),
    ]
    again = {"commit": "1123456789"}
    found = fill(tmp_path, *pair(**again), row(OURS, what=what, **again))
    assert {(each.mode, each.tokens, each.backend) for each in found} == {
        ("min_shift", 4096, "hopper"),
        ("min_shift", 4096, "triton"),
        ("multiplicative", 8192, "torch"),
        ("multiplicative", 8192, "triton"),
    }


def test_kinds_of_calls_are_told_apart(tmp_path: Path) -> None:
    what = "attention forward + backward, full, every key and head, multiplicative"
    step = "attention decode B16, every key, multiplicative"
    found = fill(
        tmp_path,
        *pair(what=what, shape="B2-Hq32-Hk8-T8192-D64"),
        *pair(what=step, shape="B16-Hq32-Hk8-Tq1-T8192-D128"),
    )
    trained, stepped = (
        next(each for each in found if each.backend == "triton" and each.queries == queries)
        for queries in (8192, 1)
    )
    assert (trained.direction, trained.causal, trained.grouped) == (table.BOTH, False, True)
    assert (trained.factors, trained.head_dim, trained.tokens) == (table.PER_HEAD, 64, 8192)
    assert (stepped.direction, stepped.causal, stepped.factors) == (
        table.FORWARD,
        False,
        "every key",
    )
    assert (stepped.queries, stepped.tokens) == (1, 8192)


REFUSED = {
    "device": (row(device=""), "device must be known, got ''"),
    "commit": (row(commit="unknown"), "commit must be known, got 'unknown'"),
    "date": (row(date=""), "date must be known, got ''"),
    "cpu": (row(device="A Processor, 2 threads"), "device must be a GPU, got 'A Processor, 2 thr"),
    "triton": (row(triton="none"), "triton must be a version, got 'none'"),
    "torch": (row(torch=""), "torch must be a version, got ''"),
    "shape": (row(shape="8192"), "shape must read as B1-Hq2-Hk2-T64-D64, got '8192'"),
    "toy": (row(shape="B1-Hq1-Hk1-T32-D16"), "shape must not be a toy's"),
    "median": (row(median=0.0), "median must be greater than 0 ms, got '0.0'"),
    "nan": (row(median=float("nan")), "median must be greater than 0 ms, got 'nan'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_rows_without_what_it_needs_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture, name: str
) -> None:
    bad, complaint = REFUSED[name]
    before = fill(tmp_path, *pair())
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        fill(tmp_path, *pair((1.0, 3.0)), bad)
    assert ended.value.code == 2
    assert f"line 4: {complaint}" in capsys.readouterr().err.replace("\n", " ")
    assert table.read_table(tmp_path / "table.csv") == before


def test_files_that_hold_nothing_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        fill(tmp_path, row())  # one backend compares nothing
    assert "no setup in which two of our backends were timed" in capsys.readouterr().err
    path = results(tmp_path)
    path.write_text("what,provider\n")
    with pytest.raises(SystemExit):
        backend_table.main([str(path)])
    assert "must have the columns of bench/gpu.py, but shape, dtype" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        backend_table.main([str(tmp_path / "none.csv")])
    assert "No such file" in capsys.readouterr().err


def times_of(rows: list[table.MeasuredRow], **wanted: object) -> dict[str, float]:
    return {
        each.backend: each.milliseconds
        for each in rows
        if all(getattr(each, name) == value for name, value in wanted.items())
    }


def test_other_devices_versions_and_setups_stay(tmp_path: Path) -> None:
    fill(tmp_path, *pair(device="Other GPU"), *pair(), *pair(triton="3.7.1"))
    longer = "B1-Hq16-Hk16-T16384-D128"
    found = fill(tmp_path, *pair((1.0, 3.0), date="2026-02-03"), *pair((4.0, 5.0), shape=longer))
    old, new = {"triton": 2.5, "torch": 2.0}, {"triton": 1.0, "torch": 3.0}
    assert times_of(found, device="Other GPU") == old
    assert times_of(found, device="Made GPU", triton="3.7") == old
    assert times_of(found, device="Made GPU", triton="3.6", tokens=8192) == new
    assert times_of(found, tokens=16384) == {"triton": 4.0, "torch": 5.0}
    assert len(found) == 8


def test_the_last_run_of_a_setup_counts(tmp_path: Path) -> None:
    later = pair((1.0, 3.0), commit="abcdefabcd", date="2026-02-03")
    assert times_of(fill(tmp_path, *pair(), *later)) == {"triton": 1.0, "torch": 3.0}
    # half of a run is not set beside half of another
    with pytest.raises(SystemExit):
        fill(tmp_path, *pair(), later[0])
