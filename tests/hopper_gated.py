"""Tests of the Hopper kernel on a GPU wait for the gate, so that a kernel that hangs fails them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from bench import hopper_gate


@pytest.fixture(autouse=True)
def hopper_gate_first(request: pytest.FixtureRequest) -> None:
    """Fail tests of the Hopper kernel, and keep it from others, where the gate says so."""
    own = request.path.name.startswith("test_hopper")
    if not (own or request.node.get_closest_marker("gpu")) or not hopper_gate.on_hopper():
        return
    if own:
        with _one_worker_at_a_time(request):
            reason = hopper_gate.verdict()
        if reason is not None:
            pytest.fail(f"The Hopper kernel {reason}", pytrace=False)
    else:
        hopper_gate.shut_out_of_auto(torch.device("cuda"))


@contextmanager
def _one_worker_at_a_time(request: pytest.FixtureRequest) -> Iterator[None]:
    """Of pytest-xdist's workers the first asks, and the others take its verdict."""
    if not hasattr(request.config, "workerinput") or hopper_gate.VERDICT in os.environ:
        yield
        return
    import fcntl

    factory: pytest.TempPathFactory = request.getfixturevalue("tmp_path_factory")
    path: Path = factory.getbasetemp().parent / "hopper-verdict"  # of this run alone
    with path.open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        known = file.read()
        if known:
            os.environ[hopper_gate.VERDICT] = known
        yield
        if not known:
            file.write(os.environ.get(hopper_gate.VERDICT, ""))
