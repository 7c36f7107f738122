"""Figures of the steps before the masks: keyframes, AKS rounds and boxes (Tables 13 and 14).

Area ratio: the target's area in the chosen frame over its largest in the video.

Box IoU: each object that the ground truth shows in the keyframe takes the predicted box that fits
it best; the mean over objects. Where the keyframe shows no target the value is 0, since no box can
be right there. The paper gives no matching for its "Avg IoU"; this one asks whether each target
was found, and does not count boxes too many (J and F of the masks do).

Left out: expressions without a target in the whole video, for which neither is defined.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from data_pipelines.geometry import tight_box
from rcot_rl.evaluation.predictions import KeyframeTrace


def keyframe_figures(
    trace: KeyframeTrace, areas: np.ndarray, objects: Mapping[str, np.ndarray] | None
) -> dict[str, float | int | None]:
    """The figures of one expression, ratios and IoU in percent.

    areas: the target's pixels in each frame [T], -1 where there is no ground truth. objects: each
    object's mask in the keyframe, bool [H, W]; None without ground truth. What the ground truth
    does not tell, or is of a target never seen, is None.
    """
    largest = int(areas.max(initial=0))

    def ratio(frame: int) -> float | None:
        return 100 * int(areas[frame]) / largest if largest and areas[frame] >= 0 else None

    known = largest > 0 and objects is not None
    return {
        "keyframe": trace.keyframe,
        "initial_keyframe": trace.initial_keyframe,
        "aks_rounds": trace.rounds,
        "keyframe_area_ratio_initial": ratio(trace.initial_keyframe),
        "keyframe_area_ratio": ratio(trace.keyframe),
        "box_iou": 100 * box_iou(trace.boxes_source, objects) if known else None,
    }


def box_iou(boxes: Sequence[Sequence[float]], objects: Mapping[str, np.ndarray]) -> float:
    """Mean over the visible objects of the best IoU that a predicted box has with their own.

    boxes [x1, y1, x2, y2] half-open in source pixels; objects: masks, bool [H, W]. 0 without a
    visible object.
    """
    visible = [tight_box(mask) for mask in objects.values() if mask.any()]
    if not visible:
        return 0.0
    best = [max((_iou(box, target) for box in boxes), default=0.0) for target in visible]
    return float(np.mean(best))


def _iou(a: Sequence[float], b: Sequence[float]) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    both = width * height
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return both / (sum(areas) - both)
