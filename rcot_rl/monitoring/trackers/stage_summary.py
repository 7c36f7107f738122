"""Values of a whole stage by which a tracker's list of runs can be filtered and sorted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rcot_rl.monitoring.judgement.changes import heldout_change
from rcot_rl.monitoring.judgement.run_verdict import judge_run
from rcot_rl.monitoring.run_files.run_reader import RunReader, StageView, as_mapping
from rcot_rl.monitoring.trackers.tracker import Value
from rcot_rl.monitoring.trackers.value_key import value_key
from rcot_rl.prediction_layout import WAYS
from rcot_rl.stats.expression_scores import by_expression, paired_change
from rcot_rl.stats.json_values import at, is_number

MOST_VERDICTS = 10
"""Failures, the newest ones, whose verdicts are listed."""


def stage_summary(reader: RunReader, stage: str) -> dict[str, Value]:
    """Return what is known about a stage so far, also from stages after it.

    A training stage has the held-out rewards and J&F of its checkpoint, each with its change from
    the stage that it started from and that change's 95 % interval, and the verdict in words.
    """
    view = reader.stage(stage)
    values = _course(view)
    if view.kind in ("sft", "grpo"):
        start = reader.start_of(stage)
        values |= _heldout(reader.heldout(), stage, start)
        values |= _scores(reader.scores(), stage, start)
    return values | _verdict(reader, stage)


def _course(view: StageView) -> dict[str, Value]:
    """Return attempts, failures with their causes, minutes and peak memory."""
    causes = [str(row.get("cause", "unknown")) for row in view.failures]
    values: dict[str, Value] = {
        "state": view.state,
        "attempts": view.attempts,
        "restarts": max(0, view.attempts - 1),
        "failures": len(causes),
        "failure_causes": ", ".join(dict.fromkeys(causes)) or "none",
    }
    first = max(0, len(causes) - MOST_VERDICTS)
    for number, row in enumerate(view.failures[first:], first + 1):
        text = str(row.get("text") or row.get("error") or "")
        values[f"failure_verdict_{number}"] = f"step {row.get('step', '?')}: {text}"
    for key, name in (("minutes", "minutes"), ("peak_gib", "peak_memory_gib"), ("steps", "steps")):
        if is_number(view.facts.get(key)):
            values[name] = view.facts[key]
    return values


def _heldout(heldout: Mapping[str, Any], stage: str, start: str | None) -> dict[str, Value]:
    values: dict[str, Value] = {}
    for task, results in heldout.items():
        for way in WAYS:
            after, before = at(results, stage, way), at(results, start or "", way)
            key = f"heldout_{task}_{way}"
            values |= _levels(key, at(before, "mean"), at(after, "mean"))
            values |= _change(key, heldout_change(before, after))
    return values


def _scores(
    scores: Mapping[str, Mapping[str, Any]], stage: str, start: str | None
) -> dict[str, Value]:
    values: dict[str, Value] = {}
    for benchmark, document in scores.items():
        checkpoints = as_mapping(document.get("checkpoints"))
        after, before = checkpoints.get(stage), checkpoints.get(start or "")
        key = f"J&F_{benchmark}"
        values |= _levels(key, at(before, "J&F"), at(after, "J&F"))
        values |= _change(key, paired_change(by_expression(before), by_expression(after)))
    return values


def _verdict(reader: RunReader, stage: str) -> dict[str, Value]:
    """Return the verdict on a training stage; for the report stage, that on the run."""
    if stage == "report":
        run = judge_run(reader)
        texts = {"verdict": run.headline, "next_steps": " ".join(run.next_steps)}
        return {"verdict_level": run.level, **texts}
    if stage not in reader.training_stages:
        return {}
    verdicts = {one.stage: one for one in judge_run(reader).stages}
    return {"verdict": " ".join(verdicts[stage].sentences)} if stage in verdicts else {}


def _levels(key: str, before: Any, after: Any) -> dict[str, Value]:
    levels = {key: after, f"{key}_before": before if is_number(after) else None}
    return {value_key(k): v for k, v in levels.items() if is_number(v)}


def _change(key: str, change: Any) -> dict[str, Value]:
    """Return a change and its 95 % interval; empty for None."""
    if change is None:
        return {}
    parts = {"change": change.mean, "change_low": change.low, "change_high": change.high}
    return {value_key(f"{key}_{k}"): v for k, v in parts.items() if v is not None}
