"""`rcot compare RUN RUN …`: what GRPO changed, over several runs of one recipe (its seeds).

Every change is a paired one: the same held-out prompts and the same expressions, after a stage
minus after CoT-SFT of the same run. Two intervals are given, for two questions:

    over prompts   each prompt's change is first averaged over the runs; prompts are the sample,
                   of J&F clips, each with its expressions. Would others show it, with these runs?
                   J&F and its change are the benchmark's own figure (ReVOS: the mean of the
                   referring and the reasoning mean); "all expressions" is the mean over them.
    over runs      each run's mean change is one value; runs are the sample. Would other seeds
                   show it? With three runs, Student's t makes it 2.5 times as wide as z would.

Left out: runs of different recipes, which is a question for the reader; a run that lacks a stage
is refused, never averaged over.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rcot_rl.errors import InputError
from rcot_rl.intervals import Interval, mean_interval, shown_change, stratified_interval
from rcot_rl.monitoring import page
from rcot_rl.monitoring.curves import COLOURS, Series, line_chart
from rcot_rl.monitoring.figures import by_expression, is_number, result_files
from rcot_rl.monitoring.metrics import read_metrics

BEFORE = "sft"
STAGES = {"aks": "grpo-aks", "ktg": "grpo-ktg"}
LAST = "grpo-ktg"
BASELINES = ("first-frame", "centre-box", "whole-frame")
CHARTS = {
    "Reward": "reward/mean",
    "Response length": "response_length/mean",
    "KL to CoT-SFT": "actor/kl_loss",
    "Groups without variance": "group/zero_variance_fraction",
}


class Unit(NamedTuple):
    """The figure of one prompt or expression."""

    value: float
    cluster: Hashable
    """The clip: units of one cluster are not independent."""
    part: str
    """A run's figure is the mean of its parts' means."""


Units = dict[Hashable, Unit]


@dataclass(frozen=True)
class Change:
    """One figure before and after, in several runs."""

    name: str
    before: list[float]
    """The level of each run: of J&F, the benchmark's own figure."""
    after: list[float]
    over_prompts: Interval
    over_runs: Interval

    def shown(self, digits: int) -> float:
        """Return the mean change of the levels as they are shown with `digits` decimals."""
        pairs = zip(self.before, self.after, strict=True)
        return round(float(np.mean([shown_change(b, a, digits) for b, a in pairs])), digits) + 0.0


def compare(runs: Sequence[Path]) -> list[Change]:
    """Rewards of each task after each GRPO stage, and J&F of each benchmark, against CoT-SFT; and
    the last stage's J&F against the baselines.

    Raises InputError for a missing or malformed file, for runs that share no finished stage, and
    for runs that were asked different questions.
    """
    if not runs:
        raise InputError("no run to compare")
    changes = [*_reward_changes(runs), *score_changes(runs)]
    if not changes:
        raise InputError("no GRPO stage that all runs have finished", file=runs[0])
    return changes


def comparison_table(runs: Sequence[Path]) -> str:
    """Markdown: a line a figure, a column a run, then the mean change with both intervals."""
    head, *rows = _cells(runs)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def comparison_page(runs: Sequence[Path]) -> str:
    """One HTML page: the table, and the runs' training curves in common axes."""
    if len(runs) > COLOURS:
        raise InputError(f"{len(runs)} runs, and a page has curves of {COLOURS} at most")
    head, *rows = _cells(runs)
    table = page.table([page.text(c) for c in head], [[page.text(c) for c in row] for row in rows])
    sections = [page.section("Before and after", table)]
    for stage in STAGES.values():
        charts = [_chart(runs, stage, title, key) for title, key in CHARTS.items()]
        sections.append(page.section(stage, f'<div class="grid-of">{"".join(charts)}</div>'))
    return page.page("Runs compared", "<h1>Runs compared</h1>" + "".join(sections))


def _chart(runs: Sequence[Path], stage: str, title: str, key: str) -> str:
    series = []
    for run in runs:
        path = run / stage / "metrics.jsonl"
        if not path.is_file():
            raise InputError("cannot be read: there are no metrics", file=path)
        try:
            lines = [line for line in read_metrics(path) if is_number(line.get(key))]
        except ValueError as error:
            raise InputError(f"not valid JSON: {error}", file=path) from error
        series.append(Series(run.name, [x["step"] for x in lines], [x[key] for x in lines]))
    if not any(one.steps for one in series):
        return page.missing(f"{title} ({key}) of {stage}")
    return line_chart(title, series)


def _cells(runs: Sequence[Path]) -> list[list[str]]:
    rows = [["", *(run.name for run in runs), "mean change", "over prompts", "over runs"]]
    for change in compare(runs):
        digits = 1 if change.name.startswith("J&F") else 3
        pairs = [
            f"{a:.{digits}f} → {b:.{digits}f}"
            for a, b in zip(change.before, change.after, strict=True)
        ]
        intervals = [_range(i, digits) for i in (change.over_prompts, change.over_runs)]
        rows.append([change.name, *pairs, f"{change.shown(digits):+.{digits}f}", *intervals])
    return rows


