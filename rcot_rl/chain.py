"""`rcot run`: run the stages of a recipe in order, skip finished ones and resume interrupted ones.

Each stage is a function in `rcot_rl.stages` that writes its results to the run's folder. The loop
below retries a failed stage as the recipe allows, and marks a stage done once it has ended.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster.supervise.processes import Host
from cluster.supervise.retries import run_with_retries
from cluster.supervise.run_tracking import RunTracking, send_rest
from cluster.supervise.verdict import FailureHistory
from rcot_rl.monitoring.run_files.metrics import read_metrics
from rcot_rl.monitoring.terminal.console import Console
from rcot_rl.monitoring.terminal.status_writer import StatusWriter
from rcot_rl.recipe.loader import require
from rcot_rl.recipe.schema import Recipe
from rcot_rl.runfolder import RunFolder
from rcot_rl.stages import (
    data_stage,
    eval_stage,
    grpo_stage,
    predict_stage,
    report_stage,
    sft_stage,
)
from rcot_rl.stages.stage_run import StageRun
from rcot_rl.system import disk
from rcot_rl.system.files import writing
from rcot_rl.training import jobs
from rcot_rl.training.provenance import reward_hashes

Stage = Callable[[StageRun, str], dict[str, Any]]
"""Runs the stage of a given name and returns the facts for its `done.json`."""

_KINDS: dict[str, Stage] = {"sft": sft_stage.run, "grpo": grpo_stage.run}
_FIXED: dict[str, Stage] = {
    "data": data_stage.run,
    "predict": predict_stage.run,
    "eval": eval_stage.run,
    "report": report_stage.run,
}


def run(
    recipe: Recipe, root: Path, stages: tuple[str, ...] | None = None, *, checked: bool = False
) -> RunFolder:
    """Run the recipe's stages in the folder `root`, which is created if it does not exist.

    Args:
        recipe: The recipe.
        root: The run's folder.
        stages: Stages to run. None: the recipe's.
        checked: True if the preflight has been run. Otherwise it runs first, before anything is
            written.

    Raises:
        InputError: The input or the configuration is invalid.
        StageFailed: A stage's process failed. After either error and after Ctrl-C, the same call
            resumes the run.
    """
    from cluster.preflight.plan import check_run

    chosen = recipe.in_order(stages or recipe.stages)
    require(recipe, stages or chosen)
    console = Console(chosen)
    if not checked:
        check_run(recipe, root, chosen, console.line)
    folder = RunFolder.claim(root, recipe)
    with folder.locked() as lock, writing(folder.root, frozenset(disk.KINDS)):
        todo = [stage for stage in chosen if not folder.is_done(stage)]
        for stage in chosen:
            if stage not in todo:
                minutes = folder.done(stage).get("minutes", 0)
                console.line(f"{stage}: done before ({minutes:.1f} min)")
                _warn_if_short(folder, stage, console)
        if not todo:
            send_rest(recipe, folder.root, console)
            return folder
        folder.pin("rewards", reward_hashes(recipe))
        status = console.status = StatusWriter(folder.root, chosen)
        host = Host(
            {"RCOT_RL_PLUGIN": "required", **data_stage.platform_of(recipe)},
            jobs.PRELOAD if recipe.device == "cpu" and _is_heavy(recipe, todo) else (),
            folder.root / "zygote.log",
            own_ray=recipe.cluster.ray_address == "local",
            held=(lock,),
        )
        followers = RunTracking(recipe, folder.root, host, console, status.track)
        with status, host, followers as tracking:
            state = StageRun(recipe, folder, host, console, tracking)
            for stage in todo:
                _run_stage(state, stage)
    return folder


def _is_heavy(recipe: Recipe, stages: list[str]) -> bool:
    """Return True if a stage starts processes that import torch, verl or vLLM."""
    if "data" in stages and data_stage.needs_model(recipe):
        return True
    return any(stage in recipe.train or stage == "predict" for stage in stages)


def _run_stage(run: StageRun, stage: str) -> None:
    """Run one stage with retries, and mark it done."""
    started = time.monotonic()
    run.host.memory.restart()
    run.console.stage(stage)
    if run.tracking is not None:
        run.tracking.poll()
    facts = _supervised(run, stage)
    minutes = (time.monotonic() - started) / 60
    peak = run.host.memory.peak_bytes() / 2**30
    run.folder.mark_done(stage, minutes=round(minutes, 2), peak_gib=round(peak, 2), **facts)
    run.console.line(f"{stage}: done in {minutes:.1f} min, peak memory {peak:.1f} GiB")


def work_of(recipe: Recipe, stage: str) -> Stage:
    """Return the function that runs a stage."""
    return _FIXED[stage] if stage in _FIXED else _KINDS[recipe.stage(stage).kind]


def _warn_if_short(folder: RunFolder, stage: str, console: Console) -> None:
    """Warn about SFT stages that earlier versions marked done without their last epoch."""
    planned = folder.done(stage).get("steps", 0)
    step = jobs.sealed_step(folder.stage(stage) / "checkpoints")
    if 0 < step < planned:
        console.line(
            f"{stage}: its newest checkpoint has step {step} of {planned}, so its model is not "
            f"fully trained: delete {folder.stage(stage) / 'done.json'} and those of the stages "
            "after it to train the rest"
        )


def _supervised(run: StageRun, stage: str) -> dict[str, Any]:
    """Run a stage, with retries as the recipe allows, and return its facts."""
    folder = run.folder.stage(stage)

    def newest_step() -> int:
        metrics = read_metrics(folder / "metrics.jsonl")
        return metrics[-1]["step"] if metrics else 0

    return run_with_retries(
        lambda: work_of(run.recipe, stage)(run, stage),
        FailureHistory(folder, run.recipe.supervise),
        run.console,
        newest_step=newest_step,
        reason=jobs.failure_reason,
    )
