"""What identifies and describes a stage to every tracker: a pure function of the run folder."""

from __future__ import annotations

import re
import secrets
from pathlib import Path
from typing import Any

from rcot_rl.monitoring.run_files.run_reader import RunReader, StageView, as_mapping
from rcot_rl.monitoring.trackers.tracker import TrackedStage
from rcot_rl.recipe.tracking_section import TRACKING
from rcot_rl.system.files import write_text

RUN_ID = "run-id"
_RUN_ID = re.compile(r"[0-9a-z]{8,32}")
_PRIVATE = ("environment", "secrets")
"""Keys of `launch` that are not sent: variables may hold tokens."""


def run_id_of(run: Path) -> str:
    """Return the id of a run folder, in RUN/tracking/run-id; create it if it is missing."""
    path = run / TRACKING / RUN_ID
    if path.is_file():
        text = path.read_text(encoding="utf-8", errors="replace").strip()
        if _RUN_ID.fullmatch(text):
            return text
    text = secrets.token_hex(6)
    write_text(path, text + "\n")
    return text


def tracked_stage(reader: RunReader, view: StageView) -> TrackedStage:
    """Return the description of a stage, which is equal in every attempt and on any host."""
    recipe = as_mapping(reader.record.get("recipe"))
    wandb = as_mapping(recipe.get("wandb"))
    tags = wandb.get("tags")
    return TrackedStage(
        run=reader.root.resolve(),
        run_id=run_id_of(reader.root),
        name=reader.name,
        stage=view.name,
        kind=view.kind,
        config=config_of(reader.record),
        tags=list(
            dict.fromkeys([*(map(str, tags if isinstance(tags, list) else ())), *_tags(recipe)])
        ),
        notes=str(wandb.get("notes") or ""),
    )


def config_of(record: dict[str, Any]) -> dict[str, Any]:
    """Return the recipe and what else RUN/recipe.yaml records, as nested JSON values."""
    recipe = dict(as_mapping(record.get("recipe")))
    if "launch" in recipe:
        launch = as_mapping(recipe["launch"])
        recipe["launch"] = {key: value for key, value in launch.items() if key not in _PRIVATE}
    hashes = {
        "recipe": record.get("recipe_hash"),
        "rewards": record.get("rewards"),
        "shards": record.get("shards"),
    }
    facts = {key: record.get(key) for key in ("git_commit", "python", "versions", "machine")}
    facts = {key: value for key, value in facts.items() if value is not None}
    return recipe | facts | {"hashes": {k: v for k, v in hashes.items() if v is not None}}


def _tags(recipe: dict[str, Any]) -> list[str]:
    """Return tags from the recipe: name, policy, seed and rewards."""
    policy = as_mapping(recipe.get("models")).get("policy")
    stages = as_mapping(recipe.get("train")).values()
    rewards = [as_mapping(stage).get("reward") for stage in stages]
    seed = recipe.get("seed")
    tags = [
        recipe.get("name"),
        Path(str(policy)).name if policy else None,
        None if seed is None else f"seed {seed}",
        *(Path(str(reward)).name for reward in rewards if reward),
    ]
    return [str(tag)[:64] for tag in tags if tag]
