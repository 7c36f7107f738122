"""A reader shows what a run folder has, whatever is missing or broken in it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from rcot_rl.monitoring.run_files.rollout_files import (
    RolloutFrames,
    groups_of,
    read_rollouts,
    rollout_steps,
)
from rcot_rl.monitoring.run_files.run_reader import RunReader, with_absent_reasons
from rcot_rl.monitoring.run_files.run_status import STALE_S, RunStatus, read_status, write_status


def status(stage: str, updated: float) -> RunStatus:
    return RunStatus("running", updated, updated, "host", 1, ["sft", "grpo-ktg"], stage=stage)


def test_states_follow_files(make_run: Callable[..., Path]) -> None:
    run = make_run()
    states = {stage.name: stage.state for stage in RunReader(run).stages()}
    assert states["sft"] == "done" and states["grpo-ktg"] == "stopped"
    assert states["report"] == "pending"
    write_status(run, status("grpo-ktg", time.time()))
    assert RunReader(run).stage("grpo-ktg").state == "running"
    write_status(run, status("grpo-ktg", time.time() - STALE_S - 1))
    assert RunReader(run).stage("grpo-ktg").state == "stopped"


def test_an_empty_or_broken_folder_reads_as_empty(tmp_path: Path) -> None:
    (tmp_path / "sft").mkdir()
    for name in ("recipe.yaml", "status.json", "sft/metrics.jsonl", "sft/attempts.jsonl"):
        (tmp_path / name).write_text("{[\n")
    reader = RunReader(tmp_path)
    assert reader.record == {} and reader.recipe is None and read_status(tmp_path) is None
    assert reader.metrics("sft") == [] and reader.heldout() == {} and reader.scores() == {}
    assert reader.stage("sft").failures == [] and reader.name == tmp_path.name


def test_a_reason_that_was_not_given_is_zero() -> None:
    steps = [{"step": 1, "reason/a": 0.5}, {"step": 2, "reason_count/b": 3.0}]
    filled = with_absent_reasons(steps)
    assert filled[0] == {"step": 1, "reason/a": 0.5, "reason_count/b": 0.0}
    assert filled[1] == {"step": 2, "reason/a": 0.0, "reason_count/b": 3.0}


def test_rollouts_keep_groups_and_objects(tmp_path: Path) -> None:
    truth = [{"bbox_2d": [1, 2, 3, 4], "point_2d": [2, 3]}, {"bbox_2d": "x"}]
    answer = '[{"bbox_2d": [0, 0, 5, 5], "point_2d": [1, 1]}, {"bbox_2d": [5, 5, 0, 0]}]'
    rows = [
        {
            "prompt_id": prompt,
            "sample": 0,
            "turn": turn,
            "data_source": "rcot/ktg",
            "response": f"<think>t</think><answer>{answer}</answer>",
            "ground_truth": json.dumps(truth),
            "reward": float(turn),
            "components": {"format": 1.0, "broken": "x"},
        }
        for prompt in "ab"
        for turn in (0, 1)
    ]
    folder = tmp_path / "rollouts"
    folder.mkdir()
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "12.jsonl").write_text(text + '{"unfinished')
    (folder / "3.jsonl").write_text(text)
    assert rollout_steps(tmp_path) == [3, 12]
    groups = groups_of(read_rollouts(tmp_path, 12))
    assert list(groups) == ["a", "b"]
    (rollout,) = groups["a"]
    assert rollout.reward == 1.0 and rollout.components == {"format": 1.0}
    assert rollout.true_objects == [((1, 2, 3, 4), (2, 3))]
    assert rollout.predicted_objects == [((0, 0, 5, 5), (1, 1))]
    assert read_rollouts(tmp_path, 4) == []


def test_frames_of_rollouts_are_those_of_the_shards(tmp_path: Path) -> None:
    recipe = {"canvas": {"image": 112}, "train": {"grpo-ktg": {"shard_set": "grpo-ktg-4"}}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"recipe": recipe}))
    shards = tmp_path / "shards" / "grpo-ktg-4"
    (shards / "media").mkdir(parents=True)
    names = ["media/a.jpg", "media/lost.jpg", "../outside.jpg"]
    for name in ("media/a.jpg", "../outside.jpg"):
        (shards / name).write_bytes(b"")
    rows = [
        {"extra_info": {"index": k, "media": m, "expression": f"e{k}"}}
        for k, m in enumerate(names, start=7)
    ]
    pq.write_table(pa.Table.from_pylist(rows), shards / "train-00000-of-00001.parquet")
    frames = RolloutFrames(tmp_path, "grpo-ktg")
    assert frames.canvas == 112 and frames.path(7) == shards / "media" / "a.jpg"
    assert [frames.path(index) for index in (8, 9, 1, None)] == [None] * 4
    assert frames.expression(8) == "e8" and frames.expression(1) == frames.expression(None) == ""
    assert RolloutFrames(tmp_path, "sft").path(7) is None
