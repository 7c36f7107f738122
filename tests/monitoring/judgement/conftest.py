"""Run folders of the laptop recipe: the shipped honest runs, and made-up stages."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from cluster.supervise.verdict import FailureHistory
from rcot_rl.monitoring.run_files.run_reader import RunReader
from rcot_rl.recipe.loader import load_recipe
from rcot_rl.recipe.supervise_section import SuperviseSection
from rcot_rl.training.reward_metrics import reward_metrics
from reward_fns.score import load_reward

SHIPPED = Path(__file__).parents[3] / "docs" / "results" / "laptop"
STAGES = ("sft", "grpo-aks", "grpo-ktg")

Lines = list[dict[str, Any]]
MakeRun = Callable[..., RunReader]


def write_lines(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def make_stage(tmp_path: Path) -> MakeRun:
    """Return a function that writes a run of the laptop recipe with the steps of one stage."""

    def make(
        lines: Sequence[dict[str, Any]], stage: str = "grpo-ktg", settings: Sequence[str] = ()
    ) -> RunReader:
        recipe = load_recipe("laptop", list(settings)).model_dump(mode="json")
        tmp_path.joinpath("recipe.yaml").write_text(
            yaml.safe_dump({"recipe": recipe}, sort_keys=False)
        )
        write_lines(tmp_path / stage / "metrics.jsonl", lines)
        (tmp_path / stage / "attempt-1").mkdir(exist_ok=True)
        return RunReader(tmp_path)

    return make


@pytest.fixture
def fail_twice() -> Callable[[Path], tuple[FailureHistory, Path]]:
    """Return a function that records a hang at step 7 of a stage and an error at step 12.

    It returns the history and the log of the attempt.
    """

    def fail(stage: Path) -> tuple[FailureHistory, Path]:
        history = FailureHistory(stage, SuperviseSection())
        log = stage / "attempt-1" / "log.txt"
        log.write_text("")
        history.judge("hung: no output for 240 s", log, 7, "no progress")
        history.judge("ended with status 1", log, 12, "RuntimeError: lost 3 of 128")
        return history, log

    return fail


@pytest.fixture
def shipped_run(make_stage: MakeRun) -> Callable[[str], RunReader]:
    """Return a function that lays out a shipped run as the folder that it came from."""

    def lay_out(name: str) -> RunReader:
        source = SHIPPED / name
        for stage in STAGES:
            lines = [json.loads(line) for line in (source / f"{stage}.jsonl").open()]
            root = make_stage(lines, stage).root
            (root / stage / "done.json").write_text('{"minutes": 1.0}')
        (root / "predict").mkdir()
        (root / "predict" / "rewards.json").write_text((source / "rewards.json").read_text())
        (root / "eval").mkdir()
        for benchmark, scores in json.loads((source / "scores.json").read_text()).items():
            checkpoints = {}
            for checkpoint in STAGES:
                rows = scores[checkpoint]["per_expression"].items()
                keys = [(key.rpartition("/"), value) for key, value in rows]
                checkpoints[checkpoint] = {
                    "per_expression": [
                        {"video": key[0], "expression_id": key[2], "J&F": value}
                        for key, value in keys
                    ]
                }
            text = json.dumps({"checkpoints": checkpoints})
            (root / "eval" / f"{benchmark}-valid.json").write_text(text)
        return RunReader(root)

    return lay_out


def _honest(n: int, seed: int = 0) -> Lines:
    """Return n steps of a KTG stage that improves in format and accuracy, as noisy as the laptop's.

    A step has 16 prompts with 8 responses each; prompts differ in how hard they are.
    """
    random, lines = np.random.default_rng([seed, n]), []
    for k in range(n):
        gain = 1 - np.exp(-3 * k / n)
        form = min(3.0, 2.6 + 0.3 * gain + random.normal(0, 0.065))
        accuracy = max(0.0, 0.7 + 0.3 * gain + random.normal(0, 0.2))
        lines.append(
            {
                "step": k + 1,
                "time": 1e9 + 12 * k,
                "reward/mean": form + accuracy,
                "reward/format/mean": form,
                "reward/accuracy/mean": accuracy,
                "group/zero_variance_fraction": float(np.clip(random.normal(0.15, 0.08), 0, 1)),
                "response_length/mean": 61 + random.normal(0, 2.8),
                "response_length/max": float(random.integers(90, 161)),
                "response_length/clip_ratio": 1 / 128,
                "actor/kl_loss": 0.007 + 0.02 * gain + abs(random.normal(0, 0.002)),
                "reason/json_invalid": float(np.clip(random.normal(0.05, 0.02), 0, 1)),
                "reason/answer_missing": float(np.clip(random.normal(0.02, 0.01), 0, 1)),
                "reason/iou_low": 0.7,
                "disk/free_gib": 40.0,
                "checkpoint/size_gib": 0.1,
            }
        )
    return lines


@pytest.fixture(scope="session")
def honest_steps() -> Callable[..., Lines]:
    return _honest


TRUTH = '[{"bbox_2d": [20, 20, 60, 60], "point_2d": [40, 40]}]'
RIGHT = f"<think>The square on the left moves down and turns.</think><answer>{TRUTH}</answer>"
WRONG = RIGHT.replace("20, 20, 60, 60", "70, 70, 99, 99").replace("40, 40", "80, 80")
MALFORMED = RIGHT.removeprefix("<think>").replace("</answer>", "")
HACK = '<think></think><answer>[{"bbox_2d":[0,0,1,1],"point_2d":[0,0]}]</answer>'
"""Well formed and empty of thought: full format, no accuracy."""

RESPONSES = {"right": RIGHT, "wrong": WRONG, "malformed": MALFORMED, "hack": HACK}


@pytest.fixture(scope="session")
def rollout_steps() -> Callable[..., Lines]:
    return _rollout_steps


def _rollout_steps(mixtures: Sequence[dict[str, float]], seed: int = 0) -> Lines:
    """Return the steps of rollouts that are drawn, scored by `ktg` and summed up as in training.

    Args:
        mixtures: For each step, kind of response -> probability. Prompts differ by 0.2 in how
            likely the right answer is.
    """
    reward, random, lines = load_reward("ktg", canvas=112), np.random.default_rng(seed), []
    scores = {kind: reward.score(text, TRUTH) for kind, text in RESPONSES.items()}
    for step, mixture in enumerate(mixtures, start=1):
        kinds, rows, lengths = list(mixture), [], []
        for prompt in range(16):
            weights = np.array([mixture[kind] for kind in kinds], dtype=float)
            reach = min(0.2, mixture.get("right", 0.0), mixture.get("wrong", 0.0))
            shift = random.uniform(-1, 1) * reach
            weights += [shift * ((k == "right") - (k == "wrong")) for k in kinds]
            for kind in random.choice(kinds, 8, p=weights / weights.sum()):
                score = scores[kind]
                lengths.append(len(RESPONSES[kind]) / 4)
                rows.append(
                    {
                        "uid": str(prompt),
                        "reward": score.reward,
                        "components": score.components,
                        "reasons": score.reasons,
                    }
                )
        length = {"response_length/mean": float(np.mean(lengths))}
        lines.append({"step": step, "time": 1e9 + step} | reward_metrics(rows) | length)
    return lines
