"""A GRPO stage on the real stack whose processes are killed one after the other ends by itself.

Each kind of process is killed once, each time at a later step, with SIGKILL. The supervisor must
start the stage again from its last checkpoint until all steps are done, and each step once.
"""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import psutil
import pytest

pytestmark = pytest.mark.slow

VICTIMS = {
    "trainer rank": "ray::WorkerDict",
    "vLLM server": "ray::vLLMHttpServer",
    "agent-loop worker": "ray::CachedAgentLoopWorkerTQ",
    "reward worker": "ray::RewardLoopWorker",
    "task runner": "ray::TaskRunnerV1",
    "raylet": "raylet/raylet",
    "driver": "rcot_rl.training.grpo_main",
}
"""What is killed -> part of its title or command line."""

STEPS = len(VICTIMS) + 2


def _line(process: psutil.Process) -> str:
    try:
        return " ".join([process.name(), *process.cmdline()])
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return ""


def _find(tree: psutil.Process, part: str) -> psutil.Process | None:
    found = [p for p in tree.children(recursive=True) if part in _line(p)]
    return found[0] if found else None


def _steps(metrics: Path) -> list[int]:
    if not metrics.is_file():
        return []
    text = metrics.read_text()
    return [json.loads(r)["step"] for r in text[: text.rfind("\n") + 1].splitlines()]


def test_whatever_is_killed_the_stage_ends_with_all_its_steps(rcot, small, tmp_path):
    run = tmp_path / "run"
    settings = [s for s in small if not s.startswith(("grpo_aks.steps", "eval."))]
    process = rcot(
        "run", "laptop", *settings, "stages=[data, sft, grpo-aks]", f"grpo_aks.steps={STEPS}",
        "supervise.max_attempts=20", "supervise.backoff_s=1", "supervise.heartbeat_s=150",
        "supervise.startup_s=240", "data.describe=template",
        "--out", str(run), mark="kills", stdout=-3, stderr=-3,
    )  # fmt: skip
    metrics, table = run / "grpo-aks" / "metrics.jsonl", []
    try:
        for number, (name, part) in enumerate(VICTIMS.items(), start=1):
            _wait(lambda n=number: n in _steps(metrics), process)
            attempts = len(list((run / "grpo-aks").glob("attempt-*")))
            tree = psutil.Process(process.pid)
            _wait(lambda t=tree, p=part: _find(t, p) is not None, process)
            victim = _find(tree, part)
            assert victim is not None, name
            killed = time.monotonic()
            os.kill(victim.pid, signal.SIGKILL)
            verdicts = run / "grpo-aks" / f"attempt-{attempts}" / "verdict.json"
            _wait(verdicts.is_file, process)
            detected = time.monotonic() - killed
            _wait(lambda n=number: (n + 1) in _steps(metrics), process)
            table.append((name, detected, time.monotonic() - killed))
        assert process.wait(timeout=600) == 0
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(timeout=60)
    for name, detected, again in table:
        print(f"{name:<20} noticed after {detected:6.1f} s, next step after {again:6.1f} s")
    assert _steps(metrics) == list(range(1, STEPS + 1))
    assert (run / "grpo-aks" / "done.json").is_file()
    verdicts = [
        json.loads(r) for r in (run / "grpo-aks" / "attempts.jsonl").read_text().split("\n")[:-1]
    ]
    assert len(verdicts) == len(VICTIMS) and all(v["retry"] for v in verdicts)


def _wait(condition, process, within: float = 420.0) -> None:
    end = time.monotonic() + within
    while not condition():
        assert process.poll() is None, "the run ended"
        assert time.monotonic() < end
        time.sleep(0.1)
