"""`load_reward`: from a name, a recipe file or FILE.py:FUNCTION to a `Reward`.

Implements equation 13 of the paper: the reward is the weighted sum of the components.
"""

from __future__ import annotations

import hashlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from rcot_rl.errors import InputError
from reward_fns.ground_truth import read_ground_truth
from reward_fns.registry import Response, modules
from reward_fns.reward_recipe import (
    REWARDS,
    RewardRecipe,
    RoutedRecipe,
    load_reward_recipe,
    reward_hash,
)
from reward_fns.user.sources import UserSource, find_source
from reward_fns.user.user_result import BAD_RESULT

if TYPE_CHECKING:
    from reward_fns.components.mask_iou import MaskSegmenter
    from reward_fns.user import guard

logger = logging.getLogger(__name__)

NOT_TEXT = "response_not_text"
TRUTHS = 1024
"""Maximum number of checked ground truths that a reward caches."""


class Score(msgspec.Struct):
    """Score of one response."""

    reward: float
    """Weighted sum of the components."""
    components: dict[str, float] = {}
    """Unweighted values by name."""
    reasons: list[str] = []
    """Machine-readable codes without duplicates; empty if nothing was deducted."""


class Reward(ABC):
    """Scores responses one by one. Pure: equal arguments give equal scores."""

    name: str
    hash: str
    """sha256 of everything that decides the reward."""
    max_reward: float | None
    """Greatest possible reward; None for a user's function."""
    component_names: tuple[str, ...]
    """Components of every score."""

    @abstractmethod
    def score(self, response: str, ground_truth: Any, /, **kwargs: Any) -> Score:
        """Score one response. Raises InputError.

        Args:
            response: Any text; any other value scores as an empty text.
            ground_truth: Ground truth of the row, as a value or as JSON text.
            **kwargs: Other keys of the row.
        """


class RecipeReward(Reward):
    """A reward for one task, composed by a recipe."""

    max_reward: float

    def __init__(
        self, name: str, recipe: RewardRecipe, segmenter: MaskSegmenter | None = None
    ) -> None:
        self.name, self.recipe, self.hash = name, recipe, reward_hash(recipe)
        self.segmenter = segmenter
        self.component_names = tuple(recipe.components)
        self._truths: dict[str, Any] = {}
        known = modules()
        self._parts = [
            (key, part.weight, known[part.module].score, part.params)
            for key, part in recipe.components.items()
        ]
        self.max_reward = 0.0
        for part in recipe.components.values():
            self.max_reward += part.weight * known[part.module].maximum(part.params, recipe)

    def score(self, response: str, ground_truth: Any, /, **kwargs: Any) -> Score:
        """Score one response (eq. 13). Only `mask_iou` and `chosen_area` read `kwargs`."""
        truth = self._truths.get(ground_truth) if isinstance(ground_truth, str) else None
        if truth is None:
            truth = self._truth(ground_truth)
        is_text = isinstance(response, str)
        sample = Response(response if is_text else "", kwargs, self.segmenter)
        reward, components = 0.0, {}
        reasons: dict[str, None] = {} if is_text else {NOT_TEXT: None}
        for key, weight, score, params in self._parts:
            term = score(sample, truth, params, self.recipe)
            components[key] = value = term.value
            reward += weight * value
            if term.reasons and weight > 0:
                reasons.update(dict.fromkeys(term.reasons))
        return Score(reward, components, list(reasons))

    def _truth(self, value: Any) -> Any:
        """Check the ground truth. A JSON text is cached: the responses of a group share it."""
        truth = read_ground_truth(value, self.recipe)
        if isinstance(value, str):
            if len(self._truths) >= TRUTHS:
                self._truths.clear()
            self._truths[value] = truth
        return truth


class RoutedReward(Reward):
    """Routes rows by `data_source`; components that the row's recipe lacks are 0."""

    def __init__(
        self, name: str, recipe: RoutedRecipe, segmenter: MaskSegmenter | None = None
    ) -> None:
        self.name, self.recipe, self.hash = name, recipe, reward_hash(recipe)
        self.routes = {
            source: RecipeReward(f"{name}:{source}", part, segmenter)
            for source, part in recipe.routes.items()
        }
        names = [key for route in self.routes.values() for key in route.component_names]
        self.component_names = tuple(dict.fromkeys(names))
        self.max_reward = max(route.max_reward for route in self.routes.values())

    def route(self, data_source: Any) -> RecipeReward:
        """Return the reward for rows of one source. Raises InputError for an unknown source."""
        if not isinstance(data_source, str) or data_source not in self.routes:
            known = ", ".join(self.routes)
            raise InputError(
                f"{self.name} has routes for {known}; not for {data_source!r}", key="data_source"
            )
        return self.routes[data_source]

    def score(self, response: str, ground_truth: Any, /, **kwargs: Any) -> Score:
        """Score with the recipe of `kwargs["data_source"]`."""
        score = self.route(kwargs.get("data_source")).score(response, ground_truth, **kwargs)
        components = {key: score.components.get(key, 0.0) for key in self.component_names}
        return Score(score.reward, components, score.reasons)


