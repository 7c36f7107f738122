"""Levels and paired effects of a study, with intervals over clips and over seeds.

Two intervals answer two questions, as in `rcot compare`:

    over clips   Would other clips show the effect with these trained models? Each expression's
                 difference is averaged over the seeds; clips are the sample, each with all its
                 expressions.
    over seeds   Would other seeds show it on these clips? Each seed's mean difference is one value.

A benchmark's J&F is its own (ReVOS: the mean of the referring and the reasoning mean); `all` is the
mean over the expressions of all benchmarks that J&F counts.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from rcot_rl.monitoring.study.study_results import Cell, HeldoutReward, StudyResults, StudyRun
from rcot_rl.stats.benchmark_means import SUBSET_MEANS, is_counted, rounded
from rcot_rl.stats.intervals import Interval, mean_interval, stratified_interval

ALL = "all"
"""The column of all benchmarks together."""
TOTAL = "reward"
"""What a `RewardChange` of the whole reward is called."""


class Sample(NamedTuple):
    """What is averaged in a column: expressions by benchmark, with their clusters and strata."""

    members: Mapping[str, np.ndarray]
    """Benchmark -> indices of its expressions."""
    clusters: list[Hashable]
    strata: list[Hashable]


class Effect(NamedTuple):
    """A difference from a reference, in all seeds that have both."""

    per_seed: list[float]
    over_clips: Interval
    over_seeds: Interval
    is_zero: bool
    """True if no expression differs in any seed."""

    @property
    def mean(self) -> float:
        """The mean difference over the seeds."""
        return self.over_clips.mean

    @property
    def is_shown(self) -> bool:
        """True if both intervals exclude 0 on the same side."""
        return excludes_zero(self.over_clips) and excludes_zero(self.over_seeds)


def excludes_zero(interval: Interval) -> bool:
    """Return True for an interval that does not contain 0; False without one."""
    if interval.low is None or interval.high is None:
        return False
    return interval.low > 0 or interval.high < 0


@dataclass(frozen=True)
class Setting:
    """What one row of a table was measured with: a cell of a run, in each seed."""

    cell: str
    runs: Mapping[int, StudyRun]
    """Seed -> run."""

    @property
    def name(self) -> str:
        """The recipe and the cell, for readers."""
        recipe = next(iter(self.runs.values())).recipe
        return f"{recipe}: {self.cell}"


Values = Callable[[Cell], np.ndarray]
"""Returns one value per expression of a cell, NaN where there is none."""


def jf_of(dataset: str) -> Values:
    """Return J&F of expressions in percent, as the benchmark averages them."""
    return lambda cell: (rounded(dataset, cell.J) + rounded(dataset, cell.F)) / 2


def figure_of(name: str) -> Values:
    """Return another figure of expressions."""

    def values(cell: Cell) -> np.ndarray:
        given = cell.figures.get(name, [None] * len(cell.J))
        return np.array([np.nan if value is None else value for value in given], dtype=float)

    return values


class Study:
    """Levels and effects of a study's results."""

    def __init__(self, results: StudyResults) -> None:
        self.results = results

    @property
    def datasets(self) -> dict[str, str]:
        """Dataset -> its benchmark."""
        return {one.dataset: name for name, one in self.results.benchmarks.items()}

    @property
    def recipes(self) -> list[str]:
        """The recipes of the runs, in their order."""
        return list(dict.fromkeys(run.recipe for run in self.results.runs))

    def runs_of(self, recipe: str) -> dict[int, StudyRun]:
        """Return seed -> run of a recipe."""
        return {run.seed: run for run in self.results.runs if run.recipe == recipe}

    def setting(self, table: str, row: str) -> Setting | None:
        """Return what a row of a paper's table was measured with; None if nothing was.

        If several recipes have the row, the first one counts.
        """
        for recipe in self.recipes:
            runs = self.runs_of(recipe)
            for run in runs.values():
                cell = run.paper_tables.get(table, {}).get(row)
                if cell is not None:
                    same = {
                        seed: other
                        for seed, other in runs.items()
                        if other.paper_tables.get(table, {}).get(row) == cell
                    }
                    return Setting(cell, same)
        return None

    def columns(self) -> list[str]:
        """Return the benchmarks' datasets, in the results' order, and `all`."""
        return [*self.datasets, ALL]

    def sample(self, column: str, kind: str | None = None) -> Sample | None:
        """Return the expressions of a column; None if the study has none.

        Args:
            column: A dataset, `<dataset>/<subset>` or `all`.
            kind: Only expressions of this kind, each with equal weight.
        """
        dataset, _, subset = column.partition("/")
        names = list(self.datasets) if column == ALL else [dataset]
        members: dict[str, np.ndarray] = {}
        clusters: list[Hashable] = []
        strata: list[Hashable] = []
        for name in names:
            if name not in self.datasets:
                return None
            benchmark = self.results.benchmarks[self.datasets[name]]
            chosen = [
                index
                for index, of_one in enumerate(benchmark.subset)
                if (of_one == subset if subset else is_counted(name, of_one))
                and kind in (None, benchmark.kind[index])
            ]
            members[self.datasets[name]] = np.array(chosen, dtype=int)
            clusters += [(name, benchmark.clip[index]) for index in chosen]
            parted = column == name in SUBSET_MEANS and kind is None
            strata += [benchmark.subset[index] if parted else "" for index in chosen]
        return Sample(members, clusters, strata) if clusters else None

    def level(self, setting: Setting, sample: Sample, values: Values | None = None) -> float | None:
        """Return the mean over the seeds; None if no expression has a value."""
        matrix = self._matrix(setting, list(setting.runs), sample, values)
        known = [_level(row, sample) for row in matrix]
        return None if any(np.isnan(known)) else float(np.mean(known))

    def effect(
        self,
        setting: Setting,
        reference: Setting,
        sample: Sample,
        values: Values | None = None,
        reference_values: Values | None = None,
    ) -> Effect | None:
        """Return the difference of a setting from a reference; None without a common seed.

        Expressions without a value in either are left out.
        """
        seeds = sorted(setting.runs.keys() & reference.runs.keys())
        if not seeds:
            return None
        difference = self._matrix(setting, seeds, sample, values) - self._matrix(
            reference, seeds, sample, reference_values or values
        )
        known = ~np.isnan(difference).any(axis=0)
        if not known.any():
            return None
        clusters = [c for c, is_known in zip(sample.clusters, known, strict=True) if is_known]
        strata = [s for s, is_known in zip(sample.strata, known, strict=True) if is_known]
        difference = difference[:, known]
        per_seed = [stratified_interval(row, clusters, strata).mean for row in difference]
        return Effect(
            per_seed,
            stratified_interval(difference.mean(axis=0), clusters, strata),
            mean_interval(per_seed),
            not difference.any(),
        )

    def _matrix(
        self, setting: Setting, seeds: Sequence[int], sample: Sample, values: Values | None
    ) -> np.ndarray:
        """Return [seeds, expressions]; without `values`, J&F."""
        rows = []
        for seed in seeds:
            scores = setting.runs[seed].scores
            parts = []
            for name, chosen in sample.members.items():
                of = values or jf_of(self.results.benchmarks[name].dataset)
                cell = scores.get(name, {}).get(setting.cell)
                parts.append(np.full(len(chosen), np.nan) if cell is None else of(cell)[chosen])
            rows.append(np.concatenate(parts))
        return np.array(rows)


