"""Intervals against tabulated t quantiles and against their own promise: 95 % coverage."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rcot_rl.intervals import Interval, clustered_interval, mean_interval, paired_difference


def test_against_the_t_table() -> None:
    # t(0.975, 4) = 2.776445; differences 1..5 have mean 3 and standard deviation sqrt(2.5).
    found = paired_difference([1, 1, 1, 1, 1], [2, 3, 4, 5, 6])
    reach = 2.7764451 * math.sqrt(2.5) / math.sqrt(5)
    assert (found.mean, found.n) == (3, 5)
    assert (found.low, found.high) == pytest.approx((3 - reach, 3 + reach), abs=1e-6)


def test_pairing_removes_how_hard_prompts_are() -> None:
    rng = np.random.default_rng(1)
    before = rng.normal(0, 10, 50)
    found = paired_difference(before, before + 0.5 + rng.normal(0, 0.1, 50))
    assert 0.4 < found.low < 0.5 < found.high < 0.6
    turned = paired_difference(before + 0.5, before)
    assert turned == pytest.approx(Interval(-0.5, -0.5, -0.5, 50))


def test_coverage() -> None:
    rng = np.random.default_rng(2)
    hits = 0
    for _ in range(1000):
        found = mean_interval(rng.normal(1.0, 2.0, 8))
        hits += found.low <= 1.0 <= found.high
    assert 930 <= hits <= 970


def test_few_and_bad_values() -> None:
    assert mean_interval([2.0]) == Interval(2.0, None, None, 1)
    for bad in ([], [math.nan], [1.0, math.inf], [[1.0]]):
        with pytest.raises(ValueError, match="finite"):
            mean_interval(bad)
    with pytest.raises(ValueError, match="pairs"):
        paired_difference([1.0, 2.0], [1.0])


def test_clusters_of_one_are_independent_values() -> None:
    values = np.random.default_rng(0).normal(size=30)
    assert clustered_interval(values, range(30)) == pytest.approx(mean_interval(values))


def test_copies_within_a_cluster_tell_nothing_new() -> None:
    values = np.random.default_rng(1).normal(size=12)
    copied = np.repeat(values, 5)
    found = clustered_interval(copied, np.repeat(np.arange(12), 5).tolist())
    assert found == pytest.approx(mean_interval(values))
    alone = mean_interval(copied)
    assert alone.high - alone.low < 0.5 * (found.high - found.low)


def test_one_cluster_has_no_interval() -> None:
    assert clustered_interval([1.0, 3.0], ["clip", "clip"]) == Interval(2.0, None, None, 1)


def test_intervals_of_clips_keep_their_promise() -> None:
    """Values that share their clip's chance: the interval holds the truth 95 times in 100."""
    random, held = np.random.default_rng(2), 0
    for _ in range(2000):
        clips = np.repeat(np.arange(20), random.integers(1, 7, 20))
        values = random.normal(size=20)[clips] + random.normal(size=len(clips))
        found = clustered_interval(values, clips.tolist())
        held += found.low <= 0 <= found.high
    assert 0.925 <= held / 2000 <= 0.975
