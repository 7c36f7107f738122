"""The KTG reward: examples by hand, equations 8 to 12 by brute force, properties."""

import itertools
import json
import random

import pytest

from reward_fns import load_reward
from reward_fns.components import hungarian_match, pair_arrays
from reward_fns.lab.exploits import well_formed

GT = [{"bbox_2d": [100, 100, 300, 300], "point_2d": [200, 200]}]
KTG = load_reward("ktg")
ZERO = load_reward("ktg-zero-target")


def item(box=(100, 100, 300, 300), point=(200, 200)):
    return {"bbox_2d": list(box), "point_2d": list(point)}


def parts(score):
    return score.components["format"], score.components["accuracy"]


def test_a_perfect_answer_earns_the_maximum():
    score = KTG.score(well_formed(GT), GT)
    assert (score.reward, score.reasons) == (6.0, [])
    assert score.components == {"format": 3.0, "accuracy": 3.0}
    assert KTG.max_reward == 6.0 and KTG.component_names == ("format", "accuracy")


@pytest.mark.parametrize(
    ("box", "point", "accuracy", "reason"),
    [
        ((139, 100, 300, 300), (200, 200), 3.0, None),  # mean of differences 9.75
        ((140, 100, 300, 300), (200, 200), 2.0, "box_far"),  # exactly 10 is not less
        ((100, 100, 300, 300), (214, 215), 3.0, None),  # |dx| + |dy| = 29
        (
            (100, 100, 300, 300),
            (215, 215),
            2.0,
            "point_missed",
        ),  # 30; the Euclidean distance is 21.2
        ((100, 100, 300, 200), (200, 200), 1.0, "iou_low"),  # IoU exactly 0.5 is not greater
        ((100, 100, 300, 201), (200, 200), 2.0, "box_far"),  # IoU 0.505
        ((100, 100, 199.5, 300), (200, 200), 0.0, "point_missed"),  # outside its own box
        ((100, 100, 200, 300), (200, 200), 1.0, "iou_low"),  # the edge counts as inside
    ],
)
def test_each_threshold_excludes_its_limit(box, point, accuracy, reason):
    score = KTG.score(well_formed([item(box, point)]), GT)
    assert parts(score) == (3.0, accuracy)
    assert (reason in score.reasons) if reason else score.reasons == []


@pytest.mark.parametrize(
    ("answer", "fmt", "accuracy"),
    [
        ([item(), {"bbox_2d": [5, 5, 9, 9]}], 2.5, 1.5),  # an invalid item costs only its share
        ([item(), {}], 2.0, 1.5),
        ([{"bbox_2d": [100, 100, 300, 300]}], 2.0, 2.0),
        ([{"point_2d": [200, 200]}], 2.0, 0.0),
        ([item((300, 100, 100, 300))], 2.0, 0.0),
        ([item((100, 100, 100, 300))], 2.0, 0.0),
        ([item() | {"point_2d": [True, 200]}], 2.0, 2.0),
        ([item() | {"label": "dog"}], 3.0, 3.0),
        ([], 1.0, 0.0),
        (item(), 1.0, 0.0),
        ([item(), 5], 1.0, 0.0),
        ("no boxes", 1.0, 0.0),
    ],
)
def test_format_and_accuracy_of_valid_and_invalid_items(answer, fmt, accuracy):
    score = KTG.score(well_formed(answer), GT)
    assert parts(score) == (fmt, accuracy)
    assert bool(score.reasons) == (score.reward < 6)


def test_structure_and_accuracy_are_independent():
    assert parts(KTG.score(f"<answer>{json.dumps(GT)}</answer>", GT)) == (2.0, 3.0)
    assert parts(KTG.score(json.dumps(GT), GT)) == (0.0, 0.0)


def test_zero_target_makes_an_empty_list_the_right_answer_to_an_empty_truth():
    hallucination, honest = well_formed([item()]), well_formed([])
    assert parts(ZERO.score(honest, [])) == (3.0, 3.0)
    assert parts(ZERO.score(hallucination, [])) == (3.0, 0.0)
    assert parts(ZERO.score(honest, GT)) == (3.0, 0.0)
    assert parts(ZERO.score(well_formed(GT), GT)) == (3.0, 3.0)
    assert parts(ZERO.score(well_formed("nothing"), [])) == (1.0, 0.0)
    assert parts(ZERO.score(well_formed([{}]), [])) == (1.0, 0.0)
    assert parts(KTG.score(honest, [])) == (1.0, 0.0)
    assert parts(KTG.score(hallucination, [])) == (3.0, 0.0)


# Equations 8 to 12, written from the contract, not from the code.


def area(box):
    return max(0, box[2] - box[0]) * max(0, box[3] - box[1])


