"""Tables of the report: rewards on held-out prompts, and J, F and J&F of the benchmarks.

Each section takes a parsed file of the run, or None, and says in its place what is missing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rcot_rl.monitoring.page import details, missing, section, table, text
from rcot_rl.recipe.inference_section import ORACLES
from rcot_rl.stats.benchmark_means import SUBSET_MEANS, is_counted, rounded
from rcot_rl.stats.intervals import Interval, paired_difference, shown_change, stratified_interval
from rcot_rl.system.files import visible

TASKS = ("aks", "ktg")
WAYS: tuple[Literal["sampled", "greedy"], ...] = ("sampled", "greedy")
"""How the held-out responses were decoded."""

DASH = "–"
"""Stands for a value that is missing."""


def rewards_section(rewards: Any) -> str:
    """Return the section on held-out rewards.

    Args:
        rewards: predict/rewards.json: {task: {checkpoint: {"sampled" | "greedy": {"mean", …}}}}.
    """
    title = "Held-out reward"
    tasks = {t: r for t, r in _mapping(rewards).items() if t in TASKS and _mapping(r)}
    if not tasks:
        return section(title, missing("predict/rewards.json (rewards on held-out prompts)"))
    names = list(dict.fromkeys(name for results in tasks.values() for name in results))
    reference = names[0]
    rows = []
    for task, results in tasks.items():
        for way in WAYS:
            base = at(results, reference, way)
            cells = [
                _reward_cell(at(results, name, way), None if name == reference else base)
                for name in names
            ]
            prompts = at(base, "per_prompt")
            rows.append([task.upper(), way, *cells, _count(prompts)])
    absent = [task.upper() for task in TASKS if task not in tasks]
    return section(
        title,
        table(["task", "responses", *map(text, names), "prompts"], rows, 2),
        '<p class="soft">Tasks: AKS (agentic keyframe selection), KTG (keyframe target grounding). '
        "Mean reward after each stage on the same held-out prompts; “sampled” uses the training "
        f"temperature. Below each mean: paired change from {text(reference)} with its "
        "95 % confidence interval over prompts (Student’s t), coloured if it excludes 0. The "
        "interval does not cover the spread between training seeds; <code>rcot compare</code> "
        "does.</p>",
        details(
            "Reward components of the sampled responses, unweighted", _components(tasks, names)
        ),
        missing(f"rewards of {', '.join(absent)}") if absent else "",
    )


def _components(tasks: Mapping[str, Any], names: list[str]) -> str:
    rows = []
    for task, results in tasks.items():
        parts = {n: _mapping(at(results, n, "sampled", "components")) for n in names}
        for component in dict.fromkeys(key for values in parts.values() for key in values):
            means = [number(parts[n].get(component), 3) for n in names]
            rows.append([task.upper(), text(component, 60), *means])
    if not rows:
        return missing("components in predict/rewards.json")
    return table(["task", "component", *map(text, names)], rows, 2)


def _reward_cell(result: Any, base: Any) -> str:
    mean = number(at(result, "mean"), 3)
    if base is None or mean == DASH:
        return mean
    try:
        change = paired_difference(base["per_prompt"], result["per_prompt"])
    except (KeyError, TypeError, ValueError):
        return f"{mean}<small>change unknown</small>"
    difference = _difference(base.get("mean"), result["mean"], change, 3)
    if change.low is None or change.high is None:
        return f"{mean}<small>{difference}, one prompt</small>"
    interval = f"[{change.low:+.3f}, {change.high:+.3f}]"
    return f'{mean}<small class="{_direction(change)}">{difference} {interval}</small>'


def _direction(change: Interval) -> str:
    """Return the style class of a change: whether its interval excludes zero."""
    if change.low is None or change.high is None:
        return "soft"
    return "up" if change.low > 0 else "down" if change.high < 0 else "soft"


def _difference(before: Any, after: Any, change: Interval, digits: int) -> str:
    """Return the difference of the two scores as they are shown, or else the interval's mean."""
    known = is_number(before) and is_number(after)
    return f"{shown_change(before, after, digits) if known else change.mean:+.{digits}f}"


def scores_section(scores: Mapping[str, Any]) -> str:
    """Return the section on J, F and J&F.

    Args:
        scores: For each benchmark, eval/<benchmark>.json: the result of the last checkpoint, with
            "checkpoints" and "baselines" as {name: result}.
    """
    title = "Segmentation"
    if not scores:
        return section(title, missing("eval/*.json (J, F and J&F of the benchmarks)"))
    return section(title, *(_benchmark(name, result) for name, result in scores.items()))


