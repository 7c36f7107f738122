"""Sections of a study's page beside the paper's tables."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from rcot_rl.monitoring.study.collect_study import ABSENT
from rcot_rl.monitoring.study.study_effects import (
    ALL,
    TOTAL,
    RewardChange,
    Sample,
    Setting,
    Study,
    Values,
    reward_changes,
)
from rcot_rl.monitoring.study.study_markdown import (
    effect_text,
    interval_text,
    level_text,
    markdown_table,
    plain,
)
from rcot_rl.monitoring.study.study_results import Cell, StudyRun
from rcot_rl.monitoring.study.study_sentences import effect_sentence, reward_sentence
from rcot_rl.monitoring.study.study_tables import EFFECT_HEAD, TableText, effect_cells
from rcot_rl.stats.paper_tables import paper_tables

_MAIN = "table-5"
"""The table whose reference row is the study's main result."""


def main_result(study: Study) -> Setting | None:
    """Return the final checkpoint that the study is about; None without any run.

    It is the reference row of Table 5, or else the first recipe's final checkpoint.
    """
    setting = study.setting(_MAIN, str(paper_tables()[_MAIN].reference))
    if setting is None and study.recipes:
        runs = study.runs_of(study.recipes[0])
        setting = Setting(next(iter(runs.values())).final, runs)
    return setting


def _start(main: Setting) -> Setting:
    return Setting(next(iter(main.runs.values())).start, main.runs)


def masks_section(study: Study, main: Setting) -> TableText:
    """Return what GRPO changed in the masks: the final checkpoint against its KL reference."""
    start = _start(main)
    rows, sentences = [], []
    for column in study.columns():
        sample = study.sample(column)
        effect = None if sample is None else study.effect(main, start, sample)
        if sample is None or effect is None:
            continue
        levels = [level_text(study.level(one, sample)) for one in (start, main)]
        seeds = ", ".join(effect_text(value) for value in effect.per_seed)
        rows.append([column, *levels, *effect_cells(effect), seeds])
        if column == ALL:
            sentences.append(effect_sentence(f"GRPO ({main.cell})", effect, start.cell))
    if not rows:
        return TableText("", [])
    head = ["benchmark", f"J&F {plain(start.cell)}", f"J&F {plain(main.cell)}", *EFFECT_HEAD]
    return TableText(markdown_table([*head, "each seed"], rows), sentences)


def kinds_section(study: Study, main: Setting) -> TableText:
    """Return the same by kind of expression; empty for corpora without kinds."""
    start = _start(main)
    kinds = sorted({k for b in study.results.benchmarks.values() for k in b.kind if k})
    rows = []
    for kind in kinds:
        sample = study.sample(ALL, kind)
        effect = None if sample is None else study.effect(main, start, sample)
        if sample is None or effect is None:
            continue
        levels = [level_text(study.level(one, sample)) for one in (start, main)]
        rows.append([plain(kind), str(len(sample.clusters)), *levels, *effect_cells(effect)])
    if not rows:
        return TableText("", [])
    levels_head = [f"J&F {plain(one.cell)}" for one in (start, main)]
    return TableText(markdown_table(["kind", "expressions", *levels_head, *EFFECT_HEAD], rows), [])


def rewards_section(main: Setting) -> TableText:
    """Return what GRPO changed in the held-out rewards and their components."""
    changes = reward_changes(main.runs)
    if not changes:
        return TableText("", [])
    start = _start(main)
    head = ["task", "responses", "figure", plain(start.cell), plain(main.cell), "change"]
    rows = [_reward_row(change) for change in changes]
    table = markdown_table([*head, "over prompts", "over seeds"], rows, 3)
    totals = [change for change in changes if change.what == TOTAL]
    return TableText(table, [reward_sentence(c, start.cell, main.cell) for c in totals])


def _reward_row(change: RewardChange) -> list[str]:
    texts = [plain(change.task), change.way, plain(change.what)]
    levels = [level_text(value, 3) for value in (change.before, change.after)]
    intervals = [interval_text(i, 3) for i in (change.over_prompts, change.over_seeds)]
    return [*texts, *levels, effect_text(change.after - change.before, 3), *intervals]


