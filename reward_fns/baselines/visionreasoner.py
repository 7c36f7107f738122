"""The public rewards that the KTG reward descends from, to the last bit: VisionReasoner, Seg-Zero.

They are baselines for comparison, not for training, so their weaknesses are kept: the first of two
answers counts, element types are not checked, one invalid item zeroes the accuracy, and objects
beyond 120 are free. Only the running time differs: the public functions take 31 s for an answer tag
followed by 4,000 blanks; these are linear.

`visionreasoner_{format,accuracy,non_repeat}`, at most 3 + 3 + 1; ground truth as for ktg.
`seg_zero_{thinking,segmentation,iou,box_l1,point_l1}`, at most 1 each; one object, two points.
Distances scale with the canvas; on the 840 canvas they equal the public ones.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

from rcot_rl.protocol.parser import ANSWER, ANSWER_END, THINK, THINK_END
from rcot_rl.recipe.base import Section
from reward_fns.ground_truth import BoxAndPoints, Objects
from reward_fns.registry import NoParams, Response, Settings, Term, register

MAX_OBJECTS = 120
"""VisionReasoner truncates predictions and targets to this number."""
_WHITE = re.compile(r"\s*")
_ERRORS = (ArithmeticError, LookupError, TypeError, ValueError, RecursionError)
"""Exceptions that malformed answers raise in arithmetic; the public rewards then pay 0."""


class SegZeroFormat(Section):
    """Parameters of `seg_zero_segmentation` and of the modules that read its answer."""

    strict: bool = False
    """Require the keys `bbox`, `points_1`, `points_2`; else any that contain `bbox` and `point`."""


def _binary(earned: bool, reason: str) -> Term:
    return Term(1.0) if earned else Term(0.0, [reason])


def thinking_then_answer(text: str) -> bool:
    """Return True if the whole text is a think block, white space, and an answer block.

    Tags may occur inside the blocks. Like the public expression, this checks only the outermost
    tags and that somewhere an answer opens after a closed think.
    """
    last = len(text) - len(ANSWER_END)
    if not (text.startswith(THINK) and text.endswith(ANSWER_END)):
        return False
    end = text.find(THINK_END, len(THINK))
    while end >= 0:
        white = _WHITE.match(text, end + len(THINK_END))
        after = white.end() if white else end + len(THINK_END)
        if text.startswith(ANSWER, after) and after + len(ANSWER) <= last:
            return True
        end = text.find(THINK_END, end + 1)
    return False


def first_answer(text: str) -> str | None:
    """Return the stripped text between the first answer tag and the next closing one."""
    start = text.find(ANSWER)
    end = text.find(ANSWER_END, start + len(ANSWER)) if start >= 0 else -1
    return None if end < 0 else text[start + len(ANSWER) : end].strip()


def _first_json(text: str) -> Any:
    answer = first_answer(text)
    try:
        return None if answer is None else json.loads(answer)
    except _ERRORS:
        return None


@register("visionreasoner_format", params=NoParams, tasks=("ktg",), maximum=3.0)
def visionreasoner_format(
    response: Response, truth: Objects, params: NoParams, settings: Settings
) -> Term:
    """Return [think, then answer] + the mean over items of [4-list box] + [2-list point]."""
    thinking = 1.0 if thinking_then_answer(response.text) else 0.0
    reasons = [] if thinking else ["structure"]
    items, complete = _visionreasoner_items(_first_json(response.text))
    return Term(thinking + items, reasons if complete else [*reasons, "items"])


def _visionreasoner_items(data: Any) -> tuple[float, bool]:
    """Return the sum of shares up to the first item that raises, and True if all are full."""
    if not isinstance(data, list):
        return 0.0, False
    total, complete = 0.0, bool(data)
    for item in data:
        if not isinstance(item, dict):
            complete = False
            # a key lookup does not raise on a list or a string that lacks the key
            if isinstance(item, (list, str)) and "bbox_2d" not in item and "point_2d" not in item:
                continue
            break
        earned = 0.0
        for key, length in (("bbox_2d", 4), ("point_2d", 2)):
            value = item.get(key)
            if isinstance(value, list) and len(value) == length:
                earned += 1.0
        complete = complete and earned == 2.0
        total += earned / len(data)
    return total, complete


@register("visionreasoner_accuracy", params=NoParams, tasks=("ktg",), maximum=3.0)
def visionreasoner_accuracy(
    response: Response, truth: Objects, params: NoParams, settings: Settings
) -> Term:
    """Return the mean matched [IoU > 0.5] + [mean box L1 < 10] + [point L2 < 30 in own box]."""
    truth.require_points()
    data = _first_json(response.text)
    try:
        value = _visionreasoner_match(data, truth.raw, settings.scale)
    except _ERRORS:
        return Term(0.0, ["answer_unusable"])
    return Term(value, [] if value >= 3.0 else ["match"])


def _visionreasoner_match(data: Any, truth: list[dict[str, Any]], scale: float) -> float:
    """Compute in the answer's number types: int64 wraps around, as in the public code."""
    import numpy as np
    from scipy.optimize import linear_sum_assignment

    boxes = np.array([item["bbox_2d"] for item in data][:MAX_OBJECTS])
    points = np.array([item["point_2d"] for item in data][:MAX_OBJECTS])
    gt_boxes = np.array([item["bbox_2d"] for item in truth][:MAX_OBJECTS])
    gt_points = np.array([item["point_2d"] for item in truth][:MAX_OBJECTS])
    if boxes.ndim != 2 or points.ndim != 2 or boxes.shape[1] != 4 or points.shape[1] != 2:
        raise ValueError("not boxes and points")
    with np.errstate(all="ignore"):
        a, b = boxes[:, None, :], gt_boxes[None, :, :]
        iou = _pixel_iou(np, a, b) > 0.5
        near = np.mean(np.abs(a - b), axis=2) < 10 * scale
        offset = points[:, None, :] - gt_points[None, :, :]
        close = np.sqrt(np.sum(offset**2, axis=2)) < 30 * scale
        inside = np.all((points >= boxes[:, :2]) & (points <= boxes[:, 2:]), axis=1)
    scores = 1.0 * iou + near + (close & inside[:, None])
    rows, columns = linear_sum_assignment(scores, maximize=True)
    return float(scores[rows, columns].sum() / max(len(boxes), len(gt_boxes)))


