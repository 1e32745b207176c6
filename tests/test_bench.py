"""The benchmarks in small: the baseline is right, and wrong results are refused."""

import csv
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from atman_triton.engine import Unit
from atman_triton.kernels.reference import attention_reference
from atman_triton.testing import assert_close_to_oracle
from bench import (
    allocations,
    explain_scaling,
    gpu,
    gpu_long,
    gpu_memory,
    harness,
    many_targets,
    memory,
    products,
    savings,
    test_bench_attention,
    test_bench_explain,
)
from bench.eager import attention_eager, modifier_matrix
from bench.explaining import LlamaShape, check, make_task, planned_tokens, spread
from bench.scaling_run import Found, Job

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


def read(folder: Path) -> list[dict[str, str]]:
    """The rows of the one file of results in a folder."""
    (path,) = folder.glob("*.csv")
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


# --- explanations -----------------------------------------------------------------------------


def test_the_loop_knows_direct_effects_from_total_ones() -> None:
    task = make_task(TINY.model(torch.float32, CPU), 24, [3])
    units = spread(24, 12)
    total, direct = task.scores(units), task.scores(units, "direct")
    check(task, {"total": (total, "total"), "direct": (direct, "direct")}, units)
    assert (total - direct).abs().max() > 1e-3
    with pytest.raises(AssertionError, match="swapped: error"):
        check(task, {"swapped": (total, "direct")}, units)


def test_units_are_spread_over_the_whole() -> None:
    assert spread(10, 4) == [0, 3, 6, 9]
    assert spread(3, 5) == [0, 1, 2]
    assert spread(9, 1) == [4]


def test_planned_tokens_are_those_that_are_run() -> None:
    task = make_task(TINY.model(torch.float32, CPU), 24, [3])
    for without in ((), ("shared_prefix",)):
        engine = task.engine(without)
        before = engine.record.tokens
        engine.perturb([Unit((unit,)) for unit in (5, 11, 23)])
        run = engine.record.tokens - before
        assert planned_tokens(task, [5, 11, 23], without) == run
    assert run == 3 * 26  # each from the start, without the last target token


def test_parameters_are_counted() -> None:
    model = TINY.model(torch.float32, CPU)
    assert TINY.parameters == sum(each.numel() for each in model.parameters())


