"""Intervals of resampled examples: against a loop, by hand, and how often they hold the truth."""

import math

import numpy as np
import pytest

from atman_triton.evaluate import bootstrap as boot
from atman_triton.evaluate import metrics
from atman_triton.evaluate.bootstrap import bootstrap, bootstrap_difference

VALUES = np.random.default_rng(5).exponential(size=23)
STATISTICS = {
    boot.mean: np.mean,
    boot.interquartile_mean: lambda sample: metrics.interquartile_mean(sample).value,
    boot.share: lambda sample: np.mean(sample > 0),
}


@pytest.mark.parametrize("statistic", STATISTICS)
def test_counts_give_what_every_draw_gives(statistic):
    """Draws kept as counts, against the statistic of the drawn values themselves."""
    values = VALUES - 1
    counts = boot._counts(len(values), 50, 3, 0)
    assert (counts.sum(1) == len(values)).all()
    found = statistic(values, counts)
    for row, own in zip(counts, found, strict=True):
        drawn = np.repeat(values, row.astype(int))
        assert own == pytest.approx(STATISTICS[statistic](drawn), rel=1e-12)


@pytest.mark.parametrize("statistic", STATISTICS)
def test_interval_is_of_the_draws(statistic):
    found = bootstrap(VALUES, statistic, repeats=200, level=0.9, seed=4)
    draws = np.sort(statistic(VALUES, boot._counts(len(VALUES), 200, 4, 0)))
    ends = STATISTICS[statistic](VALUES), draws[9], draws[189]
    assert found[:3] == pytest.approx(ends, rel=1e-12) and found[3:] == (len(VALUES), "")


def test_same_seed_same_interval_in_blocks_or_at_once(monkeypatch):
    found = bootstrap(VALUES, seed=1)
    assert found == bootstrap(VALUES, seed=1)
    assert found[1:3] != bootstrap(VALUES, seed=2)[1:3]
    monkeypatch.setattr(boot, "_CELLS", 70 * len(VALUES))
    assert [len(each) for each in boot._draws(len(VALUES), 23, 150, 0)] == [70, 70, 10]
    blocks = bootstrap(VALUES, seed=1)
    assert blocks.value == found.value
    assert blocks.low == pytest.approx(found.low, rel=0.1)


def test_scale_and_place_carry_over():
    plain, moved = bootstrap(VALUES), bootstrap(3 * VALUES + 2)
    assert moved[:3] == pytest.approx([3 * each + 2 for each in plain[:3]])


def test_few_values():
    none = bootstrap([])
    assert none[3:] == (0, "no values") and all(math.isnan(each) for each in none[:3])
    one = bootstrap([2.5, math.nan])
    assert one.value == 2.5 and one[3:] == (1, "1 NaN left out; one value")
    assert math.isnan(one.low) and math.isnan(one.high)
    assert bootstrap([2.0, 2.0]) == (2, 2, 2, 2, "")
    assert bootstrap([0.0, -1.0, 2.0, 3.0], boot.share).value == 0.5
    two = bootstrap([0.0, 1.0])  # a quarter of the draws is 0, a quarter 1
    assert two[:4] == (0.5, 0, 1, 2)


def test_infinite_values_are_kept():
    found = bootstrap([1.0, 2.0, 3.0, 4.0, math.inf], boot.interquartile_mean)
    assert found.value == pytest.approx(3) and found.low >= 1
    assert bootstrap([1.0, math.inf]).value == math.inf


def test_differences_are_paired():
    hard = np.linspace(0, 100, 23)  # which would drown the difference
    found = bootstrap_difference(hard + VALUES, hard)
    alone = bootstrap(VALUES)
    assert found[:3] == pytest.approx(alone[:3])
    a, b = [1.0, math.nan, 3.0], [0.0, 1.0, math.nan]
    left = bootstrap_difference(a, b)
    assert left.value == 1 and left[3:] == (1, "2 NaN left out; one value")
    quarters = bootstrap_difference([0, 0, 0, 9], [1, 2, 3, 4], boot.interquartile_mean)
    assert quarters.value == 0 - 2.5  # not that of the differences, −1.5


def test_groups_are_drawn_together():
    values, groups = [0.0, 0.0, 0.0, 1.0], ["a", "a", "a", "b"]
    found = bootstrap(values, groups=groups)
    assert found == (0.25, 0, 1, 4, "")  # draws aa, ab, ba, bb
    own = bootstrap(VALUES, groups=range(len(VALUES)))
    assert own == bootstrap(VALUES)
    one = bootstrap([1.0, 2.0], groups=["a", "a"])
    assert one.value == 1.5 and one.note == "one group" and math.isnan(one.low)
    left = bootstrap([math.nan, 1.0, 2.0], groups=["a", "b", "b"])
    assert left.note == "1 NaN left out; one group"


def test_coverage_is_about_right():
    """Of 400 samples the interval of 95% should hold the truth in 380; small ones hold it less."""
    rng = np.random.default_rng(0)
    samples = rng.normal(1, 2, (400, 40))
    for statistic in (boot.mean, boot.interquartile_mean):
        found = [bootstrap(sample, statistic, repeats=400) for sample in samples]
        held = np.mean([each.low <= 1 <= each.high for each in found])
        assert 0.90 <= held <= 0.97, held


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"repeats": 0}, "repeats must be at least 1, got 0"),
        ({"level": 1.0}, "level must lie between 0 and 1, got 1.0"),
        ({"groups": ["a"]}, "groups must have one entry for each of 23 values, got 1"),
    ],
)
def test_wrong_arguments(arguments, text):
    with pytest.raises(ValueError, match=text):
        bootstrap(VALUES, **arguments)


def test_wrong_values():
    with pytest.raises(ValueError, match="a and b must have the same length, got 1 and 2"):
        bootstrap_difference([1], [1, 2])
    with pytest.raises(ValueError, match=r"values must be a list of numbers, got shape \[1, 1\]"):
        bootstrap([[1]])
