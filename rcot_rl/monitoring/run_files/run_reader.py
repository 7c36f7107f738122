"""Read a run folder, also one that is in progress, incomplete, or of an earlier version.

Files that are missing or broken yield empty results: a report, a tracker or a terminal must show
what there is. Training code never reads through this module.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import ValidationError

from rcot_rl.monitoring.run_files.metrics import read_metrics
from rcot_rl.monitoring.run_files.run_status import RunStatus, read_status
from rcot_rl.prediction_layout import heldout_rewards_file
from rcot_rl.recipe.schema import AFTER_TRAINING, BEFORE_TRAINING, Recipe
from rcot_rl.system.files import visible

StageKind = Literal["data", "sft", "grpo", "predict", "eval", "report"]
StageState = Literal["pending", "running", "stopped", "done"]
"""`stopped`: the stage has started and neither runs nor is done."""

REASON = "reason/"
REASON_COUNT = "reason_count/"


@dataclass(frozen=True)
class StageView:
    """One stage of a run."""

    name: str
    kind: StageKind
    state: StageState
    folder: Path
    attempts: int
    """Number of attempts that were started."""

    failures: list[dict[str, Any]] = field(default_factory=list)
    """Rows of attempts.jsonl: failed attempts with their verdicts, oldest first."""

    facts: dict[str, Any] = field(default_factory=dict)
    """done.json; empty before the stage is done."""


class RunReader:
    """A run folder. Each property and method reads the files again, except the recipe."""

    def __init__(self, root: Path) -> None:
        self.root = Path(root)

    @cached_property
    def record(self) -> dict[str, Any]:
        """RUN/recipe.yaml: the resolved recipe, its hash, the commit and the versions."""
        try:
            record = yaml.safe_load((self.root / "recipe.yaml").read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError, yaml.YAMLError):
            return {}
        return record if isinstance(record, dict) else {}

    @cached_property
    def recipe(self) -> Recipe | None:
        """The resolved recipe; None if it is missing or of an incompatible version."""
        try:
            return Recipe.model_validate(self.record.get("recipe"))
        except ValidationError:
            return None

    @property
    def name(self) -> str:
        """Name of the recipe, or of the folder."""
        recipe = self.record.get("recipe")
        name = recipe.get("name") if isinstance(recipe, dict) else None
        return str(name or self.root.resolve().name)

    @property
    def status(self) -> RunStatus | None:
        """What the newest command reported last; None for a run that never reported."""
        return read_status(self.root)

    @property
    def training_stages(self) -> list[str]:
        """Training stages in the order in which they run."""
        recorded = as_mapping(as_mapping(self.record.get("recipe")).get("train"))
        others = sorted(path.parent.name for path in self.root.glob("*/metrics.jsonl"))
        return list(dict.fromkeys([*map(str, recorded), *others]))

    def stages(self) -> list[StageView]:
        """Return all stages of the recipe in order, those that have not started included."""
        recipe, status = self.recipe, self.status
        names = [*BEFORE_TRAINING, *self.training_stages, *AFTER_TRAINING]
        if recipe is not None:
            names = [n for n in names if n in recipe.stages or (self.root / n).is_dir()]
        return [self._stage(name, status) for name in names]

    def stage(self, name: str) -> StageView:
        """Return one stage, which may not have started."""
        return self._stage(name, self.status)

    def start_of(self, stage: str) -> str | None:
        """Return the checkpoint that a training stage starts from; None if it is unknown."""
        recipe = self.recipe
        return recipe.start_of(stage) if recipe is not None and stage in recipe.train else None

    def metrics(self, stage: str) -> list[dict[str, Any]]:
        """Return the steps of a stage, oldest first.

        A reason that was not given at a step is 0 there, if any step of the stage gave it.
        """
        return with_absent_reasons(self._tolerant(read_metrics, stage, "metrics.jsonl"))

    def heldout(self) -> dict[str, Any]:
        """Return RUN/predict/rewards.json: task -> checkpoint -> rewards; empty before predict."""
        return as_mapping(read_json(heldout_rewards_file(self.root)))

    def scores(self) -> dict[str, dict[str, Any]]:
        """Return benchmark -> RUN/eval/<benchmark>.json."""
        files = result_files(self.root)
        return {path.stem: scores for path in files if (scores := as_mapping(read_json(path)))}

    def _stage(self, name: str, status: RunStatus | None) -> StageView:
        folder = self.root / name
        facts = as_mapping(read_json(folder / "done.json"))
        attempts = len(list(folder.glob("attempt-*")))
        state: StageState = "stopped" if attempts else "pending"
        if facts:
            state = "done"
        elif status is not None and status.is_running and status.stage == name:
            state = "running"
        failures = self._tolerant(read_metrics, name, "attempts.jsonl")
        return StageView(name, self._kind(name), state, folder, attempts, failures, facts)

    def _kind(self, name: str) -> StageKind:
        recipe = self.recipe
        if recipe is not None and name in recipe.train:
            return recipe.train[name].kind
        if name in get_args(StageKind):
            return name  # type: ignore[return-value]
        steps = self._tolerant(read_metrics, name, "metrics.jsonl")
        return "sft" if any("train/loss" in step for step in steps) else "grpo"

    def _tolerant(
        self, read: Callable[[Path], list[dict[str, Any]]], stage: str, file: str
    ) -> list[dict[str, Any]]:
        try:
            rows = read(self.root / stage / file)
        except (OSError, ValueError, RecursionError):
            return []
        return [row for row in rows if isinstance(row, dict)]


def result_files(run: Path) -> list[Path]:
    """Return RUN/eval/<benchmark>.json by name, without the stage's done.json."""
    return [p for p in visible((run / "eval").glob("*.json")) if p.stem != "done"]


def with_absent_reasons(steps: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the steps with 0 for each reason that another step has and that one lacks."""
    reasons = {k for s in steps for k in s if k.startswith((REASON, REASON_COUNT))}
    zeros = dict.fromkeys(sorted(reasons), 0.0)
    return [zeros | step for step in steps]


def read_json(path: Path) -> Any:
    """Return the parsed file, or None if it is missing or unreadable."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None


def as_mapping(value: Any) -> dict[str, Any]:
    """Return `value`, or an empty mapping if it is none."""
    return value if isinstance(value, dict) else {}
