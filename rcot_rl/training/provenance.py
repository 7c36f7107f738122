"""The provenance of a stage: sha256 of its recipe, reward and shards.

It is part of verl's configuration, of the W&B run and of every checkpoint, so that a model can be
traced to its inputs.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from rcot_rl.recipe.loader import recipe_hash
from rcot_rl.recipe.schema import Recipe
from rcot_rl.system.files import write_text
from rcot_rl.training.checkpoint_store import seal
from reward_fns.score import UserReward, load_reward

FILE = "provenance.json"
"""Name of the file in each checkpoint's folder."""


def reward_hashes(recipe: Recipe) -> dict[str, dict[str, str]]:
    """Return name and sha256 of the reward of each GRPO stage that the recipe runs.

    Raises:
        InputError: A reward does not load.
    """
    return {name: _reward(recipe, name) for name in recipe.grpo_stages if name in recipe.stages}


def shard_hash(shards: Path) -> str:
    """Return the sha256 of a shard set's manifest, which contains that of every file."""
    return hashlib.sha256((shards / "manifest.json").read_bytes()).hexdigest()


def provenance(
    recipe: Recipe, stage: str, shards: Path, rehearsed: Path | None = None
) -> dict[str, Any]:
    """Return the inputs of a stage besides the code and the starting model.

    Args:
        recipe: The recipe.
        stage: A training stage.
        shards: Folder of its shard set.
        rehearsed: Folder of the shard set of the stage that it rehearses.
    """
    facts = {"stage": stage, "recipe_sha256": recipe_hash(recipe)} | _inputs(recipe, stage, shards)
    if rehearsed is not None and (other := recipe.rehearsed_by(stage)) is not None:
        facts["rehearses"] = {"stage": other} | _inputs(recipe, other, rehearsed)
    return facts


def seal_with_provenance(checkpoint: Path, facts: Any) -> None:
    """Seal a checkpoint with its stage's provenance (JSON values)."""
    write_text(checkpoint / FILE, json.dumps(facts, indent=1) + "\n")
    seal(checkpoint, provenance=facts)


def _inputs(recipe: Recipe, stage: str, shards: Path) -> dict[str, Any]:
    facts = {"shards_sha256": shard_hash(shards)}
    if stage in recipe.grpo_stages:
        reward = _reward(recipe, stage)
        facts |= {"reward": reward["name"], "reward_sha256": reward["sha256"]}
    return facts


def _reward(recipe: Recipe, stage: str) -> dict[str, str]:
    reward = load_reward(recipe.grpo(stage).reward, canvas=recipe.canvas.image)
    if isinstance(reward, UserReward):
        reward.close()
    return {"name": reward.name, "sha256": reward.hash}
