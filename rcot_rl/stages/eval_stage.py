"""The eval stage: J, F and J&F of every benchmark, checkpoint and baseline."""

from __future__ import annotations

from typing import Any

from rcot_rl.prediction_layout import benchmark_predictions
from rcot_rl.recipe.schema import Benchmark
from rcot_rl.runfolder import write_json
from rcot_rl.stages.data_stage import corpus_root
from rcot_rl.stages.predict_stage import FIRST_FRAME
from rcot_rl.stages.stage_run import StageRun


def run(run: StageRun, stage: str) -> dict[str, Any]:
    """Score the predictions, and return J&F by benchmark and checkpoint."""
    return {
        "J&F": {
            benchmark.dataset: scores
            for benchmark in run.recipe.eval.benchmarks
            if (scores := _score(run, stage, benchmark)) is not None
        }
    }


def _score(run: StageRun, stage: str, benchmark: Benchmark) -> dict[str, Any] | None:
    """Write RUN/eval/<dataset>.json, and return J&F by checkpoint; None without ground truth."""
    from data_pipelines.corpora import open_corpus
    from rcot_rl.evaluation.benchmarks import BASELINES, evaluate, evaluate_masks
    from rcot_rl.monitoring.run_summary import fault_lines

    recipe, folder, console = run.recipe, run.folder, run.console
    dataset, split, limit = benchmark.dataset, benchmark.split, benchmark.limit
    root = corpus_root(folder, recipe, dataset, benchmark.root)
    console.line(f"{stage}: {dataset} {split}")
    last = benchmark_predictions(folder.root, dataset)
    if not open_corpus(dataset, root, split).has_masks:
        console.line(
            f"{stage}: {dataset} {split} has no ground truth and is not scored; "
            f"submit {last} to its evaluation server"
        )
        return None
    result = evaluate(dataset, root, split, last, limit=limit)
    for line in fault_lines(result):
        console.line(f"{stage}: {dataset}: {line}")
    *others, final = recipe.scored_checkpoints
    places = {name: benchmark_predictions(folder.root, dataset, name) for name in others}
    checkpoints = {
        name: evaluate(dataset, root, split, place, limit=limit) for name, place in places.items()
    } | {final: result}
    baselines = {}
    if recipe.eval.baselines:
        place = benchmark_predictions(folder.root, dataset, FIRST_FRAME)
        baselines[FIRST_FRAME] = evaluate(dataset, root, split, place, limit=limit)
        for name, masks in BASELINES.items():
            baselines[name] = evaluate_masks(dataset, root, split, masks, limit=limit)
    complete = dict(result) | {"checkpoints": checkpoints, "baselines": baselines}
    write_json(folder.root / "eval" / f"{dataset}.json", complete)
    return {name: scores["J&F"] for name, scores in checkpoints.items()}
