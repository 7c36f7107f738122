"""Jobs of training stages: processes, their configuration, their last step and their results.

The stages run a job and follow its metrics; this module knows verl's inputs and outputs.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from data_pipelines.tokens import pixel_limits
from rcot_rl.errors import InputError
from rcot_rl.recipe.schema import Recipe
from rcot_rl.recipe.training_section import SftStage
from rcot_rl.system.files import link_or_copy, replace_folder, write_text
from rcot_rl.system.stacks import FOLDER
from rcot_rl.training.checkpoint_store import all_of, inspect, settle
from rcot_rl.training.model_compatibility import CARD, card_of
from rcot_rl.training.provenance import provenance, seal_with_provenance
from rcot_rl.training.verl_config import grpo_config, sft_config, training_environment

KEEP = "keep_checkpoints"
"""Key below `trainer.rcot` for the callback that prunes (`checkpoint_callback.py`)."""

PRELOAD = (
    "ray",
    "torch",
    "datasets",
    "peft",
    "scipy.optimize",
    "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl",
    "transformers.models.qwen2_5_vl.processing_qwen2_5_vl",
    "verl.trainer.main_ppo",
    "verl.trainer.sft_trainer",
    "verl.trainer.ppo.v1",
    "verl.workers.engine_workers",
    "verl.experimental.reward_loop",
    "verl.workers.rollout.vllm_rollout.vllm_async_server",
    "verl.workers.rollout.vllm_rollout.utils",
    "vllm.v1.engine.async_llm",
    "vllm.v1.engine.core",
    "vllm.v1.worker.cpu_worker",
    "vllm.entrypoints.openai.api_server",
    "vllm.model_executor.models.qwen2_5_vl",
    "rcot_rl.training.cpu.engine_cpu",
    "rcot_rl.training.grpo_trainer",
    "rcot_rl.training.reward_function",
    "rcot_rl.training.cpu.vllm_worker",
)
"""Modules that the zygote of a local run imports; see `cluster.supervise.zygote`."""


@dataclass(frozen=True)
class Job:
    """The training process of a stage."""

    config: Path
    """verl's resolved configuration."""
    environment: dict[str, str]
    verl_log: Path
    total_steps: int
    """The planned last step."""
    resumes_from: int
    """The step of the newest checkpoint. 0: there is no checkpoint."""
    on_all_hosts: bool
    """False: only on the driver's host."""


def sft_job(recipe: Recipe, stage: str, model: Path, shards: Path, out: Path, attempt: Path) -> Job:
    """Return the job that trains `model` on `shards` with SFT.

    Args:
        recipe: The recipe.
        stage: An SFT stage of its `train`.
        model: Folder of the model that the stage starts from.
        shards: Folder of the shard set.
        out: The stage's folder.
        attempt: Folder of the attempt, for configuration and logs.

    Raises:
        InputError: The configuration, the model or the shards are invalid.
    """
    check_pixels(recipe, model)
    train = split_files(shards, "train")
    config = sft_config(recipe, stage, model=model, train=train, val=[], out=out)
    facts = provenance(recipe, stage, shards)
    _note_provenance(config, facts)
    ranks, tasks = ranks_of(recipe, stage), recipe.sft(stage).tasks
    if tasks is not None and (config.data.get("train_max_samples") or -1) > 0:
        # verl would draw the samples before the rows of other tasks are left out
        raise InputError("cannot be combined with train_max_samples", key=f"train.{stage}.tasks")
    rows = count_rows(train) if tasks is None else _count_rows_of(train, tasks)
    steps = _planned_steps(config, rows, ranks, f"train.{stage}.batch_size", shards)
    path = _save(config, attempt)
    return Job(
        path,
        training_environment(recipe, attempt),
        attempt / "verl.jsonl",
        steps,
        _resume_step(out / "checkpoints", facts),
        on_all_hosts=False,
    )


