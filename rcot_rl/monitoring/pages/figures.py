"""Tables of the report: rewards on held-out prompts, and J, F and J&F of the benchmarks.

Each section takes a parsed file of the run, or None, and says in its place what is missing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, get_args

from rcot_rl.monitoring.judgement.changes import heldout_change
from rcot_rl.monitoring.pages.page import details, folds, missing, section, table, text
from rcot_rl.monitoring.run_files.run_reader import as_mapping
from rcot_rl.prediction_layout import WAYS
from rcot_rl.recipe.inference_section import ORACLES, PolicyTask
from rcot_rl.stats.expression_scores import by_expression, paired_change
from rcot_rl.stats.intervals import Interval, shown_change
from rcot_rl.stats.json_values import at, is_number

TASKS = ("aks", "ktg")

DASH = "–"
"""Stands for a value that is missing."""


def rewards_section(rewards: Any, maxima: Mapping[str, float] = MappingProxyType({})) -> str:
    """Return the section on held-out rewards.

    Args:
        rewards: predict/rewards.json: {task: {checkpoint: {"sampled" | "greedy": {"mean", …}}}}.
        maxima: Task -> greatest possible reward, where known.
    """
    title = "Held-out reward"
    tasks = {t: r for t, r in as_mapping(rewards).items() if t in TASKS and as_mapping(r)}
    if not tasks:
        return section(title, missing("predict/rewards.json (rewards on held-out prompts)"))
    names = list(dict.fromkeys(name for results in tasks.values() for name in results))
    reference = names[0]
    rows = []
    for task, results in tasks.items():
        most = f" <small>of {number(maxima[task], 0)}</small>" if task in maxima else ""
        for way in WAYS:
            base = at(results, reference, way)
            cells = [
                _reward_cell(at(results, name, way), None if name == reference else base)
                for name in names
            ]
            rows.append([f"{task.upper()} {way}{most}", *cells])
    absent = [task.upper() for task in TASKS if task not in tasks]
    sizes = {_count(at(r, reference, "sampled", "per_prompt")) for r in tasks.values()}
    caption = (
        f"Mean reward on the same {' or '.join(sorted(sizes))} held-out prompts; below it the "
        f"change from {text(reference)} with its 95 % confidence interval, coloured if it excludes "
        "0"
    )
    absent_note = missing(f"rewards of {', '.join(absent)}") if absent else ""
    parts = details(
        "Reward components of the sampled responses, before weights", _components(tasks, names)
    )
    how = details("How to read this table", f"<p>{_HELDOUT_NOTE}</p>")
    rewards_table = table(["task", *map(text, names)], rows, 1, caption)
    return section(title, rewards_table, folds(parts, how), absent_note)


_HELDOUT_NOTE = (
    "AKS: agentic keyframe selection. KTG: keyframe target grounding. “Sampled” uses the training "
    "temperature, and is what training optimizes; “greedy” is what the pipeline uses. The interval "
    "is Student’s t over prompts, paired. It does not cover the spread between training seeds; "
    "<code>rcot compare</code> does. If the sampled reward rises and the greedy one does not, "
    "training made the policy surer, not better."
)


def _components(tasks: Mapping[str, Any], names: list[str]) -> str:
    rows = []
    for task, results in tasks.items():
        parts = {n: as_mapping(at(results, n, "sampled", "components")) for n in names}
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
    change = heldout_change(base, result)
    if change is None:
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
    how = details("How to read these tables", f"<p>{_HOW_TO_READ}</p>")
    tables = "".join(_benchmark(name, result) for name, result in scores.items())
    return section(title, f'<div class="benchmarks">{tables}</div>', how)


_HOW_TO_READ = (
    "J, F, their mean J&amp;F, ratios and IoU are in percent. The change is the paired difference "
    "of J&amp;F with its 95 % confidence interval over clips, coloured if it excludes 0; it is the "
    "difference of the levels beside it. A variant of the settings is compared with its own "
    "checkpoint. The interval of J&amp;F itself is a bootstrap over videos. Area ratio: target "
    "area in the keyframe over its largest area in the video, first choice → after AKS. Box IoU: "
    "best predicted box for each visible target. ReVOS: J&amp;F and its change are the mean of the "
    "referring and the reasoning mean. Missing predictions count 0. Expressions with defective "
    "ground truth are included. If J&amp;F does not follow the reward, compare with the baselines, "
    "then look at the queries below: a wrong keyframe, a wrong box, or a mask that the segmenter "
    "loses."
)


class _Row(NamedTuple):
    """A result to show: its name, the result it is compared with, and how the row looks."""

    label: str
    result: Any
    base: Any
    against: str
    """Name of the base if it is not the table's own; else empty."""

    kind: Literal["", "sub", "apart"]


