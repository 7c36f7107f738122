"""A training stage is done if and only if its newest sealed checkpoint is that of the last step."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from cluster.supervise.processes import StageFailed
from rcot_rl import chain
from rcot_rl.errors import InputError
from rcot_rl.recipe.loader import load_recipe
from rcot_rl.runfolder import RunFolder
from rcot_rl.stages import training_run
from rcot_rl.stages.stage_run import StageRun
from rcot_rl.training.checkpoint_store import METRICS, seal
from rcot_rl.training.jobs import Job

LAST = 8


class Trainer:
    """Replace `Host`: its only process saves some steps and ends with a status."""

    def __init__(self, folder: Path, status: int, steps: list[int], sealed: bool = True) -> None:
        self.folder, self.status, self.steps, self.sealed = folder, status, steps, sealed
        self.runs = 0

    def run(self, arguments: list[str], log: Path, **_: object) -> None:
        self.runs += 1
        log.write_text("INFO nothing wrong\n")
        for step in self.steps:
            save(self.folder, step, self.sealed)
        if self.status:
            raise StageFailed(f"ended with status {self.status}", log)


def save(folder: Path, step: int, sealed: bool = True) -> Path:
    path = folder / "checkpoints" / f"global_step_{step}"
    path.mkdir(parents=True, exist_ok=True)
    (path / METRICS).write_text(json.dumps({"step": step}))
    (path / "weights").write_text("w")
    if sealed:
        seal(path)
    return path


@pytest.fixture
def train(tmp_path: Path) -> Callable[..., tuple[Path, Trainer]]:
    def go(status: int, *steps: int, resumes_from: int = 0, **options: bool):
        folder = RunFolder.claim(tmp_path / "run", load_recipe("laptop"))
        attempt = folder.new_attempt("grpo-ktg")
        host = Trainer(folder.stage("grpo-ktg"), status, list(steps), **options)
        console = SimpleNamespace(line=lambda text: None)
        state = StageRun(load_recipe("laptop"), folder, host, console)
        job = Job(
            attempt / "verl.yaml", {}, attempt / "verl.jsonl", LAST, resumes_from, on_all_hosts=True
        )
        return training_run.train(state, "grpo-ktg", job, [], attempt), host

    return go


@pytest.mark.parametrize("status", [0, 1, 134, -9])
def test_a_sealed_last_step_completes_the_stage_with_any_exit_status(train, tmp_path, status):
    checkpoint, _ = train(status, 4, LAST)
    assert checkpoint.name == f"global_step_{LAST}"
    lines = (tmp_path / "run/grpo-ktg/metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] == LAST, "recorded, though the process died before"


@pytest.mark.parametrize("steps", [(), (4,), (4, 7)])
@pytest.mark.parametrize("status", [0, 1])
def test_a_stage_without_its_last_checkpoint_failed_even_with_status_0(train, steps, status):
    with pytest.raises(StageFailed) as caught:
        train(status, *steps)
    if status == 0:
        assert f"step {max(steps, default=0)} of {LAST}" in str(caught.value)


def test_a_last_checkpoint_that_is_not_sealed_does_not_count(train):
    with pytest.raises(StageFailed, match=f"step 0 of {LAST}"):
        train(0, LAST, sealed=False)


def test_a_checkpoint_beyond_the_last_step_is_refused(train):
    train(0, LAST)
    with pytest.raises(InputError, match=f"has step 9, but the last planned step is {LAST}"):
        train(0, resumes_from=9)


def test_a_finished_stage_is_not_trained_again(train):
    train(0, LAST)
    _, host = train(0, resumes_from=LAST)
    assert host.runs == 0


def test_an_incomplete_stage_is_restarted_once(tmp_path, monkeypatch):
    """It ends with a verdict, not with old weights."""
    folder = RunFolder.claim(tmp_path / "run", load_recipe("laptop"))
    starts = []

    def stage(run: object, name: str) -> None:
        attempt = folder.new_attempt("sft")
        (attempt / "log.txt").write_text("Total time for train steps: 0.00s\n")
        starts.append(attempt)
        raise StageFailed(
            "ended with status 0 before its last step (newest sealed checkpoint: step 76 of 80)",
            attempt / "log.txt",
        )

    monkeypatch.setitem(chain._KINDS, "sft", stage)
    monkeypatch.setattr(chain.time, "sleep", lambda _: None)
    lines: list[str] = []
    state = SimpleNamespace(
        recipe=load_recipe("laptop"), folder=folder, console=SimpleNamespace(line=lines.append)
    )
    with pytest.raises(StageFailed, match=r"step 76 of 80.*same step with the same error"):
        chain._supervised(state, "sft")
    assert len(starts) == 2 and not folder.is_done("sft")
    verdict = json.loads((starts[0] / "verdict.json").read_text())
    assert verdict["cause"] == "incomplete" and verdict["retry"]


@pytest.mark.parametrize(("step", "warned"), [(76, True), (80, False), (None, False)])
def test_a_done_stage_that_an_earlier_version_cut_short_is_named(tmp_path, step, warned):
    folder = RunFolder.claim(tmp_path / "run", load_recipe("laptop"))
    folder.stage("sft").mkdir()
    folder.mark_done("sft", steps=80)
    if step is not None:  # checkpoints may be deleted after the run
        save(folder.stage("sft"), step)
    lines: list[str] = []
    chain._warn_if_short(folder, "sft", SimpleNamespace(line=lines.append))
    assert [("76 of 80" in line and "done.json" in line) for line in lines] == [True] * warned
