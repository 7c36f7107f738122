"""Every shipped reward: description, hash, maximum for a perfect answer, constant keys."""

from __future__ import annotations

import json

import numpy as np
import pytest
import yaml

from rcot_rl.protocol.row_clips import clip_text
from reward_fns import load_reward
from reward_fns.reward_recipe import REWARDS
from reward_fns.score import RoutedReward

NAMES = sorted(path.stem for path in REWARDS.folder.glob("*.yaml"))
OBJECTS = [
    {"bbox_2d": [100, 100, 300, 300], "point_2d": [200, 200]},
    {"bbox_2d": [400, 100, 500, 300], "point_2d": [450, 200]},
]
FRAMES = {"frames": [3, 8], "areas": [5, 9], "boxes": [[[1, 1, 4, 4]], [[2, 2, 9, 9]]]}
THOUGHT = " ".join(f"word{k}" for k in range(60))
PERFECT = {
    "aks": ("A", "A"),
    "ktg": (json.dumps(OBJECTS), OBJECTS),
    "kfg": ("1", {"areas": [5, 9]}),
    "veason": (json.dumps({"keyframe_timestamp": 8, "bbox_2d_list": [[2, 2, 9, 9]]}), FRAMES),
    "seg-zero": (
        '{"bbox": [10, 20, 200, 210], "points_1": [30, 40], "points_2": [50, 60]}',
        "<box>(10,20),(200,210)</box><points>(30,40),(50,60)</points>",
    ),
}


class Perfect:
    """Returns the true masks: the whole frame."""

    def union_masks(self, requests):
        return [np.ones((len(r.frames), 4, 4), dtype=bool) for r in requests]


CLIP = {
    "extra_info": {
        "clip": clip_text(["a.png", "b.png"], 0, [np.ones((4, 4), bool)] * 2),
        "agentic": {"area": 1.0},
    }
}


MAXIMA = {
    "aks": 3.0,
    "aks-agentic": 4.0,
    "aks-answer-only": 3.0,
    "aks-format-only": 1.0,
    "joint": 6.0,
    "kfg": 2.0,
    "ktg": 6.0,
    "ktg-answer-only": 6.0,
    "ktg-box-only": 6.0,
    "ktg-continuous-iou": 6.0,
    "ktg-format-only": 3.0,
    "ktg-masks": 8.0,
    "ktg-point-only": 6.0,
    "ktg-reasoned": 7.0,
    "ktg-soft": 6.0,
    "ktg-zero-target": 6.0,
    "seg-zero": 5.0,
    "veason-r1": 4.0,
    "veason-r1-sam2": 5.0,
    "visionreasoner": 7.0,
}
"""Maxima of the paper and of the public rewards."""


def routes(name: str):
    reward = load_reward(name)
    return reward.routes.items() if isinstance(reward, RoutedReward) else [(None, reward)]


@pytest.mark.parametrize("name", NAMES)
def test_only_a_perfect_answer_earns_the_maximum(name: str) -> None:
    whole = load_reward(name, segmenter=Perfect())
    for source, part in routes(name):
        answer, truth = PERFECT[part.recipe.task]
        thought = "" if name.endswith("answer-only") else f"<think>{THOUGHT}</think>"
        response = f"{thought}<answer>{answer}</answer>"
        score = whole.score(response, truth, data_source=source, **CLIP)
        assert score.reward == pytest.approx(part.max_reward)
        assert score.reasons == []
        for worse in ("", response + "</think>", response.replace(answer, "?")):
            lower = whole.score(worse, truth, data_source=source, **CLIP)
            assert lower.reward < part.max_reward and lower.reasons
            assert tuple(lower.components) == tuple(score.components) == whole.component_names


@pytest.mark.parametrize("name", NAMES)
def test_each_has_a_description_and_a_unique_hash(name: str) -> None:
    raw = yaml.safe_load((REWARDS.folder / f"{name}.yaml").read_text())
    assert len(raw["description"]) > 10
    hashes = {other: load_reward(other).hash for other in NAMES}
    assert len(set(hashes.values())) == len(NAMES)
    assert load_reward(name).hash == hashes[name]


@pytest.mark.parametrize(("name", "answer"), [("aks", "A"), ("ktg", PERFECT["ktg"][0])])
def test_reasoning_costs_an_answer_only_policy_what_its_absence_costs_another(
    name: str, answer: str
) -> None:
    truth = PERFECT[name][1]
    plain = f"<answer>{answer}</answer>"
    for response in (plain, f"<think>{THOUGHT}</think>{plain}"):
        scores = [load_reward(n).score(response, truth) for n in (name, f"{name}-answer-only")]
        assert {s.components["accuracy"] for s in scores} == {1.0 if name == "aks" else 3.0}
        assert sorted(s.reward for s in scores) == [MAXIMA[name] - 1.0, MAXIMA[name]]
    assert load_reward(f"{name}-answer-only").score(plain, truth).reward == MAXIMA[name]


def test_maxima_equal_those_of_the_paper_and_the_public_rewards() -> None:
    assert {name: load_reward(name).max_reward for name in NAMES} == MAXIMA


@pytest.mark.parametrize(
    ("key", "value"),
    [("eta", 0.51), ("gamma_box", 11), ("alpha_pt", 0.5), ("iou", "pixel"), ("pt_score", "soft")],
)
def test_any_parameter_changes_the_hash(key: str, value: object) -> None:
    changed = load_reward("ktg", overrides={f"components.accuracy.{key}": value})
    assert changed.hash != load_reward("ktg").hash


def test_ablations_ignore_the_terms_they_remove() -> None:
    answer = json.dumps([o | {"point_2d": [o["bbox_2d"][0] + 1, 101]} for o in OBJECTS])
    far = f"<think>t</think><answer>{answer}</answer>"  # boxes right, points far
    assert load_reward("ktg-box-only").score(far, OBJECTS).reward == 6.0
    assert load_reward("ktg-point-only").score(far, OBJECTS).reward == 3.0
    wrong = load_reward("ktg-format-only").score(far, OBJECTS)
    assert (wrong.reward, wrong.components["accuracy"], wrong.reasons) == (3.0, 2.0, [])
