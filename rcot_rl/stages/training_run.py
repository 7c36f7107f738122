"""Shared by SFT and GRPO stages: resume, train to the planned last step, watch the trainer."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from cluster.supervise.processes import StageFailed
from cluster.supervise.watchdog import run_watched
from rcot_rl.errors import InputError
from rcot_rl.monitoring.judgement.alert_rules import AlertWatch
from rcot_rl.monitoring.run_files.metrics import (
    StepCopier,
    read_metrics,
    recover_steps,
    restore_step,
)
from rcot_rl.monitoring.run_files.run_reader import RunReader
from rcot_rl.runfolder import attempts_in
from rcot_rl.stages.stage_run import StageRun
from rcot_rl.training import jobs
from rcot_rl.training.checkpoint_store import METRICS

logger = logging.getLogger(__name__)


def fit_ranks(run: StageRun, stage: str, attempt: Path) -> None:
    """Reshard the newest checkpoint to the recipe's number of ranks, if they differ."""
    checkpoints = run.folder.stage(stage) / "checkpoints"
    arguments = jobs.reshard_job(checkpoints, jobs.ranks_of(run.recipe, stage))
    if arguments is not None:
        run.console.line(f"{stage}: resharding to {arguments[-1]} ranks")
        run.run_child(stage, arguments, attempt / "reshard.log")


def train(run: StageRun, stage: str, job: jobs.Job, arguments: list[str], attempt: Path) -> Path:
    """Train to the planned last step, and return its checkpoint.

    Only the sealed checkpoint of the last step counts as success, not the exit status: Ray's or
    gloo's threads may crash at exit, after the last checkpoint was sealed.

    Raises:
        StageFailed: The newest sealed checkpoint is not that of the last step.
        InputError: A checkpoint has a later step.
    """
    folder = run.folder.stage(stage)
    checkpoints, metrics = folder / "checkpoints", folder / "metrics.jsonl"
    if job.resumes_from > job.total_steps:
        raise InputError(
            f"has step {job.resumes_from}, but the last planned step is {job.total_steps}: "
            "delete it, or choose another folder with --out",
            file=checkpoints / f"global_step_{job.resumes_from}",
        )
    if job.resumes_from:
        logs = [attempt / job.verl_log.name for attempt in attempts_in(folder)]
        recover_steps(metrics, logs, job.resumes_from)
        restore_step(metrics, checkpoints / f"global_step_{job.resumes_from}" / METRICS)
    if job.resumes_from < job.total_steps:
        if job.on_all_hosts:
            _await_hosts(run, stage, attempt)
        try:
            _run_trainer(run, stage, job, arguments, attempt)
        except StageFailed as error:
            if jobs.sealed_step(checkpoints) != job.total_steps:
                raise
            run.console.line(f"{stage}: {error}, after its last checkpoint was sealed")
        restore_step(metrics, checkpoints / f"global_step_{job.total_steps}" / METRICS)
    step = jobs.sealed_step(checkpoints)
    if step != job.total_steps:
        raise StageFailed(
            "ended with status 0 before its last step "
            f"(newest sealed checkpoint: step {step} of {job.total_steps})",
            attempt / "log.txt",
        )
    return checkpoints / f"global_step_{step}"


def _await_hosts(run: StageRun, stage: str, attempt: Path) -> None:
    """Wait until a running Ray cluster has all its hosts; one may have been lost."""
    cluster = run.recipe.cluster
    if cluster.ray_address != "local":
        wait = ["--wait", str(run.recipe.launch.health.wait_s)]
        size = ["--nodes", str(cluster.nodes), "--gpus", str(cluster.gpus_per_node)]
        arguments = ["-m", "cluster.launch.await_hosts", cluster.ray_address, *size, *wait]
        run.run_child(stage, arguments, attempt / "hosts.log")


def _run_trainer(
    run: StageRun, stage: str, job: jobs.Job, arguments: list[str], attempt: Path
) -> None:
    log, metrics = attempt / "log.txt", run.folder.stage(stage) / "metrics.jsonl"
    copier = StepCopier(job.verl_log, metrics)
    alerts = _ConsoleAlerts(run, stage, metrics, job.resumes_from)
    if job.resumes_from:
        run.console.line(f"{stage}: resuming from step {job.resumes_from}")
    run.console.line(f"{stage}: starting, log {log}")

    def new_steps() -> int:
        lines = copier.poll()
        for line in lines:
            run.console.step(stage, line, job.total_steps)
            alerts.update(line)
        return len(lines)

    run_watched(
        partial(run.run_child, stage),
        arguments,
        log,
        run.recipe,
        new_steps=new_steps,
        environment=job.environment,
        on_ray=job.on_all_hosts,
    )


class _ConsoleAlerts:
    """Prints new alerts of a stage. A fault in a rule ends the alerts, not the training.

    Alerts of earlier steps and attempts count as printed.
    """

    def __init__(self, run: StageRun, stage: str, metrics: Path, resumes_from: int) -> None:
        self._console, self._stage = run.console, stage
        self._watch: AlertWatch | None = AlertWatch(RunReader(run.folder.root), stage)
        with self._harmless():
            for line in read_metrics(metrics):
                if line["step"] <= resumes_from:
                    self._watch.update(line)
            self._watch.new_failures()

    def update(self, line: dict[str, Any]) -> None:
        """Print the alerts that a new step raises."""
        with self._harmless():
            for alert in self._watch.update(line) if self._watch else ():
                self._console.line(f"{self._stage}: alert at step {alert.step}: {alert.text}")

    @contextlib.contextmanager
    def _harmless(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._watch = None
            logger.exception("alerts of %s ended", self._stage)
            self._console.line(f"{self._stage}: no more alerts: {type(error).__name__}: {error}")
