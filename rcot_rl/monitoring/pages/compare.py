"""`rcot compare RUN RUN …`: what GRPO changed, over several runs (seeds) of one recipe.

Every change is paired: the same held-out prompts or the same expressions, after a stage minus after
the first checkpoint that the same run scored (usually CoT-SFT's). Two intervals answer two
questions:

    over prompts   Would other prompts show the change with these runs? Each prompt's change is
                   averaged over the runs; prompts are the sample. For J&F, clips are the sample,
                   each with all its expressions. J&F and its change are the benchmark's own score
                   (ReVOS: the mean of the referring and the reasoning mean); "all expressions" is
                   the mean over the expressions of all benchmarks.
    over runs      Would other seeds show the change? Each run's mean change is one value; runs are
                   the sample. With three runs, Student's t makes the interval 2.2 times as wide as
                   the normal distribution would.

A run that lacks a stage is refused, not skipped. Whether the runs share a recipe is not checked.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from rcot_rl.errors import InputError
from rcot_rl.monitoring.pages.figures import DASH
from rcot_rl.monitoring.run_files.run_reader import result_files
from rcot_rl.prediction_layout import WAYS, heldout_rewards_file
from rcot_rl.stats.expression_scores import by_expression
from rcot_rl.stats.intervals import Interval, mean_interval, shown_change, stratified_interval
from rcot_rl.stats.json_values import is_number
from rcot_rl.system.files import read_json_object

BASELINES = {
    "first-frame": "the pipeline with the first frame as keyframe",
    "centre-box": "a box in the centre of each frame",
    "whole-frame": "the whole of each frame as mask",
}
"""Baseline -> what it is."""

Question = Literal["reward", "masks", "baseline"]
"""What a change is about: held-out reward, J&F, or J&F over a baseline."""


class Unit(NamedTuple):
    """Score of one prompt or expression."""

    value: float
    cluster: Hashable
    """The clip; units of one cluster are not independent."""
    part: str
    """A run's score is the mean of the means of its parts."""


Units = dict[Hashable, Unit]


@dataclass(frozen=True)
class Change:
    """One score before and after a stage, in several runs."""

    name: str
    question: Question
    meaning: str
    """What the change says, in one sentence."""

    before: list[float]
    """Score of each run; for J&F, the benchmark's own."""
    after: list[float]
    over_prompts: Interval
    over_runs: Interval

    def shown(self, digits: int) -> float:
        """Return the mean difference of the scores as they are shown with `digits` decimals."""
        pairs = zip(self.before, self.after, strict=True)
        return round(float(np.mean([shown_change(b, a, digits) for b, a in pairs])), digits) + 0.0


def compare(runs: Sequence[Path]) -> list[Change]:
    """Return all changes that every run has.

    These are the held-out rewards of each task and J&F of each benchmark after each later
    checkpoint against the first, and J&F after the last one against the baselines.

    Raises:
        InputError: for a missing or malformed file, for runs that share no finished stage, and for
            runs that were evaluated on different prompts or expressions.
    """
    if not runs:
        raise InputError("no run to compare; name at least one run folder")
    changes = [*_reward_changes(runs), *score_changes(runs)]
    if not changes:
        raise InputError("no GRPO stage that all runs have finished", file=runs[0])
    return changes


def comparison_table(runs: Sequence[Path]) -> str:
    """Return a Markdown table: a row per change, a column per run, mean, intervals. InputError."""
    head, *rows = _cells(runs)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def change_cells(change: Change) -> tuple[list[str], str, str, str]:
    """Return each run's scores, the mean change, and its intervals over prompts and over runs."""
    digits = 3 if change.question == "reward" else 1
    pairs = [
        f"{a:.{digits}f} → {b:.{digits}f}" for a, b in zip(change.before, change.after, strict=True)
    ]
    over_prompts, over_runs = (_range(i, digits) for i in (change.over_prompts, change.over_runs))
    return pairs, f"{change.shown(digits):+.{digits}f}", over_prompts, over_runs


def _cells(runs: Sequence[Path]) -> list[list[str]]:
    rows = [["", *(run.name for run in runs), "mean change", "over prompts", "over runs"]]
    for change in compare(runs):
        pairs, *rest = change_cells(change)
        rows.append([change.name, *pairs, *rest])
    return rows


def _range(interval: Interval, digits: int) -> str:
    if interval.low is None:
        return DASH
    return f"[{interval.low:+.{digits}f}, {interval.high:+.{digits}f}]"


def _reward_changes(runs: Sequence[Path]) -> list[Change]:
    files = [heldout_rewards_file(run) for run in runs]
    rewards = [read_json_object(file) for file in files]
    changes = []
    for task, results in rewards[0].items():
        first, *others = results or [""]
        for way in WAYS:
            for stage in others:
                if not all(stage in one.get(task, {}) for one in rewards):
                    continue
                before, after = (
                    [
                        _prompts(document, file, task, name, way)
                        for document, file in zip(rewards, files, strict=True)
                    ]
                    for name in (first, stage)
                )
                meaning = (
                    f"Held-out {task.upper()} prompts, {way} responses ({_WAY_MEANINGS[way]}): "
                    f"reward after {stage} minus after {first}."
                )
                name = f"{task} {way}, {stage}"
                changes.append(_change(name, "reward", meaning, runs, before, after))
    return [change for change in changes if change]