def _benchmark(name: str, result: Any) -> str:
    if not isinstance(result, dict):
        return missing(f"eval/{name}.json (unreadable)")
    stages, baselines = (as_mapping(result.get(key)) for key in ("checkpoints", "baselines"))
    if not stages:
        stages = {"predictions": result}
    reference = next((name for name in stages if "@" not in name), next(iter(stages)))
    rows = _rows(stages, baselines, reference)
    defective = at(result, "n_defective")
    with_defects = f", {number(defective, 0)} with defective ground truth" if defective else ""
    facts = (
        f"{number(at(result, 'n_expressions'), 0)} expressions{with_defects} · "
        f"masks by <b>{text(at(result, 'segmenter') or 'unknown', 100)}</b> · "
        f"{text(at(result, 'protocol') or '', 200)}"
    )
    head = ["", "J&amp;F", f"change from {text(reference)}", "J", "F"]
    scored = table(
        head,
        [_score_row(row) for row in rows],
        caption=facts,
        classes=[row.kind for row in rows],
        secondary=(3, 4),
    )
    return (
        f'<div class="benchmark"><h3>{text(name, 100)}</h3>{scored}'
        + folds(
            _public(rows),
            _counts(rows),
            _subsets(result),
            _steps(rows),
            _listing("Defects of the ground truth", result.get("defects"), DEFECT_COLUMNS),
            _listing("Unexpected names and values", result.get("unexpected"), UNEXPECTED_COLUMNS),
        )
        + "</div>"
    )


def _rows(stages: Mapping[str, Any], baselines: Mapping[str, Any], reference: str) -> list[_Row]:
    """Return checkpoints, each followed by its variants, then baselines and upper bounds."""
    base = stages[reference]
    rows = []
    owners = [name for name in stages if name.partition("@")[0] == name]
    owners += [name for name in stages if "@" in name and name.partition("@")[0] not in stages]
    for owner in owners:
        rows.append(_Row(owner, stages[owner], base, "", ""))
        for name, result in stages.items():
            checkpoint, at_sign, variant = name.partition("@")
            if at_sign and checkpoint == owner and name != owner:
                against = owner if owner != reference else ""
                rows.append(_Row(f"@{variant}", result, stages[owner], against, "sub"))
    for name, result in baselines.items():
        kind = "upper bound" if name in ORACLES else "baseline"
        rows.append(_Row(f"{kind}: {name}", result, base, "", "apart"))
    return rows


def _score_row(row: _Row) -> list[str]:
    against = f"<small>from {text(row.against, 60)}</small>" if row.against else ""
    return [
        text(row.label, 100),
        f"<b>{number(at(row.result, 'J&F'), 1)}</b>",
        _change(row.result, row.base) + against,
        *(number(at(row.result, key), 1) for key in ("J", "F")),
    ]


def _counts(rows: Sequence[_Row]) -> str:
    """Return interval, keyframes, boxes and faults of each row to unfold."""
    cells = []
    for row in rows:
        ratios = [
            number(at(row.result, key), 1)
            for key in ("keyframe_area_ratio_initial", "keyframe_area_ratio")
        ]
        cells.append(
            [
                text(row.label, 100),
                score_interval(row.result, ".1f") or DASH,
                " → ".join(ratios) if ratios != [DASH, DASH] else DASH,
                number(at(row.result, "aks_rounds"), 2),
                number(at(row.result, "box_iou"), 1),
                *(number(at(row.result, key), 0) for key in ("n_expressions", "n_defective")),
                *(_count(at(row.result, key)) for key in ("missing", "faults", "unexpected")),
            ]
        )
    head = [
        "",
        "J&amp;F interval",
        "area ratio",
        "AKS rounds",
        "box IoU",
        "expressions",
        "defective",
    ]
    head += ["missing", "faults", "unexpected"]
    return details("Keyframes and faults", table(head, cells))


