"""The set ``correctness`` of bench/gpu.py: which tests it runs, how long, and what it reports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bench import gpu, gpu_correctness, hopper_gate


def test_failed_gpu_tests_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_some.py").write_text(
        "import pytest\npytestmark = pytest.mark.gpu\n"
        "def test_good(): pass\ndef test_bad(): assert False\n"
        "@pytest.mark.skip\ndef test_left(): pass\n"
    )
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: here\n")
    monkeypatch.setattr(gpu_correctness, "ROOT", tmp_path)
    files = gpu_correctness.files_of("test_*.py")
    found = gpu_correctness.outcome(files, ["-m", "gpu"], 60.0)
    assert (found.passed, found.skipped) == (1, 1)
    assert found.failed == ("tests.test_some::test_bad",)
    late = gpu_correctness.outcome(files, [], 0.01)
    assert late.failed[-1] == "was stopped after 0 s"  # whatever it had done by then
    (tmp_path / "tests" / "test_some.py").write_text("# pytest.mark.gpu\nimport nowhere\n")
    assert gpu_correctness.outcome(files, [], 60.0).failed


def test_tests_that_hang_are_counted_as_far_as_they_came(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "test_some.py").write_text(
        "import time\ndef test_good(): time.sleep(0.01)\ndef test_hangs(): time.sleep(600)\n"
    )
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    monkeypatch.setattr(gpu_correctness, "ROOT", tmp_path)
    found = gpu_correctness.outcome([tmp_path / "test_some.py"], [], 6.0)
    assert found.failed[-1] == "was stopped after 6 s" and found.passed == 1


@pytest.mark.parametrize("verdict", [None, "failed before: no answer within 90 s"])
def test_what_runs_on_a_hopper_gpu(monkeypatch: pytest.MonkeyPatch, verdict: str | None) -> None:
    started: list[tuple[set[str], tuple[str, ...]]] = []

    def outcome(files: list[Path], words: list[str], *_: Any) -> gpu_correctness.Counts:
        started.append(({path.name for path in files}, tuple(words)))
        return gpu_correctness.Counts(3, 0, (), 1.0)

    monkeypatch.setattr(gpu_correctness, "on_hopper", lambda device: True)
    monkeypatch.setattr(gpu_correctness, "verdict", lambda: verdict)
    monkeypatch.setattr(gpu_correctness, "outcome", outcome)
    monkeypatch.setattr(gpu_correctness, "summarise", lambda *_, **__: [])
    _, table, *failures = gpu_correctness.run(torch.device("cuda"), False)
    (anywhere, words), (marked, selected), *_ = started
    own = {"test_hopper.py", "test_hopper_backend.py"}
    assert {"test_persistent.py", "test_tuned.py"} <= anywhere
    assert own <= anywhere if verdict is None else not own & anywhere
    assert {"test_gpu.py", "test_forward.py"} <= marked and selected[:2] == ("-m", "gpu")
    assert "-k" not in words and "-m" not in words
    told = [] if verdict is None else [f"atman (hopper) {verdict}"]
    assert failures == told and ("left out" in table) == (verdict is not None)


def test_correctness_ends_inside_ten_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]

    def outcome(files: object, words: object, seconds: float, *_: Any) -> gpu_correctness.Counts:
        clock[0] += seconds + gpu_correctness._GRACE  # all are stopped
        return gpu_correctness.Counts(1, 0, (), seconds)

    def late() -> str:
        clock[0] += 90
        return "hangs"

    monkeypatch.setattr(gpu_correctness.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(gpu_correctness.shutil, "which", lambda name: name)
    monkeypatch.setattr(gpu_correctness, "on_hopper", lambda device: True)
    monkeypatch.setattr(gpu_correctness, "verdict", late)
    monkeypatch.setattr(gpu_correctness, "outcome", outcome)
    monkeypatch.setattr(gpu_correctness, "summarise", lambda *_, **__: [])
    *_, last, after = gpu_correctness.run(torch.device("cuda"), False)
    assert clock[0] < 595
    assert last == "compute-sanitizer memcheck: no time was left"
    assert after == "compute-sanitizer racecheck: no time was left"


def test_auto_is_kept_from_a_kernel_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before any set, and the script fails with the reason."""
    began: list[str] = []

    def run(*_: object) -> tuple[list[object], str]:
        assert began == ["gate"]
        return [], "a table"

    def shut_out(device: torch.device) -> list[str]:
        began.append("gate")
        return ["atman (hopper): hangs"]

    monkeypatch.setattr(hopper_gate, "shut_out_of_auto", shut_out)
    monkeypatch.setitem(gpu.SETS, "long", gpu.Set(run, "made"))
    with pytest.raises(SystemExit) as ended:
        gpu.main(["long", "--tiny"])
    assert ended.value.code == "FAILED\natman (hopper): hangs"
