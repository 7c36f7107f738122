"""A GRPO stage: train a policy with a fixed KL reference (eq. 15).

`run` is the parent's side. The child is `python -m rcot_rl.stages.grpo_stage CONFIG.yaml`, the
driver of Ray's workers: rollout engines and trainers.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from rcot_rl.stages.stage_run import StageRun
from rcot_rl.stages.training_run import fit_ranks, train
from rcot_rl.training import jobs


def run(run: StageRun, stage: str) -> dict[str, Any]:
    """Train the stage or resume it, and return the facts for its `done.json`.

    verl builds policy and reference from the reference's folder. If the policy starts from another
    stage, the newest checkpoint of that stage becomes step 0 of this stage.
    """
    recipe, folder = run.recipe, run.folder.stage(stage)
    settings, checkpoints = recipe.grpo(stage), folder / "checkpoints"
    attempt = run.folder.new_attempt(stage)
    start, reference = recipe.start_of(stage), recipe.reference_of(stage)
    if start != reference and not jobs.is_started(checkpoints):
        previous = jobs.newest_checkpoint(run.folder.stage(start) / "checkpoints")
        first = jobs.start_job(recipe, stage, previous, folder)
        run.run_child(stage, first, attempt / "start.log")
    fit_ranks(run, stage, attempt)
    own_ray = recipe.cluster.ray_address == "local"
    model = run.model_of(reference)
    own, *others = [run.shards(name) for name in recipe.shard_sets_of(stage)]
    job = jobs.grpo_job(
        recipe,
        stage,
        model,
        own,
        folder,
        attempt,
        # the zygote serves only this host; a running Ray may have others
        py_executable=run.host.environment.get("RCOT_ZYGOTE_PYTHON") if own_ray else None,
        rehearsed=others[0] if others else None,
    )
    arguments = ["-m", "rcot_rl.stages.grpo_stage", str(job.config)]
    newest = train(run, stage, job, arguments, attempt)
    if settings.lora_rank is None:
        jobs.publish_model(newest, folder / "model", recipe)
    else:
        run.console.line(f"{stage}: merging the adapter")
        merge = jobs.merge_job(model, newest / "actor", folder / "model")
        run.run_child(stage, merge, attempt / "merge.log")
        jobs.write_card(folder / "model", recipe)
    return {"steps": job.total_steps, "reward": settings.reward}


def drive(config: Path) -> None:
    """Be the driver of verl's GRPO: train to the last step, from the newest checkpoint.

    This is verl's own entry point (verl/trainer/main_ppo.py) with our task runner.

    Args:
        config: verl's resolved configuration.
    """
    import ray
    from omegaconf import OmegaConf
    from verl.trainer import main_ppo
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import validate_config

    from rcot_rl.training.task_runner import TaskRunner

    settings: Any = OmegaConf.load(config)
    validate_config(
        config=settings,
        use_reference_policy=need_reference_policy(settings),
        use_critic=need_critic(settings),
    )
    try:
        main_ppo.run_ppo(settings, task_runner_class=TaskRunner)
    finally:
        ray.shutdown()


if __name__ == "__main__":
    drive(Path(sys.argv[1]))
