"""Limit the objects of a response before they are segmented: each costs memory and time."""

from __future__ import annotations

import numpy as np

from reward_fns.components.pair_arrays import iou_table


def merge_duplicates(
    boxes: np.ndarray, points: np.ndarray | None, max_objects: int, duplicate_iou: float
) -> np.ndarray:
    """Return the indices of the objects to keep, ascending.

    An object is a duplicate of an earlier one if their boxes' IoU is at least `duplicate_iou` and
    their points are as close: within `1 - duplicate_iou` of the earlier box's width and height. So
    two objects that fill the same box, but are marked in different places, both stay.

    Args:
        boxes: float `[N, 4]` x1, y1, x2, y2; N may be 0.
        points: float `[N, 2]` x, y, or None: boxes alone.
        max_objects: Maximum number of objects; the first ones are kept.
        duplicate_iou: From 0 to 1. At 1, only equal objects are duplicates.
    """
    kept: list[int] = []
    left = np.ones(len(boxes), dtype=bool)
    while left.any() and len(kept) < max_objects:
        first = int(left.argmax())
        kept.append(first)
        duplicate = iou_table(boxes[first : first + 1], boxes)[0] >= duplicate_iou
        if points is not None:
            reach = (1 - duplicate_iou) * (boxes[first, 2:] - boxes[first, :2])
            duplicate &= (np.abs(points - points[first]) <= reach).all(axis=1)
        left &= ~duplicate
        left[first] = False  # a box without area has IoU 0 with itself
    return np.array(kept, dtype=np.int64)
