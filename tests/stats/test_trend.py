"""The change of a curve has an interval that holds for few, many and correlated steps."""

from __future__ import annotations

import numpy as np
import pytest

from rcot_rl.stats.trend import FEWEST_STEPS, trend


def correlated(n: int, correlation: float, random: np.random.Generator) -> np.ndarray:
    """Return n values of a stationary AR(1) process with variance 1."""
    noise, values = random.normal(size=n), np.empty(n)
    values[0] = noise[0]
    for k in range(1, n):
        values[k] = correlation * values[k - 1] + np.sqrt(1 - correlation**2) * noise[k]
    return values


def shares(n: int, correlation: float, rise: float, times: int) -> tuple[float, float]:
    """Return how often a linear rise is found, and how often its interval covers it."""
    random = np.random.default_rng([n, round(100 * correlation)])
    line = np.linspace(0, rise, n)
    true = trend(line).change.mean
    changes = [trend(line + correlated(n, correlation, random)).change for _ in range(times)]
    detected = sum(change.low > 0 for change in changes) / times
    return detected, sum(change.low <= true <= change.high for change in changes) / times


def test_change_is_the_last_third_minus_the_first() -> None:
    result = trend([1, 2, 3, 9, 9, 9, 9, 4, 5, 9])
    assert (result.before, result.after) == (2, 6)
    assert result.change.mean == 4
    assert result.change.n == 10


def test_a_curve_without_noise_has_a_narrow_interval() -> None:
    change = trend(np.linspace(0, 3, 30)).change
    assert change.low == pytest.approx(2.0, rel=0.05)
    assert change.high == pytest.approx(2.0, rel=0.05)


def test_few_steps_have_no_interval() -> None:
    assert trend([1.0]).change[:3] == (0.0, None, None)
    assert trend(range(FEWEST_STEPS - 1)).change.low is None
    assert trend(range(FEWEST_STEPS)).change.low is not None


@pytest.mark.parametrize(
    ("n", "correlation", "most"),
    [
        (10, 0.0, 0.04),
        (10, 0.3, 0.06),
        (24, 0.3, 0.05),
        (48, 0.5, 0.06),
        (1000, 0.0, 0.04),
        (1000, 0.8, 0.05),
    ],
)
def test_a_curve_that_does_not_change_rarely_rises(n: int, correlation: float, most: float) -> None:
    """2.5 % in theory; a few percent of bias remain for few correlated steps."""
    found, covered = shares(n, correlation, 0.0, 600)
    assert found <= most
    assert covered >= 1 - 2 * most


def test_a_planted_rise_is_found() -> None:
    """A rise of two standard deviations over 48 steps, as in the laptop's second stage."""
    found, covered = shares(48, 0.0, 2.0, 400)
    assert found >= 0.8
    assert covered >= 0.92
