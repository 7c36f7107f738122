"""verl's custom reward function: any reward of `reward_fns`, with a deadline per sample.

verl loads this module in every reward worker by `reward.custom_reward_function.path`; a reward is
loaded once per process. `compute_score` never blocks the worker's event loop:

- A recipe scores in a thread. A sample that overruns (only `mask_iou`, which calls another process,
  can) is abandoned.
- A user's function runs in its own process: a plain one gets one sample after another, a batch
  function all waiting samples, and the calls of an async one overlap. The process is killed when a
  sample overruns.

The deadline covers the sample's own scoring, not its wait. A sample that overruns gets reward 0,
every component 0, and `deadline` among its reasons. InputError is raised, not scored: a broken
ground truth is a fault of the shards, and ends the group.
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

from reward_fns.reward_recipe import RewardRecipe, RoutedRecipe, load_reward_recipe
from reward_fns.score import Reward, Score, UserReward, load_reward
from reward_fns.user.guard import DEADLINE_S, TIMEOUT
from reward_fns.user.guard_async import Multiplexer
from reward_fns.user.sources import find_source

DEADLINE = "deadline"
"""Reason code of a sample that overran, in every case."""

GATHER_S = 0.02
"""Seconds that a batch function's first sample waits for others."""
MAX_BATCH = 128
"""Most samples in one call of a batch function."""

SEGMENTER_MODULE = "mask_iou"
SEGMENTER_CALLS = 16
"""Open calls per worker of a reward that uses the segmenter, which batches them."""


@dataclass(frozen=True)
class TimedScore:
    """A score and the seconds it took, without the wait before it."""

    score: Score
    seconds: float


class RecipeScorer:
    """Scores with a recipe in threads, at most `calls` samples at a time."""

    def __init__(self, reward: Reward, deadline_s: float, calls: int) -> None:
        self._reward, self._deadline_s, self._calls = reward, deadline_s, calls
        self._turn, self._pool = asyncio.Semaphore(calls), ThreadPoolExecutor(calls)

    async def score(self, response: str, truth: Any, row: Mapping[str, Any]) -> TimedScore:
        """Score one sample. Raises InputError as `Reward.score`."""
        call = functools.partial(self._reward.score, response, truth, **row)
        async with self._turn:
            start, pool = time.perf_counter(), self._pool
            try:
                future = asyncio.get_running_loop().run_in_executor(pool, call)
                score = await asyncio.wait_for(future, self._deadline_s)
            except TimeoutError:
                if pool is self._pool:  # its threads may never return
                    self._pool = ThreadPoolExecutor(self._calls)
                    pool.shutdown(wait=False)
                score = Score(0.0, dict.fromkeys(self._reward.component_names, 0.0), [DEADLINE])
            return TimedScore(score, time.perf_counter() - start)


class TurnScorer:
    """Scores with a user's plain or batch function: one call at a time, on the waiting samples."""

    def __init__(self, reward: UserReward) -> None:
        self._reward = reward
        self._size = MAX_BATCH if reward.guard.traits.batch else 1
        self._waiting: deque[tuple[Any, asyncio.Future[TimedScore]]] = deque()
        self._thread = ThreadPoolExecutor(1)
        self._serving: asyncio.Task[None] | None = None

    async def score(self, response: str, truth: Any, row: Mapping[str, Any]) -> TimedScore:
        """Score one sample. Raises InputError as `UserReward.score`."""
        future: asyncio.Future[TimedScore] = asyncio.get_running_loop().create_future()
        self._waiting.append(((response, truth, row), future))
        if self._serving is None or self._serving.done():
            self._serving = asyncio.create_task(self._serve())
        return await future

    async def _serve(self) -> None:
        while self._waiting:
            if self._size > 1:
                await asyncio.sleep(GATHER_S)
            count = min(self._size, len(self._waiting))
            batch = [self._waiting.popleft() for _ in range(count)]
            start = time.perf_counter()
            try:
                scores = await asyncio.get_running_loop().run_in_executor(
                    self._thread, self._reward.score_batch, [row for row, _ in batch]
                )
            except Exception as error:  # raised to each caller; the next batch is served
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)
                continue
            seconds = (time.perf_counter() - start) / count
            for (_, future), score in zip(batch, scores, strict=True):
                if not future.done():
                    future.set_result(TimedScore(score, seconds))


class AsyncScorer:
    """Scores with a user's async function; calls overlap."""

    def __init__(self, reward: UserReward) -> None:
        self._reward, self._calls = reward, Multiplexer(reward.guard)

    async def score(self, response: str, truth: Any, row: Mapping[str, Any]) -> TimedScore:
        """Score one sample. Raises InputError as `UserReward.score`."""
        start = time.perf_counter()
        result = await self._calls.call(self._reward.sample(response, truth, row))
        return TimedScore(self._reward.finish(response, result), time.perf_counter() - start)


Scorer = RecipeScorer | TurnScorer | AsyncScorer
_SCORERS: weakref.WeakKeyDictionary[Any, dict[Any, Scorer]] = weakref.WeakKeyDictionary()
"""By event loop: a scorer's futures belong to one loop."""


def scorer(reward: str, canvas: int, deadline_s: float) -> Scorer:
    """Return the running event loop's scorer, built on first use. Raises InputError as `load`."""
    scorers = _SCORERS.setdefault(asyncio.get_running_loop(), {})
    key = (reward, canvas, deadline_s)
    if key not in scorers:
        scorers[key] = _build(load(*key), deadline_s)
    return scorers[key]


def _build(reward: Reward, deadline_s: float) -> Scorer:
    if not isinstance(reward, UserReward):
        recipe = getattr(reward, "recipe", None)
        calls = SEGMENTER_CALLS if recipe is not None and needs_segmenter(recipe) else 1
        return RecipeScorer(reward, deadline_s, calls)
    traits = reward.guard.traits
    return AsyncScorer(reward) if traits.is_async and not traits.batch else TurnScorer(reward)


def needs_segmenter(recipe: RewardRecipe | RoutedRecipe) -> bool:
    """Return True if a component of the recipe computes masks."""
    recipes = recipe.routes.values() if isinstance(recipe, RoutedRecipe) else [recipe]
    return any(c.module == SEGMENTER_MODULE for r in recipes for c in r.components.values())


@functools.lru_cache(maxsize=8)
def load(name: str, canvas: int, deadline_s: float) -> Reward:
    """Load a reward once per process, with the run's segmenter for masks. Raises InputError."""
    if find_source(name) is None and needs_segmenter(load_reward_recipe(name, canvas=canvas)):
        from rcot_rl.segmentation.segmenter_actor import segmenter_handle

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
    rehearsed: Mapping[str, str] | None = None,
    **row: Any,
) -> dict[str, Any]:
    """Score one response (eq. 13). Raises InputError.

    Args:
        reward: A shipped reward, a reward recipe's file, or FILE.py:FUNCTION.
        rehearsed: Data source -> reward of the rows that have another reward than the stage's.
        row: Further keys for a user's function.

    Returns:
        `score`, the weighted sum; every component, unweighted, as `component/<name>`; `reasons`,
        codes joined by ";"; and `reward_seconds`. Rows with the same reward have the same keys.
    """
    used = (rehearsed or {}).get(data_source, reward)
    timed = await scorer(used, canvas, deadline_s).score(
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
