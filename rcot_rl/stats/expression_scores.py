"""Scores of a benchmark's expressions in an evaluation's results, and their paired change."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

from rcot_rl.stats.benchmark_means import SUBSET_MEANS, is_counted, rounded
from rcot_rl.stats.intervals import Interval, stratified_interval
from rcot_rl.stats.json_values import at, is_number


class Key(NamedTuple):
    """One expression of a benchmark."""

    video: str
    expression_id: str
    occurrence: int
    """0, or 1, 2, … for further expressions of the video with the same id."""


class Counted(NamedTuple):
    """What an expression adds to a benchmark's J&F, the mean of the means of its parts."""

    score: float
    part: str


Expressions = Mapping[Key, Counted]


def by_expression(result: Any) -> dict[Key, Counted]:
    """Return the expressions that the benchmark's J&F counts."""
    rows, dataset = at(result, "per_expression"), at(result, "benchmark")
    dataset = dataset if isinstance(dataset, str) else None
    counted: dict[Key, Counted] = {}
    occurrences: Counter[tuple[str, str]] = Counter()
    for row in rows if isinstance(rows, list) else []:
        name, subset = (str(at(row, "video")), str(at(row, "expression_id"))), at(row, "subset")
        occurrence, occurrences[name] = occurrences[name], occurrences[name] + 1
        if is_number(at(row, "J&F")) and is_counted(dataset, subset):
            part = subset if dataset in SUBSET_MEANS else ""
            counted[Key(*name, occurrence)] = Counted(_score(dataset, row), part)
    return counted


def _score(dataset: str | None, row: dict[str, Any]) -> float:
    parts = [row.get("J"), row.get("F")]
    if not all(map(is_number, parts)):
        return float(row["J&F"])
    return float(rounded(dataset, parts).mean())


def paired_change(before: Expressions, after: Expressions) -> Interval | None:
    """Return the paired change of J&F over clips; None unless both have the same expressions."""
    if not before or before.keys() != after.keys():
        return None
    return stratified_interval(
        [after[key].score - one.score for key, one in before.items()],
        [key.video for key in before],
        [one.part for one in before.values()],
    )


def level(expressions: Expressions) -> Interval | None:
    """Return J&F over clips; None without expressions."""
    if not expressions:
        return None
    return stratified_interval(
        [one.score for one in expressions.values()],
        [key.video for key in expressions],
        [one.part for one in expressions.values()],
    )


def pooled_expressions(scores: Mapping[str, Any], checkpoint: str) -> dict[Key, Counted]:
    """Return the expressions of all benchmarks for one checkpoint, each with equal weight.

    Args:
        scores: Benchmark -> its result file, with `checkpoints`.
        checkpoint: Key of `checkpoints`. Benchmarks that did not score it are left out.
    """
    return {
        Key(f"{benchmark}/{key.video}", key.expression_id, key.occurrence): Counted(one.score, "")
        for benchmark, result in scores.items()
        for key, one in by_expression(at(result, "checkpoints", checkpoint)).items()
    }
