"""verl's configuration from a recipe, without importing torch or verl.

Hydra composes verl's `ppo_trainer` (GRPO) or `sft_trainer_engine` (SFT) from the installed wheel.
The recipe's values override it. Unknown keys are errors here, because verl ignores typos in YAML.

The GRPO values have three parts: `_grpo_method` (the experiment), `_grpo_host` (sizes and devices,
which may differ between a laptop and a cluster) and `_grpo_paths`.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from rcot_rl.errors import InputError
from rcot_rl.recipe.schema import DATA_SOURCES, Recipe
from rcot_rl.recipe.training_section import GrpoStage
from rcot_rl.suggestions import did_you_mean
from rcot_rl.system import machine
from rcot_rl.system.prometheus_targets import targets_file
from reward_fns.user.sources import absolute

FREE_KEYS = (
    "ray_kwargs.ray_init.",
    "actor_rollout_ref.rollout.engine_kwargs.vllm.",
    "actor_rollout_ref.rollout.enable_sleep_mode",
    "actor_rollout_ref.rollout.agent.agent_loop_manager_class",
    "actor_rollout_ref.model.override_config.",
    "actor_rollout_ref.actor.fsdp_config.mixed_precision",
    "actor_rollout_ref.ref.fsdp_config.mixed_precision",
    "reward.custom_reward_function.reward_kwargs.",
    "model.override_config.",
    "engine.mixed_precision",
    "trainer.rcot.",
    "data.rcot.",
)
"""Keys, or prefixes with a final dot, that verl reads but its configuration does not list."""

AGENT_LOOP = "rcot_rl.training.cached_agent_loop"

_LOGGERS = ("console", "file")
"""verl's loggers. Trackers follow the run folder in processes of their own."""

_FP32 = {"param_dtype": "fp32", "reduce_dtype": "fp32", "buffer_dtype": "fp32"}


def grpo_config(
    recipe: Recipe, stage: str, *, model: Path, train: list[Path], val: list[Path], out: Path
) -> DictConfig:
    """Return verl's complete configuration of a GRPO stage.

    Args:
        recipe: The recipe.
        stage: A GRPO stage of its `train`.
        model: Folder of the KL reference, from which verl also builds the policy.
        train: Parquet shards.
        val: Parquet shards of held-out rows.
        out: The stage's folder.

    Raises:
        InputError: A key under `verl:` is unknown to verl.
    """
    section = recipe.grpo(stage)
    values: dict[str, Any] = {}
    values.update(_grpo_method(recipe, stage))
    values.update(_grpo_host(recipe, section))
    values.update(_grpo_paths(recipe, stage, section, model, train, val, out))
    config = _compose("ppo_trainer", ["actor_rollout_ref.rollout.name=vllm"])
    _write(config, values, section)
    if section.old_log_probs == "reuse":
        _check_one_update(config)
    return config


