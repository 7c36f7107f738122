"""Fixed points beside a run's curves: the reward's maxima, and the paper's figures.

Maxima and weights come from the reward recipe that RUN/recipe.yaml names. A user's function
declares neither.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rcot_rl.errors import InputError
from rcot_rl.monitoring.run_files.run_reader import RunReader
from rcot_rl.recipe.training_section import GrpoStage
from rcot_rl.stats.json_values import is_number

FORM_MODULES = frozenset(
    {
        "format",
        "answer_format",
        "non_repeat",
        "reasoning_length",
        "veason_format",
        "visionreasoner_format",
        "visionreasoner_non_repeat",
        "seg_zero_thinking",
        "seg_zero_segmentation",
    }
)
"""Reward modules that never read the ground truth: a policy can earn them without the task."""


@dataclass(frozen=True)
class PaperLandmarks:
    """What the paper reports of one GRPO task."""

    start_reward: float
    """Mean reward at the first steps, after CoT-SFT (figures 11 (a) and 12 (a))."""

    max_reward: float
    """Maximum of the paper's reward, to compare only with the same one."""

    response_tokens: float
    """Mean length of the responses, stable over training (figures 11 (b) and 12 (b))."""


PAPER: Mapping[str, PaperLandmarks] = {
    "aks": PaperLandmarks(2.1, 3.0, 300.0),
    "ktg": PaperLandmarks(4.3, 6.0, 300.0),
}
"""Task -> landmarks of the paper's 3- and 7-billion-parameter policies. A tiny policy's levels are
not comparable with them."""


@dataclass(frozen=True)
class RewardFacts:
    """What is known about a stage's reward before any step. Unknown values are None or empty."""

    maximum: float | None = None
    """Greatest possible reward."""

    maxima: Mapping[str, float] | None = None
    """Component -> greatest value, before its weight; None if unknown."""

    weights: Mapping[str, float] | None = None
    """Component -> weight; None if unknown or if the routes of a routed reward differ."""

    form: frozenset[str] | None = None
    """Components that never read the ground truth; None if unknown."""

    def is_form(self, component: str) -> bool:
        """Return True if a component never reads the ground truth.

        The modules of a recipe decide. Of a user's function only the names are known: components
        with "format" in the name count.
        """
        return "format" in component if self.form is None else component in self.form


def reward_facts(reader: RunReader, stage: str) -> RewardFacts:
    """Return what the reward recipe of a GRPO stage says; empty facts if it cannot be read."""
    from reward_fns.registry import modules
    from reward_fns.reward_recipe import RoutedRecipe, load_reward_recipe

    settings = reader.recipe.train.get(stage) if reader.recipe is not None else None
    if not isinstance(settings, GrpoStage):
        return RewardFacts()
    try:
        recipe = load_reward_recipe(settings.reward)
    except InputError:  # a user's function, or a file that is not here
        return RewardFacts()
    routes = list(recipe.routes.values()) if isinstance(recipe, RoutedRecipe) else [recipe]
    known = modules()
    totals: list[float] = []
    maxima: dict[str, float] = {}
    weights: dict[str, float] = {}
    form: set[str] = set()
    agree = True
    for route in routes:
        totals.append(0.0)
        for name, part in route.components.items():
            greatest = known[part.module].maximum(part.params, route)
            totals[-1] += part.weight * greatest
            maxima[name] = max(maxima.get(name, greatest), greatest)
            agree &= weights.setdefault(name, part.weight) == part.weight
            if part.module in FORM_MODULES:
                form.add(name)
    return RewardFacts(max(totals), maxima, weights if agree else None, frozenset(form))


def max_reward(reader: RunReader, stage: str) -> float | None:
    """Return the greatest possible reward of a stage, such as 3 or 6; None if unknown."""
    return reward_facts(reader, stage).maximum


def component_maxima(reader: RunReader, stage: str) -> dict[str, float]:
    """Return the greatest value of each component, before its weight; empty if unknown."""
    return dict(reward_facts(reader, stage).maxima or {})


def trained_tasks(reader: RunReader, stage: str) -> tuple[str, ...]:
    """Return the tasks of a stage's rows, `aks` and `ktg`; empty if unknown."""
    recipe = reader.recipe
    if recipe is None or stage not in recipe.train:
        return ()
    return tuple(map(str, recipe.tasks_in(recipe.train[stage].shard_set)))


def component_keys(line: Mapping[str, Any]) -> dict[str, str]:
    """Return component -> key of its mean in a line of metrics.jsonl."""
    means = (key for key in line if key.startswith("reward/") and key.endswith("/mean"))
    return {key.split("/")[1]: key for key in means if key.count("/") == 2}


_EXACT = 1e-3
"""Largest deviation of fitted weights from the logged reward, which may be rounded."""


def component_weights(
    steps: Sequence[Mapping[str, Any]], facts: RewardFacts
) -> dict[str, float] | None:
    """Return the weight of each component: the recipe's, or else those that explain the rewards.

    A user's function does not declare weights. If the mean reward is a weighted sum of the
    components' means at every step, least squares returns the weights; a component that never
    changes gets 0. None if no weights explain the rewards.
    """
    import numpy as np

    names = component_keys(steps[-1]) if steps else {}
    if facts.weights is not None and names.keys() <= facts.weights.keys():
        return {name: facts.weights[name] for name in names}
    rows = [[s.get(key) for key in (*names.values(), "reward/mean")] for s in steps]
    table = np.array([row for row in rows if all(map(is_number, row))], dtype=float)
    if not names or len(table) <= len(names) + 1:
        return None
    centred = table - table.mean(axis=0)
    weights = np.linalg.lstsq(centred[:, :-1], centred[:, -1], rcond=1e-6)[0]
    if np.abs(centred[:, :-1] @ weights - centred[:, -1]).max() > _EXACT:
        return None
    return dict(zip(names, map(float, weights), strict=True))
