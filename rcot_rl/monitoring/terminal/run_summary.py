"""Text summary of a finished run (verdict, rewards, J&F, minutes, report) and of `rcot eval`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rcot_rl.monitoring.judgement.changes import heldout_change
from rcot_rl.monitoring.judgement.run_verdict import judge_run
from rcot_rl.monitoring.pages.compare import read_json_object, score_changes
from rcot_rl.monitoring.pages.figures import score_interval
from rcot_rl.monitoring.run_files.run_reader import RunReader, result_files
from rcot_rl.prediction_layout import WAYS, heldout_rewards_file
from rcot_rl.recipe.recorded import heldout_stages
from rcot_rl.stats.intervals import shown_change
from rcot_rl.stats.json_values import at
from rcot_rl.system.lines import fold

WIDTH = 80
"""Columns of the summary."""


def summary_table(root: Path) -> str:
    """Return the summary of a run folder, without parts that have no results. InputError.

    The verdict comes first, then held-out rewards, changes and levels of J&F, and last the minutes
    and the path of the report.
    """
    blocks = [
        _verdict_lines(root),
        _reward_lines(root),
        _change_lines(root),
        *_score_blocks(root),
        _end_lines(root),
    ]
    shown = ["\n".join(block) for block in blocks if block]
    rule = "─" * WIDTH
    return f"{rule}\n" + "\n\n".join(shown) + f"\n{rule}"


def _verdict_lines(root: Path) -> list[str]:
    """Return what the rules of docs/alerts.md say about the run; nothing without training."""
    verdict = judge_run(RunReader(root))
    return [] if verdict.level == "unknown" else fold(verdict.headline, WIDTH)


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a titled table; the first column is cut off if a line would be too long."""
    cells = [[title, *columns], *([f"  {row[0]}", *row[1:]] for row in rows)]
    widths = [max(len(row[k]) for row in cells) for k in range(len(cells[0]))]
    widths[0] = min(widths[0], WIDTH - sum(widths[1:]) - 2 * len(columns))
    lines = []
    for name, *values in cells:
        label = name if len(name) <= widths[0] else name[: widths[0] - 1] + "…"
        rest = [value.rjust(width) for value, width in zip(values, widths[1:], strict=True)]
        lines.append("  ".join([label.ljust(widths[0]), *rest]))
    return lines


def _reward_lines(root: Path) -> list[str]:
    path = heldout_rewards_file(root)
    if not path.is_file():
        return []
    rewards = read_json_object(path)
    rows = []
    stages, reader = heldout_stages(root), RunReader(root)
    for task, results in rewards.items():
        first, *others = results or [""]
        if not others:
            continue
        # A recipe may evaluate only the last checkpoint, and not the start of the stage.
        after = stages[task] if stages.get(task) in others else others[-1]
        start = reader.start_of(after)
        before = start if start in results else first
        for way in WAYS:
            cells = _reward_cells(results[before][way], results[after][way])
            rows.append([f"{task} {way}, after {after}", *cells])
    if not rows:
        return []
    return _table("held-out reward", ("before → after", *_CHANGE, "prompts"), rows)


_CHANGE = ("change", "95 % interval")


