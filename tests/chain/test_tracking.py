"""A real run, killed twice, is one gap-free W&B run for each stage."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rcot_rl.monitoring.run_files.metrics import read_metrics

sys.path.insert(0, str(Path(__file__).parents[1] / "monitoring" / "trackers"))

from offline_run import OfflineRun, read_run

LIMIT_S = 1500


def wait_for_step(run: Path, stage: str, process: subprocess.Popen) -> None:
    end = time.monotonic() + LIMIT_S
    while not (run / stage / "metrics.jsonl").is_file():
        assert process.poll() is None, "ended before it was killed"
        assert time.monotonic() < end
        time.sleep(0.2)


def offline_runs(run: Path) -> dict[str, OfflineRun]:
    """Return stage -> its only offline run."""
    folders = (run / "tracking" / "wandb" / "wandb").glob("offline-run-*")
    files = [file for folder in folders for file in folder.glob("*.wandb")]
    runs: dict[str, OfflineRun] = {}
    for file in files:
        stage = file.stem.split("-", 2)[2]
        assert stage not in runs, f"two files of {stage}"
        runs[stage] = read_run(file)
    return runs


@pytest.mark.slow
def test_a_run_that_is_killed_twice_is_one_gap_free_run_per_stage(tmp_path, small, start_rcot):
    run = tmp_path / "run"
    settings = ["wandb.mode=offline", "tracking.drain_s=300", "tracking.rollout_tables=2"]
    words = ["run", "laptop", *small, *settings, "--out", str(run)]
    log = tmp_path / "console.txt"
    for stage in ("grpo-aks", "grpo-ktg"):
        process = start_rcot(*words, stdout=-3, stderr=log.open("a"))
        wait_for_step(run, stage, process)
        process.send_signal(signal.SIGKILL)
        process.wait()
    process = start_rcot(*words, stdout=-3, stderr=log.open("a"))
    assert process.wait(timeout=LIMIT_S) == 0, log.read_text()[-3000:]
    assert "rcot wandb sync" in log.read_text()

    runs = offline_runs(run)
    stages = ("data", "sft", "grpo-aks", "grpo-ktg", "predict", "eval")
    assert set(stages) <= runs.keys()
    assert len({one.run.run_group for one in runs.values()}) == 1
    identity = (run / "tracking" / "run-id").read_text().strip()
    assert {one.run.run_id for one in runs.values()} == {f"{identity}-{stage}" for stage in runs}
    for stage in ("sft", "grpo-aks", "grpo-ktg"):
        metrics = read_metrics(run / stage / "metrics.jsonl")
        assert runs[stage].steps == [line["step"] for line in metrics]
        assert runs[stage].steps == list(range(1, len(metrics) + 1))
    for stage in ("grpo-aks", "grpo-ktg"):
        keys = {key for line in runs[stage].history for key in line}
        scalars = {"reward/mean", "reward/format/mean", "group/zero_variance_fraction"}
        assert scalars | {"distribution/reward", "length_and_kl_vs_reward", "rollouts"} <= keys
        assert runs[stage].summary["attempts"] == 2
        assert any(key.startswith("heldout") for key in runs[stage].summary)
        made = {artifact.type for artifact in runs[stage].artifacts}
        assert {"shards", "model"} <= made
    assert {artifact.type for artifact in runs["predict"].artifacts} >= {"model", "predictions"}
    state = json.loads((run / "tracking" / "wandb-offline.json").read_text())
    assert not state["error"]
    assert all(stage["closed"] == "done" for stage in state["stages"].values())
