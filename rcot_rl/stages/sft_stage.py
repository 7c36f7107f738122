"""An SFT stage: train an adapter on the model that it starts from, then merge it.

`run` is the parent's side. The child, one process for each rank, is
`torchrun … -m rcot_rl.stages.sft_stage CONFIG.yaml`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from rcot_rl.stages.stage_run import StageRun
from rcot_rl.stages.training_run import fit_ranks, train
from rcot_rl.training import jobs


def run(run: StageRun, stage: str) -> dict[str, Any]:
    """Train the stage or resume it, and return the facts for its `done.json`."""
    recipe, folder = run.recipe, run.folder.stage(stage)
    start = run.model_of(recipe.start_of(stage))
    attempt = run.folder.new_attempt(stage)
    fit_ranks(run, stage, attempt)
    shards = run.shards(recipe.sft(stage).shard_set)
    job = jobs.sft_job(recipe, stage, start, shards, folder, attempt)
    ranks = jobs.ranks_of(recipe, stage)
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    arguments = [*torchrun, "-m", "rcot_rl.stages.sft_stage", str(job.config)]
    checkpoint = train(run, stage, job, arguments, attempt)
    run.console.line(f"{stage}: merging the adapter")
    merge = jobs.merge_job(start, checkpoint, folder / "model")
    run.run_child(stage, merge, attempt / "merge.log")
    jobs.write_card(folder / "model", recipe)
    return {"steps": job.total_steps}


def train_rank(config: Path) -> None:
    """Be one rank of the trainer: train to the last step, from the newest checkpoint.

    Args:
        config: verl's resolved SFT configuration.
    """
    from omegaconf import OmegaConf
    from verl.utils import distributed

    from rcot_rl.training.sft_trainer import RCoTSFTTrainer

    distributed.initialize_global_process_group()
    RCoTSFTTrainer(config=OmegaConf.load(config)).fit()
    distributed.destroy_global_process_group()


if __name__ == "__main__":
    train_rank(Path(sys.argv[1]))
