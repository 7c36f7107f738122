"""What a stage was made of, by sha256: it travels with verl's configuration, into W&B and into
every checkpoint, so that a model found later says which recipe, reward and shards gave it.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from rcot_rl.files import write_text
from rcot_rl.recipe.loader import recipe_hash
from rcot_rl.recipe.schema import Recipe
from rcot_rl.training.checkpoint_store import seal
from reward_fns.score import UserReward, load_reward

FILE = "provenance.json"
"""In each checkpoint's folder."""


def reward_hashes(recipe: Recipe) -> dict[str, dict[str, str]]:
    """GRPO stage -> name and sha256 of its reward. Raises InputError for one that does not load."""
    return {stage: _reward(recipe, stage) for stage in recipe.grpo_stages}


def shard_hash(shards: Path) -> str:
    """sha256 of a shard set: of its manifest, which holds every file's."""
    return hashlib.sha256((shards / "manifest.json").read_bytes()).hexdigest()


def provenance(recipe: Recipe, stage: str, shards: Path) -> dict[str, Any]:
    """What decides a stage's outcome, besides the code and its starting model."""
    made_of: dict[str, Any] = {
        "stage": stage,
        "recipe_sha256": recipe_hash(recipe),
        "shards_sha256": shard_hash(shards),
    }
    if stage != "sft":
        reward = _reward(recipe, stage)
        made_of |= {"reward": reward["name"], "reward_sha256": reward["sha256"]}
    return made_of


def seal_made_of(checkpoint: Path, made_of: Any) -> None:
    """Seal a checkpoint with its stage's provenance (JSON values)."""
    write_text(checkpoint / FILE, json.dumps(made_of, indent=1) + "\n")
    seal(checkpoint, provenance=made_of)


def _reward(recipe: Recipe, stage: str) -> dict[str, str]:
    reward = load_reward(recipe.grpo(stage).reward, canvas=recipe.canvas.image)
    if isinstance(reward, UserReward):
        reward.close()
    return {"name": reward.name, "sha256": reward.hash}
