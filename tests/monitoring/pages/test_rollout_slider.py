"""Drawn rollouts: the shown steps, groups and responses, and the slider in a browser."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from rcot_rl.monitoring.pages.rollout_slider import MOST_STEPS, rollouts_section, shown_group
from rcot_rl.monitoring.run_files.rollout_files import read_rollouts
from rcot_rl.monitoring.run_files.run_reader import RunReader

STAGE = "grpo-ktg"
CANVAS = 112


def row(prompt: str, sample: int, reward: float, **values: Any) -> dict[str, Any]:
    answer = [{"bbox_2d": [10, 20, 30 + sample, 40], "point_2d": [15, 25]}]
    return {
        "prompt_id": prompt,
        "sample": sample,
        "turn": 0,
        "data_source": "rcot/ktg",
        "prompt": "user: where?",
        "response": f"<think>thought {prompt}{sample}</think><answer>{json.dumps(answer)}</answer>",
        "ground_truth": json.dumps([{"bbox_2d": [12, 22, 32, 42], "point_2d": [20, 30]}]),
        "reward": reward,
        "components": {"format": 1.0, "accuracy": reward - 1},
        "reasons": [] if reward == 6 else ["iou_low"],
        "index": 7,
        "video": "v",
        "expression_id": "0",
    } | values


def write_rollouts(run: Path, step: int, rows: list[dict[str, Any]]) -> None:
    path = run / STAGE / "rollouts" / f"{step}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with a shard of one row, whose frame is 112 x 112 pixels."""
    run = tmp_path / "run"
    shards = run / "shards" / "ktg-1"
    (shards / "media").mkdir(parents=True)
    recipe = {"canvas": {"image": CANVAS}, "train": {STAGE: {"shard_set": "ktg-1"}}}
    (run / "recipe.yaml").write_text(yaml.safe_dump({"recipe": recipe}))
    cv2.imwrite(str(shards / "media" / "a.jpg"), np.full((CANVAS, CANVAS, 3), 90, np.uint8))
    info = {"index": 7, "media": "media/a.jpg", "expression": "the <b>red</b> one"}
    pq.write_table(pa.Table.from_pylist([{"extra_info": info}]), shards / "train-0.parquet")
    return run


def section_of(run: Path) -> str:
    return rollouts_section(RunReader(run), STAGE)


def test_steps_are_evenly_spaced_with_the_first_and_the_last(run: Path) -> None:
    for step in range(3, 60):
        write_rollouts(run, step, [row("a", 0, 6.0), row("a", 1, 2.0)])
    steps = [int(step) for step in re.findall(r'data-step="(\d+)"', section_of(run))]
    assert len(steps) == MOST_STEPS and (steps[0], steps[-1]) == (3, 59)
    assert set(np.diff(steps)) == {8}


def test_the_shown_group_is_typical_and_has_rewards_that_differ(run: Path) -> None:
    groups = {"far": (0.0, 1.0), "same": (4.0, 4.0), "near": (3.0, 5.0), "good": (6.0, 5.5)}
    rows = [row(name, k, r) for name, rewards in groups.items() for k, r in enumerate(rewards)]
    write_rollouts(run, 1, rows)
    rollouts = read_rollouts(run / STAGE, 1)
    assert {one.prompt_id for one in shown_group(rollouts)} == {"near"}
    write_rollouts(run, 1, [row("a", 0, 4.0), row("a", 1, 4.0)])
    assert "the group gives no gradient" in section_of(run)


def test_best_and_worst_are_drawn_on_one_embedded_frame(run: Path) -> None:
    rows = [row("a", k, reward, advantage=reward - 4) for k, reward in enumerate((3.0, 6.0, 1.5))]
    write_rollouts(run, 12, rows)
    html = section_of(run)
    best, worst = re.findall("<figure>.*?</figure>", html)
    assert "<b>Best</b>: reward 6, advantage +2.00" in best and "thought a1" in best
    assert "<b>Worst</b>: reward 1.5, advantage -2.50" in worst and "thought a2" in worst
    assert "no points lost" in best and "<code>iou_low</code>" in worst
    assert "format 1 · accuracy 5" in best
    for figure, width in ((best, 21), (worst, 22)):
        assert f'x="10" y="20" width="{width}" height="20" class="mark box"' in figure
        assert 'x="12" y="22" width="20" height="20" class="mark truth"' in figure
        assert 'viewBox="0 0 112 112"' in figure
        assert '1 true and 1 predicted boxes"' in figure
    assert html.count("data:image/jpeg") == 1 and html.count('<use href="#') == 2
    assert "<b>the &lt;b&gt;red&lt;/b&gt; one</b>" in html


def test_what_a_dump_lacks_is_named(run: Path) -> None:
    write_rollouts(run, 1, [row("a", 0, 6.0), row("a", 1, 2.0, index=8, response="<b>no tags")])
    html = section_of(run)
    assert "advantage not recorded" in html
    assert html.count("Missing: the frame of this prompt") == 1
    assert "&lt;b&gt;no tags" in html and "<b>no tags" not in html
    (run / "shards" / "ktg-1" / "media" / "a.jpg").write_text("no image")
    assert "Missing: the drawing of this response (a.jpg is no readable image)" in section_of(run)


@pytest.mark.parametrize(
    "truth",
    [
        "[{}]",
        "[[1]]",
        '[{"bbox_2d": [0, 0, NaN, 5], "point_2d": ["x", {}]}]',
        "nonsense",
        "[1e999]",
    ],
)
def test_malformed_rows_do_not_break_the_section(truth: str, run: Path) -> None:
    write_rollouts(run, 1, [row("a", 0, 6.0, ground_truth=truth), row("a", 1, 2.0, reasons=3)])
    html = section_of(run)
    assert html.count("<figure>") == 2
    assert not re.search(r'="(?:nan|inf)', html)


def test_an_episode_says_where_it_ended(run: Path) -> None:
    outcome = {"truth": "A", "area": 0.5, "judgements": 3, "judged": 4, "chosen": 6}
    values = {"data_source": "rcot/aks", "ground_truth": '"A"', "extra_info": {"agentic": outcome}}
    write_rollouts(run, 1, [row("a", 0, 3.0, **values), row("a", 1, 1.0, **values)])
    html = section_of(run)
    assert html.count("episode of 3 judgements, drawn: the first judged frame. Last judged: ") == 2
    assert "frame 5 of the clip. Chosen: frame 7, with 50 % of the largest" in html
    assert "correct answer A" in html and 'class="mark ' not in html


def test_a_stage_without_rollouts_has_no_section(run: Path) -> None:
    assert section_of(run) == ""
    write_rollouts(run, 1, [{"no": "reward"}])
    assert section_of(run) == ""
