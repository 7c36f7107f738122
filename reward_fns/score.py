"""`load_reward`: from a name, a recipe file or FILE.py:FUNCTION to something that scores.

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
from reward_fns.recipe import SHIPPED, Recipe, RoutedRecipe, load_recipe, recipe_hash
from reward_fns.registry import Response, modules
from reward_fns.user import sources as user

if TYPE_CHECKING:
    from reward_fns.components.mask_iou import Segmenter
    from reward_fns.user import guard

_LOG = logging.getLogger(__name__)

NOT_TEXT = "response_not_text"
TRUTHS = 1024
"""Checked ground truths that a reward keeps."""


class Score(msgspec.Struct):
    """The score of one response."""

    reward: float
    """The weighted sum."""
    components: dict[str, float] = {}
    """Unweighted, by name."""
    reasons: list[str] = []
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
    def score(self, response: str, ground_truth: Any, /, **kwargs: Any) -> Score:
        """Score one response, of which nothing is assumed.

        kwargs: the row's other keys. Raises InputError when the ground truth, or a key that the
        reward needs, is broken or missing.
        """


class RecipeReward(Reward):
    """A reward of one task, composed by a recipe."""

    max_reward: float

    def __init__(self, name: str, recipe: Recipe, segmenter: Segmenter | None = None) -> None:
        self.name, self.recipe, self.hash = name, recipe, recipe_hash(recipe)
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
        """Equation 13; of kwargs, `mask_iou` alone reads the row's clip."""
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
        """The ground truth, checked; that of a text is kept, for a group's responses share it."""
        truth = read_ground_truth(value, self.recipe)
        if isinstance(value, str):
            if len(self._truths) >= TRUTHS:
                self._truths.clear()
            self._truths[value] = truth
        return truth


class RoutedReward(Reward):
    """Rows of several tasks in one batch, told apart by `data_source`.

    Every score has the same components; those that a row's own recipe lacks are 0.
    """

    def __init__(self, name: str, recipe: RoutedRecipe, segmenter: Segmenter | None = None) -> None:
        self.name, self.recipe, self.hash = name, recipe, recipe_hash(recipe)
        self.routes = {
            source: RecipeReward(f"{name}:{source}", part, segmenter)
            for source, part in recipe.routes.items()
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

    def score(self, response: str, ground_truth: Any, /, **kwargs: Any) -> Score:
        """Score by the recipe of `kwargs["data_source"]`."""
        score = self.route(kwargs.get("data_source")).score(response, ground_truth, **kwargs)
        components = {key: score.components.get(key, 0.0) for key in self.component_names}
        return Score(score.reward, components, score.reasons)


class UserReward(Reward):
    """A user's function, in a process of its own (`guard.py`) and under a deadline.

    Its components are those that it declares (COMPONENTS) or, without that, those of its first
    good result; a result with other keys is a bad one. Whatever the function does costs its own
    sample: reward 0, every known component 0, and the reasons `reward_function_*`.
    """

    def __init__(self, source: user.Source, canvas: int | None, deadline_s: float | None) -> None:
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
        self._said: set[str] = set()

    def score(self, response: str, ground_truth: Any, /, **kwargs: Any) -> Score:
        """Call the function; `canvas` is among the arguments if one was given to `load_reward`.

        Raises InputError for a row that JSON cannot hold.
        """
        return self.score_batch([(response, ground_truth, kwargs)])[0]

    def score_batch(self, rows: Sequence[tuple[Any, Any, Mapping[str, Any]]]) -> list[Score]:
        """Score (response, ground truth, other keys) each; a batch function gets them in one call.

        Raises as `score`.
        """
        results = self.guard.call([self.sample(*row) for row in rows])
        return [self.finish(row[0], result) for row, result in zip(rows, results, strict=True)]

    def sample(self, response: Any, ground_truth: Any, row: Mapping[str, Any]) -> list[Any]:
        """What the guard takes: of the row, the keys that the function can take."""
        keys = self.guard.traits.row_keys
        taken = row if keys is None else {key: row[key] for key in keys if key in row}
        return [response if isinstance(response, str) else "", ground_truth, taken]

    def finish(self, response: Any, result: guard.Result) -> Score:
        """The score that one result of the guard makes, with the keys of every other row."""
        from reward_fns.user.guard import BAD_RESULT

        failed, says = result.failed, result.says
        if not failed:
            if not self.component_names and not self._declared:
                self.component_names, self._declared = tuple(result.components), True
            if result.components.keys() != set(self.component_names):
                failed = [BAD_RESULT]
                says = f"components {sorted(result.components)}, not {list(self.component_names)}"
        reasons = [] if isinstance(response, str) else [NOT_TEXT]
        if failed:
            self._say(failed, says)
            components = dict.fromkeys(self.component_names, 0.0)
            return Score(0.0, components, [*reasons, *failed])
        components = {key: result.components[key] for key in self.component_names}
        return Score(result.reward, components, [*reasons, *result.reasons])

    def _say(self, failed: list[str], says: str) -> None:
        """Log each kind of failure once; the reasons count them."""
        if failed[-1] not in self._said:
            self._said.add(failed[-1])
            _LOG.warning("%s: %s: %s (reward 0; said once)", self.name, failed[0], says)

    def close(self) -> None:
        """End the function's process; a later call starts it again."""
        self.guard.close()


def load_reward(
    spec: str,
    *,
    canvas: int | None = None,
    overrides: Mapping[str, Any] | None = None,
    deadline_s: float | None = None,
    segmenter: Segmenter | None = None,
) -> Reward:
    """The reward of that name (`aks`, `ktg`, …), YAML recipe, or user's function (`user.py`).

    canvas: side of the image that the policy sees, in pixels; distance thresholds, given for 840,
    are scaled to it. overrides: recipe keys, dotted or nested, to values. deadline_s: what a call
    of a user's function may take, 10 s by default; recipes need none. segmenter: makes the masks of
    `mask_iou`. Raises InputError.
    """
    if deadline_s is not None and not deadline_s > 0:
        raise InputError("must be more than 0 seconds", key="deadline_s")
    shipped = frozenset(path.stem for path in SHIPPED.glob("*.yaml"))
    source = user.find_source(spec, shipped)
    if source is not None:
        if overrides:
            raise InputError("a function has no recipe keys to override", key=next(iter(overrides)))
        return UserReward(source, canvas, deadline_s)
    recipe = load_recipe(spec, canvas=canvas, overrides=overrides)
    if isinstance(recipe, RoutedRecipe):
        return RoutedReward(spec, recipe, segmenter)
    return RecipeReward(spec, recipe, segmenter)
