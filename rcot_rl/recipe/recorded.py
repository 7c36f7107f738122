"""The recipe that a run's folder records, for readers that accept incomplete folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from rcot_rl.recipe.schema import Recipe


def stages_with(run: Path, *names: str) -> list[str]:
    """Return the training stages of a run whose folders have one of these files or folders.

    Stages are in the order of `train` in RUN/recipe.yaml. Stages that are not in `train`, or all of
    them if the file cannot be read, follow in alphabetical order.
    """
    present = sorted({path.parent.name for name in names for path in run.glob(f"*/{name}")})
    order = [stage for stage in recorded_stages(run) if stage in present]
    return order + [stage for stage in present if stage not in order]


def recorded_stages(run: Path) -> list[str]:
    """Return the training stages in RUN/recipe.yaml; none if it cannot be read."""
    recorded = _recorded(run).get("train")
    return [str(stage) for stage in recorded] if isinstance(recorded, dict) else []


def heldout_stages(run: Path) -> dict[str, str]:
    """Return, for each task, the GRPO stage whose held-out rows measure it; empty if unknown."""
    try:
        recipe = Recipe.model_validate(_recorded(run))
    except ValidationError:
        return {}
    return {str(task): stage for task, stage in recipe.heldout_stages.items()}


def _recorded(run: Path) -> dict[str, Any]:
    try:
        recipe = yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))["recipe"]
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError):
        return {}
    return recipe if isinstance(recipe, dict) else {}