def pair(pred, gt, iou_rule, box_rule, point_rule, alphas):
    (a, p), (b, q) = pred, gt
    one = 1 if iou_rule == "pixel" else 0
    a1, b1 = [(*c[:2], c[2] + one, c[3] + one) for c in (a, b)]
    common = area([max(a1[0], b1[0]), max(a1[1], b1[1]), min(a1[2], b1[2]), min(a1[3], b1[3])])
    earned = [2 * common > area(a1) + area(b1) - common]
    rules = {
        "mean_l1": lambda d: sum(d) / len(d),
        "l1": sum,
        "l2": lambda d: sum(x * x for x in d) ** 0.5,
    }
    earned.append(rules[box_rule]([abs(u - v) for u, v in zip(a, b, strict=True)]) < 10)
    near = p is not None and a[0] <= p[0] <= a[2] and a[1] <= p[1] <= a[3]
    earned.append(near and rules[point_rule]([abs(u - v) for u, v in zip(p, q, strict=True)]) < 30)
    return sum(alpha for alpha, e in zip(alphas, earned, strict=True) if e)


def brute_force(preds, gts, *rules):
    """Return the best total over all assignments of the smaller side to the larger, normalized."""
    valid = [(i["bbox_2d"], i.get("point_2d")) for i in preds if "bbox_2d" in i]
    targets = [(g["bbox_2d"], g["point_2d"]) for g in gts]
    table = [[pair(p, g, *rules) for g in targets] for p in valid]
    if len(valid) > len(targets):
        table = [list(column) for column in zip(*table, strict=True)]
    width = len(table[0]) if table else 0
    best = max(
        sum(row[j] for row, j in zip(table, columns, strict=True))
        for columns in itertools.permutations(range(width), len(table))
    )
    return best / max(len(preds), len(gts))


