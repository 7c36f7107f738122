"""VisionReasoner and Seg-Zero against independent, slow versions of their formulas."""

import itertools
import json
import random
import re

import pytest

from rcot_rl.errors import InputError
from reward_fns import load_reward
from reward_fns.baselines.visionreasoner import first_answer, thinking_then_answer
from reward_fns.lab.exploits import well_formed

VR = load_reward("visionreasoner")
SZ = load_reward("seg-zero")


def pixel_iou(a, b):
    w = max(0, min(a[2], b[2]) - max(a[0], b[0]) + 1)
    h = max(0, min(a[3], b[3]) - max(a[1], b[1]) + 1)
    areas = [(c[2] - c[0] + 1) * (c[3] - c[1] + 1) for c in (a, b)]
    union = sum(areas) - w * h
    return w * h / union if union else 0.0  # boxes with swapped corners can have no area


def visionreasoner_accuracy(preds, gts):
    """Return the best total over all assignments; boxes and points are numeric."""

    def pair(p, g):
        (a, u), (b, v) = [(o["bbox_2d"], o["point_2d"]) for o in (p, g)]
        inside = a[0] <= u[0] <= a[2] and a[1] <= u[1] <= a[3]
        distance = ((u[0] - v[0]) ** 2 + (u[1] - v[1]) ** 2) ** 0.5
        mean = sum(abs(x - y) for x, y in zip(a, b, strict=True)) / 4
        return (pixel_iou(a, b) > 0.5) + (mean < 10) + (distance < 30 and inside)

    small, large = sorted((preds, gts), key=len)
    flip = small is not preds
    best = max(
        sum(pair(y, x) if flip else pair(x, y) for x, y in zip(small, chosen, strict=True))
        for chosen in itertools.permutations(large, len(small))
    )
    return best / len(large)


def test_visionreasoner_equals_its_formula():
    rng = random.Random(1)
    seen = set()
    for _ in range(1500):
        gts = []
        for _ in range(rng.randrange(1, 5)):
            x, y = rng.randrange(0, 100), rng.randrange(0, 100)
            box = [x, y, x + rng.randrange(1, 90), y + rng.randrange(1, 90)]
            gts.append({"bbox_2d": box, "point_2d": [x + 5, y + 5]})
        preds = []
        for _ in range(rng.randrange(1, 5)):
            near, shift = rng.choice(gts), rng.choice([0, 5, 12, 30])
            preds.append({k: [c + rng.randint(-shift, shift) for c in v] for k, v in near.items()})
        if rng.random() < 0.3:
            preds[0]["bbox_2d"] = [c + 0.5 for c in preds[0]["bbox_2d"]]
        score = VR.score(well_formed(preds), json.dumps(gts))
        assert score.components["accuracy"] == visionreasoner_accuracy(preds, gts)
        # shares are summed sequentially, so the last bit depends on their number
        items = 0.0
        for _ in preds:
            items += 2.0 / len(preds)
        assert score.components["format"] == 1.0 + items
        seen.add(score.reward)
    assert len(seen) > 15 and VR.max_reward == 7.0


def test_visionreasoner_uses_pixel_iou_and_euclidean_points():
    gt = [{"bbox_2d": [0, 0, 9, 9], "point_2d": [5, 5]}]
    half = [{"bbox_2d": [0, 0, 9, 4], "point_2d": [5, 4]}]  # 50 of 100 pixels is not greater
    more = [{"bbox_2d": [0, 0, 9, 5], "point_2d": [5, 4]}]
    for items, accuracy in ((half, 2.0), (more, 3.0)):
        assert VR.score(well_formed(items), gt).components["accuracy"] == accuracy
    gt = [{"bbox_2d": [0, 0, 400, 400], "point_2d": [200, 200]}]
    near = [{"bbox_2d": [0, 0, 400, 400], "point_2d": [221, 221]}]  # distance 29.7
    assert VR.score(well_formed(near), gt).components["accuracy"] == 3.0


def test_visionreasoner_truncates_both_sides_to_120_objects():
    gt = [{"bbox_2d": [i, 0, i + 3, 9], "point_2d": [i + 1, 4]} for i in range(0, 600, 4)]
    assert VR.score(well_formed(gt[:120]), gt).reward == pytest.approx(7.0)
    assert VR.score(well_formed(gt[:120]), gt).components["accuracy"] == 3.0


