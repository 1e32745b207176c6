"""Commands in processes of their own, for so long at most: what hangs there hangs nothing here."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent
# A shell lets what it starts in the background ignore interrupts, and so all that this starts.
_HEARS_INTERRUPTS = (
    sys.executable,
    "-c",
    "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); "
    "os.execvp(sys.argv[1], sys.argv[1:])",
)
_UNWILLING = 10.0  # seconds after which a process that cannot even be killed is left alone


@dataclass(frozen=True)
class Ended:
    """How a command ended, and what it wrote.

    Args:
        code: its exit code, negative for a signal; ``None`` if it was stopped.
        said: standard output and error together.
    """

    code: int | None
    said: str

    @property
    def lines(self) -> list[str]:
        """What it wrote, without what is empty."""
        return [line.strip() for line in self.said.splitlines() if line.strip()]


def run_apart(
    commands: Sequence[Sequence[str]],
    seconds: float,
    *,
    folder: Path = _ROOT,
    environment: Mapping[str, str] | None = None,
    grace: float = 0.0,
) -> list[Ended]:
    """Run commands side by side, and stop with all that they started those that take too long.

    Args:
        seconds: that all together may take.
        grace: how long one that is to end may write what it has, after an interrupt; 0 asks none.
    """
    stop = time.monotonic() + seconds
    with contextlib.ExitStack() as opened:
        started, written = [], []
        try:
            for command in commands:
                written.append(opened.enter_context(tempfile.TemporaryFile()))
                process = subprocess.Popen(
                    [*_HEARS_INTERRUPTS, *command] if grace else command,
                    cwd=folder,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=written[-1],
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # a group that can be ended as one
                )
                started.append(process)
            codes = [_wait(process, stop) for process in started]
        finally:
            _end(started, grace)
        found = []
        for code, file in zip(codes, written, strict=True):
            file.seek(0)
            found.append(Ended(code, file.read().decode(errors="replace")))
    return found


def _wait(process: subprocess.Popen, stop: float) -> int | None:
    """Its exit code, or ``None`` where there is none by then."""
    try:
        return process.wait(max(0.0, stop - time.monotonic()))
    except subprocess.TimeoutExpired:
        return None


def _end(started: Sequence[subprocess.Popen], grace: float) -> None:
    """End what still runs."""
    late = [process for process in started if process.poll() is None]
    if grace:
        for process in late:
            process.send_signal(signal.SIGINT)
        stop = time.monotonic() + grace
        for process in late:
            _wait(process, stop)
    for process in late:
        with contextlib.suppress(ProcessLookupError):  # it and all of its group have ended
            os.killpg(process.pid, signal.SIGKILL)
    stop = time.monotonic() + _UNWILLING
    for process in late:
        _wait(process, stop)
