"""The predict stage: held-out rewards and masks of a run's checkpoints.

One vLLM engine loads the checkpoints of a run in turn. Each checkpoint answers the held-out
prompts, then predicts every benchmark with the pipeline. Existing results are kept.

`rcot_rl.prediction_layout` defines the paths of the results.

`run` runs in the parent; the child is `python -m rcot_rl.stages.predict_stage PLAN.json`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rcot_rl.events import child_process, emit
from rcot_rl.prediction_layout import benchmark_predictions, heldout_rewards_file
from rcot_rl.recipe.loader import dump_recipe, load_recipe
from rcot_rl.recipe.schema import Recipe
from rcot_rl.recipe.training_section import GrpoStage
from rcot_rl.runfolder import write_json
from rcot_rl.stages.data_stage import corpus_root
from rcot_rl.stages.stage_run import StageRun
from rcot_rl.system.files import write_text
from rcot_rl.training import jobs

if TYPE_CHECKING:
    from rcot_rl.inference.engine import PolicyEngine
    from rcot_rl.segmentation.segmenter_actor import LocalSegmenter

FIRST_FRAME = "first-frame"
"""Name of the baseline without keyframe selection, which uses the first frame (Table 3)."""


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
    }


def work_off(plan: dict[str, Any]) -> None:
    """Predict in the child.

    Args:
        plan: The result of `plan_of`, and the path of the recipe as `recipe`.
    """
    from rcot_rl.inference.engine import PolicyEngine
    from rcot_rl.segmentation.segmenter import load_segmenter
    from rcot_rl.segmentation.segmenter_actor import LocalSegmenter

    recipe = load_recipe(plan["recipe"], stages=())
    out = Path(plan["out"])
    checkpoints = [(name, Path(folder)) for name, folder in plan["checkpoints"]]
    segmenter = load_segmenter(recipe.models.segmenter, recipe.device)
    masks = LocalSegmenter(segmenter)
    emit("note", message=f"starting vLLM on {checkpoints[0][0]}")
    with PolicyEngine(
        checkpoints[0][1], recipe.engine, device=recipe.device, seed=recipe.seed
    ) as engine:
        for name, folder in checkpoints:
            if engine.model != folder:
                engine.load_checkpoint(folder)
            _heldout(recipe, plan["heldout"], name, engine, masks, out)
            for benchmark in plan["benchmarks"]:
                _predict(recipe, benchmark, name, engine, segmenter, _place(plan, name, benchmark))
        if recipe.eval.baselines:
            plain = recipe.model_copy(
                update={"predict": recipe.predict.model_copy(update={"kfg": False, "rounds": 0})}
            )
            for benchmark in plan["benchmarks"]:
                place = benchmark_predictions(out, benchmark["dataset"], FIRST_FRAME)
                _predict(plain, benchmark, FIRST_FRAME, engine, segmenter, place)


def _place(plan: dict[str, Any], name: str, benchmark: dict[str, Any]) -> Path:
    last = plan["checkpoints"][-1][0]
    checkpoint = None if name == last else name
    return benchmark_predictions(Path(plan["out"]), benchmark["dataset"], checkpoint)


def _predict(
    recipe: Recipe,
    benchmark: dict[str, Any],
    name: str,
    engine: PolicyEngine,
    segmenter: Any,
    place: Path,
) -> None:
    from data_pipelines.corpora import open_corpus
    from rcot_rl.inference.model_folder import fingerprint
    from rcot_rl.inference.predict import predict
    from rcot_rl.protocol.prompts import load_prompts

    corpus = open_corpus(benchmark["dataset"], Path(benchmark["root"]), benchmark["split"])
    label = f"{name} on {benchmark['dataset']}"
    predict(
        corpus,
        engine,
        load_prompts(recipe.prompts),
        recipe.predict,
        recipe.canvas,
        segmenter,
        place,
        model=fingerprint(engine.model),
        seed=recipe.seed,
        limit=benchmark["limit"],
        progress=lambda done, total: emit("progress", what=label, done=done, total=total),
    )


def _heldout(
    recipe: Recipe,
    heldout: dict[str, Any],
    name: str,
    engine: PolicyEngine,
    masks: LocalSegmenter,
    out: Path,
) -> None:
    from rcot_rl.inference.heldout import heldout_rewards, read_rows
    from reward_fns.score import load_reward

    path = heldout_rewards_file(out)
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for task, rows_of in heldout.items():
        if name in known.get(task, {}):
            continue
        settings = recipe.grpo(rows_of["stage"])
        files = [Path(file) for file in rows_of["files"]]
        rows = read_rows(files, recipe.eval.heldout_prompts, task)
        known.setdefault(task, {})[name] = heldout_rewards(
            engine,
            rows,
            load_reward(
                heldout_reward(settings),
                canvas=recipe.canvas.image,
                deadline_s=settings.reward_deadline_s,
                segmenter=masks,
            ),
            k=recipe.eval.heldout_samples,
            temperature=settings.temperature,
            max_tokens=settings.max_response_length,
            seed=recipe.seed,
            count=engine.count_tokens,
        )
        emit("heldout", what=f"{name}, {task}", **_means(known[task][name]))
        known[task] = {
            c: known[task][c]
            for c in [*recipe.scored_checkpoints, *known[task]]
            if c in known[task]
        }
        write_text(path, json.dumps(known, indent=1))


def heldout_reward(settings: GrpoStage) -> str:
    """Return the reward of held-out rows, which are single-turn.

    The reward of an agentic stage scores episodes instead.
    """
    return "aks" if settings.agent == "agentic-aks" else settings.reward


def _means(result: dict[str, Any]) -> dict[str, float]:
    return {way: round(result[way]["mean"], 3) for way in ("sampled", "greedy")}


if __name__ == "__main__":
    with child_process():
        work_off(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