@pytest.mark.parametrize(
    ("text", "value"), [("a. b. a. c", 1.0), ("a. a. a", 0.0), ("a.b.a.b", 0.0), ("..", 1.0)]
)
def test_non_repeat_counts_pieces_between_full_stops(text, value):
    gt = [{"bbox_2d": [0, 0, 9, 9], "point_2d": [5, 5]}]
    assert VR.score(text, gt).components["non_repeat"] == value


def test_searches_agree_with_the_public_patterns():
    """On texts short enough for the running time of those patterns."""
    rng = random.Random(2)
    units = ["<think>", "</think>", "<answer>", "</answer>", " ", "\n", "x", "\x1c"]
    hits = 0
    for _ in range(20_000):
        text = "".join(rng.choice(units) for _ in range(rng.randrange(12)))
        if rng.random() < 0.5:
            text = f"<think>{text}</answer>"
        frame = re.fullmatch(r"<think>.*?</think>\s*<answer>.*?</answer>", text, re.DOTALL)
        answer = re.search(r"<answer>\s*(.*?)\s*</answer>", text, re.DOTALL)
        assert thinking_then_answer(text) == bool(frame)
        assert first_answer(text) == (answer.group(1) if answer else None)
        hits += bool(frame)
    assert hits > 100


SEG_GT = "<box>(100,100),(300,300)</box><points>(150,150),(250,250)</points>"


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        # iou, thinking, segmentation, point, box
        ({"bbox": [100, 100, 300, 300], "points_1": [150, 150], "points_2": [250, 250]}, "11111"),
        ({"bbox": [100, 100, 300, 300], "points_1": [250, 250], "points_2": [150, 150]}, "11111"),
        ({"bbox_2d": [100, 100, 300, 300], "p_points": [150, 150], "points": [250, 250]}, "11111"),
        ({"bbox": [139, 100, 300, 300], "points_1": [150, 150], "points_2": [250, 250]}, "11111"),
        ({"bbox": [140, 100, 300, 300], "points_1": [150, 150], "points_2": [250, 250]}, "11110"),
        ({"bbox": [100, 100, 300, 199], "points_1": [150, 150], "points_2": [250, 180]}, "01110"),
        ({"bbox": [100, 100, 300, 300], "points_1": [150, 150], "points_2": [250, 350]}, "11101"),
        ({"bbox": [100, 100, 300, 300], "points_1": [150, 150]}, "11001"),
        ({"box": [100, 100, 300, 300], "points_1": [150, 150], "points_2": [250, 250]}, "01000"),
        ({"bbox": [100, 100, 300], "points_1": [150, 150], "points_2": [250, 250]}, "01000"),
        ({"bbox": [1e400, 1, 2, 3], "points_1": [1e400, 1], "points_2": [None, []]}, "01100"),
    ],
)
def test_seg_zero_components_equal_values_by_hand(answer, expected):
    score = SZ.score(well_formed(answer), SEG_GT)
    names = ("iou", "thinking", "segmentation", "point_l1", "box_l1")
    assert "".join(str(int(score.components[name])) for name in names) == expected
    assert score.reward == sum(map(int, expected)) and SZ.max_reward == 5.0
    assert bool(score.reasons) == ("0" in expected)


def test_seg_zero_strict_requires_exact_keys():
    parts = ("iou", "segmentation", "point_l1", "box_l1")
    strict = load_reward("seg-zero", overrides={f"components.{p}.strict": True for p in parts})
    for box in ("bbox", "bbox_2d"):
        answer = {box: [100, 100, 300, 300], "points_1": [150, 150], "points_2": [250, 250]}
        assert strict.score(well_formed(answer), SEG_GT).reward == (5 if box == "bbox" else 1)
    assert strict.hash != SZ.hash


def test_seg_zero_ground_truth_is_a_tagged_text_or_its_json():
    for broken in ("<box>(1,2),(3,4)</box>", "", None, {"bbox": [1]}, '"x'):
        with pytest.raises(InputError):
            SZ.score(well_formed("{}"), broken)
    assert SZ.score(well_formed("{}"), json.dumps(SEG_GT)) == SZ.score(well_formed("{}"), SEG_GT)
