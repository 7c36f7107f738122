"""Means of a benchmark's scores with 95 % intervals, and paired differences of methods.

Three means of J, F and J&F, in percent:

    protocol   the benchmark's own mean, as in the result's J, F and J&F
    micro      over expressions
    macro      over videos, of the mean over the expressions of each

All three leave out the expressions that the protocol leaves out. Expressions of a video share its
frames, so videos are the sample of the bootstrap.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from rcot_rl.stats.benchmark_means import SUBSET_MEANS, is_counted, rounded
from rcot_rl.stats.intervals import RESAMPLES, bootstrap_intervals

SCORES = ("J", "F", "J&F")


def score_statistics(dataset: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Return the means of one method with their intervals; None without counted expressions.

    Args:
        rows: `per_expression` of a result.

    Returns:
        {"n_videos", "resamples", mean: {score: {"mean", "low", "high"}}}; low and high are None
        if a part of the benchmark has fewer than two videos.
    """
    return _statistics(dataset, rows, _scores(dataset, rows))


def score_differences(
    dataset: str, results: Mapping[str, Mapping[str, Any]], pairs: Iterable[tuple[str, str]]
) -> list[dict[str, Any]]:
    """Return the paired differences of methods that scored the same expressions.

    Args:
        results: Name -> result of the method.
        pairs: (before, after).

    Returns:
        For each pair, {"before", "after"} and the statistics of after - before; see
        `score_statistics`.
    """
    differences = []
    for before, after in pairs:
        first, second = (results[name]["per_expression"] for name in (before, after))
        names = [[(r["video"], r["expression_id"]) for r in rows] for rows in (first, second)]
        if names[0] != names[1]:
            raise ValueError(f"{before} and {after} scored different expressions")
        old, new = _scores(dataset, first), _scores(dataset, second)
        statistics = _statistics(dataset, first, (new[0] - old[0], new[1] - old[1]))
        differences.append({"before": before, "after": after, **(statistics or {})})
    return differences


def _scores(dataset: str, rows: Sequence[Mapping[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """Return J, F and J&F of the counted expressions, [N, 3], as the protocol rounds and exact."""
    counted = [r for r in rows if is_counted(dataset, r["subset"])]
    exact = np.array([[r["J"], r["F"]] for r in counted]).reshape(-1, 2)
    both = (rounded(dataset, exact), exact)
    of_protocol, plain = (np.column_stack([two, two.mean(axis=1)]) for two in both)
    return of_protocol, plain


def _statistics(
    dataset: str, rows: Sequence[Mapping[str, Any]], scores: tuple[np.ndarray, np.ndarray]
) -> dict[str, Any] | None:
    counted = [r for r in rows if is_counted(dataset, r["subset"])]
    if not counted:
        return None
    of_protocol, exact = scores
    videos = [r["video"] for r in counted]
    parts = [r["subset"] if dataset in SUBSET_MEANS else "" for r in counted]
    members: dict[str, list[int]] = {}
    for index, video in enumerate(videos):
        members.setdefault(video, []).append(index)
    by_video = np.array([exact[indices].mean(axis=0) for indices in members.values()])
    return {
        "n_videos": len(members),
        "resamples": RESAMPLES,
        "protocol": _means(of_protocol, videos, parts),
        "micro": _means(exact, videos, [""] * len(videos)),
        "macro": _means(by_video, list(members), [""] * len(members)),
    }


def _means(
    values: np.ndarray, videos: Sequence[Hashable], parts: Sequence[Hashable]
) -> dict[str, dict[str, float | None]]:
    intervals = bootstrap_intervals(values, videos, parts)
    return {
        score: {"mean": one.mean, "low": one.low, "high": one.high}
        for score, one in zip(SCORES, intervals, strict=True)
    }