def _benchmark(name: str, result: Any) -> str:
    if not isinstance(result, dict):
        return missing(f"eval/{name}.json (unreadable)")
    stages, baselines = (_mapping(result.get(key)) for key in ("checkpoints", "baselines"))
    if not stages:
        stages = {"predictions": result}
    # a variant of the settings is compared with its checkpoint, not the other way round
    reference = next((name for name in stages if "@" not in name), next(iter(stages)))
    base = stages[reference]
    rows = [_score_row(n, r, base, "") for n, r in stages.items()]
    for other, r in baselines.items():
        kind = "upper bound" if other in ORACLES else "baseline"
        rows.append(_score_row(f"{kind}: {other}", r, base, "plain"))
    head = [
        "",
        "J&amp;F",
        "95 % interval",
        "J",
        "F",
        f"change from {text(reference)}",
        "area ratio",
        "AKS rounds",
        "box IoU",
        "expressions",
        "defective",
        "missing",
        "faults",
        "unexpected",
    ]
    keys = ("J&F", "J", "F", "N-Acc", "T-Acc")
    parts = [
        [
            text(n, 60),
            *(number(at(s, k), 1) for k in keys),
            *(number(at(s, k), 0) for k in ("n_expressions", "n_defective")),
        ]
        for n, s in _mapping(result.get("per_subset")).items()
    ]
    defective = at(result, "n_defective")
    with_defects = f", {number(defective, 0)} with defective ground truth" if defective else ""
    facts = (
        f"{number(at(result, 'n_expressions'), 0)} expressions{with_defects} · "
        f"masks by <b>{text(at(result, 'segmenter') or 'unknown', 100)}</b> · "
        f"{text(at(result, 'protocol') or '', 200)}"
    )
    return (
        f"<h3>{text(name, 100)}</h3>"
        f"<p>{facts}</p>{table(head, rows)}"
        + details(
            "Subsets after the last stage",
            table(
                ["subset", "J&amp;F", "J", "F", "N-Acc", "T-Acc", "expressions", "defective"],
                parts,
            ),
        )
        + _steps({**stages, **baselines})
        + _listing("Defects of the ground truth", result.get("defects"), DEFECT_COLUMNS)
        + _listing("Unexpected names and values", result.get("unexpected"), UNEXPECTED_COLUMNS)
        + '<p class="soft">J, F, ratios and IoU are in percent. The interval of J&amp;F is a '
        "bootstrap over videos. Change: paired difference of "
        "J&amp;F with its 95 % confidence interval over clips, coloured if it excludes 0. Area "
        "ratio: target area in the keyframe over its largest area in the video, first choice → "
        "after AKS. Box IoU: best predicted box for each visible "
        "target. ReVOS: J&amp;F and its change are the mean of the referring and the reasoning "
        "mean. Missing predictions count 0. Expressions with defective ground truth are "
        "included.</p>"
    )


def _steps(results: Mapping[str, Any]) -> str:
    """Return times of the pipeline's steps and verdicts of AKS to unfold; empty without them."""
    rows = []
    for name, result in results.items():
        costs, verdicts = at(result, "pipeline_costs"), at(result, "aks_verdicts")
        if costs is None and verdicts is None:
            continue
        stages = [number(at(costs, "stages", s, "relative"), 2) for s in STEPS]
        times = [number(at(costs, k), 2) for k in ("keyframe_seconds", "segmentation_seconds")]
        keys = ("precision_A", "recall_A", "precision_B", "recall_B")
        shares = [number(at(verdicts, key), 1) for key in keys]
        extra, brier = number(at(costs, "aks_extra"), 1), number(at(verdicts, "brier"), 3)
        judged = number(at(verdicts, "n"), 0)
        rows.append([text(name, 100), *stages, extra, *times, judged, *shares, brier])
    if not rows:
        return ""
    head = ["", *map(str.upper, STEPS), "AKS adds %", "keyframe, s", "segmentation, s"]
    head += ["judged", "A precision", "A recall", "B precision", "B recall", "Brier"]
    note = (
        '<p class="soft">VDG to SAM2: engine time relative to KTG and SAM2 together (1). Seconds '
        "are means per query; with many queries in progress they are latencies of a shared batch. "
        "Precision and recall of AKS’ verdicts in percent; A is right if the frame shows the "
        "target. Brier score of the probability of A: 0 is best.</p>"
    )
    return details("Time of the steps and verdicts of AKS", table(head, rows) + note)


STEPS = ("vdg", "kfg", "aks", "ktg", "sam2")
DEFECT_COLUMNS = ("file", "key", "reason", "effect")
UNEXPECTED_COLUMNS = ("place", "reason", "cause")
_LISTED = 100
"""Most rows of a table of defects."""


def _listing(title: str, entries: Any, columns: tuple[str, ...]) -> str:
    """Return the first entries as a table to unfold; empty without entries."""
    if not isinstance(entries, list) or not entries:
        return ""
    rows = [[text(at(e, c) or DASH, 400) for c in columns] for e in entries[:_LISTED]]
    more = "" if len(entries) <= _LISTED else f"; first {_LISTED}"
    return details(f"{title} ({len(entries)}{more})", table(list(columns), rows, len(columns)))


