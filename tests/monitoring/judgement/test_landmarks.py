"""Maxima and weights agree with the contract and with the scorer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml

from rcot_rl.monitoring.judgement.landmarks import (
    FORM_MODULES,
    PAPER,
    RewardFacts,
    component_maxima,
    component_weights,
    max_reward,
    reward_facts,
    trained_tasks,
)
from rcot_rl.monitoring.run_files.run_reader import RunReader
from rcot_rl.recipe.loader import load_recipe
from reward_fns.registry import modules
from reward_fns.reward_recipe import REWARDS, RoutedRecipe, load_reward_recipe
from reward_fns.score import load_reward


def run_with(folder: Path, *settings: str) -> RunReader:
    recipe = load_recipe("laptop", list(settings)).model_dump(mode="json")
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"recipe": recipe}, sort_keys=False))
    return RunReader(folder)


def test_maxima_are_those_of_the_contract(tmp_path: Path) -> None:
    run = run_with(tmp_path)
    assert max_reward(run, "grpo-aks") == 3.0
    assert max_reward(run, "grpo-ktg") == 6.0
    assert component_maxima(run, "grpo-aks") == {"format": 1.0, "accuracy": 1.0}
    assert component_maxima(run, "grpo-ktg") == {"format": 3.0, "accuracy": 3.0}
    assert reward_facts(run, "grpo-aks").weights == {"format": 1.0, "accuracy": 2.0}
    assert max_reward(run, "sft") is None
    assert max_reward(run, "no-such-stage") is None


@pytest.mark.parametrize("name", REWARDS.names)
def test_maxima_of_every_shipped_reward_equal_the_scorers(name: str, tmp_path: Path) -> None:
    run = run_with(tmp_path, f"train.grpo-ktg.reward={name}")
    assert max_reward(run, "grpo-ktg") == load_reward(name).max_reward


def test_routes_with_other_weights_have_no_common_weights(tmp_path: Path) -> None:
    run = run_with(tmp_path, "train.grpo-ktg.reward=joint")
    assert reward_facts(run, "grpo-ktg").weights is None  # accuracy counts twice for aks only


def test_a_users_function_has_no_maxima(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def f(response, ground_truth):\n    return 0.5\n")
    run = run_with(tmp_path, f"train.grpo-ktg.reward={tmp_path / 'mine.py'}:f")
    assert reward_facts(run, "grpo-ktg") == RewardFacts()
    assert component_maxima(run, "grpo-ktg") == {}


def test_form_modules_are_registered_and_pay_without_the_truth() -> None:
    """Two ground truths, equal values: the module cannot tell them apart."""
    assert modules().keys() >= FORM_MODULES
    truths = ['[{"bbox_2d": [1, 1, 9, 9], "point_2d": [5, 5]}]', '[{"bbox_2d": [70, 70, 99, 99]}]']
    truths[1] = truths[1].replace("99]}", '99], "point_2d": [80, 80]}')
    answer = truths[0]
    response = f"<think>a b c d e f g h.</think><answer>{answer}</answer>"
    checked = set()
    for name in REWARDS.names:
        recipe = load_reward_recipe(name)
        if isinstance(recipe, RoutedRecipe) or recipe.task != "ktg" or name == "ktg-masks":
            continue
        reward = load_reward(name)
        scores = [reward.score(response, truth).components for truth in truths]
        for key, part in recipe.components.items():
            same = scores[0][key] == scores[1][key]
            checked.add(part.module)
            assert same == (part.module in FORM_MODULES), part.module
    assert {"format", "hungarian_match", "visionreasoner_format"} <= checked


def test_fitted_weights_are_those_that_made_the_rewards() -> None:
    random = np.random.default_rng(1)
    steps = [
        {"reward/format/mean": f, "reward/box/mean": b, "reward/mean": 0.5 * f + 3 * b + 0.2}
        for f, b in random.uniform(size=(20, 2))
    ]
    weights = component_weights(steps, RewardFacts())
    assert weights == pytest.approx({"format": 0.5, "box": 3.0})
    spoiled = [s | {"reward/mean": s["reward/mean"] + random.normal()} for s in steps]
    assert component_weights(spoiled, RewardFacts()) is None
    assert component_weights(steps[:3], RewardFacts()) is None


def test_papers_starts_lie_below_the_maxima_and_tasks_are_known(tmp_path: Path) -> None:
    run = run_with(tmp_path)
    assert (PAPER["aks"].start_reward, PAPER["ktg"].start_reward) == (2.1, 4.3)
    assert PAPER["ktg"].max_reward == max_reward(run, "grpo-ktg")
    assert PAPER["aks"].max_reward == max_reward(run, "grpo-aks")
    assert trained_tasks(run, "grpo-aks") == ("aks",)
    assert trained_tasks(run, "sft") == ("aks", "ktg")
