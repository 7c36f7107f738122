"""What trackers receive about a stage, as a function of the run's files.

Keys are those of metrics.jsonl, with figures of the rollouts (`rollout_figures`) added; names that
are added may be filtered and sorted by in trackers that accept only letters, digits, `_` and `/`.
docs/tracked-values.md lists them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from rcot_rl.errors import InputError
from rcot_rl.monitoring.judgement.landmarks import RewardFacts, reward_facts
from rcot_rl.monitoring.run_files.rollout_figures import rollout_figures
from rcot_rl.monitoring.run_files.rollout_files import Rollout, read_rollouts
from rcot_rl.monitoring.run_files.run_reader import REASON, REASON_COUNT, RunReader
from rcot_rl.monitoring.trackers.rollout_tables import RolloutTables, component_names
from rcot_rl.monitoring.trackers.stage_artifacts import stage_artifacts
from rcot_rl.monitoring.trackers.stage_results import stage_results
from rcot_rl.monitoring.trackers.stage_summary import stage_summary
from rcot_rl.monitoring.trackers.tracker import DataTable, Distribution, TrackedArtifact, Value
from rcot_rl.recipe.training_section import GrpoStage
from rcot_rl.stats.json_values import is_number
from rcot_rl.stats.spacing import evenly_spaced
from reward_fns.reason_codes import reason_codes
from reward_fns.reward_recipe import load_reward_recipe
from reward_fns.user.user_result import BAD_RESULT, DIED, RAISED, TIMEOUT

DEADLINE = "deadline"
"""Code that training adds if scoring exceeds `reward_deadline_s` (`reward_function.py`)."""
MAX_CODES = 64
"""Reason codes of a stage that get their own key, beside those that its reward is known to give.
Later ones are added up as `other`."""
DISTRIBUTIONS = 100
"""About how many steps of a stage get distributions, evenly spaced."""
BINS = 32
MOST_POINTS = 1000
"""Most rows of a table to draw as points."""
_ADVANTAGE = 4.0
"""Range of the distribution of advantages, which are in standard deviations of a group."""


class StageSource:
    """Values, results, summary and artifacts of one stage.

    `step` expects each line of metrics.jsonl once, in order, from the first step or from any later
    one: what it returns does not depend on where it began, up to codes that no shipped reward
    gives.
    """

    def __init__(self, reader: RunReader, stage: str) -> None:
        self._reader, self._stage = reader, stage
        recipe = reader.recipe
        settings = recipe.train.get(stage) if recipe is not None else None
        self._grpo = settings if isinstance(settings, GrpoStage) else None
        self._codes = dict.fromkeys(_known_codes(self._grpo))
        self._n_codes = len(self._codes) + MAX_CODES
        for line in reader.metrics(stage):
            self._add_codes(line)
        total = self._grpo.steps if self._grpo else 0
        tables = recipe.tracking.rollout_tables if recipe is not None else 0
        self._table_steps = chosen_steps(total, tables)
        self._distribution_steps = chosen_steps(total, DISTRIBUTIONS)

    def step(self, line: dict[str, Any]) -> dict[str, Value]:
        """Return the values of a step: its metrics, figures of its rollouts and, at chosen steps,
        distributions and tables.

        Args:
            line: A line of metrics.jsonl.
        """
        self._add_codes(line)
        step = line.get("step")
        values: dict[str, Value] = self._with_reasons(
            {key: value for key, value in line.items() if key != "step" and is_number(value)}
        )
        if self._grpo is None or not isinstance(step, int):
            return values
        rollouts = read_rollouts(self._reader.root / self._stage, step)
        if not rollouts:
            return values
        figures = rollout_figures(rollouts, self._reward.maximum)
        values |= {key: value for key, value in figures.items() if is_number(value)}
        if step in self._distribution_steps:
            values |= self._distributions(rollouts)
        if self._tables is not None:
            values |= self._tables.same_prompts(step, rollouts)
            if step in self._table_steps:
                values |= self._tables.tables(step, rollouts)
                values |= _points(step, rollouts) | self._curve(step)
        return values

    def results(self) -> dict[str, Value]:
        """Return the results of a stage without steps; empty for a training stage."""
        return stage_results(self._reader, self._stage)

    def summary(self) -> dict[str, Value]:
        """Return values of the whole stage, with the results that later stages found for it."""
        return stage_summary(self._reader, self._stage)

    def artifacts(self) -> list[TrackedArtifact]:
        """Return the files that the stage made and used, as far as they exist."""
        return stage_artifacts(self._reader, self._stage)

    @cached_property
    def _reward(self) -> RewardFacts:
        return reward_facts(self._reader, self._stage)

    @cached_property
    def _tables(self) -> RolloutTables | None:
        return RolloutTables(self._reader, self._stage) if self._table_steps else None

    def _add_codes(self, line: dict[str, Any]) -> None:
        """Note the codes that a step gave, in the order of their first step."""
        given = {k.removeprefix(REASON) for k, v in line.items() if k.startswith(REASON) and v}
        for code in sorted(given - self._codes.keys()):
            if len(self._codes) < self._n_codes:
                self._codes[code] = None

    def _with_reasons(self, values: dict[str, Value]) -> dict[str, Value]:
        """Return the values with 0 for absent reasons, and further codes added up as `other`."""
        if self._grpo is None:
            return values
        out: dict[str, Value] = {}
        for prefix in (REASON, REASON_COUNT):
            out |= {f"{prefix}{code}": 0.0 for code in self._codes}
        for key, value in values.items():
            prefix, _, code = key.partition("/")
            if f"{prefix}/" in (REASON, REASON_COUNT) and code not in self._codes:
                if not value:
                    continue
                key = f"{prefix}/other"
                value = float(out.get(key, 0.0)) + float(value)  # type: ignore[arg-type]
            out[key] = value
        return out

    def _distributions(self, rollouts: Sequence[Rollout]) -> dict[str, Value]:
        """Return distributions with the same edges at every step, as far as ranges are known."""
        assert self._grpo is not None
        tokens = [r.tokens for r in rollouts if r.tokens is not None]
        advantages = [r.advantage for r in rollouts if r.advantage is not None]
        longest = float(self._grpo.max_response_length)
        columns: dict[str, tuple[list[float], float, float | None]] = {
            "reward": ([r.reward for r in rollouts], 0.0, self._reward.maximum),
            "response_length": ([float(n) for n in tokens], 0.0, longest),
            "advantage": (advantages, -_ADVANTAGE, _ADVANTAGE),
        }
        maxima = self._reward.maxima or {}
        for name in component_names(rollouts):
            values = [r.components.get(name, 0.0) for r in rollouts]
            columns[f"reward/{name}"] = (values, 0.0, maxima.get(name))
        return {
            f"distribution/{name}": distribution
            for name, (values, low, high) in columns.items()
            if (distribution := distribution_of(values, low, high)) is not None
        }

    def _curve(self, step: int) -> dict[str, Value]:
        """Return length, KL and entropy against the reward, one row for each step so far."""
        keys = ("response_length/mean", "actor/kl_loss", "actor/entropy", "reward/mean")
        lines = [s for s in self._reader.metrics(self._stage) if s.get("step", 0) <= step]
        shown = [lines[i] for i in evenly_spaced(len(lines), MOST_POINTS)]
        rows = [
            [s["step"], *(s.get(key) for key in keys)]
            for s in shown
            if all(s.get(key) is None or is_number(s[key]) for key in keys)
        ]
        columns = ["step", "response_length", "kl_loss", "entropy", "reward"]
        return {"length_and_kl_vs_reward": DataTable(columns, rows)}


def chosen_steps(total: int, count: int) -> frozenset[int]:
    """Return up to `count` of a stage's steps 1 to `total`, evenly spaced, the last included."""
    return frozenset(i + 1 for i in evenly_spaced(total, count))