def _grpo_method(recipe: Recipe, stage: str) -> dict[str, Any]:
    """Return the values of the experiment: Table 7 and section 4.2 of the paper."""
    section = recipe.grpo(stage)
    actor, rollout = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
    return {
        "algorithm.adv_estimator": "grpo",  # eq. 14
        "algorithm.norm_adv_by_std_in_grpo": section.advantage == "group",
        "algorithm.filter_groups.enable": section.dynamic_sampling,
        "algorithm.filter_groups.metric": "reward",
        "trainer.rcot.advantage": section.advantage,
        "trainer.rcot.max_lost_share": section.max_lost_share,
        "trainer.rcot.keep_checkpoints": section.keep_checkpoints,
        "algorithm.use_kl_in_reward": False,
        "trainer.v1.trainer_mode": "rcot_" + section.rollouts.replace("-", "_"),
        "data.train_batch_size": section.prompts_per_step,
        "data.max_prompt_length": section.max_prompt_length,
        "data.max_response_length": section.max_response_length,
        "data.image_key": "images",
        "data.truncation": "error",
        "data.seed": recipe.seed,  # with null, each resume would change the order
        f"{actor}.strategy": "fsdp2",
        f"{actor}.optim.lr": section.learning_rate,
        f"{actor}.optim.weight_decay": section.weight_decay,
        f"{actor}.optim.lr_scheduler_type": "constant",
        f"{actor}.ppo_mini_batch_size": section.prompts_per_step,  # one update a step: on-policy
        f"{actor}.clip_ratio": section.clip_ratio,
        f"{actor}.clip_ratio_low": section.clip_ratio,
        f"{actor}.clip_ratio_high": section.clip_ratio,
        f"{actor}.loss_agg_mode": section.loss_agg_mode,
        f"{actor}.use_kl_loss": True,  # eq. 15
        f"{actor}.kl_loss_coef": section.kl_loss_coef,
        f"{actor}.kl_loss_type": section.kl_loss_type,
        f"{rollout}.name": "vllm",
        f"{rollout}.n": section.n,
        f"{rollout}.temperature": section.temperature,
        f"{rollout}.top_k": section.top_k,
        f"{rollout}.top_p": section.top_p,
        f"{rollout}.seed": recipe.seed,
        f"{rollout}.calculate_log_probs": True,
        f"{rollout}.load_format": "auto",
        f"{rollout}.agent.agent_loop_manager_class": f"{AGENT_LOOP}.CachedAgentLoopManager",
        **_old_log_probs(section),
        **_agent(recipe, section),
        "reward.reward_manager.source": "importlib",
        "reward.reward_manager.name": "RCoTRewardManager",
        "reward.reward_manager.module.path": "pkg://rcot_rl.training.reward_manager",
        "reward.custom_reward_function.path": "pkg://rcot_rl.training.reward_function",
        "reward.custom_reward_function.name": "compute_score",
        # absolute, since Ray's workers may have another working directory
        "reward.custom_reward_function.reward_kwargs.reward": absolute(section.reward),
        **_rehearsed(recipe, stage),
        "reward.custom_reward_function.reward_kwargs.deadline_s": section.reward_deadline_s,
        "reward.custom_reward_function.reward_kwargs.canvas": recipe.canvas.image,
        "trainer.val_before_train": False,
        "trainer.test_freq": -1,  # held-out rewards are the predict stage's work
        "trainer.total_training_steps": section.steps,
        # verl ends at the first of steps and epochs; only the steps must count
        "trainer.total_epochs": 100_000,
        "trainer.resume_mode": "auto",
        **_lora(section),
    }


def _rehearsed(recipe: Recipe, stage: str) -> dict[str, Any]:
    """Return the reward of each data source that the stage rehearses. Raises InputError."""
    name = recipe.rehearsed_by(stage)
    if name is None:
        return {}
    for shard_set in recipe.shard_sets_of(stage):
        if not recipe.tasks_in(shard_set):
            raise InputError(
                f"needs {shard_set} in data.sets, for the tasks of its rows",
                key=f"train.{stage}.rehearse",
            )
    other = recipe.grpo(name)
    sources = [DATA_SOURCES[task] for task in recipe.tasks_in(other.shard_set)]
    rewards = dict.fromkeys(sources, absolute(other.reward))
    return {"reward.custom_reward_function.reward_kwargs.rehearsed": rewards}


_ON_POLICY = "rcot_on_policy"


def _check_one_update(config: DictConfig) -> None:
    """Raise InputError if keys under `verl:` leave `old_log_probs: reuse` inexact."""
    for key, reason in inexact_reuse(lambda key: OmegaConf.select(config, key)):
        raise InputError(reason, key=f"verl.{key}")