def absent_section(study: Study, main: Setting) -> TableText:
    """Return the effect of training with zero targets, where targets can be absent.

    Rows: the main result and every recipe whose prompt allows an empty list of boxes.
    """
    trained = []
    for recipe in study.recipes:
        runs = study.runs_of(recipe)
        if all(run.zero_target for run in runs.values()):
            trained.append(Setting(next(iter(runs.values())).final, runs))
    figures: list[tuple[str, Sample, Values | None]] = []
    for dataset, name in study.datasets.items():
        absent = study.sample(f"{dataset}/{ABSENT}")
        if absent is None:
            continue
        benchmark = study.results.benchmarks[name]
        present = [i for i, subset in enumerate(benchmark.subset) if subset != ABSENT]
        clips = [(dataset, benchmark.clip[i]) for i in present]
        others = Sample({name: np.array(present, dtype=int)}, list(clips), [""] * len(clips))
        figures.append((f"{dataset} N-Acc", absent, _bits("empty")))
        if present:
            figures.append((f"{dataset} T-Acc", others, _bits("found")))
    for column in study.columns():
        sample = study.sample(column)
        if sample is not None:
            figures.append((f"{column} J&F", sample, None))
    if not trained or not any(values is not None for _, _, values in figures):
        return TableText("", [])
    rows, sentences = [], []
    for setting in trained:
        for figure, sample, values in figures:
            effect = study.effect(setting, main, sample, values)
            if effect is None:
                continue
            off = level_text(study.level(main, sample, values))
            on = level_text(study.level(setting, sample, values))
            rows.append([plain(setting.name), figure, off, on, *effect_cells(effect)])
            if values is not None or figure.startswith(ALL):
                sentences.append(effect_sentence(setting.name, effect, main.name, figure))
    return TableText(
        markdown_table(["run", "figure", "off", "on", *EFFECT_HEAD], rows, 2), sentences
    )


def _bits(name: str) -> Values:
    def values(cell: Cell) -> np.ndarray:
        bits = getattr(cell, name)
        return np.full(len(cell.J), np.nan) if bits is None else 100.0 * np.array(bits, dtype=float)

    return values


def minutes_section(study: Study) -> TableText:
    """Return the minutes and steps of each recipe's stages, as means over the seeds."""
    rows = []
    totals = []
    for recipe in study.recipes:
        runs = list(study.runs_of(recipe).values())
        stages = list(dict.fromkeys(stage for run in runs for stage in run.minutes))
        for stage in stages:
            minutes = [run.minutes[stage] for run in runs if stage in run.minutes]
            steps = {run.steps[stage] for run in runs if stage in run.steps}
            shown = ", ".join(map(str, sorted(steps)))
            rows.append([plain(recipe), plain(stage), shown, f"{np.mean(minutes):.1f}"])
        total = [sum(run.minutes.values()) for run in runs]
        totals.append(float(np.sum(total)))
        rows.append([plain(recipe), "all stages", "", f"{np.mean(total):.1f}"])
    table = markdown_table(["recipe", "stage", "steps", "minutes"], rows, 2)
    return TableText(f"All runs together: {sum(totals):.0f} minutes.\n\n{table}", [])


def runs_section(study: Study) -> TableText:
    """Return the runs with their commits and commands."""
    runs = study.results.runs
    rows = [
        [plain(run.recipe), str(run.seed), plain(run.commit or "unknown"), plain(run.command)]
        for run in runs
    ]
    table = markdown_table(["recipe", "seed", "commit", "command"], rows, 4)
    return TableText(f"{table}\n\n{_versions(runs)}", [])


def _versions(runs: list[StudyRun]) -> str:
    """Return the versions, or say that runs differ in them."""
    known: dict[str, set[str]] = {}
    for run in runs:
        for package, version in run.versions.items():
            known.setdefault(package, set()).add(version)
    lines: Mapping[str, str] = {p: ", ".join(sorted(v)) for p, v in known.items()}
    return "Versions: " + "; ".join(f"{plain(p)} {plain(v)}" for p, v in lines.items()) + "."
