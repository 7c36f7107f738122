"""OUT/results.json of a study: all numbers that its page needs, so that the runs may be deleted.

    {"format": 1,
     "benchmarks": {BENCHMARK: {"dataset", "split", "clips": [name],
                                "clip": [index], "id": [text], "subset": [text], "kind": [text]}},
     "runs": [{"recipe", "seed", "commit", "command", "versions": {package: version},
               "minutes": {stage: number}, "steps": {stage: number}, "start", "final",
               "zero_target", "paper_tables": {table: {row: cell}},
               "scores": {BENCHMARK: {CELL: {"J": [percent], "F": [percent], …}}},
               "rewards": {task: {checkpoint: {"sampled" | "greedy":
                                               {"per_prompt": [number], "components": {}}}}}}]}

A cell is a checkpoint or `<checkpoint>@<variant>`. The arrays of a benchmark and of its cells have
one entry per expression, in the same order. J and F have 2 decimals in percent, to which ReVOS
rounds them too.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rcot_rl.errors import InputError
from rcot_rl.prediction_layout import Way
from rcot_rl.stats.paper_tables import paper_tables
from rcot_rl.system.files import read_json_object, write_text

RESULTS_FILE = "results.json"

Percent = Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Bit = Annotated[int, Field(ge=0, le=1)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class StudyBenchmark(_Part):
    """The expressions of a benchmark."""

    dataset: str
    split: str
    clips: list[str]
    clip: list[Annotated[int, Field(ge=0)]] = Field(min_length=1)
    """For each expression, the index of its clip."""
    id: list[str]
    subset: list[str]
    """The evaluation's subset, such as `referring` or `no_target`."""
    kind: list[str]
    """What a toy expression is about, such as `time`; empty for other corpora."""


class Cell(_Part):
    """Scores of one checkpoint, in one variant, on one benchmark."""

    J: list[Percent]
    F: list[Percent]
    empty: list[Bit] | None = None
    """1 if no frame has a predicted pixel. Only for benchmarks with absent targets."""
    found: list[Bit] | None = None
    """1 if some frame has a predicted pixel. Only for benchmarks with absent targets."""
    figures: dict[str, list[Finite | None]] = Field(default_factory=dict)
    """Other metrics that a table of the paper asks for: figure -> values."""


class HeldoutReward(_Part):
    """Rewards on the held-out prompts of a task, in one way of decoding."""

    per_prompt: list[Finite] = Field(min_length=1)
    components: dict[str, Finite]
    """Means of the unweighted components."""


class StudyRun(_Part):
    """One recipe with one seed."""

    recipe: str
    seed: int
    commit: str | None
    command: str
    versions: dict[str, str]
    minutes: dict[str, Finite]
    steps: dict[str, int]
    start: str
    """The checkpoint that GRPO of the final checkpoint starts from: its KL reference."""
    final: str
    zero_target: bool
    """True if the prompt allows an empty list of boxes."""
    paper_tables: dict[str, dict[str, str]]
    scores: dict[str, dict[str, Cell]]
    rewards: dict[str, dict[str, dict[Way, HeldoutReward]]]


class StudyResults(_Part):
    """All runs of a study that are finished."""

    format: Literal[1] = 1
    benchmarks: dict[str, StudyBenchmark]
    runs: list[StudyRun]


def write_results(results: StudyResults, folder: Path) -> Path:
    """Write FOLDER/results.json, one benchmark or run per line."""
    lines = {
        name: json.dumps(one.model_dump(exclude_none=True), separators=(",", ":"))
        for name, one in results.benchmarks.items()
    }
    benchmarks = ",\n".join(f"{json.dumps(name)}:{line}" for name, line in lines.items())
    runs = ",\n".join(
        json.dumps(_without_none(run), separators=(",", ":"), ensure_ascii=False)
        for run in results.runs
    )
    text = f'{{"format":1,\n"benchmarks":{{\n{benchmarks}\n}},\n"runs":[\n{runs}\n]}}\n'
    write_text(folder / RESULTS_FILE, text)
    return folder / RESULTS_FILE


