"""The pair scores of `hungarian_match` in arrays, for many objects. Imported only when needed.

Does the same operations in the same order as `PairScorer`, so that both decide every threshold
alike.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rcot_rl.protocol.grounding import Box, Point
from reward_fns.components.hungarian_match import PairScorer
from reward_fns.ground_truth import Objects

CHUNK = 4096
"""Predictions at a time; bounds the memory that an absurdly long answer can take."""
NO_POINT = (np.nan, np.nan)


def pair_scores(
    scored: Sequence[tuple[Box, Point | None]], truth: Objects, scorer: PairScorer
) -> tuple[np.ndarray, np.ndarray]:
    """Score every prediction with every target.

    Beyond CHUNK predictions, rows that no best assignment needs are left out. The best `n_gt` rows
    of each column are enough: an assigned row that is not among them can be swapped for a free row
    that is.

    Returns:
        The index of each row's prediction, int [n], and S (eq. 11), float64 [n, m].
    """
    n_gt = len(truth.boxes)
    gt_boxes = np.array(truth.boxes)
    gt_points = np.array([point or NO_POINT for point in truth.points], dtype=float)
    kept_rows, kept_scores = [], []
    with np.errstate(all="ignore"):
        for start in range(0, len(scored), CHUNK):
            chunk = scored[start : start + CHUNK]
            boxes = np.array([box for box, _ in chunk])
            points = np.array([point or NO_POINT for _, point in chunk], dtype=float)
            scores = _score(boxes, points, gt_boxes, gt_points, scorer)
            rows = np.arange(len(chunk))
            if len(scored) > CHUNK and len(chunk) > n_gt:
                rows = np.unique(np.argpartition(-scores, n_gt - 1, axis=0)[:n_gt])
                scores = scores[rows]
            kept_rows.append(start + rows)
            kept_scores.append(scores)
    return np.concatenate(kept_rows), np.concatenate(kept_scores)


def iou_table(boxes: Sequence[Box] | np.ndarray, targets: Sequence[Box] | np.ndarray) -> np.ndarray:
    """Return the continuous IoU of every pair, float64 [n, m]."""
    with np.errstate(all="ignore"):
        return _iou(np.array(boxes), np.array(targets), 0.0)


def _score(
    boxes: np.ndarray,
    points: np.ndarray,
    gt_boxes: np.ndarray,
    gt_points: np.ndarray,
    scorer: PairScorer,
) -> np.ndarray:
    """Return S, float64 [n, m]."""
    iou = _iou(boxes, gt_boxes, scorer.pad)
    box_distance = _distance(boxes, gt_boxes, scorer.box_distance)
    point_distance = _distance(points, gt_points, scorer.pt_distance)
    inside = np.all((boxes[:, :2] <= points) & (points <= boxes[:, 2:]), axis=1)
    # the distance to a missing target point is NaN, which is never near
    point_distance = np.where(inside[:, None], point_distance, np.inf)
    soft_iou, soft_box, soft_point = scorer.soft
    shares = (
        iou if soft_iou else iou > scorer.eta,
        _share(box_distance, scorer.gamma_box, soft_box),
        _share(point_distance, scorer.gamma_pt, soft_point),
    )
    scores = np.zeros(iou.shape)
    for alpha, share in zip(scorer.alphas, shares, strict=True):
        scores += alpha * share
    return scores


def _share(distance: np.ndarray, limit: float, soft: bool) -> np.ndarray:
    """Return float64 shares if `soft`, else bool."""
    if soft:
        return np.nan_to_num(np.maximum(0.0, 1.0 - distance / limit), nan=0.0)
    return distance < limit


def _iou(a: np.ndarray, b: np.ndarray, pad: float) -> np.ndarray:
    """Return the IoU, [n, m], of boxes [n, 4] with boxes [m, 4]."""
    width = (
        np.minimum(a[:, 2, None], b[None, :, 2]) - np.maximum(a[:, 0, None], b[None, :, 0]) + pad
    )
    height = (
        np.minimum(a[:, 3, None], b[None, :, 3]) - np.maximum(a[:, 1, None], b[None, :, 1]) + pad
    )
    inter = width * height
    area_a = (a[:, 2] - a[:, 0] + pad) * (a[:, 3] - a[:, 1] + pad)
    area_b = (b[:, 2] - b[:, 0] + pad) * (b[:, 3] - b[:, 1] + pad)
    union = area_a[:, None] + area_b[None, :] - inter
    return np.where((width > 0) & (height > 0) & (union > 0), inter / union, 0.0)


def _distance(a: np.ndarray, b: np.ndarray, kind: str) -> np.ndarray:
    """Return the distances, [n, m], of [n, d] and [m, d], summed in the order of `PairScorer`."""
    total = np.zeros((len(a), len(b)))
    for axis in range(a.shape[1]):
        difference = a[:, axis, None] - b[None, :, axis]
        total += difference * difference if kind == "l2" else np.abs(difference)
    if kind == "l2":
        return np.sqrt(total)
    return total / a.shape[1] if kind == "mean_l1" else total
