"""The gate before the Hopper kernel: what it says of commands that hang, fail or are wrong, what it
checks, and what tests and ``auto`` make of its verdict. Without a GPU."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="the fused kernels need triton")
pytest.importorskip("triton.experimental.gluon", reason="the Hopper kernel needs Gluon")

from gluon_emulator.interpreter import emulated

from atman_triton import backend_registry, backend_table
from atman_triton.kernels import hopper
from bench import hopper_gate
from bench.apart import run_apart
from bench.hopper_gate import CASES, RIGHT, VERDICT, GateCase, ask

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
EMULATED = not torch.cuda.is_available()


def python(text: str) -> list[str]:
    return [sys.executable, "-c", text]


GOOD = python(f"print('a case:'); print('{RIGHT}')")


def test_a_right_kernel_passes():
    assert ask([GOOD, GOOD]) is None


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("print('wrong: output: error 1e-1, allowed 1e-3'); raise SystemExit(1)", "exit code 1 at"),
        ("raise ValueError('no such kernel')", "ValueError: no such kernel"),
        ("import os; print('a case:', flush=True); os.abort()", "exit code -6 at a case:"),
        ("print('a case:')", "did not say that the numbers are right, but: a case:"),
        ("pass", "did not say that the numbers are right, but: its start"),
        (f"print('{RIGHT}'); print('wrong')", f"but: {RIGHT} wrong"),
    ],
)
def test_what_fails_is_named(command, said):
    reason = ask([GOOD, python(command)])
    assert reason is not None and reason.startswith("failed before anything was run with it: ")
    assert said in reason


def test_what_hangs_is_ended_and_named():
    """Also what it started, which would keep the GPU."""
    child = python("import time; time.sleep(600)")
    hang = (
        "import signal, subprocess, sys, time; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        f"child = subprocess.Popen({child!r})\n"
        "print(child.pid); print('D64 causal:', flush=True); time.sleep(600)"
    )
    started = time.monotonic()
    # long enough for a busy machine to start python
    (ended,) = run_apart([python(hang)], 5.0, grace=0.1)
    assert ended.code is None
    assert time.monotonic() - started < 60
    reason = hopper_gate.reason_of(ended, 5.0)
    assert reason == "no answer within 5 s, at D64 causal:"
    pid = int(ended.lines[0])
    for _ in range(100):
        if not running(pid):
            break
        time.sleep(0.1)
    assert not running(pid)
    late = ask([python("import time; time.sleep(600)")] * 2, 0.05)
    assert late is not None and "no answer within 0.05 s, at its start (and 1 more)" in late


def running(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("hearing", [signal.SIG_DFL, signal.SIG_IGN], ids=["front", "background"])
def test_an_interrupt_lets_it_write_what_it_has(hearing):
    patient = (
        "import time\ntry:\n    print('at work', flush=True); time.sleep(600)\n"
        "finally:\n    print('written')"
    )
    before = signal.signal(signal.SIGINT, hearing)
    try:
        (ended,) = run_apart([python(patient)], 5.0, grace=20.0)
    finally:
        signal.signal(signal.SIGINT, before)
    assert ended.code is None and "written" in ended.lines


def test_it_is_asked_once(monkeypatch):
    asked = []
    monkeypatch.setenv(VERDICT, "")  # is put back at the end
    monkeypatch.delenv(VERDICT)
    monkeypatch.setattr(hopper_gate, "ask", lambda: asked.append(1) or "hangs")
    assert hopper_gate.verdict() == hopper_gate.verdict() == "hangs"
    assert asked == [1] and os.environ[VERDICT] == "hangs"
    monkeypatch.setenv(VERDICT, RIGHT)  # as a process that was started by one that knows
    assert hopper_gate.verdict() is None and asked == [1]


# --- what it checks -------------------------------------------------------------------------------


@pytest.fixture
def launches(monkeypatch):
    """The kernel emulated where there is no GPU; a number for each of its launches."""
    kernel, found = emulated(hopper._hopper_fwd_kernel), []

    class Counted:
        def __getitem__(self, grid):
            found.append(grid)
            return kernel[grid]

    monkeypatch.setattr(hopper, "_hopper_fwd_kernel", Counted())
    monkeypatch.setattr(backend_registry, "_is_hopper", lambda device: True)
    return found


SMALL = [case for case in CASES if case.tokens[0] < 1000]


@pytest.mark.skipif(not EMULATED, reason="the gate itself runs them on a GPU")
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_its_cases_pass(launches, monkeypatch, case):
    monkeypatch.setattr(hopper_gate, "_REPEATED", 2)
    hopper_gate.check(case, CPU)
    assert len(launches) == 2


@pytest.mark.skipif(not EMULATED, reason="needs the emulator")
@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda out, lse, turn: (out * 1.1, lse), "output: error"),
        (lambda out, lse, turn: (out, lse + 0.1), "log-sum-exp: error"),
        (lambda out, lse, turn: (out * torch.nan, lse), "other numbers"),
        (lambda out, lse, turn: (out + 2.0**-9 * (turn == 2), lse), "other numbers"),
    ],
)
def test_wrong_numbers_are_found(launches, monkeypatch, wrong, said):
    right, turns = hopper.attention_fwd_hopper, []

    def launch(*tensors, **options):
        turns.append(1)
        return wrong(*right(*tensors, **options), len(turns))

    monkeypatch.setattr(hopper, "attention_fwd_hopper", launch)
    case = GateCase("multiplicative", 64, True, (40, 70), (1, 1), 1)
    with pytest.raises(AssertionError, match=said):
        hopper_gate.check(case, CPU)


def test_its_cases_cover_what_the_kernel_tells_apart():
    assert {(case.mode, case.head_dim) for case in CASES} >= {
        (mode, head_dim)
        for mode in ("multiplicative", "min_shift", "log_additive")
        for head_dim in (64, 128, 256)
    }
    for mode in ("multiplicative", "min_shift", "log_additive"):
        assert {case.causal for case in CASES if case.mode == mode} == {False, True}
    assert any(case.mode == "plain" for case in CASES)
    many = [case for case in CASES if case.batch * case.heads[0] * -(-case.tokens[0] // 128) > 396]
    assert len(many) >= 3  # three pieces of work for each of 132 multiprocessors
    assert {case.heads[0] > case.heads[1] for case in CASES} == {True}
    assert {case.per_head for case in CASES} == {case.few for case in CASES} == {False, True}


@pytest.mark.skipif(hopper_gate.on_hopper(), reason="here it would run")
def test_it_needs_a_hopper_gpu():
    done = subprocess.run(
        [sys.executable, "-m", "bench.hopper_gate", "0", "1"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1 and "needs a Hopper GPU (sm_90)" in done.stderr


# --- what comes of it -----------------------------------------------------------------------------


def test_auto_is_kept_from_a_kernel_that_failed(monkeypatch):
    row = type("Row", (), {"backend": "hopper", "device": "A Hopper"})
    asked = []
    monkeypatch.setattr(hopper_gate, "on_hopper", lambda device=None: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A Hopper")
    monkeypatch.setattr(hopper_gate, "verdict", lambda: asked.append(1) or "failed: it hangs")
    monkeypatch.setattr(backend_registry, "_is_hopper", lambda device: True)
    device = torch.device("cuda")
    monkeypatch.setattr(backend_table, "read_table", lambda: [])
    assert hopper_gate.shut_out_of_auto(device) == [] == asked  # nothing takes it
    monkeypatch.setattr(backend_table, "read_table", lambda: [row])
    told = ["atman (hopper): failed: it hangs"]
    assert hopper_gate.shut_out_of_auto(device) == told
    assert not backend_registry._is_hopper(device)


HANGS = "failed: it hangs"


@pytest.mark.parametrize(("workers", "verdict"), [(0, HANGS), (2, HANGS), (2, RIGHT)])
def test_tests_of_the_kernel_are_failed(tmp_path, workers, verdict):
    """As on a Hopper GPU; with workers, only one of them asks."""
    (tmp_path / "made_hopper.py").write_text(
        "import pathlib\nfrom bench import hopper_gate\n"
        "def ask():\n"
        f"    with open({str(tmp_path / 'asked')!r}, 'a') as file:\n        file.write('x')\n"
        f"    return {None if verdict == RIGHT else verdict!r}\n"
        "hopper_gate.ask = ask\nhopper_gate.on_hopper = lambda device=None: True\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "made_hopper"]
    if workers:
        pytest.importorskip("xdist")
        command += ["-n", str(workers)]
    command += ["tests/test_hopper.py", "-k", "fit_shared_memory"]
    environment = {name: text for name, text in os.environ.items() if name != VERDICT}
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), str(ROOT)])
    for name in [name for name in environment if name.startswith("PYTEST_")]:
        del environment[name]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert (tmp_path / "asked").read_text() == "x", done.stdout
    if verdict == RIGHT:
        assert done.returncode == 0 and "9 passed" in done.stdout
    else:
        assert done.returncode == 1 and "9 errors" in done.stdout
        assert "The Hopper kernel failed: it hangs" in done.stdout
