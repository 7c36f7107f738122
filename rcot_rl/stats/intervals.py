"""95 % confidence intervals of means and of paired differences (section 4.4).

Rewards of two checkpoints are compared on the same prompts, with Student's t interval of the paired
differences: prompts are the sample, and pairing removes how hard each prompt is. The interval
assumes that the mean of n differences is about normal, which holds for tens to hundreds of bounded
rewards. Expressions of one clip share its frames and its description, so for J&F the clips are the
sample. `stratified_interval` is the interval of reports, which also holds for a few clips;
`bootstrap_intervals` assumes nothing about the distribution, but is too narrow for a few clips
(about 90 % instead of 95 % for ten). Left out: the spread between training runs (seeds); reports
show the differences per seed.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import lru_cache
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
    """Return the mean of independent values with its 95 % t interval. Raises ValueError."""
    import numpy as np
    from scipy.special import stdtrit

    array = np.asarray(values, dtype=float)
    if array.ndim != 1 or not array.size or not np.isfinite(array).all():
        raise ValueError("needs a non-empty list of finite numbers")
    mean, n = float(array.mean()), len(array)
    if n < 2:
        return Interval(mean, None, None, n)
    reach = float(stdtrit(n - 1, 0.975) * array.std(ddof=1) / np.sqrt(n))
    return Interval(mean, mean - reach, mean + reach, n)


def stratified_interval(
    values: Sequence[float] | np.ndarray,
    clusters: Sequence[Hashable],
    strata: Sequence[Hashable],
) -> Interval:
    """Return the unweighted mean of the strata's means with its 95 % interval.

    Clusters are the sample; a cluster may have values in several strata. The variance is the
    cluster-robust one of the linearized statistic, with the factor G / (G - 1) and Student's t with
    G - 1 degrees of freedom, where G is the number of clusters in the stratum with the fewest. It
    agrees with a bootstrap over clusters. Raises ValueError.

    Returns:
        The interval; `n` is the number of clusters. Without two clusters in each stratum, low and
        high are None.
    """
    import numpy as np
    from scipy.special import stdtrit

    mean_interval(values)
    members: dict[Hashable, list[float]] = {}
    spread: dict[Hashable, set[Hashable]] = {}
    for value, cluster, stratum in zip(values, clusters, strata, strict=True):
        members.setdefault(stratum, []).append(float(value))
        spread.setdefault(stratum, set()).add(cluster)
    means = {stratum: float(np.mean(inside)) for stratum, inside in members.items()}
    mean, n = float(np.mean(list(means.values()))), len(set(clusters))
    fewest = min(map(len, spread.values()))
    if fewest < 2:
        return Interval(mean, None, None, n)
    influence: dict[Hashable, float] = {}
    for value, cluster, stratum in zip(values, clusters, strata, strict=True):
        share = (float(value) - means[stratum]) / len(members[stratum]) / len(means)
        influence[cluster] = influence.get(cluster, 0.0) + share
    variance = sum(u * u for u in influence.values()) * fewest / (fewest - 1)
    reach = float(stdtrit(fewest - 1, 0.975) * np.sqrt(variance))
    return Interval(mean, mean - reach, mean + reach, n)


RESAMPLES = 10_000
"""Resamples of the bootstrap."""
_SEED = 20260507
_CHUNK = 1000


@lru_cache(maxsize=2)
def _resamples(n: int) -> np.ndarray:
    """Return how often each resample draws each of `n` clusters, uint16 [RESAMPLES, n]."""
    import numpy as np

    rng = np.random.default_rng(_SEED)
    chunks = (
        rng.multinomial(n, np.full(n, 1 / n), size=_CHUNK) for _ in range(RESAMPLES // _CHUNK)
    )
    return np.concatenate([chunk.astype(np.uint16) for chunk in chunks])


def bootstrap_intervals(
    values: np.ndarray, clusters: Sequence[Hashable], strata: Sequence[Hashable]
) -> list[Interval]:
    """Return `stratified_interval` of each column, by a percentile bootstrap over clusters.

    Clusters are drawn with replacement, each with all its values. Resamples that miss a stratum are
    left out. The seed is fixed: equal input gives equal intervals, up to the rounding of sums.

    Args:
        values: [N, K]; the columns share the resamples.
    """
    import numpy as np

    groups = {cluster: g for g, cluster in enumerate(dict.fromkeys(clusters))}
    parts = {stratum: s for s, stratum in enumerate(dict.fromkeys(strata))}
    group, part = [groups[c] for c in clusters], [parts[s] for s in strata]
    sums = np.zeros((len(groups), len(parts), values.shape[1]))
    counts = np.zeros((len(groups), len(parts)))
    np.add.at(sums, (group, part), values)
    np.add.at(counts, (group, part), 1)
    means = (sums.sum(axis=0) / counts.sum(axis=0)[:, None]).mean(axis=0)
    n = len(groups)
    if np.count_nonzero(counts, axis=0).min() < 2:
        return [Interval(float(mean), None, None, n) for mean in means]
    # sums and counts of a stratum together, so that one product resamples both
    both = np.concatenate([sums, counts[..., None]], axis=2)
    resampled = []
    for drawn in np.array_split(_resamples(n), RESAMPLES // _CHUNK):
        totals = (drawn.astype(float) @ both.reshape(n, -1)).reshape(-1, *both.shape[1:])
        totals = totals[totals[..., -1].all(axis=1)]
        resampled.append((totals[..., :-1] / totals[..., -1:]).mean(axis=1))
    bounds = np.percentile(np.concatenate(resampled), [2.5, 97.5], axis=0)
    columns = zip(means, *bounds, strict=True)
    return [Interval(float(mean), float(low), float(high), n) for mean, low, high in columns]


def shown_change(before: float, after: float, digits: int) -> float:
    """Return the difference of two levels that are shown rounded to `digits` decimals.

    A difference that is rounded separately can differ in the last digit from the shown levels.
    """
    return round(round(after, digits) - round(before, digits), digits) + 0.0


def paired_difference(
    before: Sequence[float] | np.ndarray, after: Sequence[float] | np.ndarray
) -> Interval:
    """Return the mean of after - before with its 95 % interval. Raises ValueError."""
    import numpy as np

    first, second = np.asarray(before, dtype=float), np.asarray(after, dtype=float)
    if first.shape != second.shape:
        raise ValueError(f"values are not in pairs: shapes {first.shape} and {second.shape}")
    return mean_interval(second - first)
