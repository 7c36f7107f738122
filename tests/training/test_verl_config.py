"""verl's configuration: one experiment on a laptop and on a cluster, no key that verl ignores."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from rcot_rl.errors import InputError
from rcot_rl.recipe.loader import load_recipe
from rcot_rl.recipe.schema import Recipe
from rcot_rl.training.verl_config import grpo_config, sft_config, training_environment

STAGES = ("grpo-aks", "grpo-ktg")
MODEL, OUT = Path("/model"), Path("/out")
TRAIN, VAL = [Path("/t0.parquet"), Path("/t1.parquet")], [Path("/v.parquet")]

ACTOR, REF = "actor_rollout_ref.actor", "actor_rollout_ref.ref"
ROLLOUT, POLICY = "actor_rollout_ref.rollout", "actor_rollout_ref.model"
VLLM = f"{ROLLOUT}.engine_kwargs.vllm"
TEACHER = "distillation.teacher_models.teacher_model.inference"

SIZES = {
    # the canvas, and the tokens of prompts and responses on it
    "reward.custom_reward_function.reward_kwargs.canvas",
    "data.max_prompt_length",
    "data.max_response_length",
    f"{ROLLOUT}.prompt_length",
    f"{ROLLOUT}.response_length",
    f"{ROLLOUT}.max_model_len",
    f"{TEACHER}.prompt_length",  # verl interpolates it; there is no teacher
    f"{TEACHER}.response_length",
    # how much at a time; results do not depend on it
    f"{ACTOR}.ppo_micro_batch_size_per_gpu",
    f"{REF}.log_prob_micro_batch_size_per_gpu",
    f"{ROLLOUT}.log_prob_micro_batch_size_per_gpu",
    f"{ROLLOUT}.max_num_batched_tokens",
    f"{ROLLOUT}.max_num_seqs",
    f"{ROLLOUT}.gpu_memory_utilization",
    f"{ROLLOUT}.checkpoint_engine.update_weights_bucket_megabytes",
    # how the same outputs are computed
    f"{POLICY}.use_remove_padding",
    f"{ACTOR}.use_remove_padding",
    "trainer.rcot.final_outputs",
    # processes
    f"{ROLLOUT}.agent.num_workers",
    "reward.num_workers",
    "data.dataloader_num_workers",
    "transfer_queue.backend.SimpleStorage.num_data_storage_units",
    "ray_kwargs.ray_init.object_store_memory",
}
DEVICES = {
    "trainer.device",
    "trainer.n_gpus_per_node",
    f"{ROLLOUT}.n_gpus_per_node",
    "ray_kwargs.ray_init.num_cpus",
    "ray_kwargs.ray_init.num_gpus",
    "ray_kwargs.ray_init.include_dashboard",
    # no compiler, no bf16 on a CPU
    f"{POLICY}.external_lib",
    f"{POLICY}.enable_gradient_checkpointing",
    f"{ACTOR}.use_torch_compile",
    f"{REF}.use_torch_compile",
    *(
        f"{role}.fsdp_config.{key}"
        for role in (ACTOR, REF)
        for key in (
            "use_torch_compile",
            "mixed_precision.param_dtype",
            "mixed_precision.reduce_dtype",
            "mixed_precision.buffer_dtype",
        )
    ),
    # vLLM without a GPU
    f"{ROLLOUT}.dtype",
    f"{TEACHER}.dtype",
    f"{ROLLOUT}.enforce_eager",
    f"{ROLLOUT}.free_cache_engine",
    f"{ROLLOUT}.enable_sleep_mode",
    f"{VLLM}.worker_extension_cls",
    f"{VLLM}.distributed_executor_backend",
    f"{VLLM}.skip_mm_profiling",
    f"{VLLM}.additional_config.rcot_threads",
    # waits of verl that are long next to a tiny model's step
    "trainer.rcot.poll_interval_s",
}
LEARNING_RATE_AND_STEPS = {
    f"{ACTOR}.optim.lr",
    "trainer.total_training_steps",
    "trainer.save_freq",
}
PATHS_AND_NAMES = {
    "trainer.experiment_name",
    f"{ROLLOUT}.trace.experiment_name",
}
MAY_DIFFER = SIZES | DEVICES | LEARNING_RATE_AND_STEPS | PATHS_AND_NAMES


def flat(config: DictConfig) -> dict[str, Any]:
    """Return dotted key -> value, interpolations resolved; empty mappings hold no key."""

    def walk(node: Any, prefix: str) -> dict[str, Any]:
        if not isinstance(node, dict):
            return {prefix: node}
        rows: dict[str, Any] = {}
        for key, child in node.items():
            rows |= walk(child, f"{prefix}.{key}" if prefix else str(key))
        return rows

    return walk(OmegaConf.to_container(config, resolve=True), "")


def grpo(recipe: Recipe, stage: str) -> DictConfig:
    return grpo_config(recipe, stage, model=MODEL, train=TRAIN, val=VAL, out=OUT)


def sft(recipe: Recipe, val: list[Path] | None = None) -> DictConfig:
    return sft_config(recipe, "sft", model=MODEL, train=TRAIN, val=val or [], out=OUT)


@pytest.mark.parametrize("stage", STAGES)
def test_laptop_and_cluster_differ_in_these_keys_and_no_other(stage: str) -> None:
    laptop = flat(grpo(load_recipe("laptop"), stage))
    cluster = flat(grpo(load_recipe("rcot_seg_3b"), stage))
    absent = object()
    keys = laptop.keys() | cluster.keys()
    differing = {k for k in keys if laptop.get(k, absent) != cluster.get(k, absent)}
    if stage == "grpo-ktg":  # only the tiny policy forgets AKS within a stage
        differing.remove("reward.custom_reward_function.reward_kwargs.rehearsed.rcot/aks")
    unexpected = {k: (laptop.get(k), cluster.get(k)) for k in differing - MAY_DIFFER}
    alike_now = MAY_DIFFER - differing
    assert not unexpected, f"differ, and are not listed: {unexpected}"
    assert not alike_now, f"listed, and do not differ: {sorted(alike_now)}"


@pytest.mark.parametrize(("stage", "steps"), [("grpo-aks", 500), ("grpo-ktg", 1000)])
def test_the_papers_settings_reach_verl(stage: str, steps: int) -> None:
    config = flat(grpo(load_recipe("rcot_seg_3b"), stage))
    expected = {
        "algorithm.adv_estimator": "grpo",
        "algorithm.use_kl_in_reward": False,
        "data.train_batch_size": 16,
        "data.max_prompt_length": 3000,
        "data.max_response_length": 2000,
        f"{ACTOR}.ppo_mini_batch_size": 16,  # one update of the policy a step
        f"{ACTOR}.ppo_epochs": 1,
        f"{ACTOR}.optim.lr": 1e-6,
        f"{ACTOR}.optim.weight_decay": 0.01,
        f"{ACTOR}.optim.lr_scheduler_type": "constant",
        f"{ACTOR}.use_kl_loss": True,
        f"{ACTOR}.kl_loss_coef": 0.01,
        f"{ACTOR}.kl_loss_type": "low_var_kl",
        f"{ACTOR}.entropy_coeff": 0,
        f"{ROLLOUT}.n": 8,
        f"{ROLLOUT}.temperature": 1.0,
        f"{ROLLOUT}.top_k": -1,
        f"{ROLLOUT}.top_p": 1.0,
        "trainer.total_training_steps": steps,
        "trainer.n_gpus_per_node": 4,
        "trainer.device": "cuda",
        "reward.custom_reward_function.reward_kwargs.reward": stage.removeprefix("grpo-"),
        "reward.custom_reward_function.reward_kwargs.canvas": 840,
    }
    assert {key: config[key] for key in expected} == expected
    # AdamW's warm-up ratio is 0: verl counts steps, and -1 means by the ratio
    assert config[f"{ACTOR}.optim.lr_warmup_steps_ratio"] == 0.0
    assert config[f"{ACTOR}.optim.lr_warmup_steps"] in (-1, 0)


@pytest.mark.parametrize("recipe", ["laptop", "rcot_seg_3b", "rcot_seg_3b_agentic"])
def test_every_module_that_verl_imports_from_this_project_exists(recipe: str) -> None:
    texts = [str(v) for v in flat(grpo(load_recipe(recipe), "grpo-aks")).values()]
    named = {m[0] for text in texts for m in re.finditer(r"\brcot_rl(\.\w+)+", text)}
    assert len(named) > 3
    root = Path(__file__).resolve().parents[2]
    for name in named:  # of a module, or of a name in one
        files = [root.joinpath(*part.split(".")) for part in (name, name.rpartition(".")[0])]
        assert any(file.with_suffix(".py").is_file() for file in files), name


def test_paths_are_the_callers() -> None:
    config = grpo(load_recipe("laptop"), "grpo-aks")
    assert config.actor_rollout_ref.model.path == "/model"
    assert list(config.data.train_files) == ["/t0.parquet", "/t1.parquet"]
    assert list(config.data.val_files) == ["/v.parquet"]
    assert config.trainer.default_local_dir == "/out/checkpoints"
    assert config.trainer.rollout_data_dir == "/out/rollouts"
    assert config.ray_kwargs.ray_init.address == "local"


def test_rollouts_are_dumped_only_when_asked() -> None:
    recipe = load_recipe("laptop", ["grpo.dump_rollouts=false"])
    assert grpo(recipe, "grpo-aks").trainer.rollout_data_dir is None


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("grpo.packing=true", f"{POLICY}.use_remove_padding", True),
        ("grpo.packing=true", f"{POLICY}.override_config.attn_implementation", "sdpa"),
        ("grpo.final_outputs=true", "trainer.rcot.final_outputs", True),
    ],
)
def test_a_cluster_can_switch_on_what_makes_a_step_faster(override: str, key: str, value: Any):
    assert flat(grpo(load_recipe("rcot_seg_3b", [override]), "grpo-ktg"))[key] == value


@pytest.mark.parametrize(
    ("overrides", "key", "message"),
    [
        (
            ["grpo.packing=true", "models.attention=flash_attention_2"],
            "grpo.packing",
            "needs models.attention: sdpa",
        ),
        (["grpo.rollout_threads=1"], "grpo.rollout_threads", "needs device: cpu"),
    ],
)
def test_switches_that_would_have_no_effect_are_refused(
    overrides: list[str], key: str, message: str
):
    with pytest.raises(InputError, match=message) as raised:
        load_recipe("rcot_seg_3b", overrides)
    assert key in str(raised.value)


def test_verl_itself_sends_nothing() -> None:
    for mode in ("online", "offline", "disabled"):
        config = grpo(load_recipe("laptop", [f"wandb.mode={mode}"]), "grpo-aks")
        assert list(config.trainer.logger) == ["console", "file"]


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("actor_rollout_ref.actor.optim.lrr", "actor_rollout_ref.actor.optim.lr"),
        ("trainer.total_epoch", "trainer.total_epochs"),
        ("algorithm.gama", "algorithm.gamma"),
        ("trainer.total_epochs.deeper", "trainer.total_epochs"),  # below a value there is nothing
    ],
)
def test_keys_unknown_to_verl_name_the_nearest(key: str, nearest: str) -> None:
    recipe = load_recipe("laptop", [f"train.grpo-ktg.verl={{{key}: 1}}"])
    grpo(recipe, "grpo-aks")  # it is the other stage's
    with pytest.raises(InputError) as caught:
        grpo(recipe, "grpo-ktg")
    assert caught.value.key == f"verl.{key}"
    assert caught.value.message.endswith(f"did you mean {nearest}?")


def test_unknown_sft_keys_are_refused() -> None:
    recipe = load_recipe("laptop", ["train.sft.verl={optim.lrs: 1}"])
    with pytest.raises(InputError, match=r"did you mean optim\.lr\?$"):
        sft(recipe)


def test_further_verl_keys_are_written_last() -> None:
    keys = "{trainer.save_freq: 7, actor_rollout_ref.rollout.engine_kwargs.vllm.seed: 3}"
    config = grpo(load_recipe("laptop", [f"train.grpo-aks.verl={keys}"]), "grpo-aks")
    assert config.trainer.save_freq == 7
    assert config.actor_rollout_ref.rollout.engine_kwargs.vllm.seed == 3


@pytest.mark.parametrize(
    "key, value",
    [
        (f"{ACTOR}.ppo_epochs", 2),
        (f"{ACTOR}.ppo_mini_batch_size", 8),
        (f"{ACTOR}.policy_loss.loss_mode", "gspo"),
        ("algorithm.rollout_correction.bypass_mode", False),
    ],
)
def test_reused_log_probs_refuse_a_second_update_of_a_batch(key: str, value: Any) -> None:
    inexact = f"train.grpo-aks.verl={{{key}: {str(value).lower()}}}"
    with pytest.raises(InputError, match="old_log_probs: recompute") as error:
        grpo(load_recipe("rcot_seg_3b", [inexact]), "grpo-aks")
    assert key in str(error.value)
    allowed = load_recipe("rcot_seg_3b", [inexact, "grpo.old_log_probs=recompute"])
    assert OmegaConf.select(grpo(allowed, "grpo-aks"), key) == value


def test_nested_keys_leave_their_neighbours_alone() -> None:
    """Each spelling is the same configuration; a whole section in its place would be none."""
    nested = "{actor_rollout_ref: {actor: {entropy_coeff: 0.5, optim.lr_warmup_steps: 3}}}"
    dotted = (
        "{actor_rollout_ref.actor.entropy_coeff: 0.5, "
        "actor_rollout_ref.actor.optim: {lr_warmup_steps: 3}}"
    )
    spelled = [
        flat(grpo(load_recipe("laptop", [f"grpo.verl={text}"]), "grpo-aks"))
        for text in (nested, dotted)
    ]
    plain = flat(grpo(load_recipe("laptop"), "grpo-aks"))
    assert spelled[0] == spelled[1]
    assert {k for k, v in spelled[0].items() if plain.get(k) != v} == {
        "actor_rollout_ref.actor.entropy_coeff",
        "actor_rollout_ref.actor.optim.lr_warmup_steps",
    }
    with pytest.raises(InputError, match=r"did you mean actor_rollout_ref\.actor\.entropy_coeff"):
        grpo(
            load_recipe("laptop", [nested.join(["grpo.verl=", ""]).replace("ff:", ":")]), "grpo-aks"
        )
    lr = flat(sft(load_recipe("laptop", ["train.sft.verl.optim.lr=0.5"])))
    assert (lr["optim.lr"], lr["optim.weight_decay"]) == (0.5, 0.0)


def test_mappings_that_are_values_stay_whole() -> None:
    keys = "{data.apply_chat_template_kwargs: {a: 1}, ray_kwargs: {ray_init: {num_cpus: 5}}}"
    config = grpo(load_recipe("laptop", [f"grpo.verl={keys}"]), "grpo-aks")
    assert config.data.apply_chat_template_kwargs == {"a": 1}
    assert config.ray_kwargs.ray_init.num_cpus == 5 and config.ray_kwargs.ray_init.num_gpus == 1


def test_sections_return_the_value_of_verl_in_every_spelling() -> None:
    keys = "{a.b: {c: 1, d.e: 2}, f: {g: {h.i: 3}}}"
    section = load_recipe("laptop", [f"grpo.verl={keys}"]).grpo("grpo-aks")
    values = [section.verl_value(k) for k in ("a.b.c", "a.b.d.e", "f.g.h.i", "a.b", "f.x", "a")]
    assert values == [1, 2, 3, {"c": 1, "d.e": 2}, None, None]
    assert section.verl_value("f.g.x", 7) == 7


@pytest.mark.parametrize("recipe", ["laptop", "rcot_seg_3b"])
def test_the_object_store_is_as_large_as_the_recipe_says(recipe: str) -> None:
    key, size = "ray_kwargs.ray_init.object_store_memory", 123_000_000
    asked = [f"cluster.object_store_bytes={size}"]
    assert flat(grpo(load_recipe(recipe, asked), "grpo-aks"))[key] == size
    elsewhere = load_recipe(recipe, [*asked, "cluster.ray_address=auto"])
    assert key not in flat(grpo(elsewhere, "grpo-aks")), "a Ray that runs has one already"


def test_sft_is_the_papers_and_the_laptops() -> None:
    expected = {
        # key: (rcot_seg_3b, laptop)
        "data.train_batch_size": (64, 32),
        "data.micro_batch_size_per_gpu": (8, 32),
        "data.max_length": (4024, 320),
        "data.max_token_len_per_gpu": (4024 * 8, 320 * 32),
        "data.truncation": ("error", "error"),
        "model.lora_rank": (8, 8),
        "model.lora_alpha": (16, 16),
        "model.target_modules": ("all-linear", "all-linear"),
        "model.exclude_modules": (".*visual.*", ".*visual.*"),
        "optim.lr": (1e-4, 3e-3),
        "optim.weight_decay": (0.0, 0.0),
        "optim.lr_scheduler_type": ("cosine", "cosine"),
        "optim.lr_warmup_steps_ratio": (0.1, 0.1),
        "trainer.total_epochs": (1, 8),
        "trainer.n_gpus_per_node": (4, 1),
        "trainer.device": ("cuda", "cpu"),
        "model.path": ("/model", "/model"),
        "trainer.default_local_dir": ("/out/checkpoints", "/out/checkpoints"),
        "trainer.experiment_name": ("rcot-seg-3b-sft", "laptop-sft"),
    }
    configs = [flat(sft(load_recipe(name))) for name in ("rcot_seg_3b", "laptop")]
    assert {k: tuple(c[k] for c in configs) for k in expected} == expected
    assert configs[0]["data.val_files"] is None
    assert list(sft(load_recipe("laptop"), VAL).data.val_files) == ["/v.parquet"]


def test_the_environment_selects_the_platform(tmp_path: Path) -> None:
    laptop = training_environment(load_recipe("laptop"), tmp_path)
    cluster = training_environment(load_recipe("rcot_seg_3b"), tmp_path)
    assert laptop["VERL_PLATFORM"] == "cpu" and "VERL_PLATFORM" not in cluster
    segmenter = {"RCOT_SEGMENTER", "RCOT_SEGMENTER_DEVICE", "RCOT_SEGMENTER_SETTINGS"}
    assert {k: v for k, v in cluster.items() if k not in segmenter}.items() <= laptop.items()
    assert laptop["RCOT_SEGMENTER"] == "tiny" and cluster["RCOT_SEGMENTER_DEVICE"] == "cuda"
    assert laptop["VERL_FILE_LOGGER_PATH"] == str(tmp_path / "verl.jsonl")
    assert all(isinstance(value, str) for value in laptop.values())
    assert not [name for name in laptop if name.startswith("WANDB")]


def test_composing_imports_neither_torch_nor_verl(run_python: Callable[..., str]) -> None:
    code = f"""
import sys
from pathlib import Path
from rcot_rl.recipe.loader import load_recipe
from rcot_rl.training.verl_config import grpo_config, sft_config
recipe, where = load_recipe("laptop"), dict(model=Path("m"), train=[], val=[], out=Path("o"))
sft_config(recipe, "sft", **where)
for stage in {STAGES}:
    grpo_config(recipe, stage, **where)
print(*sorted(sys.modules.keys() & {{"torch", "verl", "ray", "vllm", "transformers", "wandb"}}))
"""
    assert run_python(code).strip() == ""