def distribution_of(
    values: Sequence[float], low: float, high: float | None, bins: int = BINS
) -> Distribution | None:
    """Return the counts of values in equal bins; None without finite values.

    Args:
        values: Those outside the range count in the first or the last bin.
        low: Lower end; lower values extend it if `high` is None.
        high: Upper end. None: the greatest value.
        bins: Number of bins.
    """
    array = np.asarray(values, dtype=float)
    array = array[np.isfinite(array)]
    if not array.size:
        return None
    if high is None:
        low, high = min(low, float(array.min())), float(array.max())
    if high <= low:
        high = low + 1.0
    counts, edges = np.histogram(np.clip(array, low, high), bins=bins, range=(low, high))
    return Distribution(edges.tolist(), counts.tolist())


def _points(step: int, rollouts: Sequence[Rollout]) -> dict[str, Value]:
    """Return length against reward, one row for each response with a known length."""
    rows = [
        [
            step,
            str(r.index if r.index is not None else r.prompt_id),
            r.tokens,
            r.reward,
            r.advantage,
        ]
        for r in rollouts
        if r.tokens is not None
    ]
    chosen = [rows[i] for i in evenly_spaced(len(rows), MOST_POINTS)]
    columns = ["step", "prompt", "tokens", "reward", "advantage"]
    return {"length_vs_reward": DataTable(columns, chosen)} if rows else {}


def _known_codes(settings: GrpoStage | None) -> list[str]:
    """Return the codes that the stage's reward is known to give."""
    if settings is None:
        return []
    try:
        codes = reason_codes(load_reward_recipe(settings.reward))
    except InputError:  # a user's function, or a file that is not on this host
        codes = [RAISED, BAD_RESULT, TIMEOUT, DIED]
    return [*codes, DEADLINE]
