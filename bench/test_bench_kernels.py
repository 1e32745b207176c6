"""The set ``kernels`` in small: rivals are right, wrong ones are not timed, nothing is dropped."""

import csv
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.attention.flex_attention as torch_flex
from torch import Tensor

if not torch.cuda.is_available():
    # Read by triton when a kernel is defined, so it must precede every import of our kernels.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from atman_triton.kernels.reference import attention_reference
from bench import gpu, gpu_kernels, kernel_table, rivals
from bench.gpu_kernels import MODES, TOY, Findings, Gate, Sizes, call_of, measure, require_close
from bench.kernel_cases import (
    EACH,
    HEADS,
    LENGTHS,
    PER_HEAD,
    TOY_CASES,
    Case,
    Factors,
    all_cases,
    decode_cases,
    inputs_of,
)

CPU = torch.device("cpu")
Offer = dict[str, rivals.Attention]
CASE = Case(1, 2, 2, 16, 16, backward=True)


def findings(case: Case, sizes: Sizes = TOY, stop: float = float("inf")) -> Findings:
    inputs = inputs_of(case, torch.float32, CPU)
    return measure(case, sizes, Gate(torch.float32, CPU), inputs, stop)


def offering(monkeypatch: pytest.MonkeyPatch, change: Callable[[str, Offer], Offer]) -> None:
    """Change what is offered to be timed, by mode."""

    def offer(mode: str, causal: bool, device: torch.device) -> Offer:
        return change(mode, rivals.providers(mode, causal, device))

    monkeypatch.setattr(gpu_kernels, "providers", offer)


def without_fused(_mode: str, offer: Offer) -> Offer:
    """Spare the interpreter."""
    return {name: attend for name, attend in offer.items() if name != rivals.OURS}


def test_the_set_runs_in_toy_sizes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gpu.main(["kernels", "--dry-run", "--out", str(tmp_path)])
    (path,) = tmp_path.glob("*.csv")
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[0]["provider"] == "torch.mm"
    timed = {(row["what"], row["provider"]) for row in rows if row["metric"] == "ms"}
    forward = "attention forward, causal, one key per row, multiplicative"
    fused = {forward.replace("multiplicative", mode) for mode in MODES}
    assert {(what, rivals.OURS) for what in fused} <= timed
    assert (forward, "k·m + SDPA MATH") in timed and (forward, rivals.FLEX) in timed
    both = "attention forward + backward, causal, every key and head, log_additive"
    assert {(both, name) for name in (rivals.OURS, "bias + SDPA MATH", rivals.EAGER)} <= timed
    step = "attention decode B1, one key per row, multiplicative"
    assert {(step, name) for name in (rivals.OURS, rivals.FLEX, "k·m + SDPA MATH")} <= timed
    rates = {row["metric"] for row in rows if row["what"] == step}
    assert rates == {"ms", "GB/s"}  # bytes are the work of a step
    assert len(rows) == 1 + 2 * len(timed)  # ms, and TFLOP/s or GB/s
    written = capsys.readouterr().out
    assert "FlexAttention does not support backward on CPU" in written
    table = written[written.index("torch.mm: ") :].splitlines()
    assert len(table) == 2 + 5 * len(gpu_kernels.TOY_CASES)


def test_nothing_is_dropped() -> None:
    case = Case(1, 2, 1, 16, 16, factors=PER_HEAD, flex=False)
    found = findings(case)
    offered = {(mode, name) for mode in MODES for name in rivals.providers(mode, True, CPU)}
    assert found.times.keys() | found.reasons.keys() == offered
    assert not found.times.keys() & found.reasons.keys()
    assert found.reasons["multiplicative", "k·m + SDPA MATH"].startswith("UnservedError: a key can")
    assert "compiles for long" in found.reasons["log_additive", rivals.FLEX]
    assert all(
        ": " in reason or reason == gpu_kernels._NO_FLEX for reason in found.reasons.values()
    )


