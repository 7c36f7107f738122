"""Intervals agree with tabulated t quantiles and cover the truth in 95 % of the cases."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rcot_rl.stats.intervals import (
    Interval,
    bootstrap_intervals,
    mean_interval,
    paired_difference,
    stratified_interval,
)


def test_paired_difference_agrees_with_the_t_table() -> None:
    # t(0.975, 4) = 2.776445; differences 1..5 have mean 3 and standard deviation sqrt(2.5).
    interval = paired_difference([1, 1, 1, 1, 1], [2, 3, 4, 5, 6])
    reach = 2.7764451 * math.sqrt(2.5) / math.sqrt(5)
    assert (interval.mean, interval.n) == (3, 5)
    assert (interval.low, interval.high) == pytest.approx((3 - reach, 3 + reach), abs=1e-6)


def test_pairing_removes_how_hard_prompts_are() -> None:
    rng = np.random.default_rng(1)
    before = rng.normal(0, 10, 50)
    interval = paired_difference(before, before + 0.5 + rng.normal(0, 0.1, 50))
    assert 0.4 < interval.low < 0.5 < interval.high < 0.6
    turned = paired_difference(before + 0.5, before)
    assert turned == pytest.approx(Interval(-0.5, -0.5, -0.5, 50))


def test_mean_interval_covers_the_truth_in_95_percent() -> None:
    rng = np.random.default_rng(2)
    hits = 0
    for _ in range(1000):
        interval = mean_interval(rng.normal(1.0, 2.0, 8))
        hits += interval.low <= 1.0 <= interval.high
    assert 930 <= hits <= 970


def test_one_value_has_no_interval_and_bad_values_are_refused() -> None:
    assert mean_interval([2.0]) == Interval(2.0, None, None, 1)
    for bad in ([], [math.nan], [1.0, math.inf], [[1.0]]):
        with pytest.raises(ValueError, match="finite"):
            mean_interval(bad)
    with pytest.raises(ValueError, match="pairs"):
        paired_difference([1.0, 2.0], [1.0])


def clustered_interval(values, clusters) -> Interval:
    return stratified_interval(values, clusters, [None] * len(clusters))


def test_clusters_of_one_equal_independent_values() -> None:
    values = np.random.default_rng(0).normal(size=30)
    assert clustered_interval(values, range(30)) == pytest.approx(mean_interval(values))


def test_copies_within_a_cluster_do_not_narrow_the_interval() -> None:
    values = np.random.default_rng(1).normal(size=12)
    copied = np.repeat(values, 5)
    interval = clustered_interval(copied, np.repeat(np.arange(12), 5).tolist())
    assert interval == pytest.approx(mean_interval(values))
    alone = mean_interval(copied)
    assert alone.high - alone.low < 0.5 * (interval.high - interval.low)


def test_one_cluster_has_no_interval() -> None:
    assert clustered_interval([1.0, 3.0], ["clip", "clip"]) == Interval(2.0, None, None, 1)


def test_clustered_interval_covers_the_truth_in_95_percent() -> None:
    """Values of a clip share a random offset."""
    random, hits = np.random.default_rng(2), 0
    for _ in range(2000):
        clips = np.repeat(np.arange(20), random.integers(1, 7, 20))
        values = random.normal(size=20)[clips] + random.normal(size=len(clips))
        interval = clustered_interval(values, clips.tolist())
        hits += interval.low <= 0 <= interval.high
    assert 0.925 <= hits / 2000 <= 0.975


def test_bootstrap_agrees_with_the_exact_distribution_of_two_clusters() -> None:
    """Of two clusters, a quarter of the resamples is twice the one, half is both."""
    values = np.array([[0.0, 1.0], [4.0, 1.0], [10.0, 3.0]])
    first, second = bootstrap_intervals(values, ["a", "a", "b"], ["", "", ""])
    assert first == Interval(pytest.approx(14 / 3), 2.0, 10.0, 2)
    assert second == Interval(pytest.approx(5 / 3), 1.0, 3.0, 2)


def test_bootstrap_agrees_with_the_stratified_interval_for_many_clusters() -> None:
    random = np.random.default_rng(4)
    clips = np.repeat(np.arange(150), 3)
    parts = random.choice(["referring", "reasoning"], len(clips), p=[0.8, 0.2]).tolist()
    values = random.normal(size=150)[clips] + random.normal(size=len(clips))
    (interval,) = bootstrap_intervals(values[:, None], clips.tolist(), parts)
    expected = stratified_interval(values, clips.tolist(), parts)
    assert interval.mean == pytest.approx(expected.mean, abs=1e-12) and interval.n == 150
    width = expected.high - expected.low
    assert (interval.low, interval.high) == pytest.approx(expected[1:3], abs=0.06 * width)
    assert bootstrap_intervals(values[:, None], clips.tolist(), parts) == [interval]


def test_bootstrap_of_one_cluster_in_a_stratum_has_no_interval() -> None:
    values = np.array([[1.0], [2.0], [6.0]])
    (interval,) = bootstrap_intervals(values, ["a", "b", "c"], ["x", "x", "y"])
    assert interval == Interval(3.75, None, None, 3)


def test_copies_within_a_cluster_do_not_change_the_bootstrap() -> None:
    values = np.random.default_rng(1).normal(size=(12, 1))
    (alone,) = bootstrap_intervals(values, range(12), [""] * 12)
    clips = np.repeat(range(12), 5).tolist()
    (copied,) = bootstrap_intervals(np.repeat(values, 5, axis=0), clips, [""] * 60)
    assert copied == pytest.approx(alone)
