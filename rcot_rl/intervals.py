"""How sure a mean difference is, for rewards compared on the same prompts (section 4.4).

Student's t interval of the paired differences: prompts are the sample, and pairing takes out how
hard each one is. It assumes that the mean of n differences is about normal, which at the tens to
hundreds of bounded rewards that are compared here it is. Expressions of one clip share its frames
and its description: of J&F, clips are the sample (`clustered_interval`). Left out: the spread
between training runs (seeds), for which differences are given per seed.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np


class Interval(NamedTuple):
    """A mean with its 95 % interval; low and high are None for fewer than two values."""

    mean: float
    low: float | None
    high: float | None
    n: int


def mean_interval(values: Sequence[float] | np.ndarray) -> Interval:
    """Mean of independent values with its 95 % t interval.

    Raises ValueError for no values and for values that are not finite.
    """
    import numpy as np
    from scipy.special import stdtrit

    array = np.asarray(values, dtype=float)
    if array.ndim != 1 or not array.size or not np.isfinite(array).all():
        raise ValueError("needs a list of finite numbers")
    mean, n = float(array.mean()), len(array)
    if n < 2:
        return Interval(mean, None, None, n)
    reach = float(stdtrit(n - 1, 0.975) * array.std(ddof=1) / np.sqrt(n))
    return Interval(mean, mean - reach, mean + reach, n)


def clustered_interval(
    values: Sequence[float] | np.ndarray, clusters: Sequence[Hashable]
) -> Interval:
    """Mean of all values with its 95 % interval when those of one cluster go together.

    The cluster-robust variance of a mean, with G / (G - 1) for G clusters, and Student's t with
    G - 1 degrees of freedom; with one value in each cluster it is `mean_interval`. n is G. Raises
    ValueError as `mean_interval`, and when the two lists differ in length.
    """
    import numpy as np
    from scipy.special import stdtrit

    mean = mean_interval(values).mean
    rests: dict[Hashable, float] = {}
    for value, cluster in zip(values, clusters, strict=True):
        rests[cluster] = rests.get(cluster, 0.0) + float(value) - mean
    n = len(rests)
    if n < 2:
        return Interval(mean, None, None, n)
    variance = sum(r * r for r in rests.values()) * n / (n - 1) / len(values) ** 2
    reach = float(stdtrit(n - 1, 0.975) * np.sqrt(variance))
    return Interval(mean, mean - reach, mean + reach, n)


def paired_difference(
    before: Sequence[float] | np.ndarray, after: Sequence[float] | np.ndarray
) -> Interval:
    """Mean of after - before with its 95 % interval; the two lists are about the same prompts.

    Raises ValueError when they are not of the same length, are empty, or not finite.
    """
    import numpy as np

    first, second = np.asarray(before, dtype=float), np.asarray(after, dtype=float)
    if first.shape != second.shape:
        raise ValueError(f"not in pairs: {first.shape} and {second.shape}")
    return mean_interval(second - first)
