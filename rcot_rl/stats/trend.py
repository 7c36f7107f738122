"""Change of a noisy curve over the steps of a stage, with an interval that holds for few steps.

The mean of the last third of the steps minus that of the first third. Its standard error comes from
the residuals of a quadratic fit: each step has other prompts, so the step noise is what remains
after the trend. Noise of neighbouring steps may be correlated; the residuals' lag-1 correlation r,
corrected for its bias in short series, widens the interval by (1 + r) / (1 - r) in the variance and
lowers the degrees of freedom of Student's t by the same factor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from rcot_rl.stats.intervals import Interval

if TYPE_CHECKING:
    import numpy as np

FEWEST_STEPS = 9
"""Steps below which a change has no interval: thirds of three steps, six degrees of freedom."""

MOST_POINTS = 200
"""A longer curve is averaged in this many stretches, which removes correlation of any shape."""

_LARGEST_CORRELATION = 0.9
_FEWEST_DEGREES = 1.5


class Trend(NamedTuple):
    """Mean of the first and of the last third of the steps, and the change between them."""

    before: float
    after: float
    change: Interval
    """95 % interval; low and high are None for fewer than FEWEST_STEPS steps."""


def trend(values: Sequence[float] | np.ndarray) -> Trend:
    """Return how a curve changed from its first to its last third.

    Args:
        values: One value per step, oldest first; at least one, all finite.
    """
    import numpy as np
    from scipy.special import stdtrit

    array = np.asarray(values, dtype=float)
    steps = len(array)
    if steps > MOST_POINTS:
        array = np.array([part.mean() for part in np.array_split(array, MOST_POINTS)])
    n, third = len(array), max(1, len(array) // 3)
    before, after = float(array[:third].mean()), float(array[-third:].mean())
    change = after - before
    if n < FEWEST_STEPS:
        return Trend(before, after, Interval(change, None, None, steps))
    design = np.vander(np.linspace(-1, 1, n), 3)
    residuals = array - design @ np.linalg.lstsq(design, array, rcond=None)[0]
    squares = float(residuals @ residuals)
    correlation = float(residuals[1:] @ residuals[:-1]) / squares if squares > 0 else 0.0
    correlation += (3 + 4 * correlation) / n
    correlation = min(max(correlation, 0.0), _LARGEST_CORRELATION)
    inflation = (1 + correlation) / (1 - correlation)
    degrees = max((n - 3) / inflation, _FEWEST_DEGREES)
    error = np.sqrt(squares / (n - 3) * 2 / third * inflation)
    reach = float(stdtrit(degrees, 0.975) * error)
    return Trend(before, after, Interval(change, change - reach, change + reach, steps))
