"""The benchmarks in small: the baseline is right, and wrong results are refused."""

import csv
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from atman_triton.kernels.reference import attention_reference
from atman_triton.testing import assert_close_to_oracle
from bench import harness, test_bench_attention, test_bench_explain
from bench.eager import attention_eager, modifier_matrix
from bench.explaining import LlamaShape

CPU = torch.device("cpu")
TINY = LlamaShape("llama-tiny", 32, 2, 4, 2, 48, vocabulary=101)


class StandIn:
    """The benchmark fixture as far as the harness uses it; xdist switches the real one off."""

    def pedantic(self, target: Any, *, args: Any, setup: Any, rounds: int, iterations: int) -> None:
        assert iterations == 1
        for _ in range(rounds):
            setup()
            target(*args)


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> list[harness.Row]:
    """Rows that a benchmark would have written."""
    written: list[harness.Row] = []
    for module in (test_bench_attention, test_bench_explain):
        monkeypatch.setattr(module, "write_rows", written.extend)
        monkeypatch.setattr(module, "DEVICE", CPU)
        monkeypatch.setattr(module, "DTYPE", torch.float32, raising=False)
    return written


@pytest.mark.parametrize("mode", ["multiplicative", "min_shift", "log_additive"])
def test_eager_baseline_is_the_oracle(mode: str) -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, 9, 16, generator=generator, dtype=torch.float64)
    key, value = torch.randn(2, 2, 2, 9, 16, generator=generator, dtype=torch.float64)
    factor = torch.rand(2, 9, generator=generator, dtype=torch.float64) + 0.1
    visible = torch.ones(9, 9, dtype=torch.bool).tril()
    oracle = attention_reference(query, key, value, factor, mode=mode, causal=True)[0]
    matrix = modifier_matrix(factor, 9)
    out = attention_eager(query, key, value, matrix, mode=mode, visible=visible)
    plain = attention_eager(query, key, value, None, mode=mode, visible=visible)
    torch.testing.assert_close(out, oracle, rtol=0, atol=1e-12)
    assert (plain - oracle).abs().max() > 1e-3
    query, key, value = query.float(), key.float(), value.float()
    assert_close_to_oracle(
        attention_eager(query, key, value, matrix, mode=mode, visible=visible),
        attention_reference(query, key, value, factor.float(), mode=mode, causal=True)[0],
        oracle,
    )


@pytest.mark.parametrize("mode", ["multiplicative", "min_shift", "log_additive"])
def test_attention_benchmark_runs(rows: list[harness.Row], mode: str) -> None:
    shape = test_bench_attention.Shape(2, 4, 2, 24, 16)
    test_bench_attention.test_forward(StandIn(), shape, mode)
    expected = {"multiplicative": 3, "min_shift": 2, "log_additive": 3}[mode]
    assert len(rows) == expected
    assert all(row.median > 0 and row.p20 <= row.median <= row.p80 for row in rows)


def test_explanation_benchmark_runs(
    rows: list[harness.Row], capsys: pytest.CaptureFixture[str]
) -> None:
    case = test_bench_explain.Case(TINY, torch.float32, 12, 2, 6)
    test_bench_explain.test_explanation(StandIn(), case)
    assert [row.provider for row in rows] == [
        "atman exact",
        "atman direct",
        "eager loop, full logits (6 of 12 units, scaled)",
    ]
    assert "faster than the loop: exact" in capsys.readouterr().out
    too_much = dataclasses.replace(case, direct=1e9)
    with pytest.raises(AssertionError, match=r"direct: .*x is below 1e\+09x"):
        test_bench_explain.test_explanation(StandIn(), too_much)


def test_a_wrong_provider_is_not_timed() -> None:
    truth = torch.linspace(0, 1, 8, dtype=torch.float64)
    eager = truth.float()
    calls: list[str] = []
    with pytest.raises(AssertionError, match="rival: error 1"):
        harness.interleave(
            StandIn(),
            "ours",
            {"ours": lambda: calls.append("ours"), "rival": lambda: calls.append("rival")},
            outputs={"ours": eager, "rival": eager + 0.1},
            eager=eager,
            oracle=truth,
            device=CPU,
        )
    assert calls == []


def test_rivals_take_turns() -> None:
    truth = torch.zeros(1, dtype=torch.float64)
    names = ["ours", "one", "two"]
    calls: list[str] = []
    times = harness.interleave(
        StandIn(),
        "ours",
        {name: lambda name=name: calls.append(name) for name in names},
        outputs=dict.fromkeys(names, truth.float()),
        eager=truth.float(),
        oracle=truth,
        device=CPU,
        rounds=8,
    )
    turns = [calls[i : i + 3] for i in range(0, len(calls), 3)]
    assert all(sorted(turn) == sorted(names) for turn in turns)
    assert len({tuple(turn) for turn in turns}) > 1
    assert [len(spent) for spent in times.values()] == [8, 8, 8]


def test_rows_are_appended_under_one_header(tmp_path: Path) -> None:
    rows = harness.summarise(
        {"ours": [1.0, 2.0, 6.0], "rival": [4.0, 4.0, 4.0]},
        what="a test",
        shape="T3",
        dtype=torch.bfloat16,
        device=CPU,
    )
    assert (rows[0].median, rows[0].p20, rows[0].p80) == (2.0, 1.4, 4.4)
    path = harness.write_rows(rows, tmp_path)
    assert harness.write_rows(rows[:1], tmp_path) == path
    with path.open(newline="") as file:
        read = list(csv.DictReader(file))
    assert [row["provider"] for row in read] == ["ours", "rival", "ours"]
    assert list(read[0]) == [field.name for field in dataclasses.fields(harness.Row)]
    assert read[0]["dtype"] == "bfloat16" and read[0]["torch"] == harness.version_of("torch")
    assert "2.00x ours" in harness.report(rows, "ours")