def grpo_job(
    recipe: Recipe,
    stage: str,
    model: Path,
    shards: Path,
    out: Path,
    attempt: Path,
    py_executable: str | None = None,
    rehearsed: Path | None = None,
) -> Job:
    """Return the job that trains a policy on `shards` with GRPO.

    Args:
        recipe: The recipe.
        stage: A GRPO stage of its `train`.
        model: Folder of the KL reference, from which verl also builds the policy.
        shards: Folder of the shard set.
        out: The stage's folder.
        attempt: Folder of the attempt, for configuration and logs.
        py_executable: Executable with which Ray starts workers. None: Ray's default.
        rehearsed: Folder of the shard set of the stage that this one rehearses.

    Raises:
        InputError: The configuration, the model or the shards are invalid.
    """
    check_pixels(recipe, model)
    train, val = split_files(shards, "train"), split_files(shards, "val")
    if rehearsed is not None:
        train += split_files(rehearsed, "train")
    config = grpo_config(recipe, stage, model=model, train=train, val=val, out=out)
    key = f"train.{stage}.prompts_per_step"
    steps = _planned_steps(config, count_rows(train), 1, key, shards)
    if config.trainer.save_freq < 1:
        raise InputError(
            "must be at least 1: a stage is only done with a checkpoint of its last step",
            key="verl.trainer.save_freq",
        )
    facts = provenance(recipe, stage, shards, rehearsed)
    _note_provenance(config, facts)
    environment = training_environment(recipe, attempt)
    # a running Ray's workers do not inherit what the supervisor sets for its own child
    alone = recipe.cluster.ray_address == "local"
    stacks = {} if alone else {FOLDER: str((attempt / "stacks").resolve())}
    runtime: dict[str, Any] = {"env_vars": environment | stacks}
    if py_executable is not None:
        runtime["py_executable"] = py_executable
    OmegaConf.update(config, "ray_kwargs.ray_init.runtime_env", runtime, force_add=True)
    path = _save(config, attempt)
    return Job(
        path,
        environment,
        attempt / "verl.jsonl",
        steps,
        _resume_step(out / "checkpoints", facts),
        on_all_hosts=True,
    )


def _planned_steps(config: DictConfig, rows: int, ranks: int, batch_key: str, shards: Path) -> int:
    """Return the last step that verl will reach, counted as in its training loops.

    Args:
        config: verl's resolved configuration, with the keys under `verl:`.
        rows: Training rows in the shards.
        ranks: Ranks that share a batch, each with the rows of its own sampler.
        batch_key: The recipe's key of the batch size.
        shards: The shard set, for the error.

    Raises:
        InputError: The rows do not fill a batch, or are too few for the requested steps.
    """
    most, batch = config.data.get("train_max_samples") or -1, config.data.train_batch_size
    rows = min(rows, most) if most > 0 else rows
    steps = rows // ranks // max(1, batch // ranks) * config.trainer.total_epochs
    if steps == 0:
        raise InputError(f"{rows} rows do not fill a batch of {batch_key}={batch}", file=shards)
    wanted = config.trainer.total_training_steps
    if wanted is not None and wanted > steps:
        raise InputError(
            f"is {wanted}, but {rows} rows in batches of {batch} make {steps} steps in "
            f"{config.trainer.total_epochs} epochs; raise the epochs",
            key="verl.trainer.total_training_steps",
        )
    return steps if wanted is None else wanted


def _resume_step(checkpoints: Path, facts: dict[str, Any]) -> int:
    """Return the step to resume from, and seal its checkpoint if its process ended before that."""
    step = settle(checkpoints)
    newest = checkpoints / f"global_step_{step}"
    if step and not inspect(newest).sealed:
        seal_with_provenance(newest, facts)
    return step


def sealed_step(checkpoints: Path) -> int:
    """Return the step of the newest complete and sealed checkpoint; 0 if there is none."""
    return max((c.step for c in all_of(checkpoints) if c.whole and c.sealed), default=0)


