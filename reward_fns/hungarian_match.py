"""`hungarian_match`: the answer accuracy reward R_a of KTG (eqs. 8 to 12).

For every prediction i and target j,

    S_ij = alpha_iou [IoU > eta] + alpha_box [box distance < gamma_box]
         + alpha_pt [point distance < gamma_pt and the point lies in its own predicted box]

The one-to-one assignment with the greatest sum of S is found exactly; the reward is that sum over
max(number of predictions, number of targets), with the true counts, whatever of them is malformed.
An item without a valid box earns no pair score, one without a valid point loses the point's term.

The paper's "L1" of boxes is the mean of the four differences, as in the code that it descends from;
its "L1" of points is the sum of both. Other readings are parameters.

Left out: soft scores. An empty ground truth is a target only under `zero_target`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from rcot_rl.protocol.grounding import Box, Point
from rcot_rl.recipe.base import Section
from reward_fns.assignment import best_assignment
from reward_fns.ground_truth import Objects
from reward_fns.registry import NonNegative, Positive, Response, Settings, Term, register

if TYPE_CHECKING:
    import numpy as np

Distance = Literal["mean_l1", "l1", "l2"]
IOU, BOX, POINT = 1, 2, 4
LOST = {IOU: "iou_low", BOX: "box_far", POINT: "point_missed"}
SMALL = 64
"""Up to this many pairs, plain Python is faster than building arrays."""


class HungarianMatch(Section):
    """Parameters of `hungarian_match`, named as in the paper."""

    iou: Literal["continuous", "pixel"] = "continuous"
    """`pixel` adds 1 to every side, as if both corners were pixels inside."""
    eta: Annotated[float, Field(ge=0, le=1)] = 0.5
    """The IoU must be greater."""
    box_distance: Distance = "mean_l1"
    """Over the four coordinates."""
    gamma_box: Positive = 10.0
    """The boxes' distance must be less, in pixels of the 840 canvas."""
    pt_distance: Distance = "l1"
    """Over the two coordinates."""
    gamma_pt: Positive = 30.0
    """The points' distance must be less, in pixels of the 840 canvas."""
    alpha_iou: NonNegative = 1.0
    """Weight of the IoU's term."""
    alpha_box: NonNegative = 1.0
    """Weight of the boxes' distance."""
    alpha_pt: NonNegative = 1.0
    """Weight of the points' distance."""


def maximum(params: HungarianMatch, settings: Settings) -> float:
    """The greatest value: the sum of the three weights."""
    return params.alpha_iou + params.alpha_box + params.alpha_pt


@register("hungarian_match", params=HungarianMatch, tasks=("ktg",), maximum=maximum)
def hungarian_match(
    response: Response, truth: Objects, params: HungarianMatch, settings: Settings
) -> Term:
    """R_a of a response (eq. 12). Raises InputError when a needed ground truth point is missing."""
    if params.alpha_pt > 0:
        truth.require_points()
    grounding = response.grounding
    n_pred, n_gt = grounding.n_items, len(truth.boxes)
    if not grounding.is_list:
        return Term(0.0, list(grounding.faults))
    if n_gt == 0 or n_pred == 0:
        return _empty(n_pred, n_gt, maximum(params, settings), settings.zero_target)
    scored = [(item.box, item.point) for item in grounding.items if item.box is not None]
    masks, pairs = _match(scored, truth, params, settings.scale)
    table = _table(params)
    value = math.fsum(table[mask] for mask in masks) / max(n_pred, n_gt)
    return Term(value, _reasons(masks, pairs, n_pred, n_gt, params))


def _empty(n_pred: int, n_gt: int, most: float, zero_target: bool) -> Term:
    if n_gt > 0:
        return Term(0.0, ["target_missed"])
    if not zero_target:
        return Term(0.0, ["ground_truth_empty"])
    return Term(most) if n_pred == 0 else Term(0.0, ["target_invented"])


