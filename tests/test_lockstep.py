"""Two threads in lockstep: who runs what, and what becomes of errors."""

import threading

import pytest

from atman_triton.lockstep import Lockstep


def test_an_errand_runs_in_the_callers_thread():
    threads = []

    def work(handover):
        threads.append(threading.get_ident())
        threads.append(handover.in_caller(threading.get_ident))
        handover.emit(handover.in_caller(lambda: 7))
        handover.emit(8)

    assert list(Lockstep(work)) == [7, 8]
    assert threads[1] == threading.get_ident() != threads[0]


def test_what_an_errand_raises_is_raised_where_it_was_sent():
    seen = []

    def work(handover):
        def errand():
            raise KeyError("lost")

        try:
            handover.in_caller(errand)
        except KeyError as error:
            seen.append(str(error))
        handover.emit(1)
        handover.in_caller(errand)

    steps = Lockstep(work)
    assert next(steps) == 1
    assert seen == ["'lost'"]
    with pytest.raises(KeyError, match="lost"):
        next(steps)
    assert steps.over


def test_a_caller_that_stops_runs_no_more_errands():
    ran = []

    def work(handover):
        handover.emit(1)
        handover.in_caller(lambda: ran.append(1))

    steps = Lockstep(work)
    assert next(steps) == 1
    steps.close()
    assert (steps.over, ran) == (True, [])
