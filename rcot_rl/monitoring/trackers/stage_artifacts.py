"""Files that each stage made and used: corpora → shards → models → predictions → scores → report.

Nothing is hashed here: checksums come from manifests and sealed checkpoints, which have them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from rcot_rl.monitoring.run_files.run_reader import RunReader, as_mapping, read_json
from rcot_rl.monitoring.trackers.tracker import TrackedArtifact
from rcot_rl.prediction_layout import benchmark_name, benchmark_predictions, heldout_rewards_file
from rcot_rl.recipe.schema import Recipe
from rcot_rl.recipe.training_section import BASE, GrpoStage

Role = Literal["made", "used"]
_MANIFEST_FACTS = ("rows", "ratios", "recipe_hash", "corpora_sha256", "fingerprint", "rewards")


def stage_artifacts(reader: RunReader, stage: str) -> list[TrackedArtifact]:
    """Return the existing files that a stage made and used; what is made, once it is done."""
    recipe = reader.recipe
    if recipe is None:
        return []
    view = reader.stage(stage)
    source = _Artifacts(reader, recipe)
    makers = {
        "data": source.of_data,
        "predict": source.of_predict,
        "eval": source.of_eval,
        "report": source.of_report,
    }
    artifacts = makers[stage]() if stage in makers else source.of_training(stage)
    return [a for a in artifacts if a.path.exists() and (a.role == "used" or view.state == "done")]


class _Artifacts:
    """Lists the artifacts of a run, whether they exist or not."""

    def __init__(self, reader: RunReader, recipe: Recipe) -> None:
        self._run, self._recipe, self._record = reader.root, recipe, reader.record
        self._reader = reader

    def of_data(self) -> Iterator[TrackedArtifact]:
        for corpus in self._recipe.data.corpora:
            yield self._corpus(corpus.dataset, corpus.split, corpus.root, "used")
        for name in self._recipe.data.sets:
            yield self._shards(name, "made")

    def of_training(self, stage: str) -> Iterator[TrackedArtifact]:
        settings = self._recipe.train.get(stage)
        if settings is None:
            return
        for name in self._recipe.shard_sets_of(stage):
            yield self._shards(name, "used")
        starts = [self._recipe.start_of(stage)]
        if isinstance(settings, GrpoStage):
            starts.append(self._recipe.reference_of(stage))
        for start in dict.fromkeys(starts):
            yield self._model(start, "used")
        yield self._model(stage, "made")
        checkpoint = newest_checkpoint(self._run / stage)
        if checkpoint is not None:
            yield TrackedArtifact(
                f"checkpoint-{stage}", "checkpoint", checkpoint, "made", _sealed(checkpoint)
            )

    def of_predict(self) -> Iterator[TrackedArtifact]:
        for checkpoint in self._recipe.scored_checkpoints:
            yield self._model(checkpoint, "used")
        for stage in dict.fromkeys(self._recipe.heldout_stages.values()):
            yield self._shards(self._recipe.grpo(stage).shard_set, "used")
        for benchmark in self._recipe.eval.benchmarks:
            yield self._corpus(benchmark.dataset, benchmark.split, benchmark.root, "used")
        yield from self._predictions("made")
        rewards = heldout_rewards_file(self._run)
        yield TrackedArtifact("heldout-rewards", "predictions", rewards, "made", _size(rewards))

    def of_eval(self) -> Iterator[TrackedArtifact]:
        for benchmark in self._recipe.eval.benchmarks:
            yield self._corpus(benchmark.dataset, benchmark.split, benchmark.root, "used")
        yield from self._predictions("used")
        yield from self._scores("made")

    def of_report(self) -> Iterator[TrackedArtifact]:
        yield from self._scores("used")
        rewards = heldout_rewards_file(self._run)
        yield TrackedArtifact("heldout-rewards", "predictions", rewards, "used", _size(rewards))
        page = self._run / "report.html"
        yield TrackedArtifact("report", "report", page, "made", _size(page))

    def _corpus(self, dataset: str, split: str, root: str | None, role: Role) -> TrackedArtifact:
        path = self._run / "corpora" / dataset if root is None else Path(root)
        facts = {"dataset": dataset, "split": split}
        return TrackedArtifact(f"corpus-{dataset}-{split}", "corpus", path, role, facts)

    def _shards(self, name: str, role: Role) -> TrackedArtifact:
        folder = self._run / "shards" / name
        manifest = as_mapping(read_json(folder / "manifest.json"))
        facts: dict[str, Any] = {key: manifest[key] for key in _MANIFEST_FACTS if key in manifest}
        files = as_mapping(manifest.get("files"))
        facts["sha256"] = {k: v for k, v in files.items() if k.endswith(".parquet")}
        facts["bytes"] = sum(_bytes(folder / file) for file in facts["sha256"])
        pinned = as_mapping(self._record.get("shards")).get(name)
        if pinned is not None:
            facts["shards_sha256"] = pinned
        return TrackedArtifact(f"shards-{name}", "shards", folder, role, facts)

    def _model(self, stage: str, role: Role) -> TrackedArtifact:
        if stage == BASE:
            facts = {"policy": self._recipe.models.policy}
            return TrackedArtifact("model-base", "model", Path(facts["policy"]), role, facts)
        folder = self._run / stage / "model"
        card = as_mapping(read_json(folder / "rcot.json"))
        return TrackedArtifact(f"model-{stage}", "model", folder, role, card | _size(folder))

    def _predictions(self, role: Role) -> Iterator[TrackedArtifact]:
        names = [
            name
            for checkpoint in self._recipe.scored_checkpoints
            for name in self._recipe.predictions_of(checkpoint)
        ]
        last = self._recipe.scored_checkpoints[-1] if names else None
        for benchmark in self._recipe.eval.benchmarks:
            of = benchmark_name(benchmark.dataset, benchmark.split)
            for name in names:
                folder = benchmark_predictions(self._run, of, None if name == last else name)
                facts = as_mapping(read_json(folder / "settings.json"))
                label = f"predictions-{of}-{name.replace('@', '.')}"
                yield TrackedArtifact(label, "predictions", folder, role, facts)

    def _scores(self, role: Role) -> Iterator[TrackedArtifact]:
        for benchmark, result in self._reader.scores().items():
            file = self._run / "eval" / f"{benchmark}.json"
            facts = {key: result.get(key) for key in ("J&F", "J", "F", "n_expressions")}
            name = f"scores-{benchmark}"
            yield TrackedArtifact(name, "scores", file, role, facts | _size(file))


def newest_checkpoint(stage: Path) -> Path | None:
    """Return the checkpoint that RUN/<stage>/checkpoints/latest names; None without one."""
    try:
        name = (stage / "checkpoints" / "latest").read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return None
    folder = stage / "checkpoints" / name
    return folder if Path(name).name == name and folder.is_dir() else None


def _sealed(checkpoint: Path) -> dict[str, Any]:
    """Return step, checksums, size and provenance of a checkpoint from its manifest."""
    manifest = as_mapping(read_json(checkpoint / "checkpoint.json"))
    files = {k: v for k, v in as_mapping(manifest.get("files")).items() if isinstance(v, Mapping)}
    return {
        "step": manifest.get("step"),
        "provenance": as_mapping(manifest.get("provenance")),
        "sha256": {name: facts.get("sha256") for name, facts in files.items()},
        "bytes": sum(facts.get("size") or 0 for facts in files.values()),
    }


def _size(path: Path) -> dict[str, int]:
    """Return the size of a file, or of a folder's own files."""
    if path.is_dir():
        return {"bytes": sum(_bytes(file) for file in path.iterdir())}
    return {"bytes": _bytes(path)}


def _bytes(path: Path) -> int:
    try:
        return path.stat().st_size if path.is_file() else 0
    except OSError:
        return 0