def test_wrong_providers_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def change(mode: str, offer: Offer) -> Offer:
        right = offer[rivals.EAGER]

        def wrong_output(*tensors: Tensor) -> Tensor:
            calls.append("output")
            return right(*tensors) * 1.001

        def wrong_gradient(query: Tensor, key: Tensor, value: Tensor, factor: Tensor) -> Tensor:
            calls.append("gradient")
            return right(query, key, value, factor + 1e-3 * (factor - factor.detach()))

        def wrong_at_size(*tensors: Tensor) -> Tensor:
            return right(*tensors) * (1 if len(tensors[0]) == 2 else 1.001)

        wrong = {"o": wrong_output, "g": wrong_gradient, "s": wrong_at_size}
        return without_fused(mode, offer) | wrong

    offering(monkeypatch, change)
    found = findings(CASE, Sizes(least=3, most=3))
    for mode in MODES:
        assert found.reasons[mode, "o"].startswith("wrong: output: error")
        assert found.reasons[mode, "g"].startswith("wrong: dm: error")
        assert found.reasons[mode, "s"].startswith("wrong: output: error")
        assert len(found.times[mode, rivals.EAGER]) == 3
    assert sorted(calls) == 3 * ["gradient"] + 3 * ["output"]  # checked once, never timed


def test_it_fails_where_ours_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def change(mode: str, offer: Offer) -> Offer:
        wrong = rivals.atman("min_shift", True, "torch")
        swap = {rivals.OURS_PORTABLE: wrong} if mode == "multiplicative" else {}
        return without_fused(mode, offer | swap)

    offering(monkeypatch, change)
    monkeypatch.setattr(gpu_kernels, "TOY_CASES", (CASE,))
    with pytest.raises(SystemExit) as ended:
        gpu.main(["kernels", "--tiny"])
    assert "atman (torch) on B1-Hq2-Hk2-T16-D16 forward + backward" in str(ended.value.code)
    assert "multiplicative: wrong: output: error" in str(ended.value.code)
    assert "min_shift: wrong" not in str(ended.value.code)
    assert "  multiplicative                   -\n" in capsys.readouterr().out


def test_what_time_does_not_allow_is_named() -> None:
    _, table, *failures = gpu_kernels.run(CPU, True, sizes=Sizes(minutes=0))
    assert "not reached: 4 of 4 cases" in table and "full, every key: T24" in table
    assert failures == []
    found = findings(CASE, stop=0)
    assert found.times == {} and set(found.reasons.values()) == {"no time was left"}


def test_a_lost_device_ends_the_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(*_: Tensor) -> Tensor:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    offering(monkeypatch, lambda mode, offer: offer | {rivals.OURS: lost})
    rows, table, *failures = gpu_kernels.run(CPU, True, cases=[CASE])
    assert len(rows) == 1 and "not reached: 1 of 1 cases" in table
    assert len(failures) == 1 and "illegal memory access" in failures[0]


def test_memory_that_runs_out_is_a_reason() -> None:
    def call() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 64 GiB.")

    assert gpu_kernels.attempt(call) == (None, "out of memory")
    assert gpu_kernels.attempt(lambda: 3) == (3, None)
    with pytest.raises(KeyError):  # a mistake of ours is none
        gpu_kernels.attempt(lambda: {}["absent"])


@pytest.mark.parametrize("mode", ["multiplicative", "log_additive"])
@pytest.mark.parametrize("factors", [EACH, PER_HEAD])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_flex_attention_reaches_the_factor(
    monkeypatch: pytest.MonkeyPatch, mode: str, factors: Factors
) -> None:
    # Only this check keeps gradients from a CPU: FlexAttention's eager form has them.
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *_: None)
    case = Case(2, 4, 2, 32, 16, backward=True, factors=factors)
    inputs = inputs_of(case, torch.float32, CPU)

    def oracle(query: Tensor, key: Tensor, value: Tensor, factor: Tensor) -> Tensor:
        return attention_reference(query, key, value, factor, mode=mode, causal=True)[0]

    truth = call_of(oracle, [each.double() for each in inputs], True)()
    eager = call_of(rivals.eager(mode, True), inputs, True)()
    require_close(call_of(rivals.flex(mode, True), inputs, True)(), eager, truth)


def test_cases_cover_the_grid() -> None:
    steps = decode_cases()
    assert [case for case in all_cases() if case.queries is not None] == steps
    assert len(set(steps)) == len(steps) and {case.queries for case in steps} == {1}
    cases = [case for case in all_cases() if case not in steps]
    assert len(set(cases)) == len(cases) == 2 * 2 * len(LENGTHS) * len(HEADS) + 4
    assert all(case.batch * case.tokens == 16384 for case in cases)
    assert {case.heads * case.head_dim for case in cases} == {2048, 4096}
    grouped = [case for case in cases if case.heads != case.key_heads]
    assert {(case.heads, case.key_heads) for case in grouped} == {(32, 8)}
    # those that FlexAttention is compiled for come before the rest of the grid
    assert {case.head_dim for case in cases[:24] if case.flex} == {64, 128, 256}
    assert not any(case.flex for case in cases[24:])


