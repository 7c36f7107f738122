"""The page of `rcot compare`: what changed over several runs, with what each row means."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from rcot_rl.errors import InputError
from rcot_rl.monitoring.judgement.landmarks import max_reward
from rcot_rl.monitoring.pages.compare import Change, Question, change_cells, compare
from rcot_rl.monitoring.pages.curves import (
    COLOURS,
    ChartMark,
    Series,
    line_chart,
    window_means,
    window_of,
)
from rcot_rl.monitoring.pages.page import details, missing, page, section, table, text
from rcot_rl.monitoring.pages.stage_charts import CHARTS
from rcot_rl.monitoring.run_files.metrics import read_metrics
from rcot_rl.monitoring.run_files.run_reader import RunReader
from rcot_rl.recipe.recorded import stages_with
from rcot_rl.stats.intervals import Interval, mean_interval
from rcot_rl.stats.json_values import is_number

_QUESTIONS: dict[Question, tuple[str, str]] = {
    "reward": (
        "Held-out reward",
        "Did training raise the reward on prompts that it never saw?",
    ),
    "masks": ("Segmentation", "Did the masks follow? J&amp;F in percent."),
    "baseline": (
        "Against baselines",
        "Is the trained pipeline better than doing without it? J&amp;F in percent.",
    ),
}

_KEYS = {
    "reward": ("reward/mean", 1.0),
    "length": ("response_length/mean", 1.0),
    "kl": ("actor/kl_loss", 1.0),
    "variance": ("group/zero_variance_fraction", 100.0),
    "entropy": ("actor/entropy", 1.0),
    "seconds": ("timing_s/step", 1.0),
}
"""Chart -> key of metrics.jsonl and factor."""


def comparison_page(runs: Sequence[Path]) -> str:
    """Return a page of changes and training curves of all runs. Raises InputError."""
    if len(runs) > COLOURS:
        raise InputError(f"{len(runs)} runs; the page shows {COLOURS} at most")
    changes = compare(runs)
    names = [run.name for run in runs]
    sections = [_summary(changes, len(runs))]
    sections += [_question(kind, changes, names) for kind in _QUESTIONS]
    sections += [_curves(runs, stage) for stage in _grpo_stages(runs[0])]
    listed = ", ".join(text(name, 60) for name in names)
    header = (
        f'<h1>Runs compared</h1><p class="soft">{len(runs)} runs: {listed}. Every change is '
        "paired: the same prompts or expressions, before and after.</p>"
    )
    return page("Runs compared", "".join(sections), header)


def _decisive(change: Change) -> Interval:
    """Return the interval that decides: over runs, or over prompts if there is one run."""
    return change.over_runs if change.over_runs.low is not None else change.over_prompts


def _direction(interval: Interval) -> str:
    if interval.low is None or interval.high is None:
        return "soft"
    return "up" if interval.low > 0 else "down" if interval.high < 0 else "soft"


def _summary(changes: Sequence[Change], runs: int) -> str:
    by_way: dict[str, list[str]] = {"up": [], "down": [], "soft": []}
    for change in changes:
        if change.question != "baseline":
            by_way[_direction(_decisive(change))].append(text(change.name))
    words = {"up": "Rose", "down": "Fell", "soft": "No change shown"}
    lines = "".join(
        f'<li><b class="{way}">{words[way]}</b>: {" · ".join(names)}</li>'
        for way, names in by_way.items()
        if names
    )
    sample = "runs are the sample" if runs > 1 else "one run: its prompts or clips are the sample"
    reading = details(
        "How to read this page",
        "<p><b>Over prompts</b>: would other prompts (for J&amp;F: other clips) show the change "
        "with these runs? <b>Over runs</b>: would other seeds show it? Both are 95 % confidence "
        "intervals. A change whose interval over runs includes 0 may be chance, however clear it "
        "looks over prompts. If only sampled rewards rise, training made the policy surer, not "
        "better.</p>",
    )
    return section(
        "Verdict",
        f'<div class="verdict"><p>95 % intervals; {sample}.</p><ul>{lines}</ul></div>',
        reading,
    )


def _question(kind: Question, changes: Sequence[Change], names: Sequence[str]) -> str:
    title, note = _QUESTIONS[kind]
    asked = [change for change in changes if change.question == kind]
    if not asked:
        return ""
    rows, levels = [], []
    for change in asked:
        pairs, mean, over_prompts, over_runs = change_cells(change)
        name = f"{text(change.name)}<small>{text(change.meaning)}</small>"
        way = _direction(_decisive(change))
        shown = (
            f'<b class="{way}">{mean}</b><small>over prompts {over_prompts}</small>'
            f"<small>over runs {over_runs}</small>"
        )
        rows.append([name, shown, *pairs])
        levels.append([text(change.name), *pairs])
    head = ["change", "mean change", *(text(name, 60) for name in names)]
    columns = range(2, len(head))
    every = details("Levels of each run", table([head[0], *head[2:]], levels))
    return section(
        title,
        table(head, rows, caption=note, secondary=columns),
        f'<div class="narrow-only">{every}</div>',
    )


def _grpo_stages(run: Path) -> list[str]:
    """Return the stages whose metrics have rewards."""
    stages = stages_with(run, "metrics.jsonl")
    return [s for s in stages if any("reward/mean" in line for line in _metrics(run, s)[:1])]


def _metrics(run: Path, stage: str) -> list[dict[str, object]]:
    path = run / stage / "metrics.jsonl"
    if not path.is_file():
        raise InputError("no metrics; the page needs those of all runs", file=path)
    try:
        return read_metrics(path)
    except ValueError as error:
        raise InputError(f"not valid JSON: {error}", file=path) from error


def _curves(runs: Sequence[Path], stage: str) -> str:
    steps = {run: _metrics(run, stage) for run in runs}
    charts = "".join(_chart(runs, stage, kind, steps) for kind in _KEYS)
    size = window_of(max(map(len, steps.values())))
    note = (
        f"Coloured: each run, mean of the {size} steps around each step, drawn where all of them "
        "exist. Dark: mean of the runs, with its 95 % interval over runs."
    )
    title = f"Training: {text(stage, 60)}"
    return section(title, f"<small>{note}</small>", f'<div class="grid-of charts">{charts}</div>')


def _chart(
    runs: Sequence[Path], stage: str, kind: str, steps: dict[Path, list[dict[str, object]]]
) -> str:
    key, factor = _KEYS[kind]
    words = CHARTS[kind]
    longest = max(map(len, steps.values()))
    smooth = [_smoothed(run.name, steps[run], key, factor, window_of(longest)) for run in runs]
    if not any(one.steps for one in smooth):
        return missing(f"{words.title} ({key}) of {stage}")
    marks = []
    if kind == "reward" and (most := max_reward(RunReader(runs[0]), stage)) is not None:
        marks.append(ChartMark(most, "maximum"))
    mean = _mean(smooth)
    curves = [*smooth, *([mean] if mean is not None else [])]
    return line_chart(words.title, curves, words.meaning, words.remedy, marks)


def _smoothed(
    name: str, lines: Sequence[dict[str, object]], key: str, factor: float, window: int
) -> Series:
    known = [
        (x["step"], x[key]) for x in lines if is_number(x.get("step")) and is_number(x.get(key))
    ]
    values = window_means([factor * float(str(v)) for _, v in known], window)
    half = window // 2
    steps = [float(str(step)) for step, _ in known[half : half + len(values)]]
    return Series(name, steps, values, style="faint")


def _mean(curves: Sequence[Series]) -> Series | None:
    """Return the mean of the runs with its interval, at the steps that all of them have."""
    if len(curves) < 2:
        return None
    by_step = [dict(zip(one.steps, one.values, strict=True)) for one in curves]
    steps = sorted(set.intersection(*(set(values) for values in by_step)))
    if not steps:
        return None
    means = [mean_interval([values[step] for values in by_step]) for step in steps]
    low = [m.mean if m.low is None else m.low for m in means]
    high = [m.mean if m.high is None else m.high for m in means]
    values = [m.mean for m in means]
    if not all(map(math.isfinite, values)):
        return None
    return Series("mean", steps, values, low=low, high=high, style="smooth", colour="ink")
