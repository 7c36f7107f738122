"""The preflight's checks of rewards: they load, keep their contract, and score the stage's rows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from cluster.preflight import at_start
from cluster.preflight.checks.case import RunCase
from cluster.preflight.checks.findings import Notes
from rcot_rl.errors import InputError
from rcot_rl.recipe.schema import DATA_SOURCES, TASKS, RowTask
from reward_fns.reward_recipe import RewardRecipe, RoutedRecipe, load_reward_recipe
from reward_fns.user.sources import PKG, find_source, is_user_reward

_SCORES: Mapping[str, RowTask] = {"aks": "aks", "ktg": "ktg", "seg-zero": "ktg"}
"""Task of a reward recipe -> task of the rows whose ground truth it reads."""

_FIRST = "an error at the first response"


def rewards(case: RunCase, notes: Notes) -> None:
    """Check the rewards of every GRPO stage that is still to be run."""
    rehearsed = filter(None, map(case.recipe.rehearsed_by, case.grpo))
    for stage in dict.fromkeys([*case.grpo, *rehearsed]):
        reward = case.recipe.grpo(stage).reward
        if case.elsewhere and _is_file_elsewhere(reward):
            notes.unknown(
                f"{stage}.reward",
                f"train.{stage}.reward: {reward} is not on this host, and was not checked",
                cost="a stage that fails when its turn comes",
                fix="the run checks it where it starts",
            )
            continue
        before = len(notes.findings)
        with notes.attempt(
            f"{stage}.reward",
            cost="a stage that fails when its turn comes, or a reward of noise",
            fix="name a reward that loads and keeps its contract; `rcot score --check REWARD` "
            "checks one",
        ):
            at_start.check_reward(case.recipe, stage)
        if len(notes.findings) == before:
            _check_routes(case, notes, stage)


def _is_file_elsewhere(reward: str) -> bool:
    """Return True if the reward is a file, or a module, that this host does not have."""
    if reward.startswith(PKG):
        return True
    if is_user_reward(reward):
        return not Path(reward.rpartition(":")[0]).is_file()
    return reward.endswith((".yaml", ".yml")) and not Path(reward).is_file()


def clips(case: RunCase, notes: Notes) -> None:
    """Check that the rows of an agentic stage have a clip to select frames from."""
    data = case.recipe.data
    for stage in case.grpo:
        agent = case.recipe.grpo(stage).agent
        if agent == "single-turn":
            continue
        for task in rows_of(case, stage):
            if not data.clip_frames or task not in data.clip_tasks:
                notes.error(
                    f"{stage}.agentic",
                    f"train.{stage}.agent={agent}: rows of {task} have no clip to select frames "
                    f"from (data.clip_frames={data.clip_frames}, "
                    f"clip_tasks={', '.join(data.clip_tasks)})",
                    cost="an error at the first episode",
                    fix=f"data.clip_frames=8 and data.clip_tasks=[{task}], and build the shards",
                )


def rows_of(case: RunCase, stage: str) -> tuple[RowTask, ...]:
    """Return the tasks of a training stage's rows.

    From the recipe's `data.sets` or, for a set that they lack, from its manifest. Empty if neither
    exists.
    """
    name = case.recipe.stage(stage).shard_set
    tasks = case.recipe.tasks_in(name)
    if tasks:
        return tasks
    try:
        counts = (case.manifest(name) or {})["counts"]["train"]
        return tuple(task for task in TASKS if counts.get(task, 0) > 0)
    except (KeyError, TypeError, AttributeError):
        return ()  # `built_shards` reports a broken manifest


def tasks_of(case: RunCase, stage: str) -> tuple[RowTask, ...]:
    """Return the tasks of the rows that a GRPO stage's reward can score.

    All for a user's function, and for a reward that does not load (`rewards` reports it).
    """
    if _load(case, stage) is None:
        return TASKS
    return tuple(routes_of(case, stage))


def routes_of(case: RunCase, stage: str) -> dict[RowTask, RewardRecipe]:
    """Return the reward recipe that scores the rows of each task in a GRPO stage.

    Empty for a user's function, and for a reward that does not load.
    """
    reward = _load(case, stage)
    if reward is None:
        return {}
    if isinstance(reward, RoutedRecipe):
        routes = {t: reward.routes[s] for t, s in DATA_SOURCES.items() if s in reward.routes}
        return {task: route for task, route in routes.items() if _SCORES.get(route.task) == task}
    return {_SCORES[reward.task]: reward} if reward.task in _SCORES else {}


def _load(case: RunCase, stage: str) -> RewardRecipe | RoutedRecipe | None:
    """Return a stage's reward recipe; None for a function, and for one that does not load."""
    name = case.recipe.grpo(stage).reward
    try:
        if find_source(name) is not None:
            return None
        return load_reward_recipe(name, canvas=case.recipe.canvas.image)
    except InputError:
        return None


