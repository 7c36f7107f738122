"""`load_reward`: from a name, a recipe file or FILE.py:FUNCTION to something that scores.

Implements equation 13 of the paper: the reward is the weighted sum of the components.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rcot_rl.errors import InputError
from reward_fns import user
from reward_fns.ground_truth import read_ground_truth
from reward_fns.recipe import Recipe, RoutedRecipe, load_recipe, recipe_hash
from reward_fns.registry import Response, modules

NOT_TEXT = "response_not_text"


@dataclass(frozen=True)
class Score:
    """The score of one response."""

    reward: float
    """The weighted sum."""
    components: dict[str, float] = field(default_factory=dict)
    """Unweighted, by name."""
    reasons: list[str] = field(default_factory=list)
    """Machine-readable codes, each once; empty when nothing was deducted."""


class Reward(ABC):
    """Scores responses one by one. Pure: equal arguments, equal scores."""

    name: str
    hash: str
    """sha256 of all that decides the reward."""
    max_reward: float | None
    """The greatest reward; None for a user's function, which does not say."""
    component_names: tuple[str, ...]
    """The components of every score."""

    @abstractmethod
    def score(self, response: str, ground_truth: Any, **kwargs: Any) -> Score:
        """Score one response, of which nothing is assumed.

        kwargs: the row's other keys. Raises InputError when the ground truth, or a key that the
        reward needs, is broken or missing.
        """


class RecipeReward(Reward):
    """A reward of one task, composed by a recipe."""

    max_reward: float

    def __init__(self, name: str, recipe: Recipe) -> None:
        self.name, self.recipe, self.hash = name, recipe, recipe_hash(recipe)
        self.component_names = tuple(recipe.components)
        known = modules()
        self._parts = [
            (key, part.weight, known[part.module], part.params)
            for key, part in recipe.components.items()
        ]
        self.max_reward = 0.0
        for _, weight, module, params in self._parts:
            self.max_reward += weight * module.maximum(params, recipe)

    def score(self, response: str, ground_truth: Any, **kwargs: Any) -> Score:
        """Equation 13; kwargs play no part."""
        truth = read_ground_truth(ground_truth, self.recipe)
        is_text = isinstance(response, str)
        sample = Response(response if is_text else "")
        reward, components, reasons = 0.0, {}, {} if is_text else {NOT_TEXT: None}
        for key, weight, module, params in self._parts:
            term = module.score(sample, truth, params, self.recipe)
            components[key] = term.value
            reward += weight * term.value
            if weight > 0:
                reasons.update(dict.fromkeys(term.reasons))
        return Score(reward, components, list(reasons))


class RoutedReward(Reward):
    """Rows of several tasks in one batch, told apart by `data_source`.

    Every score has the same components; those that a row's own recipe lacks are 0.
    """

    def __init__(self, name: str, recipe: RoutedRecipe) -> None:
        self.name, self.recipe, self.hash = name, recipe, recipe_hash(recipe)
        self.routes = {
            source: RecipeReward(f"{name}:{source}", part) for source, part in recipe.routes.items()
        }
        names = [key for route in self.routes.values() for key in route.component_names]
        self.component_names = tuple(dict.fromkeys(names))
        self.max_reward = max(route.max_reward for route in self.routes.values())

    def route(self, data_source: Any) -> RecipeReward:
        """The reward of the rows of one source. Raises InputError for an unknown one."""
        if not isinstance(data_source, str) or data_source not in self.routes:
            known = ", ".join(self.routes)
            raise InputError(
                f"{self.name} needs one of: {known}; not {data_source!r}", key="data_source"
            )
        return self.routes[data_source]

    def score(self, response: str, ground_truth: Any, **kwargs: Any) -> Score:
        """Score by the recipe of `kwargs["data_source"]`."""
        score = self.route(kwargs.get("data_source")).score(response, ground_truth, **kwargs)
        components = {key: score.components.get(key, 0.0) for key in self.component_names}
        return Score(score.reward, components, score.reasons)


class UserReward(Reward):
    """A user's function. Its components are known once it has scored a first response."""

    def __init__(self, spec: str, canvas: int | None) -> None:
        self.name = spec
        self.function, self.hash = user.load_function(spec)
        self.canvas = canvas
        self.max_reward = None
        self.component_names = ()

    def score(self, response: str, ground_truth: Any, **kwargs: Any) -> Score:
        """Call the function; `canvas` is among the arguments if one was given to `load_reward`."""
        if self.canvas is not None:
            kwargs = {"canvas": self.canvas, **kwargs}
        is_text = isinstance(response, str)
        kwargs = user.accepted(self.function, kwargs)
        reward, components, reasons = user.call(
            self.function, response if is_text else "", ground_truth, kwargs
        )
        if components:
            self.component_names = tuple(components)
        else:  # a sample that failed keeps the keys of the others
            components = dict.fromkeys(self.component_names, 0.0)
        return Score(reward, components, reasons if is_text else [NOT_TEXT, *reasons])


def load_reward(
    spec: str, *, canvas: int | None = None, overrides: Mapping[str, Any] | None = None
) -> Reward:
    """The reward of that name (`aks`, `ktg`, …), YAML recipe, or FILE.py:FUNCTION.

    canvas: side of the image that the policy sees, in pixels; distance thresholds, given for 840,
    are scaled to it. overrides: recipe keys, dotted or nested, to values. Raises InputError.
    """
    if user.is_user_reward(spec):
        if overrides:
            raise InputError("a function has no recipe keys to override", key=next(iter(overrides)))
        return UserReward(spec, canvas)
    recipe = load_recipe(spec, canvas=canvas, overrides=overrides)
    if isinstance(recipe, RoutedRecipe):
        return RoutedReward(spec, recipe)
    return RecipeReward(spec, recipe)