def test_operations_are_counted_by_hand() -> None:
    full = Case(2, 4, 2, 8, 16, causal=False)
    assert full.flops == 2 * (2 * 2 * 4 * 8 * 8 * 16)  # QK and PV, a product and a sum each
    assert Case(2, 4, 2, 8, 16).flops == full.flops / 2
    assert Case(2, 4, 2, 8, 16, causal=False, backward=True).flops == 3.5 * full.flops


def test_bytes_of_a_step_are_counted_by_hand() -> None:
    step = Case(2, 4, 2, 8, 16, causal=False, queries=1)
    assert step.flops == 2 * (2 * 2 * 4 * 1 * 8 * 16)
    read = 2 * (2 * 2 * 8 * 16) * 2  # keys and values, two bytes each
    assert step.rate(1e-6, torch.float16) == (pytest.approx(read), "GB/s")  # bytes in a nanosecond
    query, key, _, _, gradient = inputs_of(step, torch.float32, CPU)
    assert query.shape == gradient.shape == (2, 4, 1, 16)
    assert key.shape == (2, 2, 8, 16)


def test_the_table_sets_ours_beside_the_best_rival() -> None:
    case = Case(1, 16, 16, 1024, 128)  # 4.29 GFLOP
    times = {
        ("multiplicative", rivals.OURS): [2.0, 1.0, 9.0],
        ("multiplicative", "k·m + SDPA cuDNN"): [1.0, 1.0, 1.0],
        ("multiplicative", "k·m + SDPA FLASH"): [3.0, 3.0, 3.0],
        ("min_shift", rivals.OURS): [3.0, 3.0, 3.0],
        ("min_shift", rivals.EAGER): [0.1, 0.1, 0.1],
    }
    cells = kernel_table.cells_of(case, Findings(times, {}), peak=8.6e12)
    assert cells == {
        "multiplicative": "2.15 25% 0.50c",
        "min_shift": "1.43 17% 1.50m",
        "log_additive": "-",
    }
    shorter = Case(2, 16, 16, 512, 128)
    table = kernel_table.table_of({case: cells, shorter: {"multiplicative": "1 2% 3.00x"}})
    assert table[1] == "Hq16-Hk16-D128 forward, causal, one key per row"
    assert table[2].split() == ["T512", "T1024"]
    assert table[3].split() == ["multiplicative", *"1 2% 3.00x".split(), *"2.15 25% 0.50c".split()]


# --- the Hopper kernel ----------------------------------------------------------------------------


def on_made_hopper(
    monkeypatch: pytest.MonkeyPatch, verdict: str | None, hopper: rivals.Attention | None = None
) -> None:
    """As if this were a Hopper GPU, with a verdict of the gate and another kernel in its place."""
    for module in (rivals, gpu_kernels):
        monkeypatch.setattr(module, "on_hopper", lambda device: True)
    monkeypatch.setattr(gpu_kernels, "verdict", lambda: verdict)

    def change(mode: str, offer: Offer) -> Offer:
        put = {} if hopper is None else {rivals.OURS_HOPPER: hopper}
        kept = (rivals.OURS, rivals.EAGER, rivals.OURS_HOPPER)
        return {name: attend for name, attend in (offer | put).items() if name in kept}

    offering(monkeypatch, change)


def test_the_hopper_kernel_is_offered_where_it_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    assert rivals.OURS_HOPPER not in rivals.providers("min_shift", True, CPU)
    monkeypatch.setattr(gpu_kernels, "on_hopper", lambda device: False)
    _, table, *failures = gpu_kernels.run(CPU, True, sizes=Sizes(minutes=0))
    assert "atman (hopper) is left out: it needs a Hopper GPU (sm_90)" in table and not failures
    on_made_hopper(monkeypatch, None)
    assert rivals.OURS_HOPPER in rivals.providers("min_shift", True, CPU)


def test_a_hopper_kernel_that_hangs_fails_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def hangs(*_: Tensor) -> Tensor:
        raise NotImplementedError("it must not be launched")

    on_made_hopper(monkeypatch, "failed before: no answer within 90 s", hangs)
    monkeypatch.setattr(gpu_kernels, "TOY_CASES", gpu_kernels.TOY_CASES[:2])
    with pytest.raises(SystemExit) as ended:
        gpu.main(["kernels", "--tiny", "--out", str(tmp_path)])
    told = "kernels: atman (hopper) failed before: no answer within 90 s"
    assert ended.value.code == f"FAILED\n{told}"  # once, and nothing else
    (path,) = tmp_path.glob("*.csv")
    with path.open(newline="") as file:
        timed = {row["provider"] for row in csv.DictReader(file)}
    assert timed == {"torch.mm", rivals.OURS, rivals.EAGER}
    written = capsys.readouterr().out
    assert "  atman (hopper): failed before: no answer within 90 s [6: B1-Hq1" in written