def _change(result: Any, base: Any) -> str:
    """Return the paired change of J&F as HTML; both results must score the same expressions."""
    before, after = by_expression(base), by_expression(result)
    if result is base or not before or not after:
        return DASH
    change = paired_change(before, after)
    if change is None:
        return '<span class="soft">different expressions</span>'
    difference = _difference(at(base, "J&F"), at(result, "J&F"), change, 1)
    if change.low is None or change.high is None:
        return difference
    interval = f"[{change.low:+.1f}, {change.high:+.1f}]"
    return f'<span class="{_direction(change)}">{difference} {interval}</span>'


def result_files(run: Path) -> list[Path]:
    """Return RUN/eval/<benchmark>.json by name, without the stage's done.json."""
    return [p for p in visible((run / "eval").glob("*.json")) if p.stem != "done"]


def paired_change(before: Expressions, after: Expressions) -> Interval | None:
    """Return the paired change of J&F over clips; None unless both have the same expressions."""
    if not before or before.keys() != after.keys():
        return None
    return stratified_interval(
        [after[key].score - one.score for key, one in before.items()],
        [key.video for key in before],
        [one.part for one in before.values()],
    )


def level(expressions: Expressions) -> Interval | None:
    """Return J&F over clips; None without expressions."""
    if not expressions:
        return None
    return stratified_interval(
        [one.score for one in expressions.values()],
        [key.video for key in expressions],
        [one.part for one in expressions.values()],
    )


class Key(NamedTuple):
    """One expression of a benchmark."""

    video: str
    expression_id: str
    occurrence: int
    """0, or 1, 2, … for further expressions of the video with the same id."""


class Counted(NamedTuple):
    """What an expression adds to a benchmark's J&F, the mean of the means of its parts."""

    score: float
    part: str


Expressions = Mapping[Key, Counted]


def by_expression(result: Any) -> dict[Key, Counted]:
    """Return the expressions that the benchmark's J&F counts."""
    rows, dataset = at(result, "per_expression"), at(result, "benchmark")
    dataset = dataset if isinstance(dataset, str) else None
    counted: dict[Key, Counted] = {}
    occurrences: Counter[tuple[str, str]] = Counter()
    for row in rows if isinstance(rows, list) else []:
        name, subset = (str(at(row, "video")), str(at(row, "expression_id"))), at(row, "subset")
        occurrence, occurrences[name] = occurrences[name], occurrences[name] + 1
        if is_number(at(row, "J&F")) and is_counted(dataset, subset):
            part = subset if dataset in SUBSET_MEANS else ""
            counted[Key(*name, occurrence)] = Counted(_score(dataset, row), part)
    return counted


def _score(dataset: str | None, row: dict[str, Any]) -> float:
    parts = [row.get("J"), row.get("F")]
    if not all(map(is_number, parts)):
        return float(row["J&F"])
    return float(rounded(dataset, parts).mean())


def score_interval(statistics: Any, form: str) -> str:
    """Return the 95 % interval of J&F by the benchmark's protocol, or "".

    Args:
        statistics: A result, or one of its differences.
        form: Format of a number.
    """
    inner = at(statistics, "statistics") or statistics
    low, high = (at(inner, "protocol", "J&F", bound) for bound in ("low", "high"))
    return f"[{low:{form}}, {high:{form}}]" if is_number(low) and is_number(high) else ""


def _score_row(name: str, result: Any, first: Any, kind: Literal["", "plain"]) -> list[str]:
    ratios = [
        number(at(result, key), 1) for key in ("keyframe_area_ratio_initial", "keyframe_area_ratio")
    ]
    jf = at(result, "J&F")
    share = min(max(jf, 0), 100) if is_number(jf) else 0
    bar = f'<span class="bar {kind}"><i style="width:{share:.1f}%"></i></span>'
    return [
        text(name, 100),
        f"{bar}<b>{number(jf, 1)}</b>",
        score_interval(result, ".1f") or DASH,
        *(number(at(result, key), 1) for key in ("J", "F")),
        _change(result, first),
        " → ".join(ratios) if ratios != [DASH, DASH] else DASH,
        number(at(result, "aks_rounds"), 2),
        number(at(result, "box_iou"), 1),
        *(number(at(result, key), 0) for key in ("n_expressions", "n_defective")),
        *(_count(at(result, key)) for key in ("missing", "faults", "unexpected")),
    ]


def at(value: Any, *keys: str) -> Any:
    """Return value[key][key]…, or None if any level is missing or no mapping."""
    for key in keys:
        if not isinstance(value, dict):
            return None
        value = value.get(key)
    return value


def is_number(value: Any) -> bool:
    """Return True for an int or float (no bool) that can be printed and drawn."""
    real = isinstance(value, int | float) and not isinstance(value, bool)
    return real and -1e300 < value < 1e300


def number(value: Any, decimals: int) -> str:
    """Format a number; return a dash for anything else."""
    return f"{value:.{decimals}f}" if is_number(value) else DASH


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _count(value: Any) -> str:
    return str(len(value)) if isinstance(value, list) else DASH
