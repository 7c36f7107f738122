"""The 3B recipe against the paper's numbers, written down here a second time and independently."""

from __future__ import annotations

import re
from typing import Any

import pytest

from rcot_rl.recipe.loader import RECIPES, load_recipe
from rcot_rl.recipe.schema import Recipe
from reward_fns.score import load_reward

TABLE_7 = {
    # key: (AKS-GRPO, KTG-GRPO)
    "learning_rate": (1e-6, 1e-6),
    "weight_decay": (0.01, 0.01),
    "prompts_per_step": (16, 16),
    "kl_loss_coef": (0.01, 0.01),
    "kl_loss_type": ("low_var_kl", "low_var_kl"),
    "n": (8, 8),
    "temperature": (1.0, 1.0),
    "top_k": (-1, -1),
    "top_p": (1.0, 1.0),
    "max_prompt_length": (3000, 3000),
    "max_response_length": (2000, 2000),
    "steps": (500, 1000),
    "shard_set": ("grpo-aks-4k", "grpo-ktg-6k"),
}
TABLE_7_SFT = {
    "lora_rank": 8,
    "learning_rate": 1e-4,
    "weight_decay": 0.0,
    "batch_size": 8 * 8,  # batch 8, gradient accumulation 8
    "scheduler": "cosine",
    "warmup_ratio": 0.1,
    "max_length": 3000 + 1024,
    "epochs": 1,
    "shard_set": "sft-28k",
}


SILENT = {"lora_alpha": 16, "clip_ratio": 0.2, "loss_agg_mode": "token-mean", "advantage": "group"}
"""Where the paper says nothing, the recipe does, with the reason beside it."""


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load_recipe("rcot_seg_3b")


@pytest.mark.parametrize(("key", "values"), TABLE_7.items(), ids=list(TABLE_7))
def test_grpo_settings_equal_table_7(recipe: Recipe, key: str, values: tuple[Any, Any]) -> None:
    assert (getattr(recipe.grpo("grpo-aks"), key), getattr(recipe.grpo("grpo-ktg"), key)) == values


@pytest.mark.parametrize(("key", "value"), TABLE_7_SFT.items(), ids=list(TABLE_7_SFT))
def test_sft_settings_equal_table_7(recipe: Recipe, key: str, value: Any) -> None:
    assert getattr(recipe.sft("sft"), key) == value


def test_what_sft_samples_with_is_of_traces_and_descriptions(recipe: Recipe) -> None:
    for asked in (recipe.data.tracer, recipe.data.describer):
        assert (asked.temperature, asked.top_k, asked.top_p) == (0.95, 50, 0.7)


def test_every_value_of_table_7_is_explicit_and_has_a_comment(recipe: Recipe) -> None:
    """None is left to a default, and each has a comment."""
    text = (RECIPES.folder / "rcot_seg_3b.yaml").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^ +(\w+): [^#\n]+(#.*)$", text, re.MULTILINE))
    keys = {*TABLE_7, *TABLE_7_SFT, *SILENT} - {"steps", "shard_set"}
    assert keys <= rows.keys(), keys - rows.keys()
    for key, value in SILENT.items():
        assert re.search(rf"^ +{key}: {value} ", text, re.MULTILINE), key
    for key in SILENT:
        assert re.search("silent|eq. 1[45]", rows[key]), key
    assert "unbiased (torch.std), + 1e-6" in rows["advantage"]
    for stage in recipe.grpo_stages:
        assert re.search(rf"^  {stage}: .*shard_set: .*steps: ", text, re.MULTILINE)


def test_hardware_and_models_equal_section_4_2(recipe: Recipe) -> None:
    assert recipe.models.policy == "Qwen/Qwen2.5-VL-3B-Instruct"
    assert (recipe.device, recipe.cluster.nodes * recipe.cluster.gpus_per_node) == ("cuda", 4)
    assert recipe.predict.rounds == 5  # Table 4


def test_canvases_equal_appendix_a_3(recipe: Recipe) -> None:
    assert (recipe.canvas.image, recipe.canvas.video) == (840, 448)


def test_data_settings_equal_section_3_4(recipe: Recipe) -> None:
    sets = recipe.data.sets
    assert {name: (s.ktg, s.aks) for name, s in sets.items()} == {
        "sft-28k": (20_000, 8_000),
        "grpo-aks-4k": (0, 4_000),
        "grpo-ktg-6k": (6_000, 0),
    }
    assert (recipe.data.single_multi, recipe.data.a_to_b) == (3.0, 1.0)
    assert recipe.data.keyframe == "largest"
    assert recipe.data.zero_target_share == 0.0
    assert {c.dataset for c in recipe.data.corpora} == {"ref-youtube-vos", "mevis", "revos"}


def test_reward_maxima_equal_appendix_a_2(recipe: Recipe) -> None:
    assert load_reward(recipe.grpo("grpo-aks").reward).max_reward == 1.0 * 1.0 + 2.0 * 1.0
    assert load_reward(recipe.grpo("grpo-ktg").reward).max_reward == 1.0 * 3.0 + 1.0 * 3.0


def test_all_five_benchmarks_are_evaluated_whole(recipe: Recipe) -> None:
    assert [b.dataset for b in recipe.eval.benchmarks] == [
        "revos",
        "reasonvos",
        "davis17",
        "ref-youtube-vos",
        "mevis",
    ]
    assert all(b.limit is None for b in recipe.eval.benchmarks)


def test_the_laptop_recipe_is_the_same_method(recipe: Recipe) -> None:
    laptop = load_recipe("laptop")
    same = (
        "weight_decay",
        "prompts_per_step",
        "kl_loss_coef",
        "kl_loss_type",
        "n",
        "temperature",
        "top_k",
        "top_p",
        "clip_ratio",
        "loss_agg_mode",
        "reward",
    )
    for stage in ("grpo-aks", "grpo-ktg"):
        small, paper = laptop.grpo(stage), recipe.grpo(stage)
        assert {k: getattr(small, k) for k in same} == {k: getattr(paper, k) for k in same}
    assert laptop.stages == recipe.stages
    assert laptop.predict.rounds == recipe.predict.rounds
