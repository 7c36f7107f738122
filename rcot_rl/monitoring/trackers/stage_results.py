"""Results of the stages without steps: data, predict and eval, as scalars and tables."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from rcot_rl.monitoring.judgement.changes import heldout_change
from rcot_rl.monitoring.pages.figures import STEPS
from rcot_rl.monitoring.run_files.run_reader import RunReader, as_mapping, read_json
from rcot_rl.monitoring.trackers.data_samples import data_samples
from rcot_rl.monitoring.trackers.heldout_tables import heldout_responses
from rcot_rl.monitoring.trackers.query_table import query_table
from rcot_rl.monitoring.trackers.tracker import DataTable, Value
from rcot_rl.monitoring.trackers.value_key import value_key
from rcot_rl.prediction_layout import WAYS
from rcot_rl.stats.intervals import Interval, mean_interval
from rcot_rl.stats.json_values import at, is_number

Cell = float | int | str | bool | None


def stage_results(reader: RunReader, stage: str) -> dict[str, Value]:
    """Return the results of a stage; empty for a training stage, or before there are any."""
    if stage == "data":
        return data_results(reader)
    if stage == "predict":
        return predict_results(reader)
    return eval_results(reader) if stage == "eval" else {}


def manifests(reader: RunReader) -> dict[str, dict[str, Any]]:
    """Return shard set -> RUN/shards/<set>/manifest.json."""
    files = sorted((reader.root / "shards").glob("*/manifest.json"))
    return {f.parent.name: m for f in files if (m := as_mapping(read_json(f)))}


def data_results(reader: RunReader) -> dict[str, Value]:
    """Return sizes and ratios of the shard sets, what was dropped and why, and sample rows."""
    values: dict[str, Value] = {}
    counts: list[list[Cell]] = []
    dropped: list[list[Cell]] = []
    plan: list[list[Cell]] = []
    for name, manifest in manifests(reader).items():
        for split, rows in _numbers(manifest.get("rows")):
            values[value_key("data", name, f"{split}_rows")] = rows
        for split, ratios in as_mapping(manifest.get("ratios")).items():
            for ratio, value in _numbers(ratios):
                values[value_key("data", name, f"{split}_ratio", ratio)] = value
        for split, groups in as_mapping(manifest.get("counts")).items():
            counts += [[name, split, group, count] for group, count in _numbers(groups)]
        for what in ("expressions", "defects_by_reason", "defects_by_source"):
            causes = _numbers(at(manifest, "dropped", what))
            dropped += [[name, what, cause, count] for cause, count in causes]
        defects = at(manifest, "dropped", "defects")
        values[value_key("data", name, "defects")] = len(defects) if defects else 0
        for entry in manifest.get("plan") or []:
            cells = [at(entry, k) for k in ("split", "group", "asked", "available", "given")]
            plan.append([name, *cells])
    tables = {
        "data_counts": (["set", "split", "group", "rows"], counts),
        "data_dropped": (["set", "what", "cause", "count"], dropped),
        "data_plan": (["set", "split", "group", "asked", "available", "given"], plan),
    }
    values |= {key: DataTable(head, rows) for key, (head, rows) in tables.items() if rows}
    return values | data_samples(reader)


def predict_results(reader: RunReader) -> dict[str, Value]:
    """Return held-out rewards per task, checkpoint and way of decoding, and the responses."""
    values: dict[str, Value] = {}
    rows: list[list[Cell]] = []
    names = _components(reader.heldout())
    for task, checkpoint, way, rewards, first in _rewards(reader.heldout()):
        mean = rewards["mean"]
        key = ("heldout", task, checkpoint, way)
        values[value_key(*key)] = mean
        interval = level_of(rewards)
        change = None if first is rewards else heldout_change(first, rewards)
        for bound in ("low", "high"):
            value = getattr(interval, bound)
            if value is not None:
                values[value_key(*key, bound)] = value
        parts = as_mapping(rewards.get("components"))
        values |= {value_key(*key, name): v for name, v in _numbers(parts)}
        rows.append(
            [
                *(task, checkpoint, way, mean, interval.low, interval.high),
                *((None, None, None) if change is None else change[:3]),
                interval.n,
                *(parts.get(name) for name in names),
            ]
        )
    if rows:
        head = ["task", "checkpoint", "responses", "reward", "low", "high", "change", "change low"]
        head += ["change high", "prompts", *(f"component/{name}" for name in names)]
        values["heldout_rewards"] = DataTable(head, rows)
    return values | heldout_responses(reader)


def level_of(rewards: Mapping[str, Any]) -> Interval:
    """Return a mean held-out reward with its 95 % interval over prompts."""
    try:
        low, high, n = mean_interval(rewards["per_prompt"])[1:]
        return Interval(rewards["mean"], low, high, n)
    except (KeyError, TypeError, ValueError):
        return Interval(rewards["mean"], None, None, 0)


SCORES = ("J&F", "J", "F")
FIGURES = (*SCORES, "keyframe_area_ratio_initial", "keyframe_area_ratio", "aks_rounds", "box_iou")
ACCURACIES = ("N-Acc", "T-Acc")


def eval_results(reader: RunReader) -> dict[str, Value]:
    """Return the scores of each benchmark, tables like Tables 10 to 14, and queries."""
    values: dict[str, Value] = {}
    scores = reader.scores()
    for benchmark, name, result, is_baseline in _evaluated(scores):
        kind = "baseline" if is_baseline else "eval"
        for figure in FIGURES:
            if is_number(at(result, figure)):
                values[value_key(kind, benchmark, name, figure)] = result[figure]
        for subset, part in as_mapping(at(result, "per_subset")).items():
            for figure in (*SCORES, *ACCURACIES):
                if is_number(at(part, figure)):
                    values[value_key(kind, benchmark, name, subset, figure)] = part[figure]
        for figure in ("accuracy", "precision_A", "recall_A", "precision_B", "recall_B"):
            value = at(result, "aks_verdicts", figure)
            if is_number(value):
                values[value_key(kind, benchmark, name, f"aks_{figure}")] = value
    tables = {
        "scores": (_SCORES, _score_rows(scores)),
        "aks_confusion": (_CONFUSION, _confusion_rows(scores)),
        **{
            name: (["benchmark", "checkpoint", *columns], _figure_rows(scores, columns))
            for name, columns in _TABLES.items()
        },
    }
    values |= {key: DataTable(head, rows) for key, (head, rows) in tables.items() if rows}
    return values | query_table(reader)


_SCORES = ["benchmark", "checkpoint", "subset", "J&F", "low", "high", "J", "F", "N-Acc", "T-Acc"]
_SCORES += ["expressions", "defective", "unusable", "unexpected"]
_CONFUSION = ["benchmark", "checkpoint", "target", "answered A", "answered B", "neither"]

_TABLES: Mapping[str, tuple[str, ...]] = {
    "table_10_aks_overhead": ("AKS adds %", "J&F", "queries"),
    "table_11_inference_time": ("keyframe selection s", "segmentation s"),
    "table_12_total_time": ("total s",),
    "table_13_keyframes": ("area ratio % reselected", "area ratio % initial", "gain", "AKS rounds"),
    "table_14_box_iou": ("box IoU %",),
    "figure_10_step_times": ("VDG", "KFG", "AKS", "KTG", "SAM2"),
}
"""Table, named for the paper's, -> its columns: keys of `_figures`."""