def inexact_reuse(value_of: Callable[[str], Any]) -> Iterator[tuple[str, str]]:
    """Yield each key of verl that makes `old_log_probs: reuse` inexact, with the reason.

    Args:
        value_of: Returns the value of a dotted key.
    """
    wanted = {
        "actor_rollout_ref.actor.ppo_epochs": 1,
        "actor_rollout_ref.actor.ppo_mini_batch_size": value_of("data.train_batch_size"),
        "actor_rollout_ref.actor.policy_loss.loss_mode": _ON_POLICY,
        "algorithm.rollout_correction.bypass_mode": True,
    }
    fix = "set old_log_probs: recompute"
    for key, needed in wanted.items():
        value = value_of(key)
        if value != needed:
            yield key, f"is {value}, and old_log_probs: reuse needs {needed}; {fix}"


def _old_log_probs(section: GrpoStage) -> dict[str, Any]:
    if section.old_log_probs == "recompute":
        return {}
    return {
        "algorithm.rollout_correction.bypass_mode": True,
        "actor_rollout_ref.actor.policy_loss.loss_mode": _ON_POLICY,
    }


def _agent(recipe: Recipe, section: GrpoStage) -> dict[str, Any]:
    key = "actor_rollout_ref.rollout.agent.default_agent_loop"
    if section.agent == "single-turn":
        return {key: "rcot_single_turn"}
    settings = {
        "rounds": recipe.predict.rounds,
        "fps": recipe.predict.fps,
        "prompts": absolute(recipe.prompts),
        "image_canvas": recipe.canvas.image,
        "video_canvas": recipe.canvas.video,
    }
    return {
        key: "rcot_agentic_aks",
        **{f"trainer.rcot.agentic.{name}": value for name, value in settings.items()},
    }


def _lora(section: GrpoStage) -> dict[str, Any]:
    if section.lora_rank is None:
        return {}
    model = "actor_rollout_ref.model"
    return {
        f"{model}.lora_rank": section.lora_rank,
        f"{model}.lora_alpha": section.lora_alpha,
        f"{model}.target_modules": "all-linear",
        f"{model}.exclude_modules": ".*visual.*",
        # the engine loads the base weights from the file; only adapters are sent to it
        "actor_rollout_ref.rollout.load_format": "safetensors",
    }


def _grpo_host(recipe: Recipe, section: GrpoStage) -> dict[str, Any]:
    """Return sizes and devices: the values that may differ between hosts."""
    cluster, rollout = recipe.cluster, "actor_rollout_ref.rollout"
    values: dict[str, Any] = {
        "trainer.device": recipe.device,
        "trainer.nnodes": cluster.nodes,
        "trainer.n_gpus_per_node": cluster.gpus_per_node,
        "transfer_queue.backend.SimpleStorage.num_data_storage_units": cluster.queue_storage_units,
        "reward.num_workers": cluster.reward_workers,
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu": section.micro_batch_size,
        f"{rollout}.log_prob_micro_batch_size_per_gpu": section.micro_batch_size,
        "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu": section.micro_batch_size,
        f"{rollout}.agent.num_workers": cluster.agent_workers,
        f"{rollout}.tensor_model_parallel_size": section.tensor_parallel_size,
        f"{rollout}.gpu_memory_utilization": section.gpu_memory_utilization,
        f"{rollout}.max_model_len": section.max_prompt_length + section.max_response_length,
        f"{rollout}.max_num_batched_tokens": section.max_num_batched_tokens,
        f"{rollout}.max_num_seqs": section.max_num_seqs,
        "trainer.save_freq": section.save_every,
        "actor_rollout_ref.actor.fsdp_config.optimizer_offload": section.offload != "none",
        "actor_rollout_ref.actor.fsdp_config.param_offload": section.offload == "all",
        "actor_rollout_ref.ref.fsdp_config.param_offload": section.offload == "all",
    }
    values.update(_attention(recipe, "actor_rollout_ref.model"))
    if section.final_outputs:
        values["trainer.rcot.final_outputs"] = True
    if section.packing:
        values["actor_rollout_ref.model.use_remove_padding"] = True
    if cluster.ray_address == "local" and cluster.object_store_bytes is not None:
        values["ray_kwargs.ray_init.object_store_memory"] = cluster.object_store_bytes
    if cluster.metrics_port is not None:
        values[f"{rollout}.disable_log_stats"] = False  # the engines' HTTP servers serve /metrics
        if cluster.ray_address == "local":
            values["ray_kwargs.ray_init._metrics_export_port"] = cluster.metrics_port
    if recipe.device == "cpu":
        values.update(_cpu_values(recipe))
        if section.rollout_threads is not None:
            options = f"{rollout}.engine_kwargs.vllm.additional_config"
            values[f"{options}.rcot_threads"] = section.rollout_threads
    return values


