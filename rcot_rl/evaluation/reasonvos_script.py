"""ReasonVOS as VideoLISA's public script scores it: only expressions with predictions count.

The script (evaluation/reason_vos/eval_reason_vos.py) skips an expression without a folder of
predictions or ground truth. A worker that finds a frame without a usable mask ends with an error,
so that its expression is missing too. The script's means are therefore over the remaining
expressions, and usually higher than the main figures, in which a missing mask counts 0.

Results are stored as `<source>_<video>_<object>_<expression id>`; a later expression with the same
key replaces the earlier one. Skipped by the script, since its key is no folder: an expression of
several objects. Left out: label images of frames that the corpus does not list, which the script
scores.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data_pipelines.corpora import Expression


def public_script_figures(
    expressions: Sequence[Expression], rows: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Return the script's means.

    Args:
        expressions: The scored expressions.
        rows: For each of them, a dictionary with "J" and "F" as fractions, "n_frames",
            "n_unusable_frames" and "n_frames_without_truth".

    Returns:
        Scores in percent; None if every expression is skipped:

            J, F, J&F
            n_skipped       expressions without usable predictions or ground truth in every frame
            n_replaced      expressions replaced by a later one with the same key
    """
    results: dict[str, tuple[float, float]] = {}
    n_scored = 0
    for expression, row in zip(expressions, rows, strict=True):
        unusable = row["n_unusable_frames"] or row["n_frames_without_truth"]
        if not row["n_frames"] or unusable or len(expression.anno_ids) != 1:
            continue
        n_scored += 1
        results[f"{expression.anno_ids[0]}_{expression.id}"] = (row["J"], row["F"])
    scores: dict[str, float | None] = {"J": None, "F": None, "J&F": None}
    if results:
        jaccard, boundary = (100 * float(m) for m in np.mean([*results.values()], axis=0))
        scores = {"J": jaccard, "F": boundary, "J&F": (jaccard + boundary) / 2}
    return {**scores, "n_skipped": len(rows) - n_scored, "n_replaced": n_scored - len(results)}
