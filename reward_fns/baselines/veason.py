"""Veason-R1's other text rewards: `veason_format` (at most 2) and `veason_spatial` (at most 1).

Format: 1 for a well-formed response, and the share of valid boxes. Spatial: continuous IoU of
predicted and true boxes of the chosen frame under the best assignment, over the larger count.

Different from the published code, on purpose: an object that the chosen frame does not show is no
target there (the published rewards pad it with [0, 0, 0, 0], so that answering [0, 0, 0, 0] on a
frame without the target pays in full), and booleans are no coordinates.
"""

from __future__ import annotations

import math
from typing import Any

from rcot_rl.recipe.base import Section
from reward_fns.baselines.veason_answer import veason_answer
from reward_fns.components.assignment import best_assignment
from reward_fns.components.hungarian_match import SMALL, box_iou
from reward_fns.ground_truth import Frames
from reward_fns.registry import Response, Settings, Term, register


class Veason(Section):
    """Parameters of the modules of this file: none."""


def _one(params: Veason, settings: Settings) -> float:
    return 1.0


def _two(params: Veason, settings: Settings) -> float:
    return 2.0


@register("veason_format", params=Veason, tasks=("veason",), maximum=_two)
def veason_format(response: Response, truth: Frames, params: Veason, settings: Settings) -> Term:
    """[well formed] + share of the list's entries that are boxes."""
    parsed, answer = response.parsed, veason_answer(response)
    structure = 1.0 if parsed.well_formed else 0.0
    reasons = [*parsed.faults, *answer.faults]
    if not answer.boxes:
        if "boxes_not_a_list" not in reasons and not reasons:
            reasons.append("list_empty")
        return Term(structure, reasons)
    valid = sum(box is not None for box in answer.boxes)
    return Term(structure + valid / len(answer.boxes), reasons)


@register("veason_spatial", params=Veason, tasks=("veason",), maximum=_one)
def veason_spatial(response: Response, truth: Frames, params: Veason, settings: Settings) -> Term:
    """Sum of the assigned IoUs over max(predicted, true boxes) of the chosen frame."""
    answer = veason_answer(response)
    if answer.keyframe not in truth.ids:
        return Term(0.0, ["keyframe_unknown"])
    targets = truth.boxes[truth.ids.index(answer.keyframe)]
    boxes = [box for box in answer.boxes if box is not None]
    if not targets or not boxes:
        return Term(0.0, ["target_missed" if targets else "keyframe_without_target"])
    if len(boxes) * len(targets) <= SMALL:
        scores: Any = [[box_iou(box, target) for target in targets] for box in boxes]
    else:
        from reward_fns.components.pair_arrays import iou_table

        scores = iou_table(boxes, targets)
    total = math.fsum(float(scores[i][j]) for i, j in best_assignment(scores))
    value = total / max(len(answer.boxes), len(targets))
    return Term(value) if value >= 1.0 else Term(value, ["iou_low"])