def _level(row: np.ndarray, sample: Sample) -> float:
    known = ~np.isnan(row)
    strata: dict[Hashable, list[float]] = {}
    for value, stratum, is_known in zip(row, sample.strata, known, strict=True):
        if is_known:
            strata.setdefault(stratum, []).append(float(value))
    return float(np.mean([np.mean(values) for values in strata.values()])) if strata else np.nan


class RewardChange(NamedTuple):
    """A held-out reward, or one of its components, before and after GRPO."""

    task: str
    way: str
    what: str
    """`TOTAL`, or a component's name."""
    before: float
    after: float
    over_prompts: Interval | None
    """None for components, of which only means are known, and if the seeds have other prompts."""
    over_seeds: Interval


def reward_changes(runs: Mapping[int, StudyRun]) -> list[RewardChange]:
    """Return what GRPO changed in the held-out rewards of one recipe's runs."""
    order = sorted(runs.items())
    first = order[0][1]
    changes = []
    for task, checkpoints in first.rewards.items():
        for way in checkpoints.get(first.final, {}):
            pairs = []
            for _, run in order:
                of_task = run.rewards.get(task, {})
                if run.start in of_task and run.final in of_task:
                    pairs.append((of_task[run.start][way], of_task[run.final][way]))
            if not pairs or pairs[0][0] is pairs[0][1]:
                continue
            changes.append(_total_change(task, way, pairs))
            names = [n for n in pairs[0][1].components if all(n in p.components for p, _ in pairs)]
            for name in names:
                before = [b.components[name] for b, _ in pairs]
                after = [a.components.get(name, float("nan")) for _, a in pairs]
                if not np.isnan(after).any():
                    changes.append(_component_change(task, way, name, before, after))
    return changes


def _total_change(
    task: str, way: str, pairs: Sequence[tuple[HeldoutReward, HeldoutReward]]
) -> RewardChange:
    differences = [np.subtract(a.per_prompt, b.per_prompt) for b, a in pairs]
    same_prompts = len({len(one) for one in differences}) == 1
    return RewardChange(
        task,
        way,
        TOTAL,
        float(np.mean([np.mean(b.per_prompt) for b, _ in pairs])),
        float(np.mean([np.mean(a.per_prompt) for _, a in pairs])),
        mean_interval(np.mean(differences, axis=0)) if same_prompts else None,
        mean_interval([float(one.mean()) for one in differences]),
    )


def _component_change(
    task: str, way: str, name: str, before: list[float], after: list[float]
) -> RewardChange:
    over_seeds = mean_interval(np.subtract(after, before))
    means = float(np.mean(before)), float(np.mean(after))
    return RewardChange(task, way, name, *means, None, over_seeds)
