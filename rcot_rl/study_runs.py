"""`rcot study`: run every recipe of a folder with every seed, then write the results and the page.

    OUT/seed-<seed>/<recipe>/    run folders
    OUT/data/                    corpora, texts and shards, which the runs share (`data.store`)
    OUT/results.json             the results of all finished runs
    OUT/study.md                 the page

A run is resumed like that of `rcot run`, and a finished one is skipped. A run that fails does not
stop the others.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import yaml

from rcot_rl.errors import InputError
from rcot_rl.recipe.loader import load_recipe, recipe_hash
from rcot_rl.recipe.schema import Recipe
from rcot_rl.runfolder import RECORD, RunFolder, read_record
from rcot_rl.suggestions import did_you_mean

logger = logging.getLogger(__name__)

_EXTENDS = "extends"


@dataclass(frozen=True)
class StudyTask:
    """A recipe with a seed, and its run folder."""

    name: str
    seed: int
    file: Path
    overrides: tuple[str, ...]
    recipe: Recipe
    root: Path

    @property
    def label(self) -> str:
        """Name of the run in messages."""
        return f"{self.name}, seed {self.seed}"

    @property
    def command(self) -> tuple[str, ...]:
        """The command that does the same as this run."""
        return ("rcot", "run", str(self.file), *self.overrides, "--out", str(self.root))

    @property
    def is_finished(self) -> bool:
        """Return True if all stages of this recipe, as it is now, are done."""
        if not (self.root / RECORD).is_file():
            return False
        folder = RunFolder(self.root.resolve())
        if not all(folder.is_done(stage) for stage in self.recipe.in_order(self.recipe.stages)):
            return False
        return read_record(self.root / RECORD).get("recipe_hash") == recipe_hash(self.recipe)


class StudyOutcome(NamedTuple):
    """What a study has written, and what failed."""

    page: Path | None
    """None if no run is finished."""
    failures: dict[str, str]
    """Label of a run -> why it failed, in one line."""


def study_tasks(
    folder: Path,
    seeds: Sequence[int],
    out: Path,
    only: Collection[str] = (),
    overrides: Sequence[str] = (),
) -> list[StudyTask]:
    """Return the runs of a study: for each seed, all recipes.

    Recipes with rows of more tables come first: the other recipes are compared with them.

    Args:
        folder: Folder of recipes.
        only: Names of recipes, without suffix; empty: all.
        overrides: Overrides of all recipes.

    Raises:
        InputError: A recipe is invalid, or there is none.
    """
    files = {path.stem: path for path in recipes_in(folder)}
    for name in only:
        if name not in files:
            known = ", ".join(files)
            message = f"'{name}' is not one of {known}{did_you_mean(name, files)}"
            raise InputError(message, key="--only")
    tasks = []
    for seed in seeds:
        for name in files:
            if only and name not in only:
                continue
            given = (*overrides, f"data.store={out / 'data'}", f"seed={seed}")
            recipe = load_recipe(str(files[name]), list(given))
            root = out / f"seed-{seed}" / name
            tasks.append(StudyTask(name, seed, files[name], given, recipe, root))
    order = {seed: number for number, seed in enumerate(seeds)}
    return sorted(tasks, key=lambda t: (order[t.seed], -len(t.recipe.report.paper_tables), t.name))


def recipes_in(folder: Path) -> list[Path]:
    """Return the recipes of a folder that no other one there extends. Raises InputError."""
    if not folder.is_dir():
        raise InputError("no such folder of recipes", file=folder)
    files = sorted(folder.glob("*.yaml"))
    extended = {(folder / base).resolve() for path in files if (base := _base(path)) is not None}
    runs = [path for path in files if path.resolve() not in extended]
    if not runs:
        raise InputError("has no recipe (*.yaml)", file=folder)
    return runs


def _base(path: Path) -> str | None:
    """Return what a recipe extends; None if the file is invalid, which loading it reports."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None
    base = values.get(_EXTENDS) if isinstance(values, dict) else None
    return base if isinstance(base, str) else None


def run_study(
    tasks: Sequence[StudyTask],
    every: Sequence[StudyTask],
    out: Path,
    line: Callable[[str], None] = print,
    run: Callable[[StudyTask], object] | None = None,
) -> StudyOutcome:
    """Run what is not finished, and write results and page after each run.

    Args:
        tasks: The runs to make.
        every: The runs whose results are collected if they are finished.
        line: Receives a line before and after each run.
        run: Runs one task; None: as `rcot run` does.

    Raises:
        InputError: Results of a finished run are missing or invalid.
        KeyboardInterrupt: The same call continues.
    """
    run = run or _run
    failures: dict[str, str] = {}
    page = None
    for number, task in enumerate(tasks, start=1):
        place = f"run {number} of {len(tasks)}: {task.label}"
        if task.is_finished:
            line(f"{place}: finished before")
            continue
        line(f"{place}: {task.root}")
        failure = _failure(run, task)
        if failure:
            failures[task.label] = failure
            line(f"{place}: failed: {failure}")
        else:
            page = write_study(every, out)
    if page is None and any(task.is_finished for task in every):
        page = write_study(every, out)
    return StudyOutcome(page, failures)


def write_study(tasks: Sequence[StudyTask], out: Path) -> Path:
    """Write OUT/results.json of the finished runs, and the page. Raises InputError."""
    from rcot_rl.monitoring.study.collect_study import FinishedRun, collect
    from rcot_rl.monitoring.study.study_page import write_page
    from rcot_rl.monitoring.study.study_results import write_results

    finished = [
        FinishedRun(task.name, task.seed, task.root, task.command)
        for task in tasks
        if task.is_finished
    ]
    write_results(collect(finished), out)
    return write_page(out)


def _run(task: StudyTask) -> object:
    from rcot_rl.chain import run

    return run(task.recipe, task.root)


def _failure(run: Callable[[StudyTask], object], task: StudyTask) -> str:
    """Run a task, and return why it failed, in one line; empty if it did not."""
    from cluster.supervise.processes import StageFailed

    try:
        run(task)
    except StageFailed as error:
        failure = f"{error}; full log: {error.log}"
    except (InputError, OSError) as error:
        failure = str(error)
    except Exception as error:  # a defect in one run must not stop the others
        logger.exception("%s failed", task.label)
        failure = f"{type(error).__name__}: {error}"
    else:
        return ""
    return "; ".join(failure.splitlines())
