"""The figure of memory and time in small: what is measured, how rows are kept, what is refused."""

import dataclasses
import math

import pytest
import torch

from atman_triton import memory
from bench import scaling, scaling_run
from bench.explaining import LlamaShape
from bench.scaling_run import CHEFER, EXACT, FORWARD, GRADIENTS, METHODS, Found, Job

TINY = LlamaShape("llama-tiny", 32, 2, 4, 2, 48, vocabulary=101)
CPU = torch.device("cpu")


def job(method=FORWARD, batch="1", shape=TINY, length=16, **settings):
    return Job(shape, length, method, batch, "cpu", steps=4, **settings)


def found(peak=2.0, seconds=1.0, note="", forwards=3.0, device="a chip"):
    return Found(peak * 2**20, seconds, forwards, device, note)


@pytest.mark.parametrize("method", METHODS)
def test_what_each_method_costs(method):
    """In passes over a prompt of 16 tokens, one target token; a backward pass is two."""
    run = scaling_run.runner(job(method), TINY.model(torch.float32, CPU))
    forwards = run(list(range(17)))
    if method == FORWARD:
        assert forwards == 1
    elif method == CHEFER:
        assert forwards == 1 + 1 + 2
    elif method == GRADIENTS:
        assert forwards == 1 + 4 * (1 + 2)
    else:
        assert (5 < forwards < 17) if method == EXACT else (1 < forwards < 3)


def test_batch_1_is_kept_to(monkeypatch):
    """Also by integrated gradients, which ask the memory module."""
    monkeypatch.setattr(memory, "tokens_per_batch", memory.tokens_per_batch)  # given back later
    rows = []
    monkeypatch.setattr(
        "atman_triton.baselines.case.Case.count",
        lambda self, count, tokens, backward=False: rows.append(count),
    )
    found = scaling_run.measure(job(GRADIENTS, "1"))
    assert set(rows) == {1}
    assert found.bytes > 0 and found.seconds > 0 and not found.note


def test_a_process_of_its_own_measures():
    before = memory.tokens_per_batch
    found = scaling_run.fresh(job(EXACT))
    assert found.bytes >= 0 and found.seconds > 0 and found.forwards > 5
    assert memory.tokens_per_batch is before


def test_a_process_that_fails_says_why():
    small = dataclasses.replace(TINY, heads=5)
    with pytest.raises(RuntimeError, match=r"plain forward on llama-tiny, 16 tokens: .*Error"):
        scaling_run.fresh(job(shape=small))


class Wire:
    """The end of a pipe that keeps what is sent."""

    def __init__(self):
        self.sent = []

    def send(self, value):
        self.sent.append(value)


def test_too_little_memory_is_a_row_without_numbers(monkeypatch):
    def full(job):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(scaling_run, "measure", full)
    wire = Wire()
    scaling_run._answer(job(), wire)  # pyright: ignore[reportArgumentType]
    (told,) = wire.sent
    assert math.isnan(told.bytes) and told.note == "out of memory"

    rows = scaling.collect([job()], 3, lambda line: None, lambda job: told)
    assert rows[0].note == "out of memory" and rows[0].rounds == 1  # not tried again
    assert math.isnan(rows[0].peak_mib) and math.isnan(rows[0].seconds)


def test_jobs_and_medians():
    jobs = scaling.jobs_of([TINY], [16, 32], ["1", "auto"], device="cpu")
    assert len(jobs) == 2 * (2 + 3 * 2)
    times = iter([1.0, 5.0, 2.0])
    (row,) = scaling.collect([job()], 3, lambda line: None, lambda _: found(seconds=next(times)))
    assert (row.seconds, row.peak_mib, row.rounds, row.forwards) == (2.0, 2.0, 3, 3.0)
    assert (row.seconds_p20, row.seconds_p80) == (1.4, 3.8)
    assert row.parameters == TINY.parameters and row.dtype == "float32"


def rows_of(device="a chip", lost=None):
    jobs = scaling.jobs_of(
        [TINY, dataclasses.replace(TINY, name="llama-wide", width=64)],
        [16, 32],
        ["1", "auto"],
        device="cpu",
    )
    return [
        scaling.summarised(
            each,
            [
                Found(math.nan, math.nan, math.nan, device, "out of memory")
                if each.method == lost
                else found(device=device)
            ],
        )
        for each in jobs
    ]


def test_rows_of_other_devices_stay(tmp_path):
    path = tmp_path / "scaling.csv"
    first, second = rows_of("one"), rows_of("two", lost=CHEFER)
    scaling.write(first, path)
    scaling.write(second, path)
    scaling.write(first, path)
    kept = scaling.read(path)
    assert len(kept) == len(first) + len(second)
    # NaN is not equal to itself
    assert [repr(row) for row in kept] == [repr(row) for row in [*second, *first]]


def test_table_and_picture(tmp_path):
    rows = rows_of(lost=CHEFER)
    text = scaling.table(rows)
    assert "AtMan exact, batch auto" in text and "1.0x" in text and "out of memory" in text
    scaling.draw(rows, tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").stat().st_size > 10_000


def test_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scaling, "fresh", lambda job: found())
    monkeypatch.setattr(scaling, "collect", lambda jobs, rounds, say: [
        scaling.summarised(each, [found()]) for each in jobs
    ])  # fmt: skip
    given = ["--models", "llama-1M", "--lengths", "16", "--batches", "1", "--out", str(tmp_path)]
    assert scaling.main(given) == 0
    assert len(scaling.read(tmp_path / "scaling.csv")) == len(METHODS)
    assert (tmp_path / "scaling.png").exists()
    for wrong in (["--lengths", "4"], ["--rounds", "0"]):
        with pytest.raises(SystemExit) as error:
            scaling.main([*given, *wrong])
        assert error.value.code == 2
    assert "lengths from 8" in capsys.readouterr().err
