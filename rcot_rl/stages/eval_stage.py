"""The eval stage: J, F and J&F of every benchmark, checkpoint and baseline."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from rcot_rl.prediction_layout import benchmark_name, benchmark_predictions
from rcot_rl.recipe.inference_section import BUILT_IN_VARIANTS
from rcot_rl.recipe.schema import Benchmark
from rcot_rl.runfolder import write_json
from rcot_rl.stages.data_stage import corpus_root
from rcot_rl.stages.stage_run import StageRun
from rcot_rl.system.files import write_text


def run(run: StageRun, stage: str) -> dict[str, Any]:
    """Score the predictions, and return J&F by benchmark and checkpoint."""
    return {
        "J&F": {
            benchmark_name(benchmark.dataset, benchmark.split): scores
            for benchmark in run.recipe.eval.benchmarks
            if (scores := _score(run, stage, benchmark)) is not None
        }
    }


def _score(run: StageRun, stage: str, benchmark: Benchmark) -> dict[str, Any] | None:
    """Write RUN/eval/<dataset>-<split>.json and .csv.

    Returns:
        J&F by checkpoint; None if the benchmark has no ground truth.
    """
    from data_pipelines.corpora import open_corpus
    from rcot_rl.evaluation.benchmarks import BASELINES, Predict, benchmark_document, evaluate_all
    from rcot_rl.evaluation.score_table import score_table
    from rcot_rl.monitoring.terminal.run_summary import fault_lines, public_lines

    recipe, folder, console = run.recipe, run.folder, run.console
    dataset, split = benchmark.dataset, benchmark.split
    root = corpus_root(folder, recipe, dataset, benchmark.root)
    name = benchmark_name(dataset, split)
    console.line(f"{stage}: {name}")
    last = benchmark_predictions(folder.root, name)
    if not open_corpus(dataset, root, split).has_masks:
        console.line(
            f"{stage}: {name} has no ground truth and is not scored; "
            f"submit {last} to its evaluation server"
        )
        return None
    # the last one is the run's result; variants come before their checkpoint
    *others, final = [
        one
        for checkpoint in recipe.scored_checkpoints
        for one in reversed(recipe.predictions_of(checkpoint))
    ]
    methods: dict[str, Path | Predict] = {
        one: benchmark_predictions(folder.root, name, one) for one in others
    }
    methods[final] = last
    if recipe.eval.baselines:
        methods |= BASELINES
    results = evaluate_all(
        dataset,
        root,
        split,
        methods,
        benchmark.limit,
        workers=recipe.eval.workers,
        progress=partial(console.progress, f"{stage}: {name}, expressions"),
    )
    for line in (*public_lines(results[final]), *fault_lines(results[final])):
        console.line(f"{stage}: {name}: {line}")
    checkpoints = {
        one: results.pop(one) for one in methods if one not in {*BUILT_IN_VARIANTS, *BASELINES}
    }
    file = folder.root / "eval" / f"{name}.json"
    write_text(file.with_suffix(".csv"), score_table({**checkpoints, **results}))
    write_json(file, benchmark_document(checkpoints, results))
    return {one: scores["J&F"] for one, scores in checkpoints.items()}