def _attention(recipe: Recipe, model: str) -> dict[str, Any]:
    """Return the trainer's attention implementation, and the module that verl imports for it.

    verl packs sequences only for flash attention. Without the kernels of flash-attn, its engine
    computes log-probabilities one by one; the engines of this package compute them in chunks.
    """
    flash = recipe.models.attention == "flash_attention_2"
    values: dict[str, Any] = {
        f"{model}.override_config.attn_implementation": recipe.models.attention,
        f"{model}.use_remove_padding": flash,
    }
    if recipe.device == "cpu" or not flash:
        engine = {"cpu": "cpu.engine_cpu", "cuda": "engine_cuda_sdpa"}[recipe.device]
        values[f"{model}.external_lib"] = f"rcot_rl.training.{engine}"
    else:
        values[f"{model}.external_lib"] = "rcot_rl.training.on_policy_loss"
    return values


def _cpu_values(recipe: Recipe) -> dict[str, Any]:
    """Return the settings of verl and vLLM without an accelerator, each for a measured reason."""
    rollout, model = "actor_rollout_ref.rollout", "actor_rollout_ref.model"
    vllm = f"{rollout}.engine_kwargs.vllm"
    values: dict[str, Any] = {
        f"{model}.enable_gradient_checkpointing": False,
        f"{rollout}.dtype": "float32",  # bf16 on a CPU is slow, and 4 digits worse in log-probs
        f"{rollout}.enforce_eager": True,
        f"{rollout}.free_cache_engine": False,  # vLLM's CPU platform has no sleep mode
        f"{rollout}.enable_sleep_mode": False,
        f"{rollout}.checkpoint_engine.update_weights_bucket_megabytes": 64,
        f"{vllm}.worker_extension_cls": "rcot_rl.training.cpu.vllm_worker.CpuWorkerExtension",
        f"{vllm}.distributed_executor_backend": "uni",  # saves a process
        f"{vllm}.skip_mm_profiling": True,  # profiling would encode 16 images of maximum size
        "data.dataloader_num_workers": 0,
        "trainer.rcot.poll_interval_s": 0.05,  # verl's 2 s are most of a tiny model's step
    }
    if recipe.cluster.ray_address == "local":
        # verl's pools request 3 CPUs per worker, and GPUs; both are logical resources of Ray. A
        # running Ray has its own and rejects these arguments.
        ray = "ray_kwargs.ray_init"
        values |= {
            f"{ray}.num_cpus": 32,
            f"{ray}.num_gpus": recipe.cluster.gpus_per_node,
            f"{ray}.include_dashboard": False,
        }
    for role in ("actor", "ref"):
        values[f"actor_rollout_ref.{role}.fsdp_config.use_torch_compile"] = False
        values[f"actor_rollout_ref.{role}.fsdp_config.mixed_precision"] = dict(_FP32)
    values["actor_rollout_ref.actor.use_torch_compile"] = False
    return values