def _reward_cells(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    means = f"{before['mean']:.3f} → {after['mean']:.3f}"
    change = heldout_change(before, after)
    if change is None:
        return [means, "unknown", "", ""]
    interval = "" if change.low is None else f"[{change.low:+.3f}, {change.high:+.3f}]"
    difference = f"{shown_change(before['mean'], after['mean'], 3):+.3f}"
    return [means, difference, interval, str(change.n)]


def _score_blocks(root: Path) -> list[list[str]]:
    """Return a block for each benchmark: J&F of its checkpoints, variants and baselines."""
    blocks = []
    for path in result_files(root):
        result = read_json_object(path)
        rows = {**result.get("checkpoints", {}), **result.get("baselines", {})}
        width = max(map(len, rows), default=0)
        title = f"J&F of {path.stem}, masks by {result.get('segmenter') or 'unknown'}"
        lines = fold(title, WIDTH)
        for name, row in rows.items():
            lines += fold(f"{name:<{width}}  {score_text(row)}", WIDTH, "  ", "      ")
        blocks.append(lines)
    return blocks


def _change_lines(root: Path) -> list[str]:
    """Return the changes of J&F; with several benchmarks, only those over all expressions."""
    if not (root / "eval").is_dir():
        return []
    changes = score_changes([root])
    shown = [c for c in changes if c.name.startswith(_ALL)] or changes
    if not shown:
        return []
    rows = []
    for change in shown:
        _, low, high, clips = change.over_prompts
        interval = "" if low is None else f"[{low:+.1f}, {high:+.1f}]"
        name = change.name.removeprefix(_ALL).removeprefix("J&F ")
        levels = f"{change.before[0]:5.1f} → {change.after[0]:.1f}"
        rows.append([name, levels, f"{change.shown(1):+.1f}", interval, str(clips)])
    title = "J&F, all expressions" if shown is not changes else "J&F"
    benchmarks = {row[0].partition(", ")[0] for row in rows}
    if shown is changes and len(benchmarks) == 1 and all(", " in row[0] for row in rows):
        title = f"J&F, {benchmarks.pop()}"
        rows = [[row[0].partition(", ")[2], *row[1:]] for row in rows]
    return _table(title, ("before → after", *_CHANGE, "clips"), rows)


_ALL = "J&F all expressions, "


def score_text(result: dict[str, Any]) -> str:
    """Return J&F of one evaluation in percent, with the counts of expressions with faults."""
    if result["J&F"] is None:
        return "nothing to score"
    kinds = (
        ("defective ground truth", result.get("n_defective")),
        ("missing or unusable predictions", result.get("n_unusable")),
        ("unexpected names or values", result.get("n_unexpected")),
    )
    parts = [f"{count} with {kind}" for kind, count in kinds if count]
    faults = f"   of {result.get('n_expressions')} expressions: {', '.join(parts)}" if parts else ""
    interval = score_interval(result, ".1f")
    shown = f"{result['J&F']:5.1f} {interval}".rstrip()
    return f"{shown}   (J {result['J']:.1f}, F {result['F']:.1f}){faults}"


def evaluation_lines(document: dict[str, Any]) -> list[str]:
    """Return what `rcot eval` prints: scores, public scripts' figures, differences and faults.

    Args:
        document: The result of `benchmark_document`.
    """
    results = document["checkpoints"]
    segmenter = document.get("segmenter") or "unknown"
    count = document["n_expressions"]
    lines = [
        f"{document['benchmark']} {document['split']}: {count} expressions, masks by {segmenter}"
    ]
    alone = len(results) == 1
    for name, result in results.items():
        lines += ["J&F " + score_text(result) + ("" if alone else f"   {name}")]
        for mean in ("micro", "macro"):
            figures = at(result, "statistics", mean)
            if figures is not None:
                lines.append(f"  {mean} mean over {_OVER[mean]}: {_mean_text(figures)}")
        lines += [f"  {line}" for line in public_lines(result)]
    for change in document["differences"]:
        level = at(change, "protocol", "J&F", "mean")
        if level is not None:
            shown = f"J&F {level:+.1f} {score_interval(change, '+.1f')}"
            lines.append(f"{shown} from {change['before']} to {change['after']}")
    if any(score_interval(result, ".1f") for result in results.values()):
        videos = at(document, "statistics", "n_videos")
        lines.append(f"[95 % intervals: bootstrap over {videos} videos]")
    for name, result in results.items():
        lines += [line if alone else f"{name}: {line}" for line in fault_lines(result)]
    return lines


_OVER = {"micro": "expressions", "macro": "videos"}


def _mean_text(figures: dict[str, Any]) -> str:
    parts = []
    for score in ("J&F", "J", "F"):
        low, high = (at(figures, score, bound) for bound in ("low", "high"))
        interval = "" if low is None else f" [{low:.1f}, {high:.1f}]"
        parts.append(f"{score} {figures[score]['mean']:.1f}{interval}")
    return ", ".join(parts)


def public_lines(result: dict[str, Any]) -> list[str]:
    """Return a line for each figure of a public script that counts differently."""
    lines = []
    robustness = result.get("robustness")
    if robustness is not None:
        forms = (
            f"{form} R {_percent(robustness[form]['R'])}, A {_percent(robustness[form]['A'])}"
            for form in ("legacy", "corrected")
        )
        lines.append(f"VISA's robustness and accuracy: {'; '.join(forms)}" + _why(robustness))
    official = result.get("official")
    if official is not None:
        lines.append(f"official DAVIS evaluation of four annotators: {_jf_text(official)}")
    script = result.get("public_script")
    if script is not None:
        skipped = f"without {script['n_skipped']} skipped expressions"
        lines.append(f"ReasonVOS' public script, {skipped}: {_jf_text(script)}")
    return lines


def _jf_text(figures: dict[str, Any]) -> str:
    """Return J&F, J and F, or why they are unknown."""
    scores = (f"{key} {_percent(figures[key])}" for key in ("J&F", "J", "F"))
    return ", ".join(scores) + _why(figures)


def _why(figures: dict[str, Any]) -> str:
    return f" ({figures['reason']})" if figures.get("reason") else ""


def _percent(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.1f}"


LISTED = 5
"""Most places that are listed for each kind of fault; `rcot eval --json` lists all."""


def fault_lines(result: dict[str, Any]) -> list[str]:
    """Return a line for each kind of fault in an evaluation's input, with the first places."""
    faults = [f"{f['place']} {f['reason']}" for f in result["faults"]]
    defects = [f"{d['file']}: {d['key']}: {d['reason']} ({d['effect']})" for d in result["defects"]]
    kinds = [
        ("predictions are missing and count 0", result["missing"]),
        ("predictions or traces are unusable; such masks count 0", faults),
        ("defects in the ground truth; all expressions are included", defects),
    ]
    causes: dict[str, list[str]] = {}
    for entry in result["unexpected"]:
        causes.setdefault(entry["cause"] or "cause unknown", []).append(
            f"{entry['place']} ({entry['reason']})"
        )
    kinds += [(f"unexpected names or values: {cause}", places) for cause, places in causes.items()]
    lines = []
    for kind, places in kinds:
        if places:
            more = ["…"] if len(places) > LISTED else []
            lines.append(f"{len(places)} {kind}: " + "; ".join([*places[:LISTED], *more]))
    return lines


def submission_lines(written: dict[str, Any]) -> list[str]:
    """Return what `rcot submit` prints.

    Args:
        written: The fields of a `Submission`.
    """
    lines = [
        f"{written['archive']}: {written['masks']} masks of {written['expressions']} expressions "
        f"in {written['videos']} videos, {written['size_bytes'] / 1e6:.1f} MB",
        f"{written['empty_masks']} masks have no object",
        "read back: every mask is there, 8-bit grey, 0 or 255, of its frame's size",
    ]
    kinds = (
        ("predictions are missing or unusable; their masks are empty", written["filled"]),
        ("folders have unknown names or improper values", written["notes"]),
    )
    for kind, places in kinds:
        if places:
            more = ["…"] if len(places) > LISTED else []
            lines.append(f"{len(places)} {kind}: " + "; ".join([*places[:LISTED], *more]))
    return lines


def _end_lines(root: Path) -> list[str]:
    """Return the minutes, the peak memory, and where the report lies."""
    done = {path.parent.name: read_json_object(path) for path in root.glob("*/done.json")}
    order = sorted(done, key=lambda stage: done[stage].get("finished", 0.0))
    stages = {stage: done[stage]["minutes"] for stage in order}
    peak = max((facts.get("peak_gib", 0.0) for facts in done.values()), default=0.0)
    each = ", ".join(f"{name} {minutes:.1f}" for name, minutes in stages.items())
    total = f"{sum(stages.values()):.1f} in all" + (f": {each}" if each else "")
    lines = [*fold(total, WIDTH, "minutes  ", " " * 9), f"memory   {peak:.1f} GiB peak"]
    page = root / "report.html"
    return [*lines, f"report   {page}"] if page.is_file() else lines
