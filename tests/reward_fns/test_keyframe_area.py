"""`keyframe_area` for a bare index (kfg) and for Veason-R1's answers, and Veason's other terms."""

from __future__ import annotations

import random

import pytest

from rcot_rl.errors import InputError
from reward_fns import load_reward
from reward_fns.lab.exploits import well_formed

KFG, VEASON = load_reward("kfg"), load_reward("veason-r1")
AREAS = {"areas": [0, 50, 200, 100]}
TRUTH = {
    "frames": [3, 8, 21],
    "areas": [400, 0, 100],
    "boxes": [[[10, 10, 110, 110], [200, 200, 300, 300]], [], [[50, 50, 100, 100]]],
}


def veason(keyframe: object, boxes: object) -> str:
    return well_formed({"keyframe_timestamp": keyframe, "bbox_2d_list": boxes})


@pytest.mark.parametrize(
    ("answer", "fmt", "share", "reasons"),
    [
        ("2", 1.0, 1.0, []),
        ("3", 1.0, 0.5, ["keyframe_not_largest"]),
        ("0", 1.0, 0.0, ["keyframe_without_target"]),
        ("4", 0.0, 0.0, ["keyframe_unknown"]),
        ("-1", 0.0, 0.0, ["keyframe_unknown"]),
        ("two", 0.0, 0.0, ["keyframe_unknown"]),
    ],
)
def test_a_keyframe_earns_its_share_of_the_largest_area(answer, fmt, share, reasons):
    score = KFG.score(well_formed(answer), AREAS)
    assert score.components == {"format": fmt, "keyframe": share}
    assert score.reasons == reasons


def test_any_frame_earns_everything_if_no_frame_shows_a_target():
    assert KFG.score(well_formed("1"), {"areas": [0, 0]}).reward == KFG.max_reward


def test_a_perfect_veason_answer_earns_the_maximum_in_any_order():
    for boxes in (TRUTH["boxes"][0], TRUTH["boxes"][0][::-1]):
        score = VEASON.score(veason(3, boxes), TRUTH)
        assert (score.reward, score.reasons) == (VEASON.max_reward, [])
    assert VEASON.max_reward == 4.0


@pytest.mark.parametrize(
    ("response", "components"),
    [
        # half of the second box, by hand: (1 + 0.5) / 2
        (veason(3, [[10, 10, 110, 110], [200, 200, 300, 250]]), (2.0, 1.0, 0.75)),
        (veason(3, [[10, 10, 110, 110]]), (2.0, 1.0, 0.5)),
        (veason(3, [[10, 10, 110, 110]] * 4), (2.0, 1.0, 0.25)),
        (veason(21, [[50, 50, 100, 100]]), (2.0, 0.25, 1.0)),
        # defect of the published code: zeros on a frame without the target earn everything
        (veason(8, [[0, 0, 0, 0]]), (1.0, 0.0, 0.0)),
        (veason(8, []), (1.0, 0.0, 0.0)),
        (veason(5, [[10, 10, 110, 110]]), (2.0, 0.0, 0.0)),
        (veason(True, [[10, 10, 110, True]]), (1.0, 0.0, 0.0)),
        (veason(3, "boxes"), (1.0, 1.0, 0.0)),
        (well_formed("[]"), (1.0, 0.0, 0.0)),
        (well_formed("NaN"), (1.0, 0.0, 0.0)),
        ("", (0.0, 0.0, 0.0)),
    ],
)
def test_veason_components_equal_values_by_hand(response, components):
    score = VEASON.score(response, TRUTH)
    assert tuple(score.components.values()) == pytest.approx(components)
    assert score.reasons


def test_an_additional_wrong_box_never_raises_the_spatial_reward():
    rng = random.Random(2)
    for _ in range(200):
        boxes = [[x, 5, x + rng.randrange(5, 90), 90] for x in rng.sample(range(300), 3)]
        before = VEASON.score(veason(3, boxes), TRUTH).components["spatial"]
        after = VEASON.score(veason(3, [*boxes, [700, 700, 800, 800]]), TRUTH).components["spatial"]
        assert after <= before


@pytest.mark.parametrize(
    ("truth", "key"),
    [
        ([], "ground_truth"),
        ({}, "ground_truth.areas"),
        ({"areas": []}, "ground_truth.areas"),
        ({"areas": [1, -1]}, "ground_truth.areas"),
        ({"areas": [True]}, "ground_truth.areas"),
    ],
)
def test_malformed_ground_truth_of_kfg_raises_with_its_key(truth, key):
    with pytest.raises(InputError) as caught:
        KFG.score(well_formed("0"), truth)
    assert caught.value.key == key


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"frames": [1, 1, 2]}, "ground_truth.frames"),
        ({"frames": [1, 2]}, "ground_truth.areas"),
        ({"boxes": [[], [], [[1, 2, 3]]]}, "ground_truth.boxes[2][0]"),
        ({"boxes": [[], 5, []]}, "ground_truth.boxes[1]"),
        ({"boxes": [[[5, 5, 1, 9]], [], []]}, "ground_truth.boxes[0][0]"),
    ],
)
def test_malformed_ground_truth_of_veason_raises_with_its_key(change, key):
    with pytest.raises(InputError) as caught:
        VEASON.score(veason(3, []), TRUTH | change)
    assert caught.value.key == key
