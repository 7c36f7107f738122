"""Collect the results of a study from its run folders.

Unlike a report, which shows what there is, this refuses a run whose files are missing or broken.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from rcot_rl.errors import InputError
from rcot_rl.monitoring.run_files.run_reader import RunReader, read_json
from rcot_rl.monitoring.study.study_results import (
    Cell,
    HeldoutReward,
    StudyBenchmark,
    StudyResults,
    StudyRun,
    first_fault,
)
from rcot_rl.prediction_layout import WAYS, benchmark_name, heldout_rewards_file
from rcot_rl.recipe.schema import Recipe
from rcot_rl.stats.json_values import at, is_number
from rcot_rl.stats.paper_tables import paper_tables
from rcot_rl.system.files import read_json_object

ABSENT = "no_target"
"""Subset of the expressions whose target is not in the video."""


class FinishedRun(NamedTuple):
    """A run of the study to collect."""

    recipe: str
    """File name of the recipe, without its suffix."""
    seed: int
    root: Path
    command: tuple[str, ...]


def collect(runs: Iterable[FinishedRun]) -> StudyResults:
    """Return the results of finished runs.

    Raises:
        InputError: A file of a run is missing or invalid, or two runs scored other expressions.
    """
    benchmarks: dict[str, StudyBenchmark] = {}
    collected = []
    for run in runs:
        try:
            collected.append(_collect_run(run, benchmarks))
        except ValidationError as error:
            raise first_fault(error, run.root) from error
    return StudyResults(benchmarks=benchmarks, runs=collected)


def _collect_run(run: FinishedRun, benchmarks: dict[str, StudyBenchmark]) -> StudyRun:
    reader = RunReader(run.root)
    recipe = reader.recipe
    if recipe is None:
        raise InputError("is not the record of a run's recipe", file=run.root / "recipe.yaml")
    facts = {stage.name: stage.facts for stage in reader.stages() if stage.state == "done"}
    final = recipe.scored_checkpoints[-1]
    figures = _figures(recipe)
    scores = {}
    for one in recipe.eval.benchmarks:
        name = benchmark_name(one.dataset, one.split)
        file = run.root / "eval" / f"{name}.json"
        cells = _get(read_json_object(file), file, "checkpoints")
        rows = {cell: _rows(result, file, cell) for cell, result in cells.items()}
        expressions = _benchmark(one.dataset, one.split, rows[final], cells[final], file)
        if benchmarks.setdefault(name, expressions) != expressions:
            raise InputError("has other expressions than the runs before it", file=file)
        places = [_place(row) for row in rows[final]]
        for cell, of_cell in rows.items():
            if [_place(row) for row in of_cell] != places:
                raise InputError(f"has other expressions than {final}", file=file, key=cell)
        scores[name] = {
            cell: _cell(of_cell, figures.get(cell, ()), file, cell)
            for cell, of_cell in rows.items()
        }
    record = reader.record
    return StudyRun(
        recipe=run.recipe,
        seed=run.seed,
        commit=record.get("git_commit"),
        command=shlex.join(run.command),
        versions={"python": str(record.get("python")), **record.get("versions", {})},
        minutes={name: float(stage.get("minutes", 0)) for name, stage in facts.items()},
        steps={name: facts[name]["steps"] for name in facts if "steps" in facts[name]},
        start=recipe.reference_of(final) if final in recipe.train else final,
        final=final,
        zero_target=recipe.predict.zero_target,
        paper_tables=recipe.report.paper_tables,
        scores=scores,
        rewards=_rewards(run.root, recipe),
    )


def _figures(recipe: Recipe) -> dict[str, list[str]]:
    """Return cell -> figures, other than J&F, of the tables' rows that it stands for."""
    wanted: dict[str, list[str]] = {}
    for table, rows in recipe.report.paper_tables.items():
        for row, cell in rows.items():
            metric = paper_tables()[table].metrics.get(row)
            if metric is not None:
                wanted.setdefault(cell, []).append(metric)
    return wanted


def _place(row: Mapping[str, Any]) -> tuple[str, str]:
    return str(row.get("video")), str(row.get("expression_id"))


def _rows(result: Any, file: Path, cell: str) -> list[dict[str, Any]]:
    rows = _get(result, file, "per_expression", name=cell)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError("must be a list of objects", file=file, key=f"{cell}.per_expression")
    return rows


def _benchmark(
    dataset: str, split: str, rows: list[dict[str, Any]], result: Any, file: Path
) -> StudyBenchmark:
    root = _get(result, file, "root")
    videos = at(read_json(Path(root) / "toy.json"), "videos")
    clips = list(dict.fromkeys(str(row.get("video")) for row in rows))
    index = {clip: number for number, clip in enumerate(clips)}
    kinds = (at(videos, *_place(row)[:1], "expressions", _place(row)[1], "kind") for row in rows)
    return StudyBenchmark(
        dataset=dataset,
        split=split,
        clips=clips,
        clip=[index[str(row.get("video"))] for row in rows],
        id=[_place(row)[1] for row in rows],
        subset=[str(row.get("subset")) for row in rows],
        kind=[kind or "" for kind in kinds],
    )


def _cell(rows: list[dict[str, Any]], figures: Iterable[str], file: Path, cell: str) -> Cell:
    def numbers(key: str, decimals: int) -> list[float]:
        for row in rows:
            if not is_number(row.get(key)):
                where = f"{cell}.per_expression.{'/'.join(_place(row))}.{key}"
                raise InputError(f"must be a number, not {row.get(key)!r}", file=file, key=where)
        return [round(float(row[key]), decimals) for row in rows]

    has_absent = any(row.get("subset") == ABSENT for row in rows)
    jaccard, boundary = numbers("J", 2), numbers("F", 2)
    try:
        return Cell(
            J=jaccard,
            F=boundary,
            empty=[int(bool(row.get("empty"))) for row in rows] if has_absent else None,
            found=[int(bool(row.get("found"))) for row in rows] if has_absent else None,
            figures={
                name: [round(v, 2) if is_number(v := row.get(name)) else None for row in rows]
                for name in figures
            },
        )
    except ValidationError as error:
        raise first_fault(error, file, cell) from error


def _rewards(root: Path, recipe: Recipe) -> dict[str, dict[str, dict[Any, HeldoutReward]]]:
    if not recipe.eval.heldout_prompts:
        return {}
    file = heldout_rewards_file(root)
    return {
        task: {
            checkpoint: {
                way: HeldoutReward(
                    per_prompt=[round(v, 4) for v in _get(values, file, way, "per_prompt")],
                    components={
                        name: round(mean, 4)
                        for name, mean in _get(values, file, way, "components").items()
                    },
                )
                for way in WAYS
            }
            for checkpoint, values in checkpoints.items()
        }
        for task, checkpoints in read_json_object(file).items()
    }


def _get(value: Any, file: Path, *keys: str, name: str = "") -> Any:
    """Return value[key][key]…, or raise InputError that names the missing key."""
    for depth, key in enumerate(keys):
        if not isinstance(value, dict) or key not in value:
            where = ".".join(([name] if name else []) + list(keys[: depth + 1]))
            raise InputError("missing", file=file, key=where)
        value = value[key]
    return value
