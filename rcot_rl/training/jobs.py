"""Training stages as jobs: what process to run, with which configuration, to which end.

The chain runs a job and follows its metrics; this room knows how verl is told and what it leaves.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from data_pipelines.tokens import pixel_limits
from rcot_rl.errors import InputError
from rcot_rl.files import link_or_copy, replace_folder, write_text
from rcot_rl.recipe.schema import Recipe
from rcot_rl.stacks import FOLDER
from rcot_rl.training.checkpoint_store import all_of, inspect, settle
from rcot_rl.training.handoff_check import CARD, card_of
from rcot_rl.training.provenance import provenance, seal_made_of
from rcot_rl.training.verl_config import grpo_config, sft_config, training_environment

KEEP = "keep_checkpoints"
"""Key below `trainer.rcot` for the callback that prunes (`checkpoints.py`)."""

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
    "rcot_rl.training.trainer",
    "rcot_rl.training.reward",
    "rcot_rl.training.cpu.vllm_worker",
)
"""What a local run's processes import; see cluster.supervise.zygote."""


@dataclass(frozen=True)
class Job:
    """One process of a training stage."""

    arguments: list[str]
    environment: dict[str, str]
    verl_log: Path
    total_steps: int
    """The planned last step."""
    resumes_from: int
    """The step of the newest checkpoint; 0: from the start."""


def sft_job(recipe: Recipe, model: Path, shards: Path, out: Path, attempt: Path) -> Job:
    """CoT-SFT of `model` on `shards`; out: the stage's folder. Raises InputError."""
    check_pixels(recipe, model)
    train = split_files(shards, "train")
    config = sft_config(recipe, model=model, train=train, val=[], out=out)
    made_of = provenance(recipe, "sft", shards)
    _note_provenance(config, made_of)
    ranks = ranks_of(recipe, "sft")
    steps = _planned_steps(config, count_rows(train), ranks, "sft.batch_size", shards)
    path = _save(config, attempt)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return Job(
        [*launcher, "-m", "rcot_rl.training.sft_main", str(path)],
        training_environment(recipe, attempt),
        attempt / "verl.jsonl",
        steps,
        _resume_step(out / "checkpoints", made_of),
    )


def grpo_job(
    recipe: Recipe,
    stage: str,
    model: Path,
    shards: Path,
    out: Path,
    attempt: Path,
    py_executable: str | None = None,
) -> Job:
    """GRPO from `model` on `shards`. py_executable: what Ray starts workers with. InputError."""
    check_pixels(recipe, model)
    train, val = split_files(shards, "train"), split_files(shards, "val")
    config = grpo_config(recipe, stage, model=model, train=train, val=val, out=out)
    key = f"{stage.replace('-', '_')}.prompts_per_step"
    steps = _planned_steps(config, count_rows(train), 1, key, shards)
    if config.trainer.save_freq < 1:
        raise InputError(
            "must be at least 1: without a checkpoint of its last step a stage is never done",
            key="verl.trainer.save_freq",
        )
    made_of = provenance(recipe, stage, shards)
    _note_provenance(config, made_of)
    environment = training_environment(recipe, attempt)
    # a running Ray's workers do not inherit what the supervisor sets for its own child
    alone = recipe.cluster.ray_address == "local"
    stacks = {} if alone else {FOLDER: str((attempt / "stacks").resolve())}
    runtime = {"env_vars": environment | stacks}
    if py_executable is not None:
        runtime["py_executable"] = py_executable
    OmegaConf.update(config, "ray_kwargs.ray_init.runtime_env", runtime, force_add=True)
    path = _save(config, attempt)
    return Job(
        ["-m", "rcot_rl.training.grpo_main", str(path)],
        environment,
        attempt / "verl.jsonl",
        steps,
        _resume_step(out / "checkpoints", made_of),
    )


