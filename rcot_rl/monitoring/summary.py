"""The table that a finished run ends with: rewards, J&F, minutes, and where the report lies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rcot_rl.intervals import paired_difference, shown_change
from rcot_rl.monitoring.compare import STAGES as STAGES_OF
from rcot_rl.monitoring.compare import read_object, score_changes
from rcot_rl.monitoring.figures import result_files
from rcot_rl.recipe.schema import STAGES


def summary_table(root: Path) -> str:
    """Plain text. What a run does not have is left out, never filled in."""
    lines = [*_reward_lines(root), *_score_lines(root), *_change_lines(root), *_time_lines(root)]
    page = root / "report.html"
    if page.is_file():
        lines.append(f"report   {page}")
    width = max(map(len, lines), default=0)
    return "\n".join(["─" * width, *lines, "─" * width])


def _reward_lines(root: Path) -> list[str]:
    path = root / "predict" / "rewards.json"
    if not path.is_file():
        return []
    rewards = read_object(path)
    lines = ["held-out reward   before → after, change with its 95 % interval"]
    for task, own in STAGES_OF.items():
        results = rewards.get(task, {})
        # a recipe may have the last checkpoint measured alone
        after = next(
            (name for name in (own, *reversed(STAGES_OF.values())) if name in results), None
        )
        if "sft" not in results or after is None:
            continue
        late = "" if after == own else f"   after {after}"
        for way in ("sampled", "greedy"):
            line = _reward_line(task, way, results["sft"][way], results[after][way])
            lines.append(f"  {line}{late}")
    return lines


def _reward_line(task: str, way: str, before: dict[str, Any], after: dict[str, Any]) -> str:
    means = f"{task} {way:<8} {before['mean']:.3f} → {after['mean']:.3f}"
    try:
        change = paired_difference(before["per_prompt"], after["per_prompt"])
    except ValueError:
        return f"{means}   change not known"
    reach = "" if change.low is None else f" [{change.low:+.3f}, {change.high:+.3f}]"
    difference = shown_change(before["mean"], after["mean"], 3)
    return f"{means}   {difference:+.3f}{reach}   {change.n} prompts"


def _score_lines(root: Path) -> list[str]:
    lines = []
    for path in result_files(root):
        result = read_object(path)
        lines.append(f"J&F {path.stem}   masks by {result.get('segmenter') or 'unknown'}")
        rows = {**result.get("checkpoints", {}), **result.get("baselines", {})}
        for name, row in rows.items():
            lines.append(f"  {name:<12} " + score_text(row))
    return lines


def _change_lines(root: Path) -> list[str]:
    """J&F of the benchmarks, or of all their expressions, after training and over the baselines."""
    if not (root / "eval").is_dir():
        return []
    changes = score_changes([root])
    whole = [c for c in changes if c.name.startswith(_ALL)] or changes
    if not whole:
        return []
    of_all = " of all expressions" if whole is not changes else ""
    lines = [f"J&F{of_all}   before → after, change with its 95 % interval; clips are the sample"]
    for change in whole:
        _, low, high, clips = change.over_prompts
        reach = "" if low is None else f" [{low:+.1f}, {high:+.1f}]"
        name = change.name.removeprefix(_ALL).removeprefix("J&F ")
        levels = f"{change.before[0]:5.1f} → {change.after[0]:.1f}"
        lines.append(f"  {name:<26}{levels} {change.shown(1):+6.1f}{reach}   {clips} clips")
    return lines


_ALL = "J&F all expressions, "


def score_text(result: dict[str, Any]) -> str:
    """J&F of one evaluation, in percent, with what is wrong with some of its expressions."""
    if result["J&F"] is None:
        return "nothing to score"
    kinds = (
        ("defective ground truth", result.get("n_defective")),
        ("missing or unusable predictions", result.get("n_unusable")),
        ("unexpected names or values", result.get("n_unexpected")),
    )
    parts = [f"{count} with {kind}" for kind, count in kinds if count]
    of = f"   of {result.get('n_expressions')} expressions: {', '.join(parts)}" if parts else ""
    return f"{result['J&F']:5.1f}   (J {result['J']:.1f}, F {result['F']:.1f}){of}"


LISTED = 5
"""Most places that are named of each kind of fault; `rcot eval --json` has them all."""


def fault_lines(result: dict[str, Any]) -> list[str]:
    """What is wrong with an evaluation's input: a line for each kind, with the first places."""
    faults = [f"{f['place']} {f['reason']}" for f in result["faults"]]
    defects = [f"{d['file']}: {d['key']}: {d['reason']} ({d['effect']})" for d in result["defects"]]
    kinds = [
        ("predictions are missing and count 0", result["missing"]),
        ("predictions or traces cannot be used, and such masks count 0", faults),
        ("defects of the ground truth; no expression is left out", defects),
    ]
    causes: dict[str, list[str]] = {}
    for entry in result["unexpected"]:
        causes.setdefault(entry["cause"] or "cause unknown", []).append(
            f"{entry['place']} ({entry['reason']})"
        )
    kinds += [(f"unexpected names or values: {cause}", places) for cause, places in causes.items()]
    lines = []
    for says, places in kinds:
        if places:
            more = ["…"] if len(places) > LISTED else []
            lines.append(f"{len(places)} {says}: " + "; ".join([*places[:LISTED], *more]))
    return lines


def _time_lines(root: Path) -> list[str]:
    stages = {}
    peak = 0.0
    for stage in STAGES:
        path = root / stage / "done.json"
        if not path.is_file():
            continue
        facts = read_object(path)
        stages[stage] = facts["minutes"]
        peak = max(peak, facts.get("peak_gib", 0.0))
    each = ", ".join(f"{name} {minutes:.1f}" for name, minutes in stages.items())
    return [f"minutes  {sum(stages.values()):.1f} in all ({each}); peak memory {peak:.1f} GiB"]