_WAY_MEANINGS = {"sampled": "what training optimizes", "greedy": "what the pipeline uses"}


def _prompts(rewards: dict[str, Any], file: Path, task: str, name: str, way: str) -> Units:
    """Return the reward of each held-out prompt for one checkpoint."""
    prompts = _get(rewards, file, task, name, "prompts")
    values = _get(rewards, file, task, name, way, "per_prompt")
    return {p: Unit(value, p, "") for p, value in zip(prompts, values, strict=True)}


def score_changes(runs: Sequence[Path]) -> list[Change]:
    """Return the changes of J&F by benchmark and over all expressions. Raises InputError."""
    names = [path.stem for path in result_files(runs[0])]
    results: dict[str, list[dict[str, Any]]] = {}
    """Benchmark -> for each run, {checkpoint or baseline: result}."""
    scored: list[str] = []
    """The first run's checkpoints, in the order in which they were scored."""
    for name in names:
        files = [run / "eval" / f"{name}.json" for run in runs]
        documents = [read_json_object(file) for file in files]
        scored += _get(documents[0], files[0], "checkpoints")
        results[name] = [
            _get(document, file, "checkpoints") | document.get("baselines", {})
            for document, file in zip(documents, files, strict=True)
        ]
    order = list(dict.fromkeys(scored))
    start = order[0] if order else ""
    pairs = [(start, stage) for stage in order[1:]]
    pairs += [(baseline, order[-1]) for baseline in BASELINES if order]
    changes = []
    for first, then in pairs:
        for benchmarks in [[name] for name in names] + ([names] if len(names) > 1 else []):
            by_run = [{name: results[name][k] for name in benchmarks} for k in range(len(runs))]
            if not all({first, then} <= one.keys() for run in by_run for one in run.values()):
                continue
            label = benchmarks[0] if len(benchmarks) == 1 else "all expressions"
            place = label if len(benchmarks) == 1 else "all expressions of all benchmarks"
            label += f", {then}" + ("" if first == start else f" over {first}")
            question: Question = "masks" if first == start else "baseline"
            base = f"those of {first}" if first == start else BASELINES[first]
            meaning = f"{place[0].upper()}{place[1:]}: masks of {then} against {base}."
            before, after = (
                [_expressions(run, which) for run in by_run] for which in (first, then)
            )
            changes.append(_change(f"J&F {label}", question, meaning, runs, before, after))
    return [change for change in changes if change]


def _expressions(results: dict[str, dict[str, Any]], which: str) -> Units:
    """Return J&F of each expression of one or several benchmarks, for one checkpoint or baseline.

    The parts of a single benchmark are kept; several benchmarks have one mean over all expressions.
    """
    return {
        (name, *key): Unit(
            counted.score, (name, key.video), counted.part if len(results) == 1 else ""
        )
        for name, result in results.items()
        for key, counted in by_expression(result[which]).items()
    }


def _change(
    name: str,
    question: Question,
    meaning: str,
    runs: Sequence[Path],
    before: list[Units],
    after: list[Units],
) -> Change | None:
    """Return the change from `before` to `after` (one entry per run); None without any unit."""
    for run, units in zip((*runs, *runs), (*before, *after), strict=True):
        different = sorted(map(_shown_key, units.keys() ^ before[0].keys()))
        if different:
            raise InputError(
                f"{name}: evaluated on other prompts or expressions than {runs[0]}: {different[0]}",
                file=run,
            )
        for key, unit in units.items():
            if not is_number(unit.value):
                raise InputError(
                    f"{name}: {_shown_key(key)} must be a finite number, not {unit.value!r}",
                    file=run,
                )
    order = list(before[0])
    if not order:
        return None
    clusters = [before[0][key].cluster for key in order]
    parts = [before[0][key].part for key in order]

    def interval(values: Sequence[float] | np.ndarray) -> Interval:
        return stratified_interval(values, clusters, parts)

    scores = np.array(
        [[[units[key].value for key in order] for units in s] for s in (before, after)]
    )
    differences = scores[1] - scores[0]
    return Change(
        name,
        question,
        meaning,
        before=[interval(row).mean for row in scores[0]],
        after=[interval(row).mean for row in scores[1]],
        over_prompts=interval(differences.mean(axis=0)),
        over_runs=mean_interval([interval(row).mean for row in differences]),
    )


def _shown_key(key: Hashable) -> str:
    """Return the name of a prompt, or `benchmark/video/expression`."""
    return "/".join(map(str, key[:3])) if isinstance(key, tuple) else str(key)


def _get(value: dict[str, Any], file: Path, *keys: str) -> Any:
    """Return value[key][key]…, or raise InputError that names the missing key."""
    for depth, key in enumerate(keys):
        if not isinstance(value, dict) or key not in value:
            raise InputError("missing", file=file, key=".".join(keys[: depth + 1]))
        value = value[key]
    return value