def _planned_steps(config: DictConfig, rows: int, ranks: int, batch_key: str, shards: Path) -> int:
    """The last step that verl will reach, as its own loops count. Raises InputError.

    Args:
        config: verl's resolved configuration, with the keys under `verl:`.
        rows: Training rows in the shards.
        ranks: Ranks that share a batch, each with the rows of its own sampler.
        batch_key: The recipe's key of the batch size.
        shards: The shard set, for the error.
    """
    most, batch = config.data.get("train_max_samples") or -1, config.data.train_batch_size
    rows = min(rows, most) if most > 0 else rows
    steps = rows // ranks // max(1, batch // ranks) * config.trainer.total_epochs
    if steps == 0:
        raise InputError(f"{rows} rows make no batch of {batch_key}={batch}", file=shards)
    wanted = config.trainer.total_training_steps
    if wanted is not None and wanted > steps:
        raise InputError(
            f"is {wanted}, but {rows} rows in batches of {batch} make {steps} steps in "
            f"{config.trainer.total_epochs} epochs; raise the epochs",
            key="verl.trainer.total_training_steps",
        )
    return steps if wanted is None else wanted


def _resume_step(checkpoints: Path, made_of: dict[str, Any]) -> int:
    """`settle`; also seals a whole checkpoint whose process ended just before it would have."""
    step = settle(checkpoints)
    newest = checkpoints / f"global_step_{step}"
    if step and not inspect(newest).sealed:
        seal_made_of(newest, made_of)
    return step


def sealed_step(checkpoints: Path) -> int:
    """Step of the newest whole checkpoint that is sealed; 0: none."""
    return max((c.step for c in all_of(checkpoints) if c.whole and c.sealed), default=0)


def start_job(recipe: Recipe, stage: str, previous: Path, out: Path) -> list[str]:
    """Arguments of the process that makes `previous` (a checkpoint) this stage's step 0."""
    section, optim = recipe.grpo(stage), "actor_rollout_ref.actor.optim"
    numbers = [
        str(section.verl_value(f"{optim}.lr", section.learning_rate)),
        str(section.verl_value(f"{optim}.weight_decay", section.weight_decay)),
        json.dumps(list(section.verl_value(f"{optim}.betas", _BETAS))),
    ]
    return ["-m", "rcot_rl.training.handoff", str(previous), str(out / "checkpoints"), *numbers]


_BETAS = (0.9, 0.999)
"""verl's default (verl/workers/config/optimizer.py)."""


def ranks_of(recipe: Recipe, stage: str) -> int:
    """Trainer ranks of a stage: CoT-SFT runs on one host of the cluster, GRPO on all of them."""
    cluster = recipe.cluster
    return cluster.gpus_per_node if stage == "sft" else cluster.nodes * cluster.gpus_per_node


def reshard_job(checkpoints: Path, ranks: int) -> list[str] | None:
    """Arguments of the process that cuts the newest checkpoint anew for `ranks`; None when it has
    that number, or there is none."""
    whole = [c for c in all_of(checkpoints) if c.whole]
    if not whole or whole[-1].world_size in (ranks, None):
        return None
    return ["-m", "rcot_rl.training.reshard", str(whole[-1].path), str(ranks)]


def is_started(checkpoints: Path) -> bool:
    """Whether verl would find a whole checkpoint to start from, step 0 included."""
    return any(c.whole for c in all_of(checkpoints))


def merge_job(base: Path, checkpoint: Path, out: Path) -> list[str]:
    """Arguments of the process that merges an SFT checkpoint's adapter into `base`."""
    return ["-m", "rcot_rl.training.merge", str(base), str(checkpoint), str(out)]


def newest_step(checkpoints: Path) -> int:
    """The step of the newest whole checkpoint, from which verl would resume; 0: none."""
    whole = [c.step for c in all_of(checkpoints) if c.whole]
    return whole[-1] if whole else 0


