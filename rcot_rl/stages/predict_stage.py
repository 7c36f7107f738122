"""The predict stage: held-out rewards and masks of a run's checkpoints.

`run` runs in the parent; the child is `python -m rcot_rl.stages.predict_stage PLAN.json`, which
drives a pool of engines and segmenters (`rcot_rl.inference.prediction_pool`). Each checkpoint
answers the held-out prompts, then predicts every benchmark in every variant. Existing results are
kept.

`rcot_rl.prediction_layout` defines the paths of the results.
"""

from __future__ import annotations

import json
import logging
import sys
from collections import Counter
from collections.abc import Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rcot_rl.errors import InputError
from rcot_rl.events import child_process, emit
from rcot_rl.prediction_layout import (
    FAILURES_FILE,
    benchmark_name,
    benchmark_predictions,
    heldout_responses_file,
    heldout_rewards_file,
    shared_masks,
)
from rcot_rl.recipe.inference_section import ORACLES
from rcot_rl.recipe.loader import dump_recipe, load_recipe
from rcot_rl.recipe.schema import Recipe
from rcot_rl.recipe.training_section import BASE, GrpoStage
from rcot_rl.runfolder import write_json
from rcot_rl.stages.data_stage import corpus_root
from rcot_rl.stages.stage_run import StageRun
from rcot_rl.system.files import write_text
from rcot_rl.system.prometheus_targets import targets_file, write_targets
from rcot_rl.training import jobs

if TYPE_CHECKING:
    from rcot_rl.inference.predict import CorpusSplit
    from rcot_rl.inference.prediction_pool import (
        HeldoutAnswers,
        HeldoutWork,
        PredictionResult,
        VideoWork,
    )
    from rcot_rl.segmentation.segmenter_actor import LocalSegmenter

logger = logging.getLogger(__name__)

HELDOUT_CHUNK = 16
"""Held-out prompts that an engine answers as one row."""


