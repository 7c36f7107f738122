"""Veason-R1's other text rewards: `veason_format` (at most 2) and `veason_spatial` (at most 1).

Format: 1 for a well-formed response, plus the share of valid boxes. Spatial: continuous IoU of
predicted and true boxes of the chosen frame under the best assignment, over the larger count.

Two deliberate differences from the published code: an object that the chosen frame does not show is
not a target (the published reward pads it with [0, 0, 0, 0], so that answering [0, 0, 0, 0] on a
frame without the target earns everything), and booleans are not coordinates.
"""

from __future__ import annotations

import math
from typing import Any

from reward_fns.baselines.veason_answer import veason_answer
from reward_fns.components.assignment import best_assignment
from reward_fns.components.hungarian_match import FEW_PAIRS, box_iou
from reward_fns.ground_truth import KeyframeTruth
from reward_fns.registry import NoParams, Response, Settings, Term, register


@register("veason_format", params=NoParams, tasks=("veason",), maximum=2.0)
def veason_format(
    response: Response, truth: KeyframeTruth, params: NoParams, settings: Settings
) -> Term:
    """Return [well formed] + the share of list entries that are valid boxes."""
    parsed, answer = response.parsed, veason_answer(response)
    structure = 1.0 if parsed.well_formed else 0.0
    reasons = [*parsed.faults, *answer.faults]
    if not answer.boxes:
        if "boxes_not_a_list" not in reasons and not reasons:
            reasons.append("list_empty")
        return Term(structure, reasons)
    valid = sum(box is not None for box in answer.boxes)
    return Term(structure + valid / len(answer.boxes), reasons)


@register("veason_spatial", params=NoParams, tasks=("veason",), maximum=1.0)
def veason_spatial(
    response: Response, truth: KeyframeTruth, params: NoParams, settings: Settings
) -> Term:
    """Return the sum of the assigned IoUs over max(predicted, true boxes) of the chosen frame."""
    answer = veason_answer(response)
    if answer.keyframe not in truth.ids:
        return Term(0.0, ["keyframe_unknown"])
    targets = truth.boxes[truth.ids.index(answer.keyframe)]
    boxes = [box for box in answer.boxes if box is not None]
    if not targets or not boxes:
        return Term(0.0, ["target_missed" if targets else "keyframe_without_target"])
    if len(boxes) * len(targets) <= FEW_PAIRS:
        scores: Any = [[box_iou(box, target) for target in targets] for box in boxes]
    else:
        from reward_fns.components.pair_arrays import iou_table

        scores = iou_table(boxes, targets)
    total = math.fsum(float(scores[i][j]) for i, j in best_assignment(scores))
    value = total / max(len(answer.boxes), len(targets))
    return Term(value) if value >= 1.0 else Term(value, ["iou_low"])