class UserReward(Reward):
    """A user's function, in a separate process (`guard.py`) and with a deadline.

    Its components are those that it declares (COMPONENTS) or else those of its first valid result;
    a later result with other keys is invalid. A failure costs only its own sample: reward 0, every
    known component 0, and a reason `reward_function_*`.
    """

    def __init__(self, source: UserSource, canvas: int | None, deadline_s: float | None) -> None:
        from reward_fns.user import guard

        self.name, self.canvas = source.spec, canvas
        self.deadline_s = guard.DEADLINE_S if deadline_s is None else deadline_s
        constants = {} if canvas is None else {"canvas": canvas}
        self.guard = guard.Guard(source, constants, self.deadline_s)
        traits = self.guard.traits
        content = f"{traits.digest} {source.name} {canvas}"
        self.hash = hashlib.sha256(content.encode()).hexdigest()
        self.max_reward = None
        self.component_names = traits.components or ()
        self._declared = traits.components is not None
        self._logged: set[str] = set()

    def score(self, response: str, ground_truth: Any, /, **kwargs: Any) -> Score:
        """Call the function, with `canvas` if `load_reward` got one. Raises InputError."""
        return self.score_batch([(response, ground_truth, kwargs)])[0]

    def score_batch(self, rows: Sequence[tuple[Any, Any, Mapping[str, Any]]]) -> list[Score]:
        """Score rows of (response, ground truth, other keys); a batch function in one call."""
        results = self.guard.call([self.sample(*row) for row in rows])
        return [self.finish(row[0], result) for row, result in zip(rows, results, strict=True)]

    def sample(self, response: Any, ground_truth: Any, row: Mapping[str, Any]) -> list[Any]:
        """Return the guard's input: response, ground truth, and the row keys the function takes."""
        keys = self.guard.traits.row_keys
        passed = row if keys is None else {key: row[key] for key in keys if key in row}
        return [response if isinstance(response, str) else "", ground_truth, passed]

    def finish(self, response: Any, result: guard.Result) -> Score:
        """Turn one result of the guard into a score that has the same components on every row."""
        failed, message = result.failed, result.message
        if not failed:
            if not self.component_names and not self._declared:
                self.component_names, self._declared = tuple(result.components), True
            if result.components.keys() != set(self.component_names):
                failed = [BAD_RESULT]
                expected = list(self.component_names)
                message = f"components {sorted(result.components)}, not {expected}"
        reasons = [] if isinstance(response, str) else [NOT_TEXT]
        if failed:
            self._log_once(failed, message)
            components = dict.fromkeys(self.component_names, 0.0)
            return Score(0.0, components, [*reasons, *failed])
        components = {key: result.components[key] for key in self.component_names}
        return Score(result.reward, components, [*reasons, *result.reasons])

    def _log_once(self, failed: list[str], message: str) -> None:
        """Log each kind of failure once; the reasons of the scores count them."""
        if failed[-1] not in self._logged:
            self._logged.add(failed[-1])
            logger.warning("%s: %s: %s (reward 0; logged once)", self.name, failed[0], message)

    def close(self) -> None:
        """End the function's process; a later call starts a new one."""
        self.guard.close()


def load_reward(
    spec: str,
    *,
    canvas: int | None = None,
    overrides: Mapping[str, Any] | None = None,
    deadline_s: float | None = None,
    segmenter: MaskSegmenter | None = None,
) -> Reward:
    """Load a reward. Raises InputError.

    Args:
        spec: Name (`aks`, `ktg`, …), YAML recipe, FILE.py:FUNCTION or pkg://module.
        canvas: Side of the image that the policy sees, in pixels. Distance thresholds refer to 840
            pixels and are scaled to it.
        overrides: Recipe keys, dotted or nested, to values.
        deadline_s: Seconds that a call of a user's function may take, 10 by default. Recipes have
            no deadline.
        segmenter: Makes the masks of `mask_iou`.
    """
    if deadline_s is not None and not deadline_s > 0:
        raise InputError("must be greater than 0", key="deadline_s")
    shipped = frozenset(REWARDS.names)
    source = find_source(spec, shipped)
    if source is not None:
        if overrides:
            raise InputError("a function has no recipe keys to override", key=next(iter(overrides)))
        return _logged(UserReward(source, canvas, deadline_s))
    recipe = load_reward_recipe(spec, canvas=canvas, overrides=overrides)
    if isinstance(recipe, RoutedRecipe):
        return _logged(RoutedReward(spec, recipe, segmenter))
    return _logged(RecipeReward(spec, recipe, segmenter))


def _logged(reward: Reward) -> Reward:
    logger.info(
        "reward %s: components %s, maximum %s, sha256 %s",
        reward.name,
        ", ".join(reward.component_names) or "not declared",
        reward.max_reward,
        reward.hash[:12],
    )
    return reward