def _grpo_paths(
    recipe: Recipe,
    stage: str,
    section: GrpoStage,
    model: Path,
    train: list[Path],
    val: list[Path],
    out: Path,
) -> dict[str, Any]:
    values: dict[str, Any] = {
        "actor_rollout_ref.model.path": str(model),
        "data.train_files": [str(p) for p in train],
        "data.val_files": [str(p) for p in val],
        "trainer.default_local_dir": str(out / "checkpoints"),
        "trainer.project_name": recipe.wandb.project,
        "trainer.experiment_name": f"{recipe.name}-{stage}",
        "trainer.logger": list(_LOGGERS),
        "trainer.checkpoint_callback_class": "rcot_rl.training.checkpoint_callback.SaveCallback",
        # verl would save an adapter's base under names that no library loads; see merge_adapter.py
        "actor_rollout_ref.actor.checkpoint.save_contents": ["model", "optimizer", "extra"]
        + (["hf_model"] if section.lora_rank is None else []),
        "actor_rollout_ref.actor.checkpoint.load_contents": ["model", "optimizer", "extra"],
    }
    if section.dump_rollouts:
        values["trainer.rollout_data_dir"] = str(out / "rollouts")
    if recipe.cluster.metrics_port is not None:
        values["trainer.rcot.prometheus"] = str(targets_file(out.parent, stage))
    # without an address, ray.init would join the cluster in RAY_ADDRESS
    values["ray_kwargs.ray_init.address"] = recipe.cluster.ray_address
    return values


def sft_config(
    recipe: Recipe, stage: str, *, model: Path, train: list[Path], val: list[Path], out: Path
) -> DictConfig:
    """Return verl's complete configuration of an SFT stage, which starts from `model`.

    Other arguments and errors are those of `grpo_config`.
    """
    values = sft_values(recipe, stage, model, train, val, out)
    return _write(sft_reference(), values, recipe.sft(stage))


def sft_reference() -> DictConfig:
    """Return verl's SFT configuration without overrides."""
    return _compose("sft_trainer_engine", [])


def sft_values(
    recipe: Recipe, stage: str, model: Path, train: list[Path], val: list[Path], out: Path
) -> dict[str, Any]:
    """Return the dotted keys of verl that the recipe sets. Arguments are those of `sft_config`."""
    sft = recipe.sft(stage)
    values: dict[str, Any] = {
        "data.train_files": [str(p) for p in train],
        "data.val_files": [str(p) for p in val] or None,
        "data.train_batch_size": sft.batch_size,
        "data.micro_batch_size_per_gpu": sft.micro_batch_size,
        "data.use_dynamic_bsz": False,
        "data.max_length": sft.max_length,
        "data.max_token_len_per_gpu": sft.max_length * sft.micro_batch_size,
        "data.truncation": "error",
        "model.path": str(model),
        "model.lora_rank": sft.lora_rank,
        "model.lora_alpha": sft.lora_alpha,
        "model.target_modules": "all-linear",
        "model.exclude_modules": ".*visual.*",  # the vision tower stays frozen
        "engine.strategy": "fsdp2",
        "optim.lr": sft.learning_rate,
        "optim.weight_decay": sft.weight_decay,
        "optim.lr_scheduler_type": sft.scheduler,
        "optim.lr_warmup_steps_ratio": sft.warmup_ratio,
        "checkpoint.save_contents": ["model", "optimizer", "extra"],
        "trainer.device": recipe.device,
        "trainer.nnodes": 1,
        "trainer.n_gpus_per_node": recipe.cluster.gpus_per_node,
        "trainer.total_epochs": sft.epochs,
        "trainer.save_freq": sft.save_every,
        "trainer.test_freq": -1,
        "trainer.max_ckpt_to_keep": 2,
        "trainer.seed": recipe.seed,
        "trainer.default_local_dir": str(out / "checkpoints"),
        "trainer.project_name": recipe.wandb.project,
        "trainer.experiment_name": f"{recipe.name}-{stage}",
        "trainer.logger": list(_LOGGERS),
        **_attention(recipe, "model"),
    }
    if sft.tasks is not None:
        values |= {
            "data.custom_cls.path": "pkg://rcot_rl.training.sft_task_rows",
            "data.custom_cls.name": "TaskRows",
            "data.rcot.tasks": list(sft.tasks),
        }
    if recipe.device == "cpu":
        values |= {
            "data.num_workers": 1,  # prepares samples on the second core
            "model.enable_gradient_checkpointing": False,
            "engine.use_torch_compile": False,
            "engine.mixed_precision": dict(_FP32),
        }
    return values