def run(run: StageRun, stage: str) -> dict[str, Any]:
    """Predict in a child process, and return the names of the checkpoints."""
    recipe, folder = run.recipe, run.folder
    attempt = folder.new_attempt(stage)
    plan = plan_of(run)
    plan["recipe"] = str(attempt / "recipe.yaml")
    (attempt / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    write_json(attempt / "plan.json", plan)
    log = attempt / "log.txt"
    run.console.line(f"{stage}: starting, log {log}")
    run.run_child(
        stage,
        ["-m", "rcot_rl.stages.predict_stage", str(attempt / "plan.json")],
        log,
        stall_timeout_s=recipe.cluster.stall_timeout_s,
    )
    return {"checkpoints": recipe.scored_checkpoints}


def plan_of(run: StageRun) -> dict[str, Any]:
    """Return the child's plan: checkpoints, benchmarks and held-out rows, as JSON values."""
    recipe, folder = run.recipe, run.folder
    heldout = {}
    if recipe.eval.heldout_prompts:
        for task, stage in recipe.heldout_stages.items():
            files = jobs.split_files(run.shards(recipe.grpo(stage).shard_set), "val")
            heldout[task] = {"stage": stage, "files": [str(file) for file in files]}
    return {
        "out": str(folder.root),
        "checkpoints": [[name, str(run.model_of(name))] for name in recipe.scored_checkpoints],
        "benchmarks": [
            {
                "dataset": b.dataset,
                "root": str(corpus_root(folder, recipe, b.dataset, b.root)),
                "split": b.split,
                "limit": b.limit,
            }
            for b in recipe.eval.benchmarks
        ],
        "heldout": heldout,
        "others": {
            name: str(run.model_of(name) if name in recipe.train or name == BASE else _model(name))
            for name in recipe.predict.other_models
        },
    }


def _model(spec: str) -> Path:
    from rcot_rl.inference.model_folder import check_model, find_model

    folder = find_model(spec)
    check_model(folder)
    return folder


def work_off(plan: dict[str, Any]) -> None:
    """Predict in the child.

    Args:
        plan: The result of `plan_of`, and the path of the recipe as `recipe`.
    """
    from rcot_rl.inference.pool_size import pool_size
    from rcot_rl.inference.prediction_pool import HeldoutAnswers, run_pool
    from rcot_rl.inference.ray_session import LOGICAL_CPUS, ray_session

    recipe = load_recipe(plan["recipe"], stages=())
    out = Path(plan["out"])
    heldout, benchmarks = _HeldoutRewards(recipe, plan["heldout"], out), _Benchmarks(recipe, plan)
    work: list[VideoWork | HeldoutWork] = []
    for name, folder in plan["checkpoints"]:
        work += [*heldout.missing(name, folder), *benchmarks.missing(name, folder)]
    if work:  # Ray takes seconds to start
        size = pool_size(recipe)
        emit(
            "note",
            message=f"{len(work)} videos and batches of held-out prompts; "
            f"engines: {size.engines}, segmenters: {size.segmenters}",
        )
        with ray_session(recipe, LOGICAL_CPUS + size.engines + size.segmenters):
            if recipe.cluster.metrics_port is not None:
                write_targets(targets_file(out, "predict"))
            recipe_file, masks = Path(plan["recipe"]), shared_masks(out)
            for result in run_pool(recipe, recipe_file, work, plan["others"], masks):
                if isinstance(result, HeldoutAnswers):
                    heldout.add(result)
                else:
                    benchmarks.add(result)
    benchmarks.finish()


class _Benchmarks:
    """Predictions of the benchmarks: what is missing, progress, and what could not be made."""

    def __init__(self, recipe: Recipe, plan: dict[str, Any]) -> None:
        from rcot_rl.inference.model_folder import fingerprint

        self._recipe, self._plan = recipe, plan
        self._others = {name: fingerprint(Path(path)) for name, path in plan["others"].items()}
        self._total: Counter[str] = Counter()
        self._done: Counter[str] = Counter()
        self._failed: dict[Path, dict[str, str]] = {}

    def missing(self, name: str, folder: str) -> list[VideoWork]:
        """Return the work of a checkpoint, and record or check the settings of its folders."""
        from rcot_rl.inference.model_folder import fingerprint
        from rcot_rl.inference.predict import CorpusSplit, Target, open_set, settings_of
        from rcot_rl.inference.prediction_pool import VideoWork
        from rcot_rl.protocol.prompts import load_prompts
        from rcot_rl.segmentation.segmenter import segmenter_name

        recipe = self._recipe
        model = fingerprint(Path(folder))
        prompts = load_prompts(recipe.prompts, response=recipe.data.response)
        segmenter = segmenter_name(recipe.models.segmenter)
        work = []
        for benchmark in self._plan["benchmarks"]:
            split = CorpusSplit(**benchmark)
            corpus = split.open()
            targets: dict[str, list[Target]] = {}
            for scored, variant in recipe.predictions_of(name).items():
                if variant in ORACLES and not corpus.has_masks:
                    continue
                settings = settings_of(
                    model=model,
                    others=self._others,
                    prompts=prompts,
                    reasoning=recipe.predict.reasoning(variant),
                    canvas=recipe.canvas,
                    segmenter=segmenter,
                    dtype=recipe.segmenter.dtype,
                    seed=recipe.seed,
                )
                place = self._place(scored, benchmark)
                one = open_set(corpus, place, settings, variant=variant, limit=split.limit)
                self._failed[place] = {}
                n_missing = sum(map(len, one.missing.values()))
                self._total[self._label(name, split)] += one.total
                self._done[self._label(name, split)] += one.total - n_missing
                for video, of_video in one.missing.items():
                    targets.setdefault(video, []).extend(of_video)
            work += [
                VideoWork(name, folder, split, video, tuple(of_video))
                for video, of_video in targets.items()
            ]
        return work

    def add(self, result: PredictionResult) -> None:
        """Report a prediction that was written, or could not be made."""
        work = result.work
        label = self._label(work.checkpoint, work.corpus)
        self._done[label] += 1
        if result.fault:
            name = f"{work.video}/{result.target.expression}"
            self._failed[self._folder(result)][name] = result.fault
            emit("note", message=f"{label}: {name} is not predicted: {result.fault}")
        emit("progress", what=label, done=self._done[label], total=self._total[label])

    def finish(self) -> None:
        """List what could not be predicted in each folder. Raises InputError if nothing could."""
        failed = {f: faults for f, faults in self._failed.items() if faults}
        for place in self._failed:
            file = place / FAILURES_FILE
            if place in failed:
                write_json(file, failed[place])
            else:
                file.unlink(missing_ok=True)
        n_failed = sum(map(len, failed.values()))
        if n_failed and n_failed == sum(self._total.values()):
            place, faults = next(iter(failed.items()))
            raise InputError(next(iter(faults.values())), file=place / FAILURES_FILE)

    def _folder(self, result: PredictionResult) -> Path:
        folder = Path(result.target.folder)
        return next(place for place in self._failed if folder.is_relative_to(place))

    @staticmethod
    def _label(name: str, split: CorpusSplit) -> str:
        return f"{name} on {benchmark_name(split.dataset, split.split)}"

    def _place(self, scored: str, benchmark: dict[str, Any]) -> Path:
        is_last = scored == self._plan["checkpoints"][-1][0]
        name = benchmark_name(benchmark["dataset"], benchmark["split"])
        out = Path(self._plan["out"])
        return benchmark_predictions(out, name, None if is_last else scored)


class _HeldoutRewards:
    """Held-out rewards: what is missing, and the rewards of what was answered."""

    def __init__(self, recipe: Recipe, sources: dict[str, Any], out: Path) -> None:
        self._recipe, self._sources = recipe, sources
        self._out, self._file = out, heldout_rewards_file(out)
        self._known = (
            json.loads(self._file.read_text(encoding="utf-8")) if self._file.is_file() else {}
        )
        self._rows: dict[str, list[dict[str, Any]]] = {}
        self._answered: dict[tuple[str, str], list[HeldoutAnswers]] = {}

    def missing(self, name: str, folder: str) -> list[HeldoutWork]:
        """Return the work of a checkpoint."""
        from rcot_rl.inference.heldout import read_rows
        from rcot_rl.inference.prediction_pool import HeldoutWork

        work = []
        for task, source in self._sources.items():
            if name in self._known.get(task, {}):
                continue
            settings, limit = self._recipe.grpo(source["stage"]), self._recipe.eval.heldout_prompts
            if task not in self._rows:
                self._rows[task] = read_rows([Path(f) for f in source["files"]], limit, task)
            count = len(self._rows[task])
            self._answered[name, task] = []
            work += [
                HeldoutWork(
                    name,
                    folder,
                    task,
                    tuple(source["files"]),
                    limit,
                    first,
                    min(first + HELDOUT_CHUNK, count),
                    self._recipe.eval.heldout_samples,
                    settings.temperature,
                    settings.max_response_length,
                )
                for first in range(0, count, HELDOUT_CHUNK)
            ]
        return work

    def add(self, result: HeldoutAnswers) -> None:
        """Keep responses; score a checkpoint's as soon as they are complete."""
        name, task = result.work.checkpoint, result.work.task
        answered = self._answered[name, task]
        answered.append(result)
        if sum(len(one.greedy) for one in answered) == len(self._rows[task]):
            self._score(name, task)

    def _score(self, name: str, task: str) -> None:
        from rcot_rl.inference.heldout import score_heldout
        from rcot_rl.inference.prompting import Prompter
        from reward_fns.score import load_reward

        recipe, answered = self._recipe, self._answered.pop((name, task))
        answered.sort(key=lambda one: one.work.first)
        settings = recipe.grpo(self._sources[task]["stage"])
        scored = score_heldout(
            self._rows[task],
            [responses for one in answered for responses in one.sampled],
            [responses for one in answered for responses in one.greedy],
            load_reward(
                heldout_reward(settings),
                canvas=recipe.canvas.image,
                deadline_s=settings.reward_deadline_s,
                segmenter=self._masks,
            ),
            Prompter(Path(answered[0].work.model), recipe.engine.max_model_len).count,
        )
        for way, lines in scored.responses.items():
            text = "".join(json.dumps(line) + "\n" for line in lines)
            write_text(heldout_responses_file(self._out, task, name, way), text)
        self._known.setdefault(task, {})[name] = scored.rewards
        emit("heldout", what=f"{task} reward of {name}", **_means(scored.rewards))
        order = [*recipe.scored_checkpoints, *self._known[task]]
        self._known[task] = {c: self._known[task][c] for c in order if c in self._known[task]}
        write_text(self._file, json.dumps(self._known, indent=1))

    @cached_property
    def _masks(self) -> LocalSegmenter:
        from rcot_rl.segmentation.mask_store import mask_store
        from rcot_rl.segmentation.segmenter import load_segmenter
        from rcot_rl.segmentation.segmenter_actor import LocalSegmenter

        recipe = self._recipe
        arguments = recipe.models.segmenter, recipe.device, recipe.segmenter
        store = mask_store(shared_masks(self._out), recipe.segmenter)
        return LocalSegmenter(partial(load_segmenter, *arguments), store)


def heldout_reward(settings: GrpoStage) -> str:
    """Return the reward of held-out rows, which are single-turn.

    The reward of an agentic stage scores episodes instead.
    """
    return "aks" if settings.agent == "agentic-aks" else settings.reward


def _means(result: Mapping[str, Any]) -> dict[str, float]:
    return {way: round(result[way]["mean"], 3) for way in ("sampled", "greedy")}


if __name__ == "__main__":
    with child_process():
        work_off(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
