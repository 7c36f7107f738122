"""`hungarian_match`: the answer accuracy reward R_a of KTG (eqs. 8 to 12).

For every prediction i and target j,

    S_ij = alpha_iou [IoU > eta] + alpha_box [box distance < gamma_box]
         + alpha_pt [point distance < gamma_pt and the point lies in its own predicted box]

The one-to-one assignment with the greatest sum of S is found exactly; the reward is that sum over
max(number of predictions, number of targets), with the true counts, whatever of them is malformed.
An item without a valid box earns no pair score, one without a valid point loses the point's term.

The paper's "L1" of boxes is the mean of the four differences, as in the code that it descends from;
its "L1" of points is the sum of both. Other readings are parameters.

`iou_score: continuous`, `box_score: soft` and `pt_score: soft` pay by degrees instead of at a
threshold. An empty ground truth is a target only under `zero_target`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Annotated, Literal

from pydantic import Field

from rcot_rl.protocol.grounding import Box, Point
from rcot_rl.recipe.base import Section
from reward_fns.components.assignment import best_assignment
from reward_fns.ground_truth import Objects
from reward_fns.registry import NonNegative, Positive, Response, Settings, Term, register

Distance = Literal["mean_l1", "l1", "l2"]
IOU, BOX, POINT = 1, 2, 4
LOST = {IOU: "iou_low", BOX: "box_far", POINT: "point_missed"}
SMALL = 64
"""Up to this many pairs, plain Python is faster than building arrays."""
TINY = 8
"""Objects up to which the given order is tried first."""


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
    iou_score: Literal["threshold", "continuous"] = "threshold"
    """`continuous`: the IoU itself, whatever eta."""
    box_score: Literal["threshold", "soft"] = "threshold"
    """`soft`: 1 - distance / gamma_box, at least 0."""
    pt_score: Literal["threshold", "soft"] = "threshold"
    """`soft`: 1 - distance / gamma_pt, at least 0; the point must lie in its own box."""


def maximum(params: HungarianMatch, settings: Settings) -> float:
    """The greatest value: the sum of the three weights."""
    return params.alpha_iou + params.alpha_box + params.alpha_pt


@register("hungarian_match", params=HungarianMatch, tasks=("ktg",), maximum=maximum)
def hungarian_match(
    response: Response, truth: Objects, params: HungarianMatch, settings: Settings
) -> Term:
    """R_a of a response (eq. 12). Raises InputError when a needed ground truth point is missing."""
    rule = rule_of(params, settings)
    if rule.alphas[2] > 0 and truth.without_point is not None:
        truth.require_points()
    grounding = response.grounding
    n_pred, n_gt = grounding.n_items, len(truth.boxes)
    if not grounding.is_list:
        return Term(0.0, list(grounding.faults))
    if n_gt == 0 or n_pred == 0:
        return _empty(n_pred, n_gt, maximum(params, settings), settings.zero_target)
    if n_pred == n_gt <= TINY:
        # objects are usually listed in the true order; where each has all of its terms, no other
        # assignment can give more
        total, whole = 0.0, rule.whole
        for item, b, q in zip(grounding.items, truth.boxes, truth.points, strict=True):
            value, full = rule.pair(item.box, item.point, b, q) if item.box else (0.0, 0)
            if full != whole:
                break
            total += value
        else:
            return Term(total / n_gt)
    scored = [(item.box, item.point) for item in grounding.items if item.box is not None]
    values, masks = match(scored, truth, rule)
    return Term(math.fsum(values) / max(n_pred, n_gt), _reasons(masks, n_pred, n_gt, rule))


def match(
    scored: Sequence[tuple[Box, Point | None]], truth: Objects, rule: Rule
) -> tuple[list[float], list[int]]:
    """S (eq. 11) of each pair of the best assignment, and the terms that it earns in full."""
    n, m = len(scored), len(truth.boxes)
    if not n:
        return [], []
    if n * m <= SMALL:
        cells = [
            [rule.pair(box, point, b, q) for b, q in zip(truth.boxes, truth.points, strict=True)]
            for box, point in scored
        ]
        pairs = best_assignment([[cell[0] for cell in row] for row in cells])
        chosen = [cells[i][j] for i, j in pairs]
        return [value for value, _ in chosen], [full for _, full in chosen]
    from reward_fns.components.pair_arrays import pair_scores

    scores, masks = pair_scores(scored, truth, rule)
    pairs = best_assignment(scores)
    return [float(scores[i, j]) for i, j in pairs], [int(masks[i, j]) for i, j in pairs]


def _empty(n_pred: int, n_gt: int, most: float, zero_target: bool) -> Term:
    if n_gt > 0:
        return Term(0.0, ["target_missed"])
    if not zero_target:
        return Term(0.0, ["ground_truth_empty"])
    return Term(most) if n_pred == 0 else Term(0.0, ["target_invented"])


def _reasons(full: list[int], n_pred: int, n_gt: int, rule: Rule) -> list[str]:
    """Codes for everything that keeps the value below the maximum."""
    weight = dict(zip(LOST, rule.alphas, strict=True))
    reasons = [LOST[bit] for bit in LOST if weight[bit] and any(not m & bit for m in full)]
    if n_pred > n_gt:
        reasons.append("objects_too_many")
    if n_pred < n_gt:
        reasons.append("objects_too_few")
    if len(full) < min(n_pred, n_gt):
        reasons.append("box_invalid")
    return reasons


Pair = Callable[[Box, Point | None, Box, Point | None], tuple[float, int]]
"""A prediction's box and point, a target's -> S (eq. 11) and the terms earned in full."""


class Rule:
    """The parameters of one recipe on one canvas, ready for use on pairs."""

    def __init__(self, params: HungarianMatch, scale: float) -> None:
        self.alphas = (params.alpha_iou, params.alpha_box, params.alpha_pt)
        self.eta, self.pad = params.eta, 1.0 if params.iou == "pixel" else 0.0
        self.gamma_box, self.gamma_pt = params.gamma_box * scale, params.gamma_pt * scale
        self.box_distance, self.pt_distance = params.box_distance, params.pt_distance
        self.soft = (
            params.iou_score == "continuous",
            params.box_score == "soft",
            params.pt_score == "soft",
        )
        self.whole = sum(bit for bit, alpha in zip(LOST, self.alphas, strict=True) if alpha)
        self._box, self._point = DISTANCES[params.box_distance], DISTANCES[params.pt_distance]
        self.table = [self._sum(mask) for mask in range(8)]
        self.pair: Pair = self._pair
        if any(self.soft):
            self.pair = self._soft_pair
        elif (params.box_distance, params.pt_distance) == ("mean_l1", "l1"):
            self.pair = _plain_pair(self)

    def _sum(self, mask: int) -> float:
        """S of a pair (eq. 11) that earns these terms."""
        iou, box, point = self.alphas
        return iou * bool(mask & IOU) + box * bool(mask & BOX) + point * bool(mask & POINT)

    def terms(self, box: Box, point: Point | None, b: Box, q: Point | None) -> tuple[float, ...]:
        """IoU, the boxes' distance, the points' distance (infinite where eq. 10 cannot hold)."""
        apart = math.inf
        if point is not None and q is not None and inside(point, box):
            apart = self._point(point, q)
        return box_iou(box, b, self.pad), self._box(box, b), apart

    def _pair(self, box: Box, point: Point | None, b: Box, q: Point | None) -> tuple[float, int]:
        """S of a pair, and the terms that it earns (eqs. 8 to 11)."""
        iou, far, apart = self.terms(box, point, b, q)
        mask = IOU if iou > self.eta else 0
        if far < self.gamma_box:
            mask |= BOX
        if apart < self.gamma_pt:
            mask |= POINT
        return self.table[mask], mask & self.whole

    def _soft_pair(
        self, box: Box, point: Point | None, b: Box, q: Point | None
    ) -> tuple[float, int]:
        value, full = 0.0, 0
        iou, far, apart = self.terms(box, point, b, q)
        shares = (
            iou if self.soft[0] else float(iou > self.eta),
            _share(far, self.gamma_box, self.soft[1]),
            _share(apart, self.gamma_pt, self.soft[2]),
        )
        for bit, alpha, share in zip(LOST, self.alphas, shares, strict=True):
            value += alpha * share
            if share >= 1.0 and alpha:
                full |= bit
        return value, full


def _plain_pair(rule: Rule) -> Pair:
    """`Rule._pair` of the usual distances, written out: it is where a reward's time goes."""
    table, whole, pad, eta = rule.table, rule.whole, rule.pad, rule.eta
    gamma_box, gamma_pt = rule.gamma_box, rule.gamma_pt

    def pair(box: Box, point: Point | None, b: Box, q: Point | None) -> tuple[float, int]:
        ax1, ay1, ax2, ay2 = box
        bx1, by1, bx2, by2 = b
        mask = 0
        width = (ax2 if ax2 < bx2 else bx2) - (ax1 if ax1 > bx1 else bx1) + pad
        height = (ay2 if ay2 < by2 else by2) - (ay1 if ay1 > by1 else by1) + pad
        if width > 0 and height > 0:
            inter = width * height
            area = (ax2 - ax1 + pad) * (ay2 - ay1 + pad)
            union = area + (bx2 - bx1 + pad) * (by2 - by1 + pad) - inter
            if union > 0 and inter / union > eta:
                mask = IOU
        far = abs(ax1 - bx1) + abs(ay1 - by1) + abs(ax2 - bx2) + abs(ay2 - by2)
        if far / 4 < gamma_box:
            mask |= BOX
        if point is not None and q is not None:
            x, y = point
            near = abs(x - q[0]) + abs(y - q[1]) < gamma_pt
            if near and ax1 <= x <= ax2 and ay1 <= y <= ay2:
                mask |= POINT
        return table[mask], mask & whole

    return pair


_RULES: dict[int, tuple[HungarianMatch, Settings, Rule]] = {}


def rule_of(params: HungarianMatch, settings: Settings) -> Rule:
    """The rule of a recipe, made once."""
    known = _RULES.get(id(params))
    if known is not None and known[0] is params and known[1] is settings:
        return known[2]
    if len(_RULES) > 1024:
        _RULES.clear()
    rule = Rule(params, settings.scale)
    _RULES[id(params)] = (params, settings, rule)  # holding both keeps their ids from others
    return rule


def _share(distance: float, limit: float, soft: bool) -> float:
    if soft:
        return max(0.0, 1.0 - distance / limit)
    return 1.0 if distance < limit else 0.0


def inside(point: Point, box: Box) -> bool:
    """Whether the point lies in the box, edges included."""
    return box[0] <= point[0] <= box[2] and box[1] <= point[1] <= box[3]


def box_iou(a: Box, b: Box, pad: float = 0.0) -> float:
    """Intersection over union of two boxes, every side lengthened by `pad`; 0 if both are empty."""
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
