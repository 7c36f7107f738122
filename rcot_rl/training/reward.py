"""verl's custom reward function: any reward of `reward_fns`, awaited, a deadline on every sample.

verl loads this module in every reward worker by `reward.custom_reward_function.path`; a reward is
loaded once per process. `compute_score` never blocks the worker's event loop:

- a recipe scores in a thread; one that overruns (only `mask_iou`, which asks another process, can)
  is left behind;
- a user's plain function gets sample after sample in its own process, a batch function all samples
  that wait, and the calls of an async one overlap. The process of one that overruns is ended.

The deadline is the sample's own: waiting for its turn does not count. On an overrun the reward is
0, with every component 0 and `deadline` among the reasons.

Left out: InputError, for a broken ground truth is a fault of the shards; it ends the group.
"""

from __future__ import annotations

import asyncio
import functools
import time
import weakref
from collections import deque
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from reward_fns.recipe import Recipe, RoutedRecipe, load_recipe
from reward_fns.score import Reward, Score, UserReward, load_reward
from reward_fns.user.guard import DEADLINE_S, TIMEOUT
from reward_fns.user.guard_async import Multiplexer
from reward_fns.user.sources import find_source

DEADLINE = "deadline"
"""The reason of a sample that overran, whichever way."""

GATHER_S = 0.02
"""How long a batch function's first sample waits for company."""
MAX_BATCH = 128
SEGMENTER_MODULE = "mask_iou"
SEGMENTER_CALLS = 16
"""Open calls a worker of a reward that asks the segmenter, which batches them."""


@dataclass(frozen=True)
class Timed:
    """A score and the seconds it took, its waiting left out."""

    score: Score
    seconds: float


class RecipeScorer:
    """A recipe in threads; `calls` samples at a time."""

    def __init__(self, reward: Reward, deadline_s: float, calls: int) -> None:
        self._reward, self._deadline_s, self._calls = reward, deadline_s, calls
        self._turn, self._pool = asyncio.Semaphore(calls), ThreadPoolExecutor(calls)

    async def score(self, response: str, truth: Any, row: Mapping[str, Any]) -> Timed:
        """Raises InputError as `Reward.score`."""
        call = functools.partial(self._reward.score, response, truth, **row)
        async with self._turn:
            start, pool = time.perf_counter(), self._pool
            try:
                future = asyncio.get_running_loop().run_in_executor(pool, call)
                score = await asyncio.wait_for(future, self._deadline_s)
            except TimeoutError:
                if pool is self._pool:  # its threads may be stuck for good
                    self._pool = ThreadPoolExecutor(self._calls)
                    pool.shutdown(wait=False)
                score = Score(0.0, dict.fromkeys(self._reward.component_names, 0.0), [DEADLINE])
            return Timed(score, time.perf_counter() - start)


class TurnScorer:
    """A user's plain or batch function: one call at a time, of what waits."""

    def __init__(self, reward: UserReward) -> None:
        self._reward = reward
        self._size = MAX_BATCH if reward.guard.traits.batch else 1
        self._waiting: deque[tuple[Any, asyncio.Future[Timed]]] = deque()
        self._thread = ThreadPoolExecutor(1)
        self._serving: asyncio.Task[None] | None = None

    async def score(self, response: str, truth: Any, row: Mapping[str, Any]) -> Timed:
        """Raises InputError as `UserReward.score`."""
        future: asyncio.Future[Timed] = asyncio.get_running_loop().create_future()
        self._waiting.append(((response, truth, row), future))
        if self._serving is None or self._serving.done():
            self._serving = asyncio.create_task(self._serve())
        return await future

    async def _serve(self) -> None:
        while self._waiting:
            if self._size > 1:
                await asyncio.sleep(GATHER_S)
            count = min(self._size, len(self._waiting))
            taken = [self._waiting.popleft() for _ in range(count)]
            start = time.perf_counter()
            try:
                scores = await asyncio.get_running_loop().run_in_executor(
                    self._thread, self._reward.score_batch, [row for row, _ in taken]
                )
            except Exception as error:  # each caller gets it, the next batch is served
                for _, future in taken:
                    if not future.done():
                        future.set_exception(error)
                continue
            seconds = (time.perf_counter() - start) / count
            for (_, future), score in zip(taken, scores, strict=True):
                if not future.done():
                    future.set_result(Timed(score, seconds))


