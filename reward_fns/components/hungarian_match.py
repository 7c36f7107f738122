"""`hungarian_match`: the answer accuracy reward R_a of KTG (eqs. 8 to 12).

For every prediction i and target j,

    S_ij = alpha_iou [IoU > eta] + alpha_box [box distance < gamma_box]
         + alpha_pt [point distance < gamma_pt and the point lies in its own predicted box]

The one-to-one assignment with the greatest sum of S is found exactly. The reward is that sum over
max(number of predictions, number of targets); malformed items are counted too. An item without a
valid box earns no pair score; one without a valid point loses the point term.

The paper's "L1" between boxes is the mean of the four differences, as in the code it descends from;
its "L1" between points is the sum of both. Parameters select other distances.

`iou_score: continuous`, `box_score: soft` and `pt_score: soft` replace a threshold by a partial
score. An empty ground truth is a valid target only under `zero_target`.

Up to `FEW_PAIRS` pairs are scored one at a time in plain Python (`PairScorer`), more in arrays
(`pair_arrays.py`). Both do the same operations in the same order, so their values are equal to the
last bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Annotated, Literal, NamedTuple

from pydantic import Field

from rcot_rl.protocol.grounding import Box, Point
from rcot_rl.recipe.base import Section
from reward_fns.components.assignment import best_assignment
from reward_fns.ground_truth import Objects
from reward_fns.registry import NonNegative, Positive, Response, Settings, Term, register

Distance = Literal["mean_l1", "l1", "l2"]
IOU, BOX, POINT = 1, 2, 4
"""Bits of the terms that a pair earns in full."""
LOST = {IOU: "iou_low", BOX: "box_far", POINT: "point_missed"}
"""Reason code of each term that is not earned in full."""
FEW_PAIRS = 64
"""Up to this many pairs, plain Python is faster than building arrays."""
FEW_OBJECTS = 8
"""Up to this many objects, the given order is tried as the assignment first."""


class HungarianMatch(Section):
    """Parameters of `hungarian_match`, named as in the paper."""

    iou: Literal["continuous", "pixel"] = "continuous"
    """`pixel` adds 1 to every side, as if both corner pixels belonged to the box."""
    eta: Annotated[float, Field(ge=0, le=1)] = 0.5
    """The IoU must be greater than this."""
    box_distance: Distance = "mean_l1"
    """Distance over the four coordinates."""
    gamma_box: Positive = 10.0
    """The box distance must be less than this, in pixels of the 840 canvas."""
    pt_distance: Distance = "l1"
    """Distance over the two coordinates."""
    gamma_pt: Positive = 30.0
    """The point distance must be less than this, in pixels of the 840 canvas."""
    alpha_iou: NonNegative = 1.0
    """Weight of the IoU term."""
    alpha_box: NonNegative = 1.0
    """Weight of the box distance term."""
    alpha_pt: NonNegative = 1.0
    """Weight of the point distance term."""
    iou_score: Literal["threshold", "continuous"] = "threshold"
    """`continuous`: the IoU itself; eta is ignored."""
    box_score: Literal["threshold", "soft"] = "threshold"
    """`soft`: 1 - distance / gamma_box, at least 0."""
    pt_score: Literal["threshold", "soft"] = "threshold"
    """`soft`: 1 - distance / gamma_pt, at least 0; the point must lie in its own box."""


def maximum(params: HungarianMatch, settings: Settings) -> float:
    """Return the greatest possible value: the sum of the three weights."""
    return params.alpha_iou + params.alpha_box + params.alpha_pt


@register("hungarian_match", params=HungarianMatch, tasks=("ktg",), maximum=maximum)
def hungarian_match(
    response: Response, truth: Objects, params: HungarianMatch, settings: Settings
) -> Term:
    """Return R_a of a response (eq. 12). Raises InputError."""
    if params.alpha_pt > 0 and truth.without_point is not None:
        truth.require_points()
    grounding = response.grounding
    n_pred, n_gt = grounding.n_items, len(truth.boxes)
    if not grounding.is_list:
        return Term(0.0, list(grounding.faults))
    if n_gt == 0 or n_pred == 0:
        return _empty(n_pred, n_gt, maximum(params, settings), settings.zero_target)
    scorer = PairScorer(params, settings.scale)
    if n_pred == n_gt <= FEW_OBJECTS:
        # objects are usually listed in the true order; if every pair then earns all of its terms,
        # no other assignment can be better
        total = 0.0
        for item, target, target_point in zip(
            grounding.items, truth.boxes, truth.points, strict=True
        ):
            value, full = 0.0, 0
            if item.box is not None:
                value, full = scorer.score(item.box, item.point, target, target_point)
            if full != scorer.whole:
                break
            total += value
        else:
            return Term(total / n_gt)
    scored = [(item.box, item.point) for item in grounding.items if item.box is not None]
    pairs = best_pairs(scored, truth, scorer)
    value = math.fsum(pair.value for pair in pairs) / max(n_pred, n_gt)
    return Term(value, _reasons(pairs, n_pred, n_gt, params))


class AssignedPair(NamedTuple):
    """One pair of the best assignment."""

    prediction: int
    target: int
    value: float
    """S (eq. 11)."""
    full: int
    """Bits of the terms earned in full."""


def best_pairs(
    scored: Sequence[tuple[Box, Point | None]], truth: Objects, scorer: PairScorer
) -> list[AssignedPair]:
    """Return the pairs of the best assignment.

    Args:
        scored: Box and point of each prediction that has a valid box.
        truth: At least one target.
    """
    if not scored:
        return []
    targets = list(zip(truth.boxes, truth.points, strict=True))
    if len(scored) * len(targets) <= FEW_PAIRS:
        table = [[scorer.score(*pred, *target) for target in targets] for pred in scored]
        chosen = best_assignment([[value for value, _ in row] for row in table])
        return [AssignedPair(i, j, *table[i][j]) for i, j in chosen]
    from reward_fns.components.pair_arrays import pair_scores

    rows, scores = pair_scores(scored, truth, scorer)
    chosen = [(int(rows[i]), j) for i, j in best_assignment(scores)]
    return [AssignedPair(i, j, *scorer.score(*scored[i], *targets[j])) for i, j in chosen]


def _empty(n_pred: int, n_gt: int, greatest: float, zero_target: bool) -> Term:
    if n_gt > 0:
        return Term(0.0, ["target_missed"])
    if not zero_target:
        return Term(0.0, ["ground_truth_empty"])
    return Term(greatest) if n_pred == 0 else Term(0.0, ["target_invented"])


def _reasons(
    pairs: Sequence[AssignedPair], n_pred: int, n_gt: int, params: HungarianMatch
) -> list[str]:
    """Return a code for everything that keeps the value below the maximum."""
    alphas = (params.alpha_iou, params.alpha_box, params.alpha_pt)
    reasons = [
        reason
        for (bit, reason), alpha in zip(LOST.items(), alphas, strict=True)
        if alpha and any(not pair.full & bit for pair in pairs)
    ]
    if n_pred > n_gt:
        reasons.append("objects_too_many")
    if n_pred < n_gt:
        reasons.append("objects_too_few")
    if len(pairs) < min(n_pred, n_gt):
        reasons.append("box_invalid")
    return reasons


class PairScorer:
    """Scores pairs (eqs. 8 to 11) by one recipe on one canvas; cheap to create per response."""

    __slots__ = (
        "alphas",
        "box_distance",
        "eta",
        "gamma_box",
        "gamma_pt",
        "pad",
        "pt_distance",
        "soft",
        "whole",
    )

    def __init__(self, params: HungarianMatch, scale: float) -> None:
        self.alphas = iou, box, point = params.alpha_iou, params.alpha_box, params.alpha_pt
        self.eta, self.pad = params.eta, 1.0 if params.iou == "pixel" else 0.0
        self.gamma_box, self.gamma_pt = params.gamma_box * scale, params.gamma_pt * scale
        self.box_distance, self.pt_distance = params.box_distance, params.pt_distance
        self.soft = (
            params.iou_score == "continuous",
            params.box_score == "soft",
            params.pt_score == "soft",
        )
        self.whole = (IOU if iou else 0) | (BOX if box else 0) | (POINT if point else 0)

    def measure(
        self, box: Box, point: Point | None, target: Box, target_point: Point | None
    ) -> tuple[float, float, float]:
        """Return IoU, box distance and point distance (infinite where eq. 10 cannot hold)."""
        point_distance = math.inf
        if point is not None and target_point is not None and inside(point, box):
            point_distance = DISTANCES[self.pt_distance](point, target_point)
        box_distance = DISTANCES[self.box_distance](box, target)
        return box_iou(box, target, self.pad), box_distance, point_distance

    def score(
        self, box: Box, point: Point | None, target: Box, target_point: Point | None
    ) -> tuple[float, int]:
        """Return S of a pair (eq. 11) and the bits of the terms that it earns in full."""
        iou, box_distance, point_distance = self.measure(box, point, target, target_point)
        soft_iou, soft_box, soft_point = self.soft
        iou_share = iou if soft_iou else (1.0 if iou > self.eta else 0.0)
        box_share = _share(box_distance, self.gamma_box, soft_box)
        point_share = _share(point_distance, self.gamma_pt, soft_point)
        alpha_iou, alpha_box, alpha_pt = self.alphas
        value = alpha_iou * iou_share + alpha_box * box_share + alpha_pt * point_share
        full = IOU if iou_share >= 1.0 else 0
        if box_share >= 1.0:
            full |= BOX
        if point_share >= 1.0:
            full |= POINT
        return value, full & self.whole


def _share(distance: float, limit: float, soft: bool) -> float:
    if soft:
        return max(0.0, 1.0 - distance / limit)
    return 1.0 if distance < limit else 0.0


def inside(point: Point, box: Box) -> bool:
    """Return True if the point lies in the box, edges included."""
    return box[0] <= point[0] <= box[2] and box[1] <= point[1] <= box[3]


def box_iou(a: Sequence[float], b: Sequence[float], pad: float = 0.0) -> float:
    """Return the intersection over union of two boxes, or 0 if both are empty.

    Args:
        pad: Added to every side.
    """
    ax1, ay1, ax2, ay2 = a
    bx1, by1, bx2, by2 = b
    width = (ax2 if ax2 < bx2 else bx2) - (ax1 if ax1 > bx1 else bx1) + pad
    height = (ay2 if ay2 < by2 else by2) - (ay1 if ay1 > by1 else by1) + pad
    if width <= 0 or height <= 0:
        return 0.0
    inter = width * height
    area_a = (ax2 - ax1 + pad) * (ay2 - ay1 + pad)
    area_b = (bx2 - bx1 + pad) * (by2 - by1 + pad)
    union = area_a + area_b - inter
    return inter / union if union > 0 else 0.0


def _l1(a: Sequence[float], b: Sequence[float]) -> float:
    total = abs(a[0] - b[0]) + abs(a[1] - b[1])
    if len(a) == 4:
        total = total + abs(a[2] - b[2]) + abs(a[3] - b[3])
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
