"""The shipped sweep starts runs that exist, in folders of their own, and names a known metric."""

from __future__ import annotations

import itertools
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from wandb.sdk.launch.sweeps.utils import (
    create_sweep_command,
    create_sweep_command_args,
    load_sweep_config,
)

from rcot_rl.monitoring.trackers.value_key import value_key
from rcot_rl.monitoring.trackers.wandb_tracker import goal_of
from rcot_rl.prediction_layout import benchmark_name
from rcot_rl.recipe.loader import load_recipe

FILE = Path(__file__).resolve().parents[3] / "recipes" / "sweeps" / "reward_recipes.yaml"


@pytest.fixture(scope="module")
def sweep() -> dict[str, Any]:
    config = load_sweep_config(str(FILE))
    assert config is not None
    return config


def combinations(sweep: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the parameters of each run of a grid, as W&B's agent gets them."""
    values = {k: p.get("values", [p.get("value")]) for k, p in sweep["parameters"].items()}
    rows = itertools.product(*values.values())
    return [{k: {"value": v} for k, v in zip(values, row, strict=True)} for row in rows]


def command_of(sweep: dict[str, Any], parameters: dict[str, Any]) -> list[str]:
    """Return the command that W&B's agent starts, by its own functions."""
    replacements = create_sweep_command_args({"args": parameters}) | {"env": ["/usr/bin/env"]}
    command = []
    for part in create_sweep_command(sweep["command"]):
        name = part.removeprefix("${").removesuffix("}")
        command += replacements[name] if part == f"${{{name}}}" else [part]
    return command


def test_each_run_of_the_sweep_is_a_valid_command_with_a_folder_of_its_own(
    sweep: dict[str, Any], tmp_path: Path
) -> None:
    program = tmp_path / "rcot"
    program.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    program.chmod(0o755)
    folders, rewards = set(), set()
    for number, parameters in enumerate(combinations(sweep)):
        environment = os.environ | {
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "WANDB_SWEEP_ID": "s",
            "WANDB_RUN_ID": f"run{number}",
        }
        command = command_of(sweep, parameters)
        answer = subprocess.run(command, env=environment, capture_output=True, text=True)
        verb, recipe, *overrides, option, folder = answer.stdout.split()
        assert (verb, option) == ("run", "--out")
        loaded = load_recipe(recipe, overrides)
        assert loaded.wandb.mode == "online"
        folders.add(folder)
        rewards.add((loaded.train["grpo-ktg"].reward, loaded.seed))
    assert len(folders) == len(rewards) == len(combinations(sweep)) == 12


def test_the_metric_of_the_sweep_is_a_score_of_its_last_checkpoint(sweep: dict[str, Any]) -> None:
    recipe = load_recipe("laptop", [])
    scores = [
        value_key("eval", benchmark_name(b.dataset, b.split), recipe.eval.checkpoints[-1], "J&F")
        for b in recipe.eval.benchmarks
    ]
    metric = sweep["metric"]
    assert metric["name"] in scores
    assert metric["goal"] == "maximize" and goal_of(metric["name"]) == "max"
