"""The context that each stage receives: recipe, run folder, processes of this host, console."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.supervise.processes import Host, StageFailed
from cluster.supervise.run_tracking import RunTracking
from rcot_rl.errors import InputError
from rcot_rl.events import EventReader
from rcot_rl.monitoring.terminal.console import Console
from rcot_rl.recipe.schema import Recipe
from rcot_rl.recipe.training_section import BASE
from rcot_rl.runfolder import RunFolder
from rcot_rl.training import jobs
from rcot_rl.training.model_compatibility import check_compatibility


@dataclass
class StageRun:
    """A run in progress."""

    recipe: Recipe
    folder: RunFolder
    host: Host
    console: Console
    tracking: RunTracking | None = None

    def shards(self, name: str) -> Path:
        """Return the folder of a shard set."""
        return self.folder.root / "shards" / name

    def model_of(self, stage: str) -> Path:
        """Return the model of a finished training stage or, for `base`, of the recipe."""
        return model_of(self.folder, self.recipe, stage)

    def run_child(
        self,
        stage: str,
        arguments: Sequence[str],
        log: Path,
        watch: Callable[[], None] = lambda: None,
        **options: Any,
    ) -> None:
        """Run a child process of a stage until it ends; see `run_child`."""

        def poll() -> None:
            if self.tracking is not None:
                self.tracking.poll()
            watch()

        run_child(self.host, self.console, stage, arguments, log, poll, **options)


def run_child(
    host: Host,
    console: Console,
    stage: str,
    arguments: Sequence[str],
    log: Path,
    watch: Callable[[], None] = lambda: None,
    **options: Any,
) -> None:
    """Run a child process until it ends, and show its events.

    Args:
        host: Runs the process.
        console: Shows the events.
        stage: Label of the events on the console.
        arguments: Arguments of the Python interpreter.
        log: File for the output.
        watch: Called several times a second.
        options: Arguments of `Host.run`.

    Raises:
        InputError: The child reported an invalid input.
        StageFailed: It failed or hung.
    """
    events = EventReader(log)
    faults: list[str] = []

    def poll() -> None:
        for event in events.poll():
            if event.get("event") == "fault":
                faults.extend(map(str, event.get("faults", ())))
            else:
                console.event(stage, event)
        watch()

    try:
        host.run(arguments, log, watch=poll, **options)
    except StageFailed:
        poll()
        if faults:
            raise InputError.of_all([InputError(fault) for fault in faults]) from None
        raise


def base_model(recipe: Recipe) -> Path:
    """Return the folder of the recipe's base policy. Raises InputError if it is incomplete."""
    from rcot_rl.inference.model_folder import check_model, find_model

    path = find_model(recipe.models.policy)
    check_model(path)
    return path


def model_of(folder: RunFolder, recipe: Recipe, stage: str) -> Path:
    """Return the model of a finished training stage or, for `base`, of the recipe.

    Raises:
        InputError: The model is missing, incomplete or incompatible with the recipe.
    """
    if stage == BASE:
        return base_model(recipe)
    path = jobs.stage_model(folder.stage(stage))
    check_compatibility(base_model(recipe), path, recipe)
    return path