def _pixel_iou(np: Any, a: Any, b: Any) -> Any:
    width = np.minimum(a[..., 2], b[..., 2]) - np.maximum(a[..., 0], b[..., 0]) + 1
    height = np.minimum(a[..., 3], b[..., 3]) - np.maximum(a[..., 1], b[..., 1]) + 1
    inter = np.maximum(0, width) * np.maximum(0, height)
    area_a = (a[..., 2] - a[..., 0] + 1) * (a[..., 3] - a[..., 1] + 1)
    area_b = (b[..., 2] - b[..., 0] + 1) * (b[..., 3] - b[..., 1] + 1)
    return inter / (area_a + area_b - inter)


@register("visionreasoner_non_repeat", params=NoParams, tasks=("ktg",), maximum=1.0)
def visionreasoner_non_repeat(
    response: Response, truth: Objects, params: NoParams, settings: Settings
) -> Term:
    """Return 0 if two or more pieces between full stops repeat; decimals split pieces too."""
    pieces = [piece for piece in map(str.strip, response.text.split(".")) if piece]
    return _binary(len(pieces) - len(set(pieces)) < 2, "repeated")


@register("seg_zero_thinking", params=NoParams, tasks=("seg-zero",), maximum=1.0)
def seg_zero_thinking(
    response: Response, truth: BoxAndPoints, params: NoParams, settings: Settings
) -> Term:
    """Return 1 if the text is think, then answer."""
    return _binary(thinking_then_answer(response.text), "structure")


def _seg_zero_object(text: str) -> dict[str, Any]:
    """Parse the first non-empty pair of braces in the response as JSON. Raises one of _ERRORS."""
    start = text.find("{")
    while start >= 0 and text.startswith("}", start + 1):
        start = text.find("{", start + 1)
    end = text.find("}", start + 1) if start >= 0 else -1
    if end <= 0:
        raise ValueError("no braces")
    return json.loads(text[start : end + 1])


