"""A W&B server that fails, seen through the command's supervision and the real wandb-core."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from cluster.supervise import run_tracking
from cluster.supervise.processes import Host
from cluster.supervise.run_tracking import RunTracking
from rcot_rl.cli.main import app
from rcot_rl.monitoring.terminal.console import Console
from rcot_rl.recipe.loader import load_recipe

sys.path.insert(0, str(Path(__file__).parents[2] / "monitoring" / "trackers"))

from fake_wandb_server import FakeWandb

STAGE = "grpo-aks"
STEPS = 8


@pytest.fixture
def wandb_server(tmp_path, monkeypatch):
    for name in ("CONFIG", "CACHE", "DATA"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / "wandb-home"))
    with FakeWandb() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        yield server
        server.fault = None


@pytest.fixture
def run(tmp_path) -> Path:
    """Return a run folder whose stage is to be trained by `train`."""
    folder = tmp_path / "run"
    (folder / STAGE / "attempt-1").mkdir(parents=True)
    recipe = load_recipe("laptop", ["wandb.mode=online"])
    record = {"recipe_hash": "ab", "recipe": recipe.model_dump(mode="json")}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(record))
    return folder


def train(run: Path, drain_s: float, during: Callable[[RunTracking, int], None]) -> list[str]:
    """Write steps as a stage does, under supervision; return the console's lines.

    `during` is called after each step.
    """
    lines: list[str] = []
    console = Console()
    console.line = lines.append  # type: ignore[method-assign]
    recipe = load_recipe("laptop", ["wandb.mode=online", f"tracking.drain_s={drain_s}"])
    host = Host({})
    with host, RunTracking(recipe, run, host, console) as tracking:
        with (run / STAGE / "metrics.jsonl").open("a") as file:
            for step in range(1, STEPS + 1):
                began = time.monotonic()
                file.write(
                    json.dumps({"step": step, "time": 1e9 + step, "reward/mean": step}) + "\n"
                )
                file.flush()
                assert time.monotonic() - began < 1.0, "a step waited for the tracker"
                tracking.poll()
                during(tracking, step)
        (run / STAGE / "done.json").write_text("{}")
    return lines


def sync(run: Path) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["wandb", "sync", str(run)])
    return result.exit_code, result.output


def arrived(server: FakeWandb) -> list[int]:
    runs = [run for name, run in server.runs.items() if name.endswith(STAGE)]
    assert len(runs) <= 1, "one run for the stage"
    return sorted(runs[0].steps()) if runs else []


def all_lines(server: FakeWandb) -> list[int]:
    """Return the step of each history line that arrived, repeated ones included."""
    (run,) = [run for name, run in server.runs.items() if name.endswith(STAGE)]
    return [line["_step"] for line in run.lines() if "reward/mean" in line]


def test_a_healthy_server_has_everything_and_sync_adds_nothing(wandb_server, run):
    lines = train(run, 120, lambda tracking, step: None)
    assert lines[-1] == f"wandb: {STEPS} of {STEPS} steps sent"
    assert arrived(wandb_server) == list(range(1, STEPS + 1))
    before = len(wandb_server.requests)
    status, output = sync(run)
    assert status == 0 and f"{STEPS} of {STEPS}" in output
    assert len(wandb_server.requests) == before, "nothing was left to send"


@pytest.mark.parametrize("fault", ["refused", pytest.param("hang", marks=pytest.mark.slow)])
def test_what_a_dead_server_missed_is_sent_once_when_it_is_back(wandb_server, run, fault):
    if fault == "refused":
        wandb_server.stop()
    else:
        wandb_server.fault = fault
    began = time.monotonic()
    lines = train(run, 5, lambda tracking, step: None)
    assert time.monotonic() - began < 40
    assert lines[-1].startswith(f"wandb: 0 of {STEPS} steps sent")
    assert lines[-1].endswith(f"`rcot wandb sync {run}` sends the rest")
    assert arrived(wandb_server) == []
    if fault == "refused":
        wandb_server.start()
    wandb_server.fault = None
    status, output = sync(run)
    assert status == 0, output
    assert sorted(all_lines(wandb_server)) == list(range(1, STEPS + 1))


@pytest.mark.slow
def test_a_run_that_was_never_tracked_can_be_sent(wandb_server, run):
    metrics = [{"step": s, "time": 1e9 + s, "reward/mean": s} for s in range(1, STEPS + 1)]
    (run / STAGE / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in metrics))
    (run / STAGE / "done.json").write_text("{}")
    status, output = sync(run)
    assert status == 0, output
    assert sorted(all_lines(wandb_server)) == list(range(1, STEPS + 1))
    assert wandb_server.url in output


def test_sync_needs_a_run_and_a_login(tmp_path, run, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    for folder, says in ((tmp_path, "no readable recipe.yaml"), (run, "wandb login")):
        result = CliRunner().invoke(app, ["wandb", "sync", str(folder)])
        assert says in str(result.exception)


@pytest.mark.slow
def test_a_killed_follower_sends_the_rest_once(wandb_server, run, monkeypatch):
    monkeypatch.setattr(run_tracking, "POLL_S", 0.05)
    monkeypatch.setattr(run_tracking, "FIRST_RESTART_S", 0.1)

    def kill_once(tracking: RunTracking, step: int) -> None:
        if step == 4:
            end = time.monotonic() + 60
            while not arrived(wandb_server) and time.monotonic() < end:
                time.sleep(0.1)
            tracking._followed[0].process.kill()
            while tracking._followed[0].restarts == 0:
                tracking.poll()
                time.sleep(0.05)

    lines = train(run, 120, kill_once)
    assert lines[-1] == f"wandb: {STEPS} of {STEPS} steps sent"
    assert arrived(wandb_server) == list(range(1, STEPS + 1))