def _without_none(run: StudyRun) -> dict[str, object]:
    """Return a run as JSON values, without the optional arrays that it lacks."""
    values = run.model_dump()
    for cells in values["scores"].values():
        for cell in cells.values():
            for name in ("empty", "found", "figures"):
                if not cell[name]:
                    del cell[name]
    return values


def read_results(path: Path) -> StudyResults:
    """Read and check results.json.

    Args:
        path: The file, or the folder that has it.

    Raises:
        InputError: The file is missing or invalid; one line with file and key.
    """
    file = path / RESULTS_FILE if path.is_dir() else path
    values = read_json_object(file)
    try:
        results = StudyResults.model_validate(values)
    except ValidationError as error:
        raise first_fault(error, file) from error
    for key, message in _contradictions(results):
        raise InputError(message, file=file, key=key)
    return results


def first_fault(error: ValidationError, file: Path, *prefix: str) -> InputError:
    """Return the first fault of invalid values as one line with file and key."""
    first = error.errors()[0]
    key = ".".join(map(str, (*prefix, *first["loc"])))
    return InputError(first["msg"], file=file, key=key)


def _contradictions(results: StudyResults) -> Iterable[tuple[str, str]]:
    """Yield (key, message) for what the types alone do not exclude."""
    sizes: dict[str, int] = {}
    datasets: dict[str, str] = {}
    for name, benchmark in results.benchmarks.items():
        key, sizes[name] = f"benchmarks.{name}", len(benchmark.clip)
        for field in ("id", "subset", "kind"):
            if len(getattr(benchmark, field)) != sizes[name]:
                yield f"{key}.{field}", f"must have {sizes[name]} entries, as clip"
        if max(benchmark.clip) >= len(benchmark.clips):
            yield f"{key}.clip", f"has an index beyond the {len(benchmark.clips)} clips"
        other = datasets.setdefault(benchmark.dataset, name)
        if other != name:
            yield key, f"is of the same dataset as {other}; a study has one split of each"
    seen = set()
    for number, run in enumerate(results.runs):
        key = f"runs.{number}"
        if (run.recipe, run.seed) in seen:
            yield key, f"{run.recipe} with seed {run.seed} occurs twice"
        seen.add((run.recipe, run.seed))
        yield from _contradictions_of(run, key, sizes)


def _contradictions_of(run: StudyRun, key: str, sizes: dict[str, int]) -> Iterable[tuple[str, str]]:
    for name, cells in run.scores.items():
        if name not in sizes:
            yield f"{key}.scores.{name}", "is none of the benchmarks"
            return
        for cell, scores in cells.items():
            arrays: dict[str, Sequence[object] | None]
            arrays = {"J": scores.J, "F": scores.F, "empty": scores.empty, "found": scores.found}
            arrays |= {f"figures.{figure}": of for figure, of in scores.figures.items()}
            for field, values in arrays.items():
                if values is not None and len(values) != sizes[name]:
                    where = f"{key}.scores.{name}.{cell}.{field}"
                    yield where, f"must have {sizes[name]} entries, one per expression"
    known = paper_tables()
    for table, rows in run.paper_tables.items():
        for row, cell in rows.items():
            where = f"{key}.paper_tables.{table}.{row}"
            if table not in known or row not in known[table].rows:
                yield where, "is no row of a table of the paper"
            elif not all(cell in cells for cells in run.scores.values()):
                yield where, f"{cell} is not scored"
    for task, checkpoints in run.rewards.items():
        counts = {len(way.per_prompt) for ways in checkpoints.values() for way in ways.values()}
        if len(counts) > 1:
            yield f"{key}.rewards.{task}", "checkpoints must have the same number of prompts"
