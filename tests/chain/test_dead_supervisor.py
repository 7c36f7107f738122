"""A killed command leaves no process, and the same command completes the run (real stack)."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import psutil
import pytest

SETTINGS = ["stages=[data, sft]", "train.sft.save_every=1"]


def steps(run: Path) -> list[int]:
    path = run / "sft" / "metrics.jsonl"
    rows = path.read_text().splitlines() if path.is_file() else []
    return [json.loads(row)["step"] for row in rows]


def sealed(run: Path) -> int:
    seals = (run / "sft" / "checkpoints").glob("global_step_*/checkpoint.json")
    return max((int(p.parent.name.rpartition("_")[2]) for p in seals), default=0)


@pytest.mark.slow
def test_a_killed_sft_leaves_no_process_and_resumes(start_rcot, small, tmp_path):
    run = tmp_path / "run"
    words = ["run", "laptop", *small, *SETTINGS, "--out", str(run)]
    reached = 0
    for number in (signal.SIGHUP, signal.SIGKILL):
        with (tmp_path / f"{number}.txt").open("w") as log:
            process = start_rcot(*words, stdout=-3, stderr=log)
        end = time.monotonic() + 400
        while sealed(run) <= reached:
            assert process.poll() is None, Path(log.name).read_text()[-3000:]
            assert time.monotonic() < end
            time.sleep(0.05)
        reached = sealed(run)
        tree = psutil.Process(process.pid).children(recursive=True)
        assert any("sft_stage" in " ".join(p.cmdline()) for p in tree)
        os.kill(process.pid, number)
        status = process.wait(timeout=60)
        assert status == (-signal.SIGKILL if number == signal.SIGKILL else 130)
        _, alive = psutil.wait_procs(tree, timeout=5)
        assert not [p.cmdline() for p in alive]
    with (tmp_path / "last.txt").open("w") as log:
        assert start_rcot(*words, stdout=-3, stderr=log).wait(timeout=600) == 0
    text = Path(log.name).read_text()
    assert "sft: resuming from step" in text
    assert steps(run) == list(range(1, 2 * 256 // 16 + 1))
    assert (run / "sft" / "model" / "config.json").is_file()


@pytest.mark.drill
def test_a_killed_grpo_leaves_no_ray_and_resumes(branch, start_rcot):
    run, words = branch("run", "grpo-aks", "train.grpo-aks.steps=2", "grpo.save_every=1")
    with (run.parent / "console.txt").open("w") as log:
        process = start_rcot(*words, stdout=-3, stderr=log)
        first = run / "grpo-aks/checkpoints/global_step_1/checkpoint.json"
        end = time.monotonic() + 400
        while not first.is_file():
            assert process.poll() is None, Path(log.name).read_text()[-3000:]
            assert time.monotonic() < end
            time.sleep(0.05)
        tree = psutil.Process(process.pid).children(recursive=True)
        titles = " ".join(part for p in tree for part in [p.name(), *p.cmdline()])
        assert "gcs_server" in titles and "raylet" in titles and "ray::" in titles
        process.kill()
        process.wait(timeout=60)
        _, alive = psutil.wait_procs(tree, timeout=5)
        assert not [p.cmdline() for p in alive]
        assert start_rcot(*words, stdout=-3, stderr=log).wait(timeout=600) == 0
    rows = (run / "grpo-aks/metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [1, 2]