def start_job(recipe: Recipe, stage: str, previous: Path, out: Path) -> list[str]:
    """Return arguments of the process that turns a checkpoint into step 0 of this stage."""
    section, optim = recipe.grpo(stage), "actor_rollout_ref.actor.optim"
    numbers = [
        str(section.verl_value(f"{optim}.lr", section.learning_rate)),
        str(section.verl_value(f"{optim}.weight_decay", section.weight_decay)),
        json.dumps(list(section.verl_value(f"{optim}.betas", _BETAS))),
    ]
    return ["-m", "rcot_rl.training.stage_start", str(previous), str(out / "checkpoints"), *numbers]


_BETAS = (0.9, 0.999)
"""verl's default (verl/workers/config/optimizer.py)."""


def ranks_of(recipe: Recipe, stage: str) -> int:
    """Return the number of trainer ranks of a stage: SFT runs on one node, GRPO on all nodes."""
    cluster = recipe.cluster
    return cluster.gpus_per_node * (cluster.nodes if stage in recipe.grpo_stages else 1)


def reshard_job(checkpoints: Path, ranks: int) -> list[str] | None:
    """Return arguments of the process that reshards the newest checkpoint to `ranks` ranks.

    None if there is no checkpoint, or if it has that number of ranks.
    """
    whole = [c for c in all_of(checkpoints) if c.whole]
    if not whole or whole[-1].world_size in (ranks, None):
        return None
    return ["-m", "rcot_rl.training.reshard_checkpoint", str(whole[-1].path), str(ranks)]


def is_started(checkpoints: Path) -> bool:
    """Return True if there is a complete checkpoint to resume from, step 0 included."""
    return any(c.whole for c in all_of(checkpoints))


def merge_job(base: Path, checkpoint: Path, out: Path) -> list[str]:
    """Return arguments of the process that merges a checkpoint's adapter into `base`."""
    return ["-m", "rcot_rl.training.merge_adapter", str(base), str(checkpoint), str(out)]


def newest_step(checkpoints: Path) -> int:
    """Return the step of the newest complete checkpoint; 0 if there is none."""
    whole = [c.step for c in all_of(checkpoints) if c.whole]
    return whole[-1] if whole else 0


def newest_checkpoint(checkpoints: Path) -> Path:
    """Return the folder of the newest complete checkpoint. Raises InputError if there is none."""
    step = newest_step(checkpoints)
    if step == 0:
        raise InputError("has no checkpoint yet; run its stage first", file=checkpoints)
    return checkpoints / f"global_step_{step}"


def check_pixels(recipe: Recipe, model: Path) -> None:
    """Raise InputError if the model's processor would resize images of the canvas."""
    side = recipe.canvas.image
    try:
        pixel_limits(model).vision_tokens(side, side)
    except ValueError as error:
        raise InputError(f"the canvas does not suit the model: {error}", file=model) from error


def token_limits(recipe: Recipe) -> dict[str, dict[str, int]]:
    """Return, for each shard set, the token limits of the stages that train on it."""
    limits: dict[str, dict[str, int]] = {}
    for stage in recipe.in_order(recipe.stages):
        settings = recipe.train.get(stage)
        if settings is None:
            continue
        if isinstance(settings, SftStage):
            key, limit = "total_tokens", settings.max_length
        else:
            key, limit = "prompt_tokens", settings.max_prompt_length
        for name in recipe.shard_sets_of(stage):
            of_set = limits.setdefault(name, {})
            of_set[key] = min(limit, of_set.get(key, limit))
    return limits


