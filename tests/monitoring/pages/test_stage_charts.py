"""Charts of a stage: values that were derived independently, and texts that the docs repeat."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml

from rcot_rl.monitoring.pages.stage_charts import CHARTS, reward_errors, stage_section
from rcot_rl.monitoring.run_files.run_reader import RunReader
from rcot_rl.recipe.loader import load_recipe

ROOT = Path(__file__).parents[3]
DOCS, RECIPE = ROOT / "docs" / "monitoring.md", ROOT / "recipes" / "laptop.yaml"


def test_the_error_of_a_step_is_that_of_the_mean_over_prompts() -> None:
    """Responses to one prompt are alike, so the number of prompts counts, not of responses."""
    rng = np.random.default_rng(0)
    prompts = rng.normal(3, 1, size=(400, 16, 1))
    rewards = prompts + rng.normal(0, 0.6, size=(400, 16, 8))
    lines = [
        {
            "step": k,
            "reward/std": float(step.std()),
            "group/reward_std_mean": float(step.std(axis=1).mean()),
        }
        for k, step in enumerate(rewards)
    ]
    errors = reward_errors(lines, groups=16)
    observed = rewards.mean(axis=(1, 2)).std()
    assert np.mean(errors) == pytest.approx(observed, rel=0.1)
    naive = rewards.std() / math.sqrt(16 * 8)
    assert np.mean(errors) > 2 * naive
    assert reward_errors([{"step": 1}], 16) == [] == reward_errors(lines, groups=0)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Return a run of the laptop recipe with two steps of grpo-ktg, and rollouts of both."""
    recipe = load_recipe(RECIPE)
    record = {"recipe": recipe.model_dump(mode="json")}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(record))
    folder = tmp_path / "grpo-ktg" / "rollouts"
    folder.mkdir(parents=True)
    reasons = {f"reason/r{k}": (9 - k) / 10 for k in range(9)}
    lines = [
        {"step": s, "reward/mean": 3.0, "reward/format/mean": 3.0, "reward/accuracy/mean": 0.6}
        | {"group/zero_variance_fraction": 0.75, "response_length/mean": 60.0 + s}
        | (reasons if s == 1 else {})
        for s in (1, 2)
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder.parent / "metrics.jsonl").write_text(text)
    groups = {"easy": (6.0, 6.0), "hard": (0.0, 0.0), "half": (3.0, 3.0), "good": (0.0, 6.0)}
    rows = [
        {"prompt_id": p, "sample": k, "turn": 0, "data_source": "rcot/ktg", "reward": reward}
        | {"response": "<think>t</think><answer>[]</answer>", "ground_truth": "[]"}
        for p, rewards in groups.items()
        for k, reward in enumerate(rewards)
    ]
    for step in (1, 2):
        dump = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{step}.jsonl").write_text(dump)
    return tmp_path


def test_groups_without_gradient_are_split_into_easy_and_hard(run: Path) -> None:
    html = stage_section(RunReader(run), "grpo-ktg")
    assert "all <b>75</b>" in html and "too easy <b>25</b>" in html and "too hard <b>50</b>" in html


def test_maxima_and_landmarks_of_the_paper_are_marked(run: Path) -> None:
    html = stage_section(RunReader(run), "grpo-ktg")
    assert "maximum: 6" in html and "paper starts at: 4.3" in html and "about: 300" in html
    assert "not comparable" in html
    assert "format <b>100</b>" in html, "3 of 3"
    assert "accuracy <b>20</b>" in html, "0.6 of 3"


def test_the_most_frequent_reasons_are_shown_and_the_others_summed(run: Path) -> None:
    """A reason that a step does not name is 0 there, not a gap."""
    html = stage_section(RunReader(run), "grpo-ktg")
    chart = html[html.index("Lost points by reason") :]
    chart = chart[: chart.index("</figure>")]
    assert all(f"r{k} <b>0</b>" in chart for k in range(6)) and "r6 <b>" not in chart
    assert "all others, summed <b>0</b>" in chart and "all others, summed: first 60" in chart


def test_the_heldout_reward_is_beside_the_sampled_one(run: Path) -> None:
    (run / "predict").mkdir()
    means = {"sft": 3.11, "grpo-aks": 3.25, "grpo-ktg": 3.91}
    rewards = {"ktg": {name: {"sampled": {"mean": mean}} for name, mean in means.items()}}
    (run / "predict" / "rewards.json").write_text(json.dumps(rewards))
    html = stage_section(RunReader(run), "grpo-ktg")
    assert "held-out: first 3.25, last 3.91" in html, "it starts from grpo-aks, not from sft"


def test_a_stage_without_steps_is_named_as_missing(run: Path) -> None:
    assert "Missing: sft/metrics.jsonl" in stage_section(RunReader(run), "sft")


def test_charts_of_another_version_are_drawn(make_run: Callable[..., Path]) -> None:
    """Without a valid recipe, maxima are unknown and components keep their own scale."""
    html = stage_section(RunReader(make_run(n_videos=1)), "grpo-ktg")
    assert "Components, before weights" in html and "maximum" not in html


def test_the_documentation_explains_each_chart_in_the_same_words() -> None:
    text = " ".join(DOCS.read_text(encoding="utf-8").split())
    for chart in CHARTS.values():
        assert f"| {chart.title} | {chart.meaning} | {chart.remedy} |" in text