def _figures(result: Any) -> dict[str, Any]:
    """Return the figures of the pipeline's steps as the paper's tables name them."""
    costs = at(result, "pipeline_costs")
    keyframe, masks = (at(costs, f"{part}_seconds") for part in ("keyframe", "segmentation"))
    first, last = (at(result, k) for k in ("keyframe_area_ratio_initial", "keyframe_area_ratio"))
    return {
        "AKS adds %": at(costs, "aks_extra"),
        "J&F": at(result, "J&F"),
        "queries": at(costs, "n_queries"),
        "keyframe selection s": keyframe,
        "segmentation s": masks,
        "total s": keyframe + masks if is_number(keyframe) and is_number(masks) else None,
        "area ratio % initial": first,
        "area ratio % reselected": last,
        "gain": last - first if is_number(first) and is_number(last) else None,
        "AKS rounds": at(result, "aks_rounds"),
        "box IoU %": at(result, "box_iou"),
        **{s.upper(): at(costs, "stages", s, "relative") for s in STEPS},
    }


def _figure_rows(scores: Mapping[str, Any], columns: Sequence[str]) -> list[list[Cell]]:
    """Return a row for each prediction with the table's first column."""
    rows: list[list[Cell]] = []
    for benchmark, name, result, _ in _evaluated(scores):
        figures = _figures(result)
        if is_number(figures[columns[0]]):
            rows.append([benchmark, name, *(figures[column] for column in columns)])
    return rows


def _score_rows(scores: Mapping[str, Any]) -> list[list[Cell]]:
    rows: list[list[Cell]] = []
    counts = ("n_expressions", "n_defective", "n_unusable", "n_unexpected")
    for benchmark, name, result, _ in _evaluated(scores):
        parts = {"all": result, **as_mapping(at(result, "per_subset"))}
        for subset, part in parts.items():
            interval = at(result, "statistics", "protocol", "J&F") if part is result else None
            row = [at(part, "J&F"), at(interval, "low"), at(interval, "high")]
            row += [at(part, figure) for figure in ("J", "F", *ACCURACIES, *counts)]
            rows.append([benchmark, name, subset, *row])
    return rows


def _confusion_rows(scores: Mapping[str, Any]) -> list[list[Cell]]:
    rows: list[list[Cell]] = []
    for benchmark, name, result, _ in _evaluated(scores):
        confusion = as_mapping(at(result, "aks_verdicts", "confusion"))
        for target in ("visible", "absent"):
            counts = [at(confusion, answer, target) for answer in ("A", "B", "none")]
            if all(map(is_number, counts)):
                rows.append([benchmark, name, target, *counts])
    return rows


def _evaluated(scores: Mapping[str, Any]) -> Iterator[tuple[str, str, dict[str, Any], bool]]:
    """Yield (benchmark, checkpoint, result, whether it is a baseline)."""
    for benchmark, document in scores.items():
        for group in ("checkpoints", "baselines"):
            for name, result in as_mapping(document.get(group)).items():
                if isinstance(result, dict):
                    yield benchmark, name, result, group == "baselines"


def _rewards(heldout: Mapping[str, Any]) -> Iterator[tuple[str, str, str, dict[str, Any], Any]]:
    """Yield (task, checkpoint, way, rewards, rewards of the first checkpoint)."""
    for task, results in heldout.items():
        first = next(iter(as_mapping(results).values()), None)
        for checkpoint, result in as_mapping(results).items():
            for way in WAYS:
                rewards = at(result, way)
                if is_number(at(rewards, "mean")):
                    yield task, checkpoint, way, rewards, at(first, way)


def _components(heldout: Mapping[str, Any]) -> list[str]:
    parts: Iterable[Any] = (rewards.get("components") for _, _, _, rewards, _ in _rewards(heldout))
    return list(dict.fromkeys(name for part in parts for name in as_mapping(part)))


def _numbers(mapping: Any) -> list[tuple[str, float]]:
    return [(str(k), v) for k, v in as_mapping(mapping).items() if is_number(v)]