def publish_model(checkpoint: Path, model: Path, recipe: Recipe) -> None:
    """Publish the Hugging Face folder of a GRPO checkpoint as `model`, with its card.

    Files are hard links if the file system supports them.

    Raises:
        InputError: The checkpoint has no Hugging Face folder.
    """
    source = _saved_model(checkpoint)
    if not (source / "config.json").is_file():
        raise InputError("the checkpoint has no Hugging Face folder", file=checkpoint)
    write_card(source, recipe)  # `rcot checkpoints export` copies it too
    partial = model.with_name(f".{model.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial, copy_function=link_or_copy)
    replace_folder(partial, model)


def stage_model(stage: Path) -> Path:
    """Return the Hugging Face folder of a finished training stage.

    In runs of earlier versions, `model` is a link into the newest checkpoint. A copy of such a run
    may lack it: then the checkpoint's folder is used, if it has the card of a finished stage.

    Args:
        stage: The stage's folder in the run.

    Raises:
        InputError: The stage has no model.
    """
    checkpoints = stage / "checkpoints"
    inside = _saved_model(checkpoints / f"global_step_{newest_step(checkpoints)}")
    if (stage / "model" / "config.json").is_file():
        return (stage / "model").resolve()
    if (inside / CARD).is_file():
        return inside.resolve()
    raise InputError("the stage has no model yet; run it first", file=stage / "model")


def _saved_model(checkpoint: Path) -> Path:
    return checkpoint / "actor" / "huggingface"


def write_card(model: Path, recipe: Recipe) -> None:
    """Write `rcot.json` of a trained model: the prompts and canvases that it was trained with."""
    write_text(model / CARD, json.dumps(card_of(recipe), indent=1) + "\n")


def split_files(shards: Path, split: str) -> list[Path]:
    """Return the Parquet files of a split, in order. Raises InputError if there are none."""
    if not (shards / "manifest.json").is_file():
        raise InputError("is not a shard set (no manifest.json); run the data stage", file=shards)
    files = sorted(shards.glob(f"{split}-*.parquet"))
    if not files:
        raise InputError(f"has no {split} shard", file=shards)
    return files


def count_rows(files: list[Path]) -> int:
    """Return the number of rows of Parquet files, from their footers.

    Raises:
        InputError: A file is unreadable or empty.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    total = 0
    for file in files:
        try:
            rows = pq.ParquetFile(file).metadata.num_rows
        except (OSError, pa.ArrowException) as error:
            raise InputError("is not a readable parquet file", file=file) from error
        if rows == 0:
            raise InputError("the shard is empty", file=file)
        total += rows
    return total


def _count_rows_of(files: list[Path], tasks: Sequence[str]) -> int:
    """Return the number of rows of some tasks in Parquet files. Raises InputError."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    count = 0
    for file in files:
        try:
            infos = pq.ParquetFile(file).read(columns=["extra_info.task"])["extra_info"]
            count += sum(info["task"] in tasks for info in infos.to_pylist())
        except (OSError, pa.ArrowException, KeyError, TypeError) as error:
            raise InputError("is not a readable file of rows", file=file) from error
    return count


def _note_provenance(config: DictConfig, facts: dict[str, Any]) -> None:
    # verl ignores this key, but passes its configuration to W&B and to SaveCallback
    OmegaConf.update(config, "trainer.rcot.provenance", facts, force_add=True)


def _save(config: DictConfig, attempt: Path) -> Path:
    attempt.mkdir(parents=True, exist_ok=True)
    path = attempt / "verl.yaml"
    OmegaConf.save(config, path)
    return path


_ERROR = re.compile(
    r"^(?:\[[^\]]{1,40}\]:? *|\([^)]{1,60}\) *)*([\w.]{0,120}(?:Error|Exception))\b[:(]"
)
_WRAPPERS = ("ChildFailedError", "RayTaskError", "ActorDiedError")


def failure_reason(log: Path) -> str:
    """Return the last error in a log that is not a wrapper, or else its last lines."""
    text = log.read_text(encoding="utf-8", errors="replace")[-400_000:]
    rows = [_COLOUR.sub("", row).strip() for row in text.splitlines() if row.strip()]
    for row in reversed(rows):
        error = _ERROR.match(row[:400])
        if error and not error[1].endswith(_WRAPPERS):
            return row[error.start(1) : error.start(1) + 600]
    return " | ".join(rows[-3:])[-600:]


_COLOUR = re.compile("\x1b\\[[0-9;]{0,20}m")