def _public(rows: Sequence[_Row]) -> str:
    """Return the figures of public scripts that count differently; empty without any."""
    tables = []
    for key, title, columns in _PUBLIC:
        cells = [
            [
                text(row.label, 100),
                *(
                    number(at(row.result, key, *path), 0 if path == ("n_skipped",) else 1)
                    for path in columns.values()
                ),
            ]
            for row in rows
            if at(row.result, key) is not None
        ]
        reasons = {str(at(r.result, key, "reason")) for r in rows if at(r.result, key, "reason")}
        why = "".join(f'<p class="soft">{text(reason, 400)}</p>' for reason in sorted(reasons))
        if cells:
            tables.append(table(["", *columns], cells, caption=title) + why)
    if not tables:
        return ""
    return details("Public scripts", "".join(tables))


_PUBLIC: tuple[tuple[str, str, dict[str, tuple[str, ...]]], ...] = (
    (
        "robustness",
        "VISA’s robustness R and accuracy A on ReVOS, in percent: as its script counts (legacy), "
        "and with its formula applied to all expressions (corrected)",
        {
            f"{measure} {form}": (form, measure)
            for form in ("legacy", "corrected")
            for measure in ("R", "A")
        },
    ),
    (
        "official",
        "Official DAVIS evaluation of four annotators, in percent",
        {"J&amp;F": ("J&F",), "J": ("J",), "F": ("F",)},
    ),
    (
        "public_script",
        "ReasonVOS’ public script, which skips expressions, in percent",
        {"J&amp;F": ("J&F",), "J": ("J",), "F": ("F",), "skipped": ("n_skipped",)},
    ),
)
"""Key of a result, caption, and column -> path of the figure."""


def _subsets(result: Any) -> str:
    keys = ("J&F", "J", "F", "N-Acc", "T-Acc")
    parts = [
        [
            text(n, 60),
            *(number(at(s, k), 1) for k in keys),
            *(number(at(s, k), 0) for k in ("n_expressions", "n_defective")),
        ]
        for n, s in as_mapping(result.get("per_subset")).items()
    ]
    if not parts:
        return ""
    head = ["subset", "J&amp;F", "J", "F", "N-Acc", "T-Acc", "expressions", "defective"]
    return details("Subsets", table(head, parts))


def _steps(rows: Sequence[_Row]) -> str:
    """Return times of the pipeline's steps and verdicts of AKS to unfold; empty without them."""
    times, verdicts = [], []
    for name, result in ((row.label, row.result) for row in rows):
        costs, judged = at(result, "pipeline_costs"), at(result, "aks_verdicts")
        if costs is not None:
            stages = [number(at(costs, "stages", s, "relative"), 2) for s in STEPS]
            seconds = [
                number(at(costs, k), 2) for k in ("keyframe_seconds", "segmentation_seconds")
            ]
            times.append([text(name, 100), *stages, number(at(costs, "aks_extra"), 1), *seconds])
        if judged is not None:
            keys = ("precision_A", "recall_A", "precision_B", "recall_B")
            shares = [number(at(judged, key), 1) for key in keys]
            count, brier = number(at(judged, "n"), 0), number(at(judged, "brier"), 3)
            verdicts.append([text(name, 100), count, *shares, brier])
    parts = []
    if times:
        head = ["", *map(str.upper, STEPS), "AKS adds %", "keyframe, s", "segmentation, s"]
        caption = (
            "Engine time relative to KTG and SAM2 together (1). Seconds are means per query; with "
            "many queries in progress they are latencies of a shared batch"
        )
        parts.append(details("Times", table(head, times, caption=caption)))
    if verdicts:
        head = ["", "judged", "A precision", "A recall", "B precision", "B recall", "Brier"]
        caption = (
            "Precision and recall in percent; A is right if the frame shows the target. Brier "
            "score of the probability of A: 0 is best"
        )
        parts.append(details("Verdicts of AKS", table(head, verdicts, caption=caption)))
    return "".join(parts)


STEPS = (*get_args(PolicyTask), "sam2")
"""Steps of the pipeline, in the order of its costs."""
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


def score_interval(statistics: Any, form: str) -> str:
    """Return the 95 % interval of J&F by the benchmark's protocol, or "".

    Args:
        statistics: A result, or one of its differences.
        form: Format of a number.
    """
    inner = at(statistics, "statistics") or statistics
    low, high = (at(inner, "protocol", "J&F", bound) for bound in ("low", "high"))
    return f"[{low:{form}}, {high:{form}}]" if is_number(low) and is_number(high) else ""


def number(value: Any, decimals: int) -> str:
    """Format a number; return a dash for anything else."""
    return f"{value:.{decimals}f}" if is_number(value) else DASH


def _count(value: Any) -> str:
    return str(len(value)) if isinstance(value, list) else DASH
