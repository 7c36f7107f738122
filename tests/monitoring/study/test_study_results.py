"""results.json: what is written is read again, and wrong input is refused in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rcot_rl.errors import InputError
from rcot_rl.monitoring.study.study_results import (
    RESULTS_FILE,
    StudyResults,
    read_results,
    write_results,
)

Values = Callable[..., dict[str, Any]]


def test_results_survive_writing_and_reading(
    tmp_path: Path, study_results: Callable[..., StudyResults]
) -> None:
    results = study_results()
    file = write_results(results, tmp_path)
    assert read_results(tmp_path) == results == read_results(file)
    lines = file.read_text().splitlines()
    assert sum('"recipe"' in line for line in lines) == len(results.runs), "a line per run"


def test_a_full_study_is_small(tmp_path: Path, study_values: Values) -> None:
    values = study_values(n_clips=215)  # 2 x 860 expressions
    cells = values["runs"][0]["scores"]
    for one in cells.values():
        one |= {f"variant-{k}": one["last"] for k in range(16)}
    for run in values["runs"][1:3]:
        run["scores"] = cells
    file = write_results(StudyResults.model_validate(values), tmp_path)
    assert file.stat().st_size < 5e6


def set_at(value: Any, key: str, new: Any) -> None:
    *path, last = key.split("/")
    for step in path:
        value = value[int(step)] if isinstance(value, list) else value[step]
    if isinstance(value, list):
        value[int(last)] = new
    else:
        value[last] = new


@pytest.mark.parametrize(
    ("key", "new", "told"),
    [
        ("format", 2, "format: "),
        ("surplus", 1, "surplus: "),
        ("runs/0/seed", "1", "runs.0.seed: "),
        ("runs/0/scores/mevis-valid/last/J/3", float("nan"), "runs.0.scores.mevis-valid.last.J.3"),
        ("runs/0/scores/mevis-valid/last/J/3", 100.5, "runs.0.scores.mevis-valid.last.J.3"),
        ("runs/0/scores/mevis-valid/last/J", [1.0], "runs.0.scores.mevis-valid.last.J: must have"),
        ("runs/0/scores/revos-valid/last/empty", [1], "revos-valid.last.empty: must have 36"),
        ("runs/0/scores/other", {}, "runs.0.scores.other: is none of the benchmarks"),
        ("runs/1/seed", 1, "runs.1: training with seed 1 occurs twice"),
        ("runs/0/paper_tables/table-5/VDG", "last", "table-5.VDG: is no row"),
        ("runs/0/paper_tables/table-5/base", "gone", "table-5.base: gone is not scored"),
        ("runs/0/rewards/ktg/last/sampled/per_prompt", [1.0], "ktg: checkpoints must have"),
        ("benchmarks/mevis-valid/clip/0", 99, "mevis-valid.clip: has an index beyond"),
        ("benchmarks/mevis-valid/id", ["0"], "mevis-valid.id: must have 36"),
        ("benchmarks/mevis-valid/dataset", "revos", "mevis-valid: is of the same dataset"),
    ],
)
def test_invalid_results_are_refused_with_file_and_key(
    tmp_path: Path, study_values: Values, key: str, new: Any, told: str
) -> None:
    values = json.loads(json.dumps(study_values()))
    set_at(values, key, new)
    file = tmp_path / RESULTS_FILE
    file.write_text(json.dumps(values))
    with pytest.raises(InputError) as caught:
        read_results(tmp_path)
    (line,) = caught.value.faults
    assert line.startswith(f"{file}: ") and told in line and "\n" not in line


def test_a_missing_or_broken_file_is_refused(tmp_path: Path) -> None:
    for text in (None, "{", "[]"):
        if text is not None:
            (tmp_path / RESULTS_FILE).write_text(text)
        with pytest.raises(InputError, match=r"results\.json"):
            read_results(tmp_path)
