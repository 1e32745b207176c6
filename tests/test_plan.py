"""Plans: every row once, level batches, little waste."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from atman_triton.plan import Batch, plan_batches, wasted_tokens

FRUGAL = 8  # inputs' worth of tokens in a batch, up to which less than a tenth is wasted


@st.composite
def inputs(draw, longest=400, most=120):
    """A length and starts: every token once, a few places over and over, or any."""
    length = draw(st.integers(1, longest))
    kind = draw(st.sampled_from(["any", "every", "clustered"]))
    if kind == "every":
        starts = list(range(length))
    elif kind == "clustered":
        places = draw(st.lists(st.integers(0, length - 1), min_size=1, max_size=4))
        starts = draw(st.lists(st.sampled_from(places), max_size=most))
    else:
        starts = draw(st.lists(st.integers(0, length - 1), max_size=most))
    return length, draw(st.permutations(starts))


def check(batches, starts, length):
    """What holds of every plan."""
    rows = [row for batch in batches for row in batch.rows]
    assert sorted(rows) == list(range(len(starts)))
    for batch in batches:
        assert batch.rows
        assert batch.start == min(starts[row] for row in batch.rows)
        assert batch.tokens(length) == len(batch.rows) * (length - batch.start)


def waste(batches, starts, length):
    """Tokens in front of their row's start, per token run, counted one by one."""
    run = early = 0
    for batch in batches:
        for row in batch.rows:
            for token in range(batch.start, length):
                run += 1
                early += token < starts[row]
    return early / run if run else 0.0


@given(case=inputs(), budget=st.integers(1, 5000))
@settings(max_examples=80, deadline=None)
def test_batches_keep_to_the_budget_of_tokens(case, budget):
    length, starts = case
    batches = plan_batches(starts, length, tokens=budget)
    check(batches, starts, length)
    for batch in batches:
        assert batch.tokens(length) <= budget or len(batch.rows) == 1


@given(case=inputs(longest=150), inputs_per_batch=st.floats(0.01, FRUGAL))
@example(case=(100, [0] * 50 + [99] * 60), inputs_per_batch=8.0)
@example(case=(97, list(range(97))), inputs_per_batch=8.0)
@settings(max_examples=80, deadline=None)
def test_less_than_a_tenth_is_wasted(case, inputs_per_batch):
    length, starts = case
    budget = max(1, int(inputs_per_batch * length))
    batches = plan_batches(starts, length, tokens=budget)
    check(batches, starts, length)
    wasted = waste(batches, starts, length)
    assert wasted < 0.1
    run = sum(batch.tokens(length) for batch in batches)
    assert wasted == pytest.approx(wasted_tokens(batches, starts) / max(1, run), abs=1e-12)


@given(case=inputs(longest=60, most=60), budget=st.integers(1, 5000), rows=st.integers(1, 9))
@settings(max_examples=40, deadline=None)
def test_rows_can_be_limited_besides(case, budget, rows):
    length, starts = case
    batches = plan_batches(starts, length, tokens=budget, rows=rows)
    check(batches, starts, length)
    assert all(len(batch.rows) <= rows for batch in batches)
    assert all(b.tokens(length) <= budget or len(b.rows) == 1 for b in batches)


@given(case=inputs(longest=60, most=60), rows=st.integers(1, 70))
@settings(max_examples=40, deadline=None)
def test_a_number_of_rows_is_that_of_every_batch_but_the_last(case, rows):
    length, starts = case
    batches = plan_batches(starts, length, rows=rows)
    check(batches, starts, length)
    sizes = [len(batch.rows) for batch in batches]
    whole, rest = divmod(len(starts), rows)
    assert sizes == [rows] * whole + [rest] * (rest > 0)


def test_neighbouring_starts_run_together():
    batches = plan_batches([90, 0, 91, 1, 92, 2], 100, rows=3)
    assert [set(batch.rows) for batch in batches] == [{1, 3, 5}, {0, 2, 4}]
    assert [batch.start for batch in batches] == [0, 90]


def test_later_batches_hold_more_rows():
    sizes = [len(batch.rows) for batch in plan_batches(range(512), 512, tokens=2048)]
    assert sizes == sorted(sizes)
    assert sizes[0] == 4
    assert sizes[-1] >= 40


def test_small_budgets_do_not_run_row_by_row_to_save_tokens():
    """Of equal starts none is wasted, so batches are as full as the budget allows."""
    assert [len(batch.rows) for batch in plan_batches([10] * 40, 20, tokens=100)] == [10] * 4


def test_nothing_to_run_is_no_batch():
    assert plan_batches([], 10, tokens=100) == []
    assert plan_batches([], 10, rows=3) == []
    assert plan_batches([], 10) == []
    assert wasted_tokens([], []) == 0


def test_without_limits_everything_is_one_batch():
    assert plan_batches([3, 1, 2], 5) == [Batch(1, (1, 2, 0))]


@given(
    length=st.integers(1, 60),
    data=st.data(),
    rows=st.integers(1, 40),
    budget=st.integers(1, 3000),
)
@settings(max_examples=40, deadline=None)
def test_a_split_batch_has_the_same_rows_in_order(length, data, rows, budget):
    start = data.draw(st.integers(0, length - 1))
    batch = Batch(start, tuple(data.draw(st.permutations(range(rows)))))
    parts = batch.split(length, budget)
    assert tuple(row for part in parts for row in part.rows) == batch.rows
    assert all(part.start == start for part in parts)
    assert all(part.tokens(length) <= budget or len(part.rows) == 1 for part in parts)
    if batch.tokens(length) <= budget:
        assert parts == [batch]
