"""The preflight's checks of rewards: they load, keep their contract, and score what rows ask."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cluster.preflight import at_start as preflight
from cluster.preflight.checks.case import Case
from cluster.preflight.checks.findings import Notes
from rcot_rl.errors import InputError
from rcot_rl.recipe.schema import section_key
from reward_fns.recipe import Recipe as RewardRecipe
from reward_fns.recipe import RoutedRecipe, load_recipe
from reward_fns.user.sources import PKG, find_source, is_user_reward


def rewards(case: Case, notes: Notes) -> None:
    """Of every GRPO stage that is still to be run."""
    for stage in case.grpo:
        key = f"{section_key(stage)}.reward"
        if case.elsewhere and _is_file_elsewhere(case.recipe.grpo(stage).reward):
            notes.unknown(
                f"{stage}.reward", f"{key}: {case.recipe.grpo(stage).reward} is not on this host, "
                "and was not checked", cost="a stage that fails when its turn comes",
                fix="the run checks it where it starts",
            )  # fmt: skip
            continue
        before = len(notes.findings)
        with notes.attempt(
            f"{stage}.reward", cost="a stage that fails when its turn comes, or a reward of noise",
            fix="name a reward that loads and keeps its contract: `rcot score --check REWARD` says "
            "whether one does",
        ):  # fmt: skip
            preflight.check_reward(case.recipe, stage)
        if len(notes.findings) == before:
            _unrouted(case, notes, stage, key)
            for route in routes_of(case, stage):
                _route(case, notes, stage, key, route)


def _is_file_elsewhere(reward: str) -> bool:
    """Return True if the reward is a file, or a module, that this host does not have."""
    if reward.startswith(PKG):
        return True
    if is_user_reward(reward):
        return not Path(reward.rpartition(":")[0]).is_file()
    return reward.endswith((".yaml", ".yml")) and not Path(reward).is_file()


def clips(case: Case, notes: Notes) -> None:
    """An agentic stage selects among the frames of its rows' clips."""
    data = case.recipe.data
    for stage in case.grpo:
        if case.recipe.grpo(stage).agent == "single-turn":
            continue
        task = stage.removeprefix("grpo-")
        if not data.clip_frames or task not in data.clip_tasks:
            notes.error(
                f"{stage}.agentic", f"{section_key(stage)}.agent={case.recipe.grpo(stage).agent}: "
                f"rows of {task} have no clip to select frames from (data.clip_frames="
                f"{data.clip_frames}, clip_tasks={', '.join(data.clip_tasks)})",
                cost="an error at the first episode",
                fix=f"data.clip_frames=8 and data.clip_tasks=[{task}], and build the shards",
            )  # fmt: skip


def routes_of(case: Case, stage: str) -> list[RewardRecipe]:
    """The reward recipe that scores a stage's rows, in a list; empty for a user's function and for
    one that cannot be loaded (`rewards` says why)."""
    recipe = _load(case, stage)
    if not isinstance(recipe, RoutedRecipe):
        return [] if recipe is None else [recipe]
    found = recipe.routes.get(_SOURCES[stage])
    return [] if found is None else [found]


def _load(case: Case, stage: str) -> RewardRecipe | RoutedRecipe | None:
    name = case.recipe.grpo(stage).reward
    try:
        if find_source(name) is not None:
            return None
        return load_recipe(name, canvas=case.recipe.canvas.image)
    except InputError:
        return None


def _unrouted(case: Case, notes: Notes, stage: str, key: str) -> None:
    recipe = _load(case, stage)
    if isinstance(recipe, RoutedRecipe) and _SOURCES[stage] not in recipe.routes:
        notes.error(
            f"{stage}.reward_task", f"{key}: {case.recipe.grpo(stage).reward} has no route for "
            f"{_SOURCES[stage]}, only for {', '.join(recipe.routes)}",
            cost="an error at the first response", fix="add the route",
        )  # fmt: skip


def tasks_of(case: Case, stage: str) -> set[str]:
    """Tasks whose rows a stage's reward can score: its own, or those that the reward routes."""
    recipe = _load(case, stage)
    if isinstance(recipe, RoutedRecipe):
        return {
            s.removeprefix("grpo-") for s, source in _SOURCES.items() if source in recipe.routes
        }
    return {stage.removeprefix("grpo-")}


def modules_of(case: Case, stage: str) -> set[str]:
    """Names of the reward modules that score a stage's rows."""
    return {c.module for route in routes_of(case, stage) for c in route.components.values()}


_SOURCES = {"grpo-aks": "rcot/aks", "grpo-ktg": "rcot/ktg"}
"""Stage -> `data_source` of its rows (data_pipelines/rows.py)."""

_TASKS: dict[str, tuple[str, ...]] = {"grpo-aks": ("aks",), "grpo-ktg": ("ktg", "seg-zero")}
"""Stage -> tasks of rewards that can read its rows' ground truth."""


def _route(case: Case, notes: Notes, stage: str, key: str, route: Any) -> None:
    name = case.recipe.grpo(stage).reward
    if route.task not in _TASKS[stage]:
        notes.error(
            f"{stage}.reward_task", f"{key}: {name} is a reward of {route.task}, and the stage's "
            f"rows ask {_TASKS[stage][0]}", cost="an error at the first ground truth, or 0 for all",
            fix=f"{key}={_TASKS[stage][0]}",
        )  # fmt: skip
        return
    if "mask_iou" in modules_of(case, stage) and not case.recipe.data.clip_frames:
        notes.error(
            f"{stage}.reward_clip", f"{key}: {name} makes masks of a row's clip, and rows have "
            "none (data.clip_frames=0)", cost="an error at the first response",
            fix="data.clip_frames=5, and build the shards again",
        )  # fmt: skip
    share = case.recipe.data.zero_target_share
    if stage == "grpo-ktg" and share > 0 and not route.zero_target:
        notes.error(
            f"{stage}.zero_target", f"{key}: {name} does not take an empty answer, and "
            f"data.zero_target_share={share:g} makes rows with nothing to find",
            cost="a policy that is taught to invent objects", fix=f"{key}=ktg-zero-target",
        )  # fmt: skip
    if not any(part.weight > 0 for part in route.components.values()):
        notes.error(
            f"{stage}.reward_weight", f"{key}: every component of {name} has weight 0",
            cost="a stage without a gradient", fix="give a component a weight",
        )  # fmt: skip
