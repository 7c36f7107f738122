"""Explanations add up: earned plus lost points are the maximum, for every shipped KTG reward."""

from __future__ import annotations

import json
import random

import pytest

from reward_fns import load_reward
from reward_fns.components import pair_arrays
from reward_fns.lab.explain import explain
from reward_fns.reward_recipe import REWARDS
from reward_fns.score import RecipeReward

KTG = [
    n
    for n in sorted(p.stem for p in REWARDS.folder.glob("*.yaml"))
    if isinstance(load_reward(n), RecipeReward)
    and load_reward(n).recipe.task == "ktg"
    and n != "ktg-masks"
]


def case(rng: random.Random) -> tuple[str, list[dict]]:
    targets, items = [], []
    for _ in range(rng.randrange(1, 5)):
        x, y = rng.randrange(400), rng.randrange(400)
        targets.append({"bbox_2d": [x, y, x + 90, y + 80], "point_2d": [x + 45, y + 40]})
    for _ in range(rng.randrange(0, 6)):
        near = rng.choice(targets)
        item: dict = {k: [c + rng.randrange(-15, 16) for c in v] for k, v in near.items()}
        if rng.random() < 0.3:
            broken = rng.choice([[1], None, ["a"] * 4, [9, 9, 1, 1], [True, 1]])
            item[rng.choice(list(item))] = broken
        if rng.random() < 0.1:
            item = {}
        items.append(item)
    answer = json.dumps(items) if rng.random() < 0.9 else rng.choice(["[", "{}", "[3]", ""])
    response = f"<think>so it is</think><answer>{answer}</answer>"
    return (response if rng.random() < 0.8 else response[rng.randrange(30) :]), targets


@pytest.mark.parametrize("name", KTG)
def test_earned_and_lost_points_sum_to_the_maximum(name: str) -> None:
    reward = load_reward(name)
    rng = random.Random(1)
    detailed = 0
    for _ in range(400):
        response, targets = case(rng)
        explanation = explain(reward, response, targets)
        score = reward.score(response, targets)
        assert explanation.reward == score.reward
        assert {k: v["value"] for k, v in explanation.components.items()} == score.components
        lost = sum(loss.points for loss in explanation.losses)
        assert explanation.reward + lost == pytest.approx(reward.max_reward)
        assert all(loss.reason for loss in explanation.losses), explanation.text()
        detailed += len(explanation.matches)
        assert explanation.text() and json.dumps(explanation.as_dict())
    assert detailed > 100 or name == "visionreasoner"


def test_many_objects_are_matched_as_they_are_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    """In arrays, with chunks that drop rows, every item keeps its number."""
    rng = random.Random(2)
    targets = [
        {"bbox_2d": [60 * k, 50 * k, 60 * k + 50, 50 * k + 40], "point_2d": [60 * k, 50 * k]}
        for k in range(12)
    ]
    order = rng.sample(range(12), 12)
    far = [{"bbox_2d": [800, 1, 830, 9], "point_2d": [810, 5]}] * 40
    items = [*far, {}, *(targets[k] for k in order)]
    monkeypatch.setattr(pair_arrays, "CHUNK", 16)
    response = f"<think>t</think><answer>{json.dumps(items)}</answer>"
    explanation = explain(load_reward("ktg"), response, targets)
    assert [match.target for match in explanation.matches] == [None] * 41 + order
    assert all(match.earned == ["iou", "box", "point"] for match in explanation.matches[41:])
    lost = {loss.reason for loss in explanation.losses if loss.component == "accuracy"}
    assert lost == {"objects_too_many", "box_invalid"}


def test_losses_of_a_response_equal_values_by_hand() -> None:
    targets = [{"bbox_2d": [100, 100, 300, 300], "point_2d": [200, 200]}]
    items = [{"bbox_2d": [100, 100, 300, 200], "point_2d": [200, 300]}, {"bbox_2d": [1]}]
    response = f"ok <think>t</think><answer>{json.dumps(items)}</answer>"
    explanation = explain(load_reward("ktg"), response, targets)
    assert explanation.faults == [("text_outside_tags", 0)] and not explanation.well_formed
    first = explanation.matches[0]
    assert (first.target, first.iou, first.box_distance, first.point_distance) == (
        0,
        0.5,
        25.0,
        None,
    )
    losses = {(loss.reason, loss.where): loss.points for loss in explanation.losses}
    assert losses == {
        ("box_not_four_numbers", "item 1"): 0.5,
        ("point_missing", "item 1"): 0.5,
        ("text_outside_tags", ""): 1.0,
        ("iou_low", "item 0, target 0"): 0.5,
        ("box_far", "item 0, target 0"): 0.5,
        ("point_missed", "item 0, target 0"): 0.5,
        ("box_invalid", "item 1"): 1.5,
    }
    assert "no point in its box" in explanation.text() and "character 0" in explanation.text()


def test_other_tasks_and_routed_rewards_are_explained() -> None:
    explanation = explain(load_reward("aks"), "<think>t</think><answer>B</answer>", "A")
    assert [(x.component, x.reason, x.points) for x in explanation.losses] == [
        ("accuracy", "option_wrong", 2.0)
    ]
    routed = explain(load_reward("joint"), "", "A", data_source="rcot/aks")
    assert routed.max_reward == 3.0 and sum(x.points for x in routed.losses) == 3.0