def modules_of(case: RunCase, stage: str) -> set[str]:
    """Return the names of the reward modules that score a GRPO stage's rows."""
    rows, routes = rows_of(case, stage) or TASKS, routes_of(case, stage)
    used = [route for task, route in routes.items() if task in rows]
    return {component.module for route in used for component in route.components.values()}


def _check_routes(case: RunCase, notes: Notes, stage: str) -> None:
    """Check a reward that loads against the rows that it scores."""
    key, name = f"train.{stage}.reward", case.recipe.grpo(stage).reward
    rows, reward, routes = rows_of(case, stage), _load(case, stage), routes_of(case, stage)
    if reward is None:
        return
    if rows and not set(rows) & set(routes):
        # a reward of only some of the rows is `<stage>.task`, which counts them
        if isinstance(reward, RoutedRecipe):
            sources = " and ".join(DATA_SOURCES[task] for task in rows)
            message = f"{name} has no route for {sources}, only for {', '.join(reward.routes)}"
            fix = "add the route"
        else:
            asked = " and ".join(rows)
            message = f"{name} is a reward of {reward.task}, and the stage's rows ask {asked}"
            fix = f"{key}={rows[0] if len(rows) == 1 else 'joint'}"
        notes.error(f"{stage}.reward_task", f"{key}: {message}", cost=_FIRST, fix=fix)
        return
    if "mask_iou" in modules_of(case, stage) and not case.recipe.data.clip_frames:
        notes.error(
            f"{stage}.reward_clip",
            f"{key}: {name} makes masks of a row's clip, and rows have none (data.clip_frames=0)",
            cost=_FIRST,
            fix="data.clip_frames=5, and build the shards again",
        )
    form = case.recipe.data.response
    for task, route in routes.items():
        if task in (rows or TASKS) and route.response not in (None, form):
            asked = "only for the answer" if form == "answer" else "for reasoning and the answer"
            suffix = "-answer-only"
            other = name.removesuffix(suffix) if form == "think_answer" else f"{task}{suffix}"
            notes.error(
                f"{stage}.response",
                f"{key}: {name} pays for responses of the form {route.response}, and "
                f"data.response={form} makes prompts that ask {asked}",
                cost="a format reward of 0 for what the prompt asks for",
                fix=f"{key}={other}",
            )
    share = case.recipe.data.zero_target_share
    if "ktg" in rows and "ktg" in routes and share > 0 and not routes["ktg"].zero_target:
        routed = f"route {DATA_SOURCES['ktg']} to ktg-zero-target in {name}"
        notes.error(
            f"{stage}.zero_target",
            f"{key}: {name} does not take an empty answer, and data.zero_target_share={share:g} "
            "makes rows without a target",
            cost="a policy that is taught to invent objects",
            fix=routed if isinstance(reward, RoutedRecipe) else f"{key}=ktg-zero-target",
        )
    for task, route in routes.items():
        if task in (rows or TASKS) and not any(p.weight > 0 for p in route.components.values()):
            notes.error(
                f"{stage}.reward_weight",
                f"{key}: every component of {name} has weight 0",
                cost="a stage without a gradient",
                fix="give a component a weight",
            )
