"""Figures of the steps before the masks: keyframes, AKS rounds and boxes (Tables 13 and 14).

AKS is agentic keyframe selection. Area ratio: the target's area in the chosen frame divided by its
largest area in the video.

Box IoU: mean over the objects visible in the keyframe of the best IoU with a predicted box; 0 if
the keyframe shows no target, since no box can be right there. The paper defines no matching for its
"Avg IoU". This one measures whether each target was found and ignores surplus boxes, which J and F
of the masks penalize.

Left out: expressions without a target in the whole video; neither figure is defined for them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data_pipelines.geometry import tight_box
from rcot_rl.evaluation.predictions import KeyframeTrace
from rcot_rl.evaluation.step_figures import step_figures
from reward_fns.components.hungarian_match import box_iou


def keyframe_figures(
    trace: KeyframeTrace, areas: np.ndarray, objects: Mapping[str, np.ndarray] | None
) -> dict[str, Any]:
    """Return the figures of one expression, ratios and IoU in percent.

    Args:
        trace: The prediction's trace.
        areas: Pixels of the target in each frame, int [T]; -1 without ground truth.
        objects: Object id -> mask in the keyframe, bool [H, W]; None without ground truth.

    Returns:
        The figures; None where the ground truth is missing or the target is never visible. Those of
        `step_figures` are included.
    """
    largest = int(areas.max(initial=0))

    def ratio(frame: int) -> float | None:
        return 100 * int(areas[frame]) / largest if largest and areas[frame] >= 0 else None

    iou = None if objects is None else 100 * mean_box_iou(trace.boxes_source, objects)
    return {
        "keyframe": trace.keyframe,
        "initial_keyframe": trace.initial_keyframe,
        "aks_rounds": trace.rounds,
        "keyframe_area_ratio_initial": ratio(trace.initial_keyframe),
        "keyframe_area_ratio": ratio(trace.keyframe),
        "box_iou": iou if largest else None,
        **step_figures(trace, areas),
    }


def mean_box_iou(boxes: Sequence[Sequence[float]], objects: Mapping[str, np.ndarray]) -> float:
    """Return the mean over visible objects of the best IoU of a predicted box; 0 without objects.

    Args:
        boxes: [x1, y1, x2, y2], half-open, in source pixels.
        objects: Object id -> mask, bool [H, W].
    """
    visible = [tight_box(mask) for mask in objects.values() if mask.any()]
    if not visible:
        return 0.0
    best = [max((box_iou(box, target) for box in boxes), default=0.0) for target in visible]
    return float(np.mean(best))
