"""Soft scores of `hungarian_match`: partial, exact and monotonic."""

from __future__ import annotations

import itertools
import random

import pytest

from reward_fns import load_reward
from reward_fns.components import hungarian_match
from reward_fns.lab.exploits import well_formed
from reward_fns.score import Reward

GT = [{"bbox_2d": [100, 100, 300, 300], "point_2d": [200, 200]}]


def soft(**keys: str) -> Reward:
    return load_reward("ktg", overrides={"components.accuracy": keys})


def one(box: list[float], point: list[float]) -> str:
    return well_formed([{"bbox_2d": box, "point_2d": point}])


TRUE_BOX, TRUE_POINT = GT[0]["bbox_2d"], GT[0]["point_2d"]
ALL = {"iou_score": "continuous", "box_score": "soft", "pt_score": "soft"}


@pytest.mark.parametrize(
    ("keys", "box", "point", "accuracy", "reasons"),
    [
        # half of the box: IoU 0.5, mean distance 25; the point is exact
        (
            {"iou_score": "continuous"},
            [100, 100, 300, 200],
            TRUE_POINT,
            1.5,
            ["iou_low", "box_far"],
        ),
        # mean distance 4 of 10
        ({"box_score": "soft"}, [116, 100, 300, 300], TRUE_POINT, 2.6, ["box_far"]),
        ({"box_score": "soft"}, [139, 101, 300, 300], TRUE_POINT, 2.0, ["box_far"]),
        # 12 + 6 of 30
        ({"pt_score": "soft"}, TRUE_BOX, [212, 206], 2.4, ["point_missed"]),
        ({"pt_score": "soft"}, [100, 100, 199, 300], TRUE_POINT, 0.0, None),
        (ALL, TRUE_BOX, TRUE_POINT, 3.0, []),
    ],
)
def test_partial_scores_equal_values_by_hand(keys, box, point, accuracy, reasons):
    score = soft(**keys).score(one(box, point), GT)
    assert score.components["accuracy"] == pytest.approx(accuracy)
    assert reasons is None or score.reasons == reasons


def scene(rng: random.Random, n_gt: int, n_pred: int) -> tuple[list[dict], list[dict]]:
    gts = []
    for _ in range(n_gt):
        x, y = rng.randrange(120), rng.randrange(120)
        box = [x, y, x + rng.randrange(20, 90), y + rng.randrange(20, 90)]
        gts.append({"bbox_2d": box, "point_2d": [(x + box[2]) / 2, (y + box[3]) / 2]})
    preds = []
    for _ in range(n_pred):
        near = rng.choice(gts)
        x1, y1, x2, y2 = [c + rng.randrange(-9, 10) for c in near["bbox_2d"]]
        point = [c + rng.randrange(-12, 13) for c in near["point_2d"]]
        preds.append({"bbox_2d": [x1, y1, max(x2, x1 + 1), max(y2, y1 + 1)], "point_2d": point})
    return gts, preds


def test_accuracy_equals_the_best_of_all_assignments():
    reward, single = soft(**ALL), soft(**ALL)
    rng = random.Random(3)
    for _ in range(300):
        gts, preds = scene(rng, rng.randrange(1, 5), rng.randrange(1, 5))
        accuracy = reward.score(well_formed(preds), gts).components["accuracy"]
        table = [
            [single.score(well_formed([p]), [g]).components["accuracy"] for g in gts] for p in preds
        ]
        if len(preds) > len(gts):
            table = [list(c) for c in zip(*table, strict=True)]
        ways = itertools.permutations(range(max(len(gts), len(preds))), len(table))
        best = max(sum(r[j] for r, j in zip(table, w, strict=True)) for w in ways)
        assert accuracy == pytest.approx(best / max(len(gts), len(preds)))


@pytest.mark.parametrize("keys", [ALL, {"box_score": "soft"}, {"iou_score": "continuous"}])
def test_arrays_and_plain_python_give_equal_soft_scores(keys, monkeypatch):
    rng = random.Random(5)
    scenes = [scene(rng, 10, 12) for _ in range(40)]
    scores = []
    for small in (0, 10**9):
        monkeypatch.setattr(hungarian_match, "FEW_PAIRS", small)
        scores.append([soft(**keys).score(well_formed(p), g) for g, p in scenes])
    assert scores[0] == scores[1]


def test_a_nearer_box_never_earns_less():
    reward = soft(**ALL)
    paid = [reward.score(one([100 + d, 100, 300, 300], [200, 200]), GT).reward for d in range(60)]
    assert paid == sorted(paid, reverse=True) and paid[0] == 6.0 and paid[-1] < 5.0