def _reasons(
    masks: list[int], pairs: int, n_pred: int, n_gt: int, params: HungarianMatch
) -> list[str]:
    """Codes for everything that keeps the value below the maximum."""
    weight = {IOU: params.alpha_iou, BOX: params.alpha_box, POINT: params.alpha_pt}
    reasons = [LOST[bit] for bit in LOST if weight[bit] and any(not m & bit for m in masks)]
    if n_pred > n_gt:
        reasons.append("objects_too_many")
    if n_pred < n_gt:
        reasons.append("objects_too_few")
    if pairs < min(n_pred, n_gt):
        reasons.append("box_invalid")
    return reasons


def _table(params: HungarianMatch) -> list[float]:
    """S of a pair (eq. 11) for each of the 8 sets of terms that it can earn."""
    return [
        params.alpha_iou * bool(mask & IOU)
        + params.alpha_box * bool(mask & BOX)
        + params.alpha_pt * bool(mask & POINT)
        for mask in range(8)
    ]


def _match(
    scored: Sequence[tuple[Box, Point | None]],
    truth: Objects,
    params: HungarianMatch,
    scale: float,
) -> tuple[list[int], int]:
    """The terms earned by each pair of the best assignment, and the number of pairs."""
    if not scored:
        return [], 0
    table = _table(params)
    masks: Sequence[Sequence[int]] | np.ndarray
    if len(scored) * len(truth.boxes) <= SMALL:
        masks = _pair_masks(scored, truth, params, scale)
    else:
        from reward_fns.pair_arrays import pair_masks

        masks = pair_masks(scored, truth, params, scale, table)
    pairs = best_assignment(masks, table)
    return [int(masks[i][j]) for i, j in pairs], len(pairs)


def _pair_masks(
    scored: Sequence[tuple[Box, Point | None]],
    truth: Objects,
    params: HungarianMatch,
    scale: float,
) -> list[list[int]]:
    """masks[i][j]: which terms prediction i earns with target j (eqs. 8 to 10)."""
    gamma_box, gamma_pt = params.gamma_box * scale, params.gamma_pt * scale
    box_distance, pt_distance = DISTANCES[params.box_distance], DISTANCES[params.pt_distance]
    pad = 1.0 if params.iou == "pixel" else 0.0
    rows = []
    for box, point in scored:
        hit = point if point is not None and inside(point, box) else None
        row = []
        for gt_box, gt_point in zip(truth.boxes, truth.points, strict=True):
            mask = IOU if box_iou(box, gt_box, pad) > params.eta else 0
            if box_distance(box, gt_box) < gamma_box:
                mask |= BOX
            if hit is not None and gt_point is not None and pt_distance(hit, gt_point) < gamma_pt:
                mask |= POINT
            row.append(mask)
        rows.append(row)
    return rows


def inside(point: Point, box: Box) -> bool:
    """Whether the point lies in the box, edges included."""
    return box[0] <= point[0] <= box[2] and box[1] <= point[1] <= box[3]


def box_iou(a: Box, b: Box, pad: float = 0.0) -> float:
    """Intersection over union of two boxes, every side lengthened by `pad`; 0 if both are empty."""
    width = min(a[2], b[2]) - max(a[0], b[0]) + pad
    height = min(a[3], b[3]) - max(a[1], b[1]) + pad
    if width <= 0 or height <= 0:
        return 0.0
    inter = width * height
    area_a = (a[2] - a[0] + pad) * (a[3] - a[1] + pad)
    area_b = (b[2] - b[0] + pad) * (b[3] - b[1] + pad)
    union = area_a + area_b - inter
    return inter / union if union > 0 else 0.0


def _l1(a: Sequence[float], b: Sequence[float]) -> float:
    total = 0.0
    for u, v in zip(a, b, strict=True):
        total += abs(u - v)
    return total


def _mean_l1(a: Sequence[float], b: Sequence[float]) -> float:
    return _l1(a, b) / len(a)


def _l2(a: Sequence[float], b: Sequence[float]) -> float:
    total = 0.0
    for u, v in zip(a, b, strict=True):
        total += (u - v) * (u - v)
    return math.sqrt(total)


DISTANCES: dict[str, Callable[[Sequence[float], Sequence[float]], float]] = {
    "mean_l1": _mean_l1,
    "l1": _l1,
    "l2": _l2,
}