def test_growth_is_measured_in_full_and_in_part(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--lengths", "12", "20", "--targets", "2", "--seconds", "0.1"]
    explain_scaling.main([*arguments, "--out", str(tmp_path)], TINY)
    rows = read(tmp_path)
    assert [row["provider"] for row in rows] == 2 * list(explain_scaling.METHODS)
    assert (tmp_path / "explain-scaling.png").stat().st_size > 10_000
    table = capsys.readouterr().out
    assert "\n     12 " in table and "\n     20 " in table and "~0" not in table
    part = tmp_path / "part"
    explain_scaling.main([*arguments, "--limit", "0", "--out", str(part)], TINY)
    assert read(part)[4]["provider"] == "exact (16 of 20 units, scaled)"
    assert read(part)[6]["provider"] == "hybrid 0.2 (4 of 4 units, scaled) + direct"
    assert "~0" in capsys.readouterr().out


def test_savings_are_left_out_one_by_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--prompt", "12", "--target", "2", "--targets", "3", "--seconds", "0.1"]
    savings.main([*sizes, "--out", str(tmp_path)], TINY)
    assert [(row["shape"], row["provider"]) for row in read(tmp_path)] == [
        ("llama-tiny-prompt12-target2", "all savings"),
        ("llama-tiny-prompt12-target2", "without target_logits"),
        ("llama-tiny-prompt12-target2", "without batching"),
        ("llama-tiny-prompt12-target2", "without shared_prefix"),
        ("llama-tiny-prompt12-target2", "without all"),
        ("llama-tiny-prompt12-target2x3", "all savings"),
        ("llama-tiny-prompt12-target2x3", "without one_pass"),
    ]
    assert "1.00x" in capsys.readouterr().out


def test_products_are_compared_where_they_differ(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = ["--prompt", "24", "--target", "2", "--seconds", "0.1", "--out", str(tmp_path)]
    monkeypatch.setattr(products, "helps", lambda: False)
    products.main(sizes, TINY)
    assert "nothing to compare" in capsys.readouterr().out and not list(tmp_path.iterdir())
    monkeypatch.setattr(products, "helps", lambda: True)
    products.main(sizes, TINY)
    assert [(row["shape"], row["provider"]) for row in read(tmp_path)] == [
        (f"llama-tiny-prompt24-target2-{effect}", provider)
        for effect in ("exact", "direct")
        for provider in ("oneDNN", "MKL")
    ]


def test_many_targets_are_one_call(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = ["--prompt", "24", "--classes", "9", "--branches", "3", "--seconds", "0.1"]
    arguments = [*sizes, "--out", str(tmp_path)]
    many_targets.main(arguments, TINY)
    assert [row["provider"] for row in read(tmp_path)] == [
        "one call, 9 targets",
        "2 single calls",
        "one call, 3 targets",
        "3 single calls",
    ]
    assert "the one call takes" in capsys.readouterr().out
    monkeypatch.setattr(many_targets, "measure", lambda *_: (rows_of(1.0, 1.0), 1.0))
    assert many_targets.main(arguments, TINY) == 1
    assert "must be cheaper" in capsys.readouterr().err


def rows_of(*medians: float) -> list[harness.Row]:
    """Rows of made-up numbers."""
    times = {f"provider {place}": [median] for place, median in enumerate(medians)}
    return harness.summarise(times, what="w", shape="s", dtype=torch.float32, device=CPU)


# --- memory -----------------------------------------------------------------------------------


def test_peaks_count_every_allocation() -> None:
    kibi = torch.zeros(256)  # 1 KiB

    def call() -> torch.Tensor:
        both = kibi.repeat(4) + kibi.repeat(4)  # three of 4 KiB at once
        return both[:1].clone()

    peak, result = allocations.peak_of(call, CPU)
    assert 3 * 4096 <= peak.bytes < 3 * 4096 + 256
    assert result.nbytes <= peak.kept < 256
    assert peak.standing[0][0] == 2 * 4096 and "repeat" in peak.standing[0][1]
    assert sum(size for size, _ in peak.standing) == peak.bytes


def test_the_resident_peak_sees_what_is_given_back() -> None:
    peak, _ = allocations.resident_peak(lambda: torch.ones(1 << 24).sum())
    assert abs(peak - (1 << 26)) < 1 << 21


def test_activations_are_set_beside_a_plain_forward(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["activations", "--lengths", "96", "--out", str(tmp_path)]
    shape = dataclasses.replace(TINY, inner=512)  # else scores are the widest
    assert memory.main(arguments, shape) == 0
    assert [row["provider"] for row in read(tmp_path)] == [
        "plain forward",
        "base run",
        "exact perturbation",
        "direct perturbation",
    ]
    assert "96 base run" in capsys.readouterr().out
    monkeypatch.setattr(memory, "LIMIT", 0.01)
    assert memory.main(arguments, shape) == 1
    assert "above 0.01: exact perturbation" in capsys.readouterr().err


def test_a_batch_behind_a_prefix_and_a_long_document(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--tokens", "2048", "--units", "4"]
    arguments = ["prefix", "long", *sizes, "--no-times", "--out", str(tmp_path)]
    assert memory.main(arguments, TINY) == 0
    rows = {(row["what"].split()[0], row["provider"]): row for row in read(tmp_path)}
    copies = float(rows["peak", "copies for direct"]["median"])
    assert copies == pytest.approx(16 * 2 * 4 * 2 * 8 * 2047 / 2**20, abs=1e-4)
    assert {row["metric"] for row in rows.values()} == {"MiB"}
    assert {name for what, name in rows if what == "explanation"} == {"base run", "direct", "exact"}
    with pytest.raises(SystemExit, match="2"):
        memory.main(["everything"])
    assert "tables are activations, prefix and long, got everything" in capsys.readouterr().err


def test_spans_cover_the_prompt() -> None:
    positions = [place for unit in memory.spans(100, 7) for place in unit.positions]
    assert positions == list(range(100))


# --- the script for GPUs ----------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(gpu.SETS))
def test_gpu_sets_run_in_toy_sizes(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu.main([name, "--tiny", "--traces", "--out", str(tmp_path)])
    column = "method" if name == "memory" else "provider"
    providers = [row[column] for row in read(tmp_path)]
    expected = {
        "correctness": ["pytest", "pytest -m gpu"],
        "memory": ["plain forward", "AtMan exact", "AtMan direct", "Chefer"],
        "kernels": ["torch.mm", "atman (triton)", "k·m + SDPA MATH", "FlexAttention"],
        "explain": [
            "exact",
            "direct",
            "eager loop, full logits (3 of 24 units, scaled)",
            "generate",
            "generate_explained",
            "generate, static cache, compiled",
            "exact, 12 units from the middle on, 1 batch",
            "generate_explained, 3 tokens",
        ],
        "long": ["atman (auto)", "direct, 2 chunks in a batch, prefix copied"],
    }
    assert set(expected[name]) <= set(providers)
    assert f"{name} on" in capsys.readouterr().out
    traces = {path.name for path in (tmp_path / "traces").glob("*")}
    assert ("llama-toy-prompt24-target2-direct.json.gz" in traces) == (name == "explain")


def test_a_wrong_long_call_is_refused() -> None:
    inputs = gpu_long.call_inputs(96, (4, 2, 16), torch.float32, CPU)
    wrong = torch.zeros_like(inputs[0])
    with pytest.raises(AssertionError, match="min_shift, 96 tokens: error"):
        gpu_long.check_last_rows(wrong, inputs, "min_shift")


def test_the_gpu_script_refuses_without_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        gpu.main(["long"])
    assert ended.value.code == 2
    assert "no GPU is here; --tiny runs the same code" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        gpu.main(["nothing"])
    assert ended.value.code == 2


def test_what_memory_does_not_allow_has_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(job: Job, model: object) -> Found:
        raise MemoryError

    monkeypatch.setattr(gpu_memory.scaling_run, "measured", full)
    rows, table = gpu_memory.run(CPU, True)
    assert {row.note for row in rows} == {"out of memory"} and {row.rounds for row in rows} == {1}
    assert "out of memory" in table
