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
    from reward_fns.hungarian_match import HungarianMatch

CHUNK = 4096
"""Predictions at a time; bounds the memory that an absurd answer can take."""
IOU, BOX, POINT = 1, 2, 4


def pair_masks(
    scored: Sequence[tuple[Box, Point | None]],
    truth: Objects,
    params: HungarianMatch,
    scale: float,
    table: Sequence[float],
) -> np.ndarray:
    """masks[i, j]: which terms prediction i earns with target j (eqs. 8 to 10), uint8.

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
            masks = _masks(boxes, points, *gt, params, scale)
            if len(scored) > CHUNK and len(chunk) > n_gt:
                scores = np.asarray(table)[masks]
                best = np.argpartition(-scores, n_gt - 1, axis=0)[:n_gt]
                masks = masks[np.unique(best)]
            kept.append(masks)
    return np.concatenate(kept)


def _masks(
    boxes: np.ndarray,
    points: np.ndarray,
    gt_boxes: np.ndarray,
    gt_points: np.ndarray,
    params: HungarianMatch,
    scale: float,
) -> np.ndarray:
    pad = 1.0 if params.iou == "pixel" else 0.0
    iou = _iou(boxes, gt_boxes, pad) > params.eta
    near = _distance(boxes, gt_boxes, params.box_distance) < params.gamma_box * scale
    inside = np.all((boxes[:, :2] <= points) & (points <= boxes[:, 2:]), axis=1)
    hit = _distance(points, gt_points, params.pt_distance) < params.gamma_pt * scale
    masks = IOU * iou + BOX * near + POINT * (hit & inside[:, None])
    return masks.astype(np.uint8)


def _iou(a: np.ndarray, b: np.ndarray, pad: float) -> np.ndarray:
    """[n, 4], [m, 4] -> [n, m]."""
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    width, height = np.moveaxis(high - low + pad, -1, 0)
    inter = width * height
    area_a = (a[:, 2] - a[:, 0] + pad) * (a[:, 3] - a[:, 1] + pad)
    area_b = (b[:, 2] - b[:, 0] + pad) * (b[:, 3] - b[:, 1] + pad)
    union = area_a[:, None] + area_b[None, :] - inter
    return np.where((width > 0) & (height > 0) & (union > 0), inter / union, 0.0)


def _distance(a: np.ndarray, b: np.ndarray, kind: str) -> np.ndarray:
    """[n, d], [m, d] -> [n, m], summed coordinate by coordinate as the plain version does."""
    total = np.zeros((len(a), len(b)))
    for axis in range(a.shape[1]):
        difference = np.abs(a[:, axis, None] - b[None, :, axis])
        total += difference * difference if kind == "l2" else difference
    if kind == "l2":
        return np.sqrt(total)
    return total / a.shape[1] if kind == "mean_l1" else total