def _range(interval: Interval, digits: int) -> str:
    if interval.low is None:
        return "–"
    return f"[{interval.low:+.{digits}f}, {interval.high:+.{digits}f}]"


def _reward_changes(runs: Sequence[Path]) -> list[Change]:
    files = [run / "predict" / "rewards.json" for run in runs]
    found = [read_object(file) for file in files]
    changes = []
    for task in STAGES:
        for way in ("sampled", "greedy"):
            for stage in STAGES.values():
                if not all(stage in one.get(task, {}) for one in found):
                    continue

                def units(run: int, name: str, task: str = task, way: str = way) -> Units:
                    prompts = _get(found[run], files[run], task, name, "prompts")
                    values = _get(found[run], files[run], task, name, way, "per_prompt")
                    pairs = zip(prompts, values, strict=True)
                    return {prompt: Unit(value, prompt, "") for prompt, value in pairs}

                found_change = _change(f"{task} {way}, {stage}", runs, units, BEFORE, stage)
                changes += [found_change] if found_change else []
    return changes


def score_changes(runs: Sequence[Path]) -> list[Change]:
    """J&F of every benchmark, and of all expressions, as `compare`; empty without a change.

    Raises InputError as `compare`.
    """
    names = [p.stem for p in result_files(runs[0])]
    found: dict[str, list[dict[str, Any]]] = {}
    for name in names:
        files = [run / "eval" / f"{name}.json" for run in runs]
        results = [read_object(file) for file in files]
        found[name] = [
            _get(result, file, "checkpoints") | result.get("baselines", {})
            for result, file in zip(results, files, strict=True)
        ]
    pairs = [(BEFORE, stage) for stage in STAGES.values()]
    pairs += [(baseline, LAST) for baseline in BASELINES]
    changes = []
    for before, after in pairs:
        for benchmarks in [[name] for name in names] + ([names] if len(names) > 1 else []):

            def units(run: int, which: str, those: list[str] = benchmarks) -> Units:
                return {
                    (name, *key): Unit(
                        one.score, (name, key.video), one.part if len(those) == 1 else ""
                    )
                    for name in those
                    for key, one in by_expression(_get(found[name][run], runs[run], which)).items()
                }

            if all({before, after} <= one.keys() for name in benchmarks for one in found[name]):
                label = benchmarks[0] if len(benchmarks) == 1 else "all expressions"
                label += f", {after}" + ("" if before == BEFORE else f" over {before}")
                found_change = _change(f"J&F {label}", runs, units, before, after)
                changes += [found_change] if found_change else []
    return changes


def _change(
    name: str,
    runs: Sequence[Path],
    units: Callable[[int, str], Units],
    first: str,
    then: str,
) -> Change | None:
    """None: nothing was scored."""
    before = [units(run, first) for run in range(len(runs))]
    after = [units(run, then) for run in range(len(runs))]
    for run, answers in zip((*runs, *runs), (*before, *after), strict=True):
        others = sorted(map(_called, answers.keys() ^ before[0].keys()))
        if others:
            raise InputError(
                f"{name}: was asked other questions than {runs[0]}: {others[0]}", file=run
            )
    order = list(before[0])
    if not order:
        return None
    for run, one in zip((*runs, *runs), (*before, *after), strict=True):
        odd = next((key for key, unit in one.items() if not is_number(unit.value)), None)
        if odd is not None:
            raise InputError(f"{name}: {_called(odd)} is {one[odd].value!r}, no number", file=run)
    clusters = [before[0][key].cluster for key in order]
    parts = [before[0][key].part for key in order]

    def of_parts(values: Sequence[float] | np.ndarray) -> Interval:
        return stratified_interval(values, clusters, parts)

    def levels(answers: list[Units]) -> list[float]:
        return [of_parts([one[key].value for key in order]).mean for one in answers]

    table = np.array(
        [[a[k].value - b[k].value for k in order] for b, a in zip(before, after, strict=True)]
    )
    return Change(
        name,
        before=levels(before),
        after=levels(after),
        over_prompts=of_parts(table.mean(axis=0)),
        over_runs=mean_interval([of_parts(row).mean for row in table]),
    )


def _called(key: Hashable) -> str:
    """The name of a prompt, or `benchmark/video/expression`."""
    return "/".join(map(str, key[:3])) if isinstance(key, tuple) else str(key)


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object. Raises InputError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", file=path) from error
    except ValueError as error:
        raise InputError(f"not valid JSON: {error}", file=path) from error
    if not isinstance(value, dict):
        raise InputError("must be a JSON object", file=path)
    return value


def _get(value: dict[str, Any], file: Path, *keys: str) -> Any:
    for depth, key in enumerate(keys):
        if not isinstance(value, dict) or key not in value:
            raise InputError("missing", file=file, key=".".join(keys[: depth + 1]))
        value = value[key]
    return value