class AsyncScorer:
    """A user's async function, its calls overlapping."""

    def __init__(self, reward: UserReward) -> None:
        self._reward, self._calls = reward, Multiplexer(reward.guard)

    async def score(self, response: str, truth: Any, row: Mapping[str, Any]) -> Timed:
        """Raises InputError as `UserReward.score`."""
        start = time.perf_counter()
        result = await self._calls.call(self._reward.sample(response, truth, row))
        return Timed(self._reward.finish(response, result), time.perf_counter() - start)


Scorer = RecipeScorer | TurnScorer | AsyncScorer
_SCORERS: weakref.WeakKeyDictionary[Any, dict[Any, Scorer]] = weakref.WeakKeyDictionary()
"""By event loop: what a scorer waits on belongs to one."""


def scorer(reward: str, canvas: int, deadline_s: float) -> Scorer:
    """The scorer of the running event loop; made when first asked for. Raises InputError."""
    own = _SCORERS.setdefault(asyncio.get_running_loop(), {})
    key = (reward, canvas, deadline_s)
    if key not in own:
        own[key] = _make(load(*key), deadline_s)
    return own[key]


def _make(reward: Reward, deadline_s: float) -> Scorer:
    if not isinstance(reward, UserReward):
        recipe = getattr(reward, "recipe", None)
        calls = SEGMENTER_CALLS if recipe is not None and needs_segmenter(recipe) else 1
        return RecipeScorer(reward, deadline_s, calls)
    traits = reward.guard.traits
    return AsyncScorer(reward) if traits.is_async and not traits.batch else TurnScorer(reward)


def needs_segmenter(recipe: Recipe | RoutedRecipe) -> bool:
    """Whether a component of the recipe makes masks."""
    recipes = recipe.routes.values() if isinstance(recipe, RoutedRecipe) else [recipe]
    return any(c.module == SEGMENTER_MODULE for r in recipes for c in r.components.values())


@functools.lru_cache(maxsize=8)
def load(name: str, canvas: int, deadline_s: float) -> Reward:
    """The reward, once a process; masks are the run's segmenter's. Raises InputError."""
    if find_source(name) is None and needs_segmenter(load_recipe(name, canvas=canvas)):
        from rcot_rl.inference.segmenter_actor import segmenter_handle

        return load_reward(name, canvas=canvas, segmenter=segmenter_handle())
    return load_reward(name, canvas=canvas, deadline_s=deadline_s)


async def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: Any,
    extra_info: dict[str, Any] | None = None,
    *,
    reward: str,
    canvas: int,
    deadline_s: float = DEADLINE_S,
    **row: Any,
) -> dict[str, Any]:
    """Score one response (eq. 13). row: further keys for a user's function.

    Returns `score`, the weighted sum; every component, unweighted, as `component/<name>`;
    `reasons`, codes joined by ";"; and `reward_seconds`. The keys are the same for every row, as
    verl requires. Raises InputError for a broken ground truth.
    """
    known = scorer(reward, canvas, deadline_s)
    timed = await known.score(
        solution_str, ground_truth, {**row, "data_source": data_source, "extra_info": extra_info}
    )
    score, reasons = timed.score, list(timed.score.reasons)
    if TIMEOUT in reasons:
        reasons.append(DEADLINE)
    components = {f"component/{name}": value for name, value in score.components.items()}
    codes = ";".join(reason.replace(";", ",") for reason in reasons)
    return {
        "score": score.reward,
        **components,
        "reasons": codes,
        "reward_seconds": timed.seconds,
    }