def training_environment(recipe: Recipe, attempt: Path) -> dict[str, str]:
    """Return the environment of a training process and, through runtime_env, of its Ray workers."""
    variables = {
        "RCOT_RL_PLUGIN": "required",
        "RCOT_RUN": hashlib.sha256(str(attempt.resolve()).encode()).hexdigest()[:10],
        "VERL_FILE_LOGGER_PATH": str(attempt / "verl.jsonl"),
        "HYDRA_FULL_ERROR": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "RCOT_SEGMENTER": recipe.models.segmenter,  # for rewards that compute masks
        "RCOT_SEGMENTER_DEVICE": recipe.device,
        "RCOT_SEGMENTER_SETTINGS": recipe.segmenter.model_dump_json(),
    }
    if recipe.device == "cpu":
        variables |= {
            "VERL_PLATFORM": "cpu",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "RAY_enable_worker_prestart": "0",
            # Ray limits an actor to one thread; these take turns, so each uses its full share
            "OMP_NUM_THREADS": str(max(1, machine.cpus() // recipe.cluster.gpus_per_node)),
            "RAY_worker_niceness": "0",  # Ray lowers the priority of its workers
        }
    return variables


def _compose(name: str, overrides: list[str]) -> DictConfig:
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    package = importlib.util.find_spec("verl")  # does not import verl
    if package is None or not package.submodule_search_locations:
        raise InputError("verl is not installed; run `make setup`, or `make setup-gpu`")
    folder = Path(package.submodule_search_locations[0]) / "trainer" / "config"
    GlobalHydra.instance().clear()
    with initialize_config_dir(config_dir=str(folder), version_base=None):
        return compose(config_name=name, overrides=overrides)


def _write(config: DictConfig, values: Mapping[str, Any], section: Any) -> DictConfig:
    with open_dict(config):
        for key, value in values.items():
            _set(config, key, value, "")
        for key, value in spelled_out(section.verl, lambda key: _is_section(config, key)).items():
            _set(config, key, value, "verl.")
    return config


def spelled_out(values: Mapping[str, Any], is_section: Callable[[str], bool]) -> dict[str, Any]:
    """Return `a: {b: c}` as `a.b: c` if `a` is a section of verl, whose other keys must stay.

    Args:
        values: Keys of verl, dotted or nested.
        is_section: Returns True if a dotted key is a section that is not empty.
    """
    out: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and is_section(key):
            below = {f"{key}.{name}": child for name, child in value.items()}
            out |= spelled_out(below, is_section)
        else:
            out[key] = value
    return out


def _is_section(config: DictConfig, key: str) -> bool:
    if key in FREE_KEYS or not _known(config, key):
        return False
    node = OmegaConf.select(config, key, throw_on_missing=False)
    return isinstance(node, DictConfig) and len(node) > 0


def _set(config: DictConfig, key: str, value: Any, prefix: str) -> None:
    free = any(key == f or (f.endswith(".") and key.startswith(f)) for f in FREE_KEYS)
    if not free and not _known(config, key):
        raise InputError(
            f"verl has no such key{did_you_mean(key, _all_keys(config))}", key=prefix + key
        )
    OmegaConf.update(config, key, value, force_add=True, merge=False)


def _known(config: DictConfig, key: str) -> bool:
    node: Any = config
    for part in key.split("."):
        if not isinstance(node, DictConfig) or part not in node:
            return False
        node = node._get_node(part)
        node = node if isinstance(node, DictConfig) else None
    return True


def _all_keys(config: DictConfig) -> list[str]:
    def walk(node: Any, prefix: str) -> list[str]:
        if not isinstance(node, dict):
            return [prefix]
        return [k for name, child in node.items() for k in walk(child, f"{prefix}.{name}")]

    tree = OmegaConf.to_container(config, resolve=False)
    return [key.lstrip(".") for key in walk(tree, "")]