def newest_checkpoint(checkpoints: Path) -> Path:
    """The folder of the newest checkpoint. Raises InputError when there is none."""
    step = newest_step(checkpoints)
    if step == 0:
        raise InputError("holds no checkpoint yet: its stage comes first", file=checkpoints)
    return checkpoints / f"global_step_{step}"


def check_pixels(recipe: Recipe, model: Path) -> None:
    """The pixel contract: the model's processor takes the canvas as it is. Raises InputError."""
    side = recipe.canvas.image
    try:
        pixel_limits(model).vision_tokens(side, side)
    except ValueError as error:
        raise InputError(f"the canvas does not suit the model: {error}", file=model) from error


def token_limits(recipe: Recipe) -> dict[str, dict[str, int]]:
    """Shard set -> the most tokens that the stages which train on it take."""
    limits: dict[str, dict[str, int]] = {}
    if "sft" in recipe.stages:
        limits[recipe.sft.shard_set] = {"total_tokens": recipe.sft.max_length}
    for stage in recipe.grpo_stages:
        section = recipe.grpo(stage)
        of_set = limits.setdefault(section.shard_set, {})
        most = min(section.max_prompt_length, of_set.get("prompt_tokens", 1 << 30))
        of_set["prompt_tokens"] = most
    return limits


def publish_model(checkpoint: Path, model: Path, recipe: Recipe) -> None:
    """Make `model` the Hugging Face folder of a GRPO checkpoint, with its card. Its files are hard
    links where the file system has them. Raises InputError when the checkpoint has no such folder.
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
    """The Hugging Face folder that a finished training stage left; stage: its folder in a run.

    In runs of earlier versions, `model` is a link into the newest checkpoint. A copy of such a run
    may have a folder instead, or nothing: then the checkpoint's own folder is taken, if it has the
    card that a finished stage writes there. Raises InputError when there is none.
    """
    checkpoints = stage / "checkpoints"
    inside = _saved_model(checkpoints / f"global_step_{newest_step(checkpoints)}")
    if (stage / "model" / "config.json").is_file():
        return (stage / "model").resolve()
    if (inside / CARD).is_file():
        return inside.resolve()
    raise InputError("the stage has left no model yet", file=stage / "model")


def _saved_model(checkpoint: Path) -> Path:
    return checkpoint / "actor" / "huggingface"


def write_card(model: Path, recipe: Recipe) -> None:
    """`rcot.json` of a trained model: the prompts and canvases that it knows."""
    write_text(model / CARD, json.dumps(card_of(recipe), indent=1) + "\n")


def split_files(shards: Path, split: str) -> list[Path]:
    """The parquet files of one split, in order. Raises InputError for none."""
    if not (shards / "manifest.json").is_file():
        raise InputError("is no shard set (no manifest.json); run the data stage", file=shards)
    files = sorted(shards.glob(f"{split}-*.parquet"))
    if not files:
        raise InputError(f"has no {split} shard", file=shards)
    return files


def count_rows(files: list[Path]) -> int:
    """Rows of parquet files, from their footers. InputError for an unreadable or empty one."""
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


def _note_provenance(config: DictConfig, made_of: dict[str, Any]) -> None:
    # verl reads no such key; it hands its whole configuration to W&B, and ours to SaveCallback
    OmegaConf.update(config, "trainer.rcot.provenance", made_of, force_add=True)


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
    """The last error that a log names, wrappers aside: what a person would look for first."""
    text = log.read_text(encoding="utf-8", errors="replace")[-400_000:]
    rows = [_COLOUR.sub("", row).strip() for row in text.splitlines() if row.strip()]
    for row in reversed(rows):
        found = _ERROR.match(row[:400])
        if found and not found[1].endswith(_WRAPPERS):
            return row[found.start(1) : found.start(1) + 600]
    return " | ".join(rows[-3:])[-600:]


_COLOUR = re.compile("\x1b\\[[0-9;]{0,20}m")
