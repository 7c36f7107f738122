"""100,000 generated KTG cases against equations 8 to 12, implemented independently.

IoU clips one box with the other, exact fractions decide thresholds, and every assignment is tried.
Coordinates are small integers, so that pairs compete for targets and values hit thresholds exactly.
"""

from __future__ import annotations

import itertools
import json
from fractions import Fraction

import numpy as np
import pytest

from reward_fns import load_reward

CASES, CHUNKS = 100_000, 8
OPTIONS = [
    {"iou": iou, "box_distance": box, "pt_distance": point}
    for iou in ("continuous", "pixel")
    for box in ("mean_l1", "l1", "l2")
    for point in ("l1", "l2", "mean_l1")
]


def below(deltas: list[int], rule: str, limit: int) -> bool:
    """Return True if a distance is under its limit, in integers (squares for l2)."""
    if rule == "l2":
        return sum(d * d for d in deltas) < limit * limit
    return sum(map(abs, deltas)) < limit * (len(deltas) if rule == "mean_l1" else 1)


def overlap(a: list[int], b: list[int], one: int) -> Fraction:
    """Return the exact IoU; `one` is added to every side."""
    sides = []
    for low, high in ((0, 2), (1, 3)):
        clipped = min(max(b[high] + one, a[low]), a[high] + one) - max(
            min(b[low], a[high] + one), a[low]
        )
        sides.append(max(clipped, 0))
    common = sides[0] * sides[1]
    whole = sum((c[2] - c[0] + one) * (c[3] - c[1] + one) for c in (a, b)) - common
    return Fraction(common, whole)


def earned(prediction: dict, target: dict, options: dict[str, str]) -> int:
    """Return S_ij of equation 11 with every alpha 1."""
    a, b = prediction.get("bbox_2d"), target["bbox_2d"]
    if a is None:
        return 0
    total = int(overlap(a, b, int(options["iou"] == "pixel")) > Fraction(1, 2))
    differences = [u - v for u, v in zip(a, b, strict=True)]
    total += int(below(differences, options["box_distance"], 10))
    p, q = prediction.get("point_2d"), target["point_2d"]
    if p is not None and a[0] <= p[0] <= a[2] and a[1] <= p[1] <= a[3]:
        total += int(below([p[0] - q[0], p[1] - q[1]], options["pt_distance"], 30))
    return total


def accuracy(predictions: list[dict], targets: list[dict], options: dict[str, str]) -> float:
    """Return R_a (eq. 12) by trying every assignment."""
    table = [[earned(p, t, options) for t in targets] for p in predictions]
    if len(table) > len(targets):
        table = [list(column) for column in zip(*table, strict=True)]
    ways = itertools.permutations(range(max(len(predictions), len(targets))), len(table))
    best = max(sum(row[j] for row, j in zip(table, way, strict=True)) for way in ways)
    return best / max(len(predictions), len(targets))


def format_reward(predictions: list[dict]) -> float:
    """Return the format reward of a well-formed response with these items."""
    parts = [("bbox_2d" in p) + ("point_2d" in p) for p in predictions]
    return 1.0 + sum(parts) / len(parts)


def case(rng: np.random.Generator) -> tuple[list[dict], list[dict]]:
    """Return predictions and targets."""
    n_gt, n_pred = rng.choice(4, 2, p=(0.5, 0.25, 0.15, 0.1)) + 1
    corners = rng.integers(0, 100, (n_gt, 2))
    boxes = np.concatenate([corners, corners + rng.integers(12, 100, (n_gt, 2))], axis=1)
    points = (boxes[:, :2] + boxes[:, 2:]) // 2
    source = rng.integers(0, n_gt, n_pred)
    reach = rng.choice([0, 4, 10, 30], (n_pred, 1))
    near = boxes[source] + rng.integers(-reach, reach + 1, (n_pred, 4))
    near[:, 2:] = np.maximum(near[:, 2:], near[:, :2] + 1)
    at = points[source] + rng.integers(-22, 23, (n_pred, 2))
    targets = [
        {"bbox_2d": b, "point_2d": p} for b, p in zip(boxes.tolist(), points.tolist(), strict=True)
    ]
    predictions = [
        {"bbox_2d": b, "point_2d": p} for b, p in zip(near.tolist(), at.tolist(), strict=True)
    ]
    for prediction, drop in zip(predictions, rng.random(n_pred), strict=True):
        if drop < 0.08:
            del prediction["bbox_2d" if drop < 0.04 else "point_2d"]
    return predictions, targets


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_every_case_equals_the_equations(chunk: int) -> None:
    rng = np.random.default_rng([810, 12, chunk])
    rewards = [load_reward("ktg", overrides={"components.accuracy": o}) for o in OPTIONS]
    wrong, distinct = [], set()
    for number in range(CASES // CHUNKS):
        predictions, targets = case(rng)
        index = number % len(OPTIONS)
        answer = json.dumps(predictions)
        response = f"<think>left</think><answer>{answer}</answer>"
        score = rewards[index].score(response, targets)
        expected = (format_reward(predictions), accuracy(predictions, targets, OPTIONS[index]))
        actual = (score.components["format"], score.components["accuracy"])
        if any(abs(a - b) > 1e-12 for a, b in zip(actual, expected, strict=True)):
            wrong.append((OPTIONS[index], predictions, targets, score, expected))
        distinct.add(expected)
    assert not wrong, f"{len(wrong)} of {CASES // CHUNKS} differ, the first: {wrong[0]}"
    assert len(distinct) > 50