def _seg_zero_box(data: dict[str, Any], strict: bool) -> Any:
    keys = ["bbox"] if strict else [key for key in data if "bbox" in key.lower()]
    box = data[keys[0]]
    if len(box) != 4:
        raise ValueError("not a box")
    return box


@register("seg_zero_segmentation", params=SegZeroFormat, tasks=("seg-zero",), maximum=1.0)
def seg_zero_segmentation(
    response: Response, truth: BoxAndPoints, params: SegZeroFormat, settings: Settings
) -> Term:
    """Return 1 if the object has a box of length 4 and two points of length 2."""
    try:
        data = _seg_zero_object(response.text)
        box = _seg_zero_box(data, params.strict)
        if params.strict:
            points = [data["points_1"], data["points_2"]]
            earned = isinstance(box, list) and all(isinstance(p, list) for p in points)
        else:
            first = next(key for key in data if "bbox" in key.lower())
            points = [data[k] for k in data if k != first and "point" in k.lower()][:2]
            earned = len(points) == 2
        return _binary(earned and all(len(point) == 2 for point in points), "items")
    except _ERRORS:
        return Term(0.0, ["items"])


@register("seg_zero_iou", params=SegZeroFormat, tasks=("seg-zero",), maximum=1.0)
def seg_zero_iou(
    response: Response, truth: BoxAndPoints, params: SegZeroFormat, settings: Settings
) -> Term:
    """Return 1 for a pixel IoU over 0.5; boxes that only touch do not intersect."""
    try:
        a, b = _seg_zero_box(_seg_zero_object(response.text), params.strict), truth.box
        x1, y1, x2, y2 = max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])
        inter = (x2 - x1 + 1) * (y2 - y1 + 1) if x1 < x2 and y1 < y2 else 0
        areas = [(c[2] - c[0] + 1) * (c[3] - c[1] + 1) for c in (a, b)]
        return _binary(float(inter) / (areas[0] + areas[1] - inter) > 0.5, "iou_low")
    except _ERRORS:
        return Term(0.0, ["iou_low"])


@register("seg_zero_box_l1", params=SegZeroFormat, tasks=("seg-zero",), maximum=1.0)
def seg_zero_box_l1(
    response: Response, truth: BoxAndPoints, params: SegZeroFormat, settings: Settings
) -> Term:
    """Return 1 for a mean coordinate difference under 10."""
    try:
        box = _seg_zero_box(_seg_zero_object(response.text), params.strict)
        left, top, right, bottom = (abs(box[k] - truth.box[k]) for k in range(4))
        return _binary((left + top + right + bottom) / 4 < 10 * settings.scale, "box_far")
    except _ERRORS:
        return Term(0.0, ["box_far"])


@register("seg_zero_point_l1", params=SegZeroFormat, tasks=("seg-zero",), maximum=1.0)
def seg_zero_point_l1(
    response: Response, truth: BoxAndPoints, params: SegZeroFormat, settings: Settings
) -> Term:
    """Return 1 if both points lie in the predicted box and their mean L2 distance is under 100.

    The better of the two pairings with the true points counts.
    """
    try:
        data = _seg_zero_object(response.text)
        box = _seg_zero_box(data, params.strict)
        soft = [key for key in data if "points" in key.lower()][:2]
        first, second = ["points_1", "points_2"] if params.strict else soft
        p, q = [(int(data[key][0]), int(data[key][1])) for key in (first, second)]
        if not all(box[0] <= x <= box[2] and box[1] <= y <= box[3] for x, y in (p, q)):
            return Term(0.0, ["point_missed"])
        s, t = truth.points
        distance = min(_l2(p, s) + _l2(q, t), _l2(p, t) + _l2(q, s)) / 2
        return _binary(distance < 100 * settings.scale, "point_missed")
    except _ERRORS:
        return Term(0.0, ["point_missed"])


def _l2(a: tuple[int, int], b: tuple[int, int]) -> float:
    return math.sqrt((a[0] - b[0]) ** 2 + (a[1] - b[1]) ** 2)