def test_what_the_hopper_kernel_refuses_is_no_failure() -> None:
    gpu_device, refused = torch.device("cuda"), {}
    saves = "ValueError: backend='hopper' saves no row minima; use backend='torch'."
    fails = gpu_kernels.fails
    assert not fails(rivals.OURS_HOPPER, saves, gpu_device, refused)
    assert not fails(rivals.OURS_HOPPER, "no time was left", gpu_device, refused)
    assert fails(rivals.OURS, saves, gpu_device, refused)
    for reason in ("RuntimeError: PassManager::run failed", "wrong: output: error"):
        assert fails(rivals.OURS_HOPPER, reason, gpu_device, refused)
        assert not fails(rivals.OURS_HOPPER, reason, gpu_device, {rivals.OURS_HOPPER: "hangs"})
        assert not fails(rivals.FLEX, reason, gpu_device, refused)
    assert not fails(rivals.OURS, "RuntimeError: no triton", CPU, refused)


def test_the_refused_direction_is_the_backend_s_own_reason() -> None:
    """What is no failure begins as the op's refusals do."""
    with pytest.raises(ValueError, match=r"^backend='hopper' ") as told:
        rivals.atman("min_shift", True, "hopper")(*inputs_of(CASE, torch.float32, CPU)[:4])
    assert f"ValueError: {told.value}".startswith(gpu_kernels._NOT_SERVED)


def test_the_hopper_kernel_is_set_beside_the_portable_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = Case(1, 16, 16, 1024, 128)  # 4.29 GFLOP
    times = {
        ("multiplicative", rivals.OURS): [2.0],
        ("multiplicative", rivals.OURS_HOPPER): [1.0],
        ("multiplicative", "k·m + SDPA cuDNN"): [1.5],
        ("min_shift", rivals.OURS): [2.0],
        ("min_shift", rivals.OURS_HOPPER): [2.5],
        ("log_additive", rivals.OURS_HOPPER): [4.0],
    }
    found = Findings(times, {})
    cells = kernel_table.cells_of(case, found, peak=8.6e12)
    assert cells["multiplicative"] == "4.29h 50% 1.50c"
    assert cells["min_shift"] == "2.15 25% 2.00m"  # of each mode the faster of ours
    assert cells["log_additive"] == "1.07h 12%"
    table = kernel_table.table_of({case: cells})
    beside = [line.split() for line in table if line.startswith("    triton/hopper")]
    assert beside == [["triton/hopper", "2.00"], ["triton/hopper", "0.80", "SLOWER"]]
    rows = list(gpu_kernels.rows_of(case, found, torch.bfloat16, CPU))
    gains = [row for row in rows if row.metric == "times as fast as atman (triton)"]
    assert [(row.provider, row.median) for row in gains] == [
        (rivals.OURS_HOPPER, 2.0),
        (rivals.OURS_HOPPER, 0.8),
    ]
    assert kernel_table.never_slower([]) == []
    told = kernel_table.never_slower([("a", 2.0), ("b", 1.0)])
    assert told == ["atman (hopper) is never slower than atman (triton): 2 cases"]
    told = kernel_table.never_slower([("a", 2.0), ("b", 0.9), ("c", 0.8)])
    title = "atman (hopper) is SLOWER than atman (triton) in 2 of 3 cases:"
    assert told == [title, "  0.80 c", "  0.90 b"]


def test_the_set_tells_where_the_hopper_kernel_is_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    on_made_hopper(monkeypatch, None, rivals.atman("multiplicative", True, "torch"))
    monkeypatch.setattr(gpu_kernels, "hopper_gain", lambda medians: 0.5)
    rows, table, *failures = gpu_kernels.run(CPU, True, cases=[TOY_CASES[0]])
    assert {row.provider for row in rows} >= {rivals.OURS_HOPPER, rivals.OURS}
    assert "is SLOWER than atman (triton) in 3 of 3 cases:\n  0.50 B1-Hq1-Hk1-T32-D16" in table
    # the same kernel in every mode is wrong in two of them
    assert len(failures) == 2 and all("wrong: output" in failure for failure in failures)