def scene(rng, n_gt, n_pred):
    """Return clustered targets, so that pairs compete, and predictions near them; integers."""
    gts = []
    for _ in range(n_gt):
        x, y = rng.randrange(0, 120), rng.randrange(0, 120)
        box = [x, y, x + rng.randrange(20, 120), y + rng.randrange(20, 120)]
        gts.append(item(box, [(box[0] + box[2]) // 2, (box[1] + box[3]) // 2]))
    preds = []
    for _ in range(n_pred):
        near = rng.choice(gts)
        shift = rng.choice([0, 4, 10, 25])
        x1, y1, x2, y2 = [c + rng.randrange(-shift, shift + 1) for c in near["bbox_2d"]]
        pred = item([x1, y1, max(x2, x1 + 1), max(y2, y1 + 1)])
        pred["point_2d"] = [c + rng.randrange(-20, 21) for c in near["point_2d"]]
        if rng.random() < 0.15:
            del pred[rng.choice(list(pred))]
        preds.append(pred)
    return gts, preds


RULES = [
    ("continuous", "mean_l1", "l1", (1, 1, 1)),
    ("pixel", "mean_l1", "l2", (1, 1, 1)),
    ("continuous", "l1", "mean_l1", (2, 0, 0.5)),
    ("continuous", "l2", "l1", (0.25, 4, 1)),
]


@pytest.mark.parametrize("rules", RULES)
def test_accuracy_equals_brute_force(rules):
    iou, box, point, alphas = rules
    reward = load_reward(
        "ktg",
        overrides={
            "components.accuracy": {"iou": iou, "box_distance": box, "pt_distance": point}
            | dict(zip(("alpha_iou", "alpha_box", "alpha_pt"), alphas, strict=True))
        },
    )
    rng = random.Random(7)
    seen = set()
    for _ in range(1200):
        n_gt, n_pred = rng.randrange(1, 6), rng.randrange(1, 6)
        gts, preds = scene(rng, n_gt, n_pred)
        score = reward.score(well_formed(preds), gts)
        expected = brute_force(preds, gts, *rules)
        assert score.components["accuracy"] == expected
        assert bool(score.reasons) == (score.reward < reward.max_reward)
        assert 0 <= score.reward <= reward.max_reward
        seen.add(expected)
    assert len(seen) > 20


@pytest.mark.parametrize("counts", [(9, 9), (12, 6), (3, 30)])
def test_arrays_and_plain_python_give_equal_scores(counts, monkeypatch):
    """Equal to the last bit, on the same scenes."""
    rng = random.Random(3)
    scenes = [scene(rng, *counts) for _ in range(60)]
    scores = []
    for small in (0, 10**9):
        monkeypatch.setattr(hungarian_match, "FEW_PAIRS", small)
        scores.append([KTG.score(well_formed(preds), gts) for gts, preds in scenes])
    assert scores[0] == scores[1]
    assert len({s.reward for s in scores[0]}) > 5


@pytest.mark.parametrize("keys", [{}, {"alpha_pt": 0}, {"alpha_iou": 0.5, "pt_score": "soft"}])
def test_full_marks_in_the_given_order_are_the_best_assignment(keys, monkeypatch):
    """The early exit for objects in the true order, against the search of all assignments."""
    reward = load_reward("ktg", overrides={"components.accuracy": keys})
    rng = random.Random(19)
    scenes = []
    for _ in range(200):
        gts, _ = scene(rng, rng.randrange(1, 9), 0)
        preds = [item(gt["bbox_2d"], gt["point_2d"]) for gt in gts]
        if rng.random() < 0.3:
            preds[-1]["bbox_2d"] = [0, 0, 2, 2]
        scenes.append((gts, preds))
    early = [reward.score(well_formed(preds), gts) for gts, preds in scenes]
    monkeypatch.setattr(hungarian_match, "FEW_OBJECTS", 0)
    assert [reward.score(well_formed(preds), gts) for gts, preds in scenes] == early
    assert 0 < sum(score.reward == reward.max_reward for score in early) < len(early)


def test_chunked_arrays_keep_the_optimum(monkeypatch):
    """Dropping rows beyond a chunk changes no score; all predictions are counted."""
    rng = random.Random(5)
    scenes = [scene(rng, 3, 90) for _ in range(40)]
    whole = [KTG.score(well_formed(preds), gts) for gts, preds in scenes]
    monkeypatch.setattr(pair_arrays, "CHUNK", 8)
    assert [KTG.score(well_formed(preds), gts) for gts, preds in scenes] == whole


def test_accuracy_is_divided_by_the_larger_true_count():
    for n in (2, 150, 1000, 6000):
        assert parts(KTG.score(well_formed([item()] * n), GT)) == (3.0, 3.0 / n)
    many = [item((i, 0, i + 10, 10), (i + 5, 5)) for i in range(0, 840, 5)]
    score = KTG.score(well_formed(many[:120]), many)
    assert score.components["accuracy"] == 3.0 * 120 / len(many)
    assert score.reasons == ["objects_too_few"]


def test_order_of_objects_does_not_change_the_score():
    rng = random.Random(11)
    for _ in range(300):
        gts, preds = scene(rng, rng.randrange(1, 7), rng.randrange(1, 7))
        before = KTG.score(well_formed(preds), gts)
        rng.shuffle(gts)
        rng.shuffle(preds)
        after = KTG.score(well_formed(preds), gts)
        assert (before.reward, before.components) == (after.reward, after.components)


def test_an_additional_wrong_box_never_raises_the_accuracy():
    rng = random.Random(13)
    for _ in range(300):
        gts, preds = scene(rng, rng.randrange(1, 5), rng.randrange(1, 5))
        wrong = item((700, 700, 720, 720), (710, 710))
        before, after = (
            KTG.score(well_formed(preds), gts),
            KTG.score(well_formed([*preds, wrong]), gts),
        )
        assert after.components["accuracy"] <= before.components["accuracy"]


def scaled(objects, factor):
    return [{k: [c * factor for c in v] for k, v in entry.items()} for entry in objects]


@pytest.mark.parametrize("canvas", [1680, 420, 105])
def test_scaling_canvas_and_coordinates_together_keeps_the_score(canvas):
    """Factors are powers of two, so that coordinates scale without rounding."""
    small, factor = load_reward("ktg", canvas=canvas), canvas / 840
    unscaled = different = 0
    rng = random.Random(17)
    for _ in range(300):
        gts, preds = scene(rng, rng.randrange(1, 6), rng.randrange(1, 6))
        expected = KTG.score(well_formed(preds), gts)
        gts, preds = scaled(gts, factor), scaled(preds, factor)
        assert small.score(well_formed(preds), gts) == expected
        different += KTG.score(well_formed(preds), gts) != expected
        unscaled += 1
    assert 0 < different < unscaled


def test_thresholds_scale_with_canvas_112():
    reward = load_reward("ktg", canvas=112)
    gts = [item((10, 10, 60, 60), (35, 35))]
    for shift, accuracy in ((5, 3.0), (6, 2.0)):  # mean 1.25 and 1.5 against 1.333
        score = reward.score(well_formed([item((10 + shift, 10, 60, 60), (35, 35))]), gts)
        assert score.components["accuracy"] == accuracy
    for shift, accuracy in ((3, 3.0), (4, 2.0)):  # against 4.0
        score = reward.score(well_formed([item((10, 10, 60, 60), (35 + shift, 35))]), gts)
        assert score.components["accuracy"] == accuracy


def test_ground_truth_is_a_value_or_its_json_text():
    assert KTG.score(well_formed(GT), json.dumps(GT)) == KTG.score(well_formed(GT), GT)
