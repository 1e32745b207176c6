"""Every metric on a case worked by hand, on what is not as usual, and on what always holds."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from atman_triton.evaluate import metrics
from atman_triton.evaluate.metrics import Metric

X, Y = [4.0, 1.0, 3.0, 2.0], [1.0, 0.0, 1.0, 0.0]
LABELLED = (metrics.precision, metrics.recall, metrics.pointing, metrics.outside)


def _undefined(found):
    assert math.isnan(found.value)
    return found.note


# --- by hand --------------------------------------------------------------------------------------


def test_precision_by_hand():
    assert metrics.precision(X, Y) == Metric(7 / 10)  # (4 + 3) / (4 + 1 + 3 + 2)
    assert metrics.precision([1, 3], [0.5, 0.25]).value == pytest.approx(1.25 / 4)


def test_recall_by_hand():
    assert metrics.recall(X, Y) == Metric(7 / 8)  # (4/4 + 3/4) / 2
    assert metrics.recall([1, 2, 4], [1, 1, 0]) == Metric(3 / 8)  # (1/4 + 2/4) / 2
    assert metrics.recall([1, 2], [0.5, 0.25]).value == pytest.approx(0.5 / 0.75)


def test_outside_by_hand():
    assert metrics.outside(X, Y).value == pytest.approx(3 / 10)


def test_pointing_by_hand():
    assert metrics.pointing(X, Y) == Metric(1)
    assert metrics.pointing([4, 5, 3, 2], Y) == Metric(0)
    assert metrics.pointing([5, 5, 5, 2], Y) == Metric(2 / 3, "3 tied for largest share")
    assert metrics.pointing([-3, -1], [0, 1]) == Metric(1)
    assert metrics.pointing([1, 2], [1, 0.25]) == Metric(0.25)


def test_total_variation_by_hand():
    # of sum 10: 0.1 0.2 / 0.3 0.4; down |0.2| + |0.2|, across |0.1| + |0.1|
    assert metrics.total_variation([[1, 2], [3, 4]]).value == pytest.approx(0.6)
    spike = np.zeros((5, 5))
    spike[2, 2] = 7
    assert metrics.total_variation(spike) == Metric(4)
    spike[2, 2], spike[0, 0] = 0, 7
    assert metrics.total_variation(spike) == Metric(2)
    assert metrics.total_variation(np.full((3, 4), 2.0)) == Metric(0)
    assert metrics.total_variation([[1.0, 3.0]]) == Metric(0.5)


def test_rank_correlation_by_hand():
    # ranks 1 2 3 4 and 2 1 4 3: 1 − 6·(1 + 1 + 1 + 1) / (4·15)
    assert metrics.rank_correlation([1, 5, 7, 9], [20, 10, 40, 30]).value == pytest.approx(0.6)
    # ranks 1.5 1.5 3 and 1 2 3: covariance 1.5, variances 1.5 and 2
    tied = metrics.rank_correlation([1, 1, 2], [1, 2, 3])
    assert tied.value == pytest.approx(1.5 / math.sqrt(3))
    assert tied.note == "ties share their mean rank"
    assert metrics.rank_correlation([1, 2, math.inf], [-math.inf, 0, 9]) == Metric(1)


def test_top_overlap_by_hand():
    assert metrics.top_overlap([9, 8, 1, 0], [8, 0, 9, 1], 2) == Metric(0.5)
    # of the second list, one of three 5s takes the last place: 1 of the first, 1/3 of the second
    tied = metrics.top_overlap([9, 8, 1, 0], [9, 5, 5, 5], 2)
    assert tied.value == pytest.approx((1 + 1 / 3) / 2)
    assert tied.note == "ties share the last places"
    assert metrics.top_overlap([1, 1, 1], [1, 1, 1], 2).value == pytest.approx(1)
    assert metrics.top_overlap([1, 2], [2, 1], 5) == Metric(1, "k is 5 of 2")
    assert metrics.top_overlap([1, 2], [2, 1], 2) == Metric(1, "k is 2 of 2")
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        metrics.top_overlap([1], [1], 0)


def test_auroc_by_hand():
    # pairs: 3 > 1, 3 > 2, 2 > 1, 2 = 2
    assert metrics.auroc([3, 2], [1, 2]) == Metric(3.5 / 4, "ties count as a half")
    assert metrics.auroc([5, 6], [1, 2, 3]) == Metric(1)
    assert _undefined(metrics.auroc([math.nan], [1])) == "1 NaN left out; no values on one side"


def test_area_by_hand():
    # 0.1·(4 + 2)/2 + 0.4·(2 + 1)/2 = 0.9 over a width of 0.5
    assert metrics.area([0, 0.1, 0.5], [4, 2, 1]).value == pytest.approx(1.8)
    assert metrics.area([2, 4], [3, 3]) == Metric(3)
    assert _undefined(metrics.area([1], [2])) == "fewer than two points"
    assert _undefined(metrics.area([0, 1], [2, math.nan])) == "1 points without a height"
    for xs in ([0, 0], [1, 0], [0, math.nan]):
        with pytest.raises(ValueError, match="xs must rise"):
            metrics.area(xs, [1, 2])


@pytest.mark.parametrize(
    ("values", "mean"),
    [
        ([7], 7),
        ([1, 3], 2),
        ([10, 0, 1], (0 + 4 * 1 + 10) / 6),
        ([4, 1, 2, 100], (2 + 4) / 2),
        ([5, 1, 2, 3, 100], 0.3 * 2 + 0.4 * 3 + 0.3 * 5),
        ([-math.inf, 1, 3, math.inf], 2),
        (list(range(8)), 3.5),
    ],
)
def test_interquartile_mean_by_hand(values, mean):
    assert metrics.interquartile_mean(values).value == pytest.approx(mean)


def test_align_by_hand():
    assert metrics.align(X, Y) == {
        "precision": (0.7, ""),
        "recall": (7 / 8, ""),
        "pointing": (1, ""),
    }
    grid, label = np.reshape([1.0, 2, 3, 4], (2, 2)), np.reshape([0, 0, 0, 1], (2, 2))
    found = {name: each.value for name, each in metrics.align_grid(grid, label).items()}
    assert found == pytest.approx(
        {"precision": 0.4, "recall": 1, "pointing": 1, "variation": 0.6, "outside": 0.6}
    )


# --- what is not as usual -------------------------------------------------------------------------


@pytest.mark.parametrize("metric", LABELLED)
def test_no_label_and_no_units(metric):
    assert _undefined(metric([1, 2], [0, 0])) == "no label"
    assert "no label" in _undefined(metric([-1, math.nan], [0, 0]))
    assert "no units" in _undefined(metric([], []))


@pytest.mark.parametrize("metric", [metrics.precision, metrics.recall])
def test_no_positive_relevance_finds_nothing(metric):
    assert metric([0, 0, 1e-9], [1, 1, 0]).value == 0
    found = metric([0, 0, 0], [0, 1, 0])
    assert found == Metric(0, "all relevance is equal; no positive relevance")
    assert metric([-1, -2], [0, 1]) == Metric(0, "2 negative taken as 0; no positive relevance")
    note = "no relevance was measured; 2 NaN taken as 0; no positive relevance"
    assert metric([math.nan, math.nan], [0, 1]) == Metric(0, note)


def test_no_positive_relevance_is_nowhere():
    note = "2 negative taken as 0; no positive relevance"
    assert _undefined(metrics.outside([-1, -2], [0, 1])) == note
    assert _undefined(metrics.total_variation([[-1, -2]])) == note


def test_nan_is_not_found():
    x = [4, 1, math.nan, 2, -5]
    assert metrics.precision(x, [*Y, 0]) == Metric(4 / 7, "1 NaN taken as 0; 1 negative taken as 0")
    assert metrics.recall(x, [*Y, 0]).value == 0.5
    assert metrics.pointing([math.nan, 1], [1, 0]) == Metric(0, "1 NaN never largest")
    assert _undefined(metrics.pointing([math.nan], [1])) == "one unit; no relevance was measured"


def test_infinite_relevance_is_all_there_is():
    x = [math.inf, 9, math.inf, -math.inf]
    found = metrics.precision(x, [1, 1, 0, 0])
    note = "1 negative taken as 0; 2 infinite, beside which the rest counts as 0"
    assert found == Metric(0.5, note)
    assert metrics.recall(x, [1, 1, 0, 0]).value == 0.5
    assert metrics.pointing(x, [1, 1, 0, 0]) == Metric(0.5, "2 tied for largest share")


def test_nothing_to_tell_apart_is_said():
    assert metrics.precision([3], [1]) == Metric(1, "one unit")
    assert metrics.recall([3, 1], [1, 1]) == Metric(2 / 3, "all units are labelled")
    equal = metrics.precision([2, 2, 2, 2], Y)
    assert equal == Metric(0.5, "all relevance is equal")


def test_rankings_without_order():
    assert _undefined(metrics.rank_correlation([1], [2])) == "fewer than two values"
    assert _undefined(metrics.rank_correlation([2, 2], [1, 2])) == "one side is constant"
    left = metrics.rank_correlation([1, math.nan, 3, 4], [1, 2, 3, math.nan])
    assert left == Metric(1, "2 NaN left out")
    assert _undefined(metrics.top_overlap([math.nan], [1], 1)) == "1 NaN left out; no values"
    assert _undefined(metrics.interquartile_mean([])) == "no values"
    assert metrics.interquartile_mean([math.nan, 3]) == Metric(3, "1 NaN left out")


@pytest.mark.parametrize("metric", LABELLED)
def test_wrong_labels_are_errors(metric):
    with pytest.raises(ValueError, match=r"y must have shape \[2\], as x, got \[1\]"):
        metric([1, 2], [1])
    with pytest.raises(ValueError, match=r"x must be a list of numbers, got shape \[1, 1\]"):
        metric([[1]], [[1]])
    for label in ([0, 2], [-0.1, 0], [math.nan, 1]):
        with pytest.raises(ValueError, match=r"y must lie in \[0, 1\]"):
            metric([1, 2], label)


def test_wrong_grids_are_errors():
    with pytest.raises(ValueError, match=r"grid must have shape \[H, W\], got \[2\]"):
        metrics.total_variation([1, 2])
    with pytest.raises(ValueError, match=r"y must have shape \[H, W\], got \[2\]"):
        metrics.align_grid([[1, 2]], [0, 1])
    with pytest.raises(ValueError, match=r"y must have shape \[1, 2\], as x, got \[2, 1\]"):
        metrics.align_grid([[1, 2]], [[0], [1]])


def test_tensors_are_taken():
    x = torch.tensor(X, dtype=torch.bfloat16, requires_grad=True)
    assert metrics.precision(x, torch.tensor(Y).bool()) == Metric(0.7)


# --- what always holds ----------------------------------------------------------------------------

_relevance = st.one_of(
    st.integers(-5, 5).map(float), st.sampled_from([math.nan, math.inf, -math.inf, 0.0])
)
_rated = st.lists(st.tuples(_relevance, st.sampled_from([0.0, 0.5, 1.0])), min_size=1, max_size=9)


def _same(one, other):
    assert one.note == other.note
    assert one.value == pytest.approx(other.value, rel=1e-12, abs=1e-12, nan_ok=True)


@pytest.mark.parametrize("metric", LABELLED)
@settings(deadline=None)
@given(rated=_rated, data=st.data())
def test_labelled_metrics_are_bounded_and_know_no_order_or_scale(metric, rated, data):
    found = metric(*zip(*rated, strict=True))
    assert math.isnan(found.value) or 0 <= found.value <= 1
    assert not math.isnan(found.value) or found.note
    _same(found, metric(*zip(*data.draw(st.permutations(rated)), strict=True)))
    x, y = zip(*rated, strict=True)
    _same(found, metric([each * 2.0**-1060 for each in x], y))
    _same(found, metric([each * 3e307 for each in x], y))


@settings(deadline=None)
@given(rated=_rated)
def test_outside_is_what_precision_leaves(rated):
    inside, beside = (
        metric(*zip(*rated, strict=True)) for metric in (metrics.precision, metrics.outside)
    )
    assert inside.note == beside.note
    assert math.isnan(beside.value) or inside.value + beside.value == pytest.approx(1)


@settings(deadline=None)
@given(grid=arrays.arrays(float, (3, 4), elements=st.integers(-2, 9).map(float)))
def test_variation_is_bounded_and_the_same_seen_from_anywhere(grid):
    found = metrics.total_variation(grid)
    assert math.isnan(found.value) or 0 <= found.value <= 4
    _same(found, metrics.total_variation(grid[::-1].T * 8))


@settings(deadline=None)
@given(st.lists(st.tuples(_relevance, _relevance), max_size=9), st.data())
def test_rankings_know_no_order_of_pairs(pairs, data):
    a, b = zip(*pairs, strict=True) if pairs else ((), ())
    c, d = zip(*mixed, strict=True) if (mixed := data.draw(st.permutations(pairs))) else ((), ())
    found = metrics.rank_correlation(a, b)
    assert math.isnan(found.value) or -1 <= found.value <= 1
    _same(found, metrics.rank_correlation(c, d))
    _same(found, metrics.rank_correlation(b, a))
    if not math.isnan(found.value):
        negative = metrics.rank_correlation([-each for each in a], b)
        assert negative.value == pytest.approx(-found.value)
        assert metrics.rank_correlation(a, a).value == pytest.approx(1)
    _same(metrics.top_overlap(a, b, 3), metrics.top_overlap(d, c, 3))
    both = metrics.auroc(a, b), metrics.auroc(b, a)
    assert math.isnan(both[0].value) or both[0].value + both[1].value == pytest.approx(1)


@settings(deadline=None)
@given(st.lists(st.integers(-9, 9).map(float), min_size=1, max_size=12), st.data())
def test_interquartile_mean_is_between_the_quartiles(values, data):
    found = metrics.interquartile_mean(values).value
    low, high = np.quantile(values, [0.25, 0.75], method="inverted_cdf")
    assert low - 1e-9 <= found <= max(high, np.quantile(values, 0.75, method="higher")) + 1e-9
    mixed = metrics.interquartile_mean(data.draw(st.permutations(values)))
    assert mixed.value == pytest.approx(found)
    repeated = metrics.interquartile_mean(values * 4).value  # every edge falls between two values
    assert repeated == pytest.approx(np.sort(values * 4)[len(values) : 3 * len(values)].mean())
    assert repeated == pytest.approx(found)
