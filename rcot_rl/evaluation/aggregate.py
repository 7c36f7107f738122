"""Aggregate the scores of expressions into a benchmark's figures, by its protocol."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np

from rcot_rl.evaluation.score_statistics import score_statistics
from rcot_rl.evaluation.step_figures import REQUESTS, aks_verdicts, pipeline_costs
from rcot_rl.stats.benchmark_means import SUBSET_MEANS, rounded

PROTOCOLS = {
    "ref-youtube-vos": "mean over annotated frames, then over expressions",
    "mevis": "mean over frames, then over expressions",
    "reasonvos": "mean over annotated frames, then over expressions",
    "davis17": "mean over frames, then over expressions, each alone (VISA)",
    "revos": "expressions rounded to 2 decimals; mean of the referring and reasoning means (VISA)",
}
KEYFRAME_FIGURES = (
    "keyframe_area_ratio_initial",
    "keyframe_area_ratio",
    "aks_rounds",
    "box_iou",
)
Subset = Literal["referring", "reasoning", "single_target", "multi_target", "no_target"]


def aggregate(dataset: str, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the figures of one benchmark.

    Args:
        dataset: Name of the benchmark.
        rows: One dictionary per expression, with "J" and "F" as fractions, "subset" (a `Subset`),
            "empty" (no frame has a predicted pixel), "found" (some frame has one), "defective" (its
            ground truth has a defect), "n_unusable_frames", "unexpected" (unknown names or improper
            values) and, if it has a trace, the keyframe figures and "segmenter".

    Returns:
        Scores in percent; None for a mean without values:

            protocol, J, F, J&F
            n_expressions   number of expressions
            n_defective     those with defective ground truth
            n_unusable      those without a usable prediction in some frame
            n_unexpected    those with unknown names or improper values
            per_subset      {subset: {J, F, J&F, n_…}}; no_target also has N-Acc and T-Acc
            per_expression  the rows in percent, with J&F
            keyframe_area_ratio_initial, keyframe_area_ratio, aks_rounds, box_iou
                            means over the expressions that have them (Tables 13 and 14)
            n_traces        number of expressions with a trace
            segmenter       the segmenters that the traces name
            pipeline_costs  see `step_figures.pipeline_costs`
            aks_verdicts    see `step_figures.aks_verdicts`
            statistics      further means, and 95 % intervals: `score_statistics.score_statistics`
    """
    costs = pipeline_costs(rows)
    rows = [_in_percent(row) for row in rows]
    subsets = {name: [r for r in rows if r["subset"] == name] for name in get_args(Subset)}
    means = {name: _means(dataset, members) for name, members in subsets.items() if members}
    if "no_target" in means:
        means["no_target"] |= _accuracies(rows)
    if dataset in SUBSET_MEANS:
        parts = [means[name] for name in SUBSET_MEANS[dataset] if name in means]
        overall = {key: _mean([part[key] for part in parts]) for key in ("J", "F", "J&F")}
    else:
        overall = _means(dataset, rows)
    traced = [row for row in rows if "segmenter" in row]
    return {
        "protocol": PROTOCOLS[dataset],
        **overall,
        **_counts(rows),
        "per_subset": means,
        **{key: _mean([row[key] for row in traced]) for key in KEYFRAME_FIGURES},
        "n_traces": len(traced),
        "segmenter": ", ".join(sorted({row["segmenter"] for row in traced})) or None,
        "pipeline_costs": costs,
        "aks_verdicts": aks_verdicts(rows),
        "statistics": score_statistics(dataset, rows),
        "per_expression": rows,
    }


def _in_percent(row: dict[str, Any]) -> dict[str, Any]:
    jaccard, boundary = 100 * row["J"], 100 * row["F"]
    row = {key: value for key, value in row.items() if key != REQUESTS}
    return {**row, "J": jaccard, "F": boundary, "J&F": (jaccard + boundary) / 2}


def _means(dataset: str, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    jaccard, boundary = (_mean(rounded(dataset, [r[key] for r in rows])) for key in ("J", "F"))
    both = None if jaccard is None or boundary is None else (jaccard + boundary) / 2
    return {"J": jaccard, "F": boundary, "J&F": both, **_counts(rows)}


def _counts(rows: Sequence[dict[str, Any]]) -> dict[str, int]:
    return {
        "n_expressions": len(rows),
        "n_defective": sum(row["defective"] for row in rows),
        "n_unusable": sum(row["n_unusable_frames"] > 0 for row in rows),
        "n_unexpected": sum(row["unexpected"] for row in rows),
    }


def _mean(values: Sequence[float | None] | np.ndarray) -> float | None:
    """Return the mean of the values that are not None."""
    known = np.array([value for value in values if value is not None], dtype=float)
    return float(np.mean(known)) if known.size else None


def _accuracies(rows: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """Return N-Acc and T-Acc; a missing prediction is wrong for both.

    N-Acc is the share of expressions without a target whose masks are empty, T-Acc the share of
    expressions with a target whose masks are not.
    """
    absent = [100.0 * row["empty"] for row in rows if row["subset"] == "no_target"]
    present = [100.0 * row["found"] for row in rows if row["subset"] != "no_target"]
    return {"N-Acc": _mean(absent), "T-Acc": _mean(present)}
