"""The pair terms of `hungarian_match` in arrays, for many objects. Imported only when needed.

The same operations in the same order as the plain version in `hungarian_match.py`, so that both
decide every threshold alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from rcot_rl.protocol.grounding import Box, Point
from reward_fns.ground_truth import Objects

if TYPE_CHECKING:
    from reward_fns.components.hungarian_match import Rule

CHUNK = 4096
"""Predictions at a time; bounds the memory that an absurd answer can take."""
IOU, BOX, POINT = 1, 2, 4


def pair_scores(
    scored: Sequence[tuple[Box, Point | None]], truth: Objects, rule: Rule
) -> tuple[np.ndarray, np.ndarray]:
    """S of prediction i with target j (eq. 11), float [n, m], and the terms earned in full, uint8.

    Beyond CHUNK predictions, rows that no best assignment needs are left out: in each column the
    best n_gt rows are enough, since a row that is not among them can give way to one that is free.
    """
    n_gt = len(truth.boxes)
    gt_points = [point or (np.nan, np.nan) for point in truth.points]
    gt = np.array(truth.boxes), np.array(gt_points, dtype=float)
    kept = []
    with np.errstate(all="ignore"):
        for start in range(0, len(scored), CHUNK):
            chunk = scored[start : start + CHUNK]
            boxes = np.array([box for box, _ in chunk])
            points = np.array([point or (np.nan, np.nan) for _, point in chunk], dtype=float)
            scores, full = _terms(boxes, points, *gt, rule)
            if len(scored) > CHUNK and len(chunk) > n_gt:
                best = np.unique(np.argpartition(-scores, n_gt - 1, axis=0)[:n_gt])
                scores, full = scores[best], full[best]
            kept.append((scores, full))
    if len(kept) == 1:
        return kept[0]
    return np.concatenate([s for s, _ in kept]), np.concatenate([f for _, f in kept])


def iou_table(boxes: Sequence[Box], targets: Sequence[Box]) -> np.ndarray:
    """Continuous IoU of every pair, [n, m]."""
    with np.errstate(all="ignore"):
        return _iou(np.array(boxes), np.array(targets), 0.0)


def _terms(
    boxes: np.ndarray, points: np.ndarray, gt_boxes: np.ndarray, gt_points: np.ndarray, rule: Rule
) -> tuple[np.ndarray, np.ndarray]:
    iou = _iou(boxes, gt_boxes, rule.pad)
    far = _distance(boxes, gt_boxes, rule.box_distance)
    apart = _distance(points, gt_points, rule.pt_distance)
    inside = np.all((boxes[:, :2] <= points) & (points <= boxes[:, 2:]), axis=1)
    apart = np.where(inside[:, None], apart, np.inf)  # and nan, of no point, is never near
    if not any(rule.soft):
        masks = (
            IOU * (iou > rule.eta) + BOX * (far < rule.gamma_box) + POINT * (apart < rule.gamma_pt)
        )
        return np.array(rule.table)[masks], (masks & rule.whole).astype(np.uint8)
    shares = (
        iou if rule.soft[0] else (iou > rule.eta).astype(float),
        _share(far, rule.gamma_box, rule.soft[1]),
        _share(apart, rule.gamma_pt, rule.soft[2]),
    )
    scores, full = np.zeros(iou.shape), np.zeros(iou.shape, dtype=np.uint8)
    for bit, alpha, share in zip((IOU, BOX, POINT), rule.alphas, shares, strict=True):
        scores += alpha * share
        if alpha:
            full |= np.where(share >= 1.0, bit, 0).astype(np.uint8)
    return scores, full


def _share(distance: np.ndarray, limit: float, soft: bool) -> np.ndarray:
    if soft:
        return np.nan_to_num(np.maximum(0.0, 1.0 - distance / limit), nan=0.0)
    return (distance < limit).astype(float)


def _iou(a: np.ndarray, b: np.ndarray, pad: float) -> np.ndarray:
    """[n, 4], [m, 4] -> [n, m]."""
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
    """[n, d], [m, d] -> [n, m], summed coordinate by coordinate as the plain version does."""
    total = np.zeros((len(a), len(b)))
    for axis in range(a.shape[1]):
        difference = a[:, axis, None] - b[None, :, axis]
        total += difference * difference if kind == "l2" else np.abs(difference)
    if kind == "l2":
        return np.sqrt(total)
    return total / a.shape[1] if kind == "mean_l1" else total
