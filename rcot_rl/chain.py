"""`rcot run`: the stages of a recipe, one after the other, each resumable, finished ones skipped.

The order below is the whole story of a run. Each stage is a function of the recipe and the run's
folder; it leaves its results there and marks itself done last.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.launch.lost_hosts import DeathWatch, LossWatch
from cluster.supervise.processes import Host, Limits, StageFailed
from cluster.supervise.verdict import History, Verdict
from rcot_rl import data_stage, disk
from rcot_rl.errors import InputError
from rcot_rl.files import writing
from rcot_rl.monitoring.console import Console, EventReader
from rcot_rl.monitoring.metrics import Follower, read_metrics, recover_steps, restore_step
from rcot_rl.recipe.loader import require
from rcot_rl.recipe.schema import STAGES, Benchmark, Recipe
from rcot_rl.runfolder import RunFolder, attempts_in, write_json
from rcot_rl.training import jobs
from rcot_rl.training.checkpoint_store import METRICS, room_needed
from rcot_rl.training.handoff_check import check_handoff
from rcot_rl.training.provenance import reward_hashes

TRAINING = ("sft", "grpo-aks", "grpo-ktg")
_HEAVY = frozenset({*TRAINING, "predict"})


def run(
    recipe: Recipe, root: Path, stages: tuple[str, ...] | None = None, *, checked: bool = False
) -> RunFolder:
    """Run the recipe's stages (or only `stages`) in RUN = `root`.

    The preflight's checks come first, before anything is written; checked: they were made.

    Raises InputError for input or configuration at fault, StageFailed when a stage's process ends
    badly; in both cases, and after Ctrl-C, the same call goes on where this one stopped.
    """
    from cluster.preflight.plan import check_run

    chosen = tuple(s for s in STAGES if s in (stages or recipe.stages))
    require(recipe, chosen)  # of stages that are not the recipe's own, too
    console = Console()
    if not checked:
        check_run(recipe, root, chosen, console.line)
    folder = RunFolder.claim(root, recipe)
    with folder.locked() as lock, writing(folder.root, frozenset(disk.KINDS)):
        todo = [s for s in chosen if not folder.is_done(s)]
        for stage in chosen:
            if stage not in todo:
                console.line(f"{stage}: done before ({_minutes(folder, stage)})")
                _warn_if_short(folder, stage, console)
        if not todo:
            return folder
        folder.pin("rewards", reward_hashes(recipe))
        heavy = bool(_HEAVY.intersection(todo)) or ("data" in todo and data_stage.asks(recipe))
        preload = jobs.PRELOAD if heavy and recipe.device == "cpu" else ()
        with Host(
            {"RCOT_RL_PLUGIN": "required", **data_stage.platform_of(recipe)},
            preload,
            folder.root / "zygote.log",
            own_ray=recipe.cluster.ray_address == "local",
            held=(lock,),
        ) as host:
            state = _Run(recipe, folder, host, console)
            for stage in todo:
                _timed(state, stage)
    return folder


def _warn_if_short(folder: RunFolder, stage: str, console: Console) -> None:
    """Earlier versions called CoT-SFT done that had skipped its last epoch after a resume."""
    if stage not in TRAINING:
        return
    planned = folder.done(stage).get("steps", 0)
    step = jobs.sealed_step(folder.stage(stage) / "checkpoints")
    if 0 < step < planned:
        console.line(
            f"{stage}: its newest checkpoint is of step {step} of {planned}, so its model is not "
            f"fully trained: delete {folder.stage(stage) / 'done.json'} and those of the stages "
            "after it to train the rest"
        )


@dataclass
class _Run:
    recipe: Recipe
    folder: RunFolder
    host: Host
    console: Console


def _timed(state: _Run, stage: str) -> None:
    started = time.monotonic()
    state.host.memory.restart()
    state.console.stage(stage)
    facts = _supervised(state, stage)
    minutes = (time.monotonic() - started) / 60
    peak = state.host.memory.peak_bytes() / 2**30
    state.folder.mark_done(stage, minutes=round(minutes, 2), peak_gib=round(peak, 2), **facts)
    state.console.line(f"{stage}: done in {minutes:.1f} min (peak {peak:.1f} GiB)")


def _supervised(state: _Run, stage: str) -> dict[str, Any]:
    """The stage's facts; it is started again after a failure, as the recipe allows."""
    history = History(state.folder.stage(stage), state.recipe.supervise)
    while True:
        try:
            with _shortages_fail(state.folder.stage(stage)):
                return _STAGES[stage](state) or {}
        except StageFailed as error:
            metrics = read_metrics(state.folder.stage(stage) / "metrics.jsonl")
            step = metrics[-1]["step"] if metrics else 0
            ours = isinstance(error.__cause__, OSError)
            reason = str(error.__cause__) if ours else jobs.failure_reason(error.log)
            verdict = history.judge(stage, str(error), error.log, step, reason)
            if verdict.cause == "input":
                raise InputError(verdict.text) from error
            if not verdict.retry:
                raise StageFailed(verdict.text, error.log) from error
            state.console.line(verdict.text)
            if verdict.cause == "disk":
                _await_space(state, stage, verdict, error.log)
            time.sleep(history.backoff_s())


@contextlib.contextmanager
def _shortages_fail(stage: Path) -> Iterator[None]:
    """Make a StageFailed of this process' own failure to write, as it is of its children's."""
    try:
        yield
    except OSError as error:
        if error.errno not in disk.KINDS:
            raise
        attempt = [stage / "attempt-1", *attempts_in(stage)][-1]
        raise StageFailed("was stopped: a file cannot be written", attempt / "log.txt") from error


def _await_space(state: _Run, stage: str, verdict: Verdict, log: Path) -> None:
    """Wait until a checkpoint fits where there was no room; StageFailed when it takes too long."""
    minutes = state.recipe.supervise.disk_wait_minutes
    place, needed = Path(verdict.place), room_needed(state.folder.stage(stage) / "checkpoints")
    end, announced = time.monotonic() + 60 * minutes, False
    while (lack := disk.shortage(place, needed, disk.LEAST_FREE)) is not None:
        if not lack.passes:
            raise StageFailed(f"{verdict.text} Since then: {lack.text}", log)
        if time.monotonic() > end:
            raise StageFailed(f"{verdict.text} {minutes:g} minutes later: {lack.text}", log)
        if lack.kind == "space":
            free = shutil.disk_usage(place).free
            state.console.progress(f"{stage}: waiting for space, MiB", free >> 20, needed >> 20)
        elif not announced:
            state.console.line(f"{stage}: waiting. {lack.text}")
            announced = True
        time.sleep(1)


def _sft(state: _Run) -> dict[str, Any]:
    recipe, stage = state.recipe, state.folder.stage("sft")
    base = base_model(recipe)
    attempt = state.folder.new_attempt("sft")
    shards = state.folder.root / "shards" / recipe.sft.shard_set
    _fit_ranks(state, "sft", attempt)
    job = jobs.sft_job(recipe, base, shards, stage, attempt)
    checkpoint = _train(state, "sft", job, attempt)
    arguments = jobs.merge_job(base, checkpoint, stage / "model")
    state.console.line("sft: merging the adapter")
    state.host.run(arguments, attempt / "merge.log")
    jobs.write_card(stage / "model", recipe)
    return {"steps": job.total_steps}


def _grpo(name: str, after: str | None = None) -> Callable[[_Run], dict[str, Any]]:
    """The stage `name`. Its reference is CoT-SFT's model (eq. 15); its policy starts there too, or
    where the stage `after` ended (see `follows`)."""

    def stage_of(state: _Run) -> dict[str, Any]:
        recipe, stage = state.recipe, state.folder.stage(name)
        section, alone = recipe.grpo(name), recipe.cluster.ray_address == "local"
        attempt = state.folder.new_attempt(name)
        started = jobs.is_started(stage / "checkpoints")
        if after is not None and follows(after, recipe, state.folder) and not started:
            previous = jobs.newest_checkpoint(state.folder.stage(after) / "checkpoints")
            state.host.run(jobs.start_job(recipe, name, previous, stage), attempt / "start.log")
        _fit_ranks(state, name, attempt)
        job = jobs.grpo_job(
            recipe,
            name,
            model_of(state.folder, recipe, "sft"),
            state.folder.root / "shards" / section.shard_set,
            stage,
            attempt,
            # the zygote is on this host, and other hosts' workers are not
            py_executable=state.host.environment.get("RCOT_ZYGOTE_PYTHON") if alone else None,
        )
        newest = _train(state, name, job, attempt)
        if section.lora_rank is None:
            jobs.publish_model(newest, stage / "model", recipe)
        else:
            state.console.line(f"{name}: merging the adapter")
            model, start = stage / "model", model_of(state.folder, recipe, "sft")
            state.host.run(jobs.merge_job(start, newest / "actor", model), attempt / "merge.log")
            jobs.write_card(model, recipe)
        return {"steps": job.total_steps, "reward": section.reward}

    return stage_of


def follows(before: str, recipe: Recipe, folder: RunFolder) -> bool:
    """Whether a GRPO stage goes on from the stage `before`: the recipe has it, or it was done in
    this folder by another command, whose recipe named other stages."""
    return before in recipe.stages or folder.is_done(before)


def _fit_ranks(state: _Run, stage: str, attempt: Path) -> None:
    """Cut the checkpoint that is resumed from for the number of ranks there is now."""
    checkpoints = state.folder.stage(stage) / "checkpoints"
    arguments = jobs.reshard_job(checkpoints, jobs.ranks_of(state.recipe, stage))
    if arguments is not None:
        state.console.line(f"{stage}: resharding to {arguments[-1]} ranks")
        state.host.run(arguments, attempt / "reshard.log")


def _await_hosts(state: _Run, attempt: Path) -> None:
    """On a Ray that runs already: wait for its hosts, one of which may have been lost."""
    cluster = state.recipe.cluster
    if cluster.ray_address != "local":
        wait = ["--wait", str(state.recipe.launch.health.wait_s)]
        size = ["--nodes", str(cluster.nodes), "--gpus", str(cluster.gpus_per_node)]
        arguments = ["-m", "cluster.launch.await_hosts", cluster.ray_address, *size, *wait]
        state.host.run(arguments, attempt / "hosts.log")


def _train(state: _Run, stage: str, job: jobs.Job, attempt: Path) -> Path:
    """Train to the planned last step, and return its checkpoint.

    The checkpoint alone decides: an exit status of 0 is no proof of it, and another status after
    the last checkpoint was sealed (a crash of Ray's or gloo's threads at exit) loses nothing.

    Raises:
        StageFailed: The newest sealed checkpoint is not that of the last step.
        InputError: There is one of a later step.
    """
    folder = state.folder.stage(stage)
    checkpoints, metrics = folder / "checkpoints", folder / "metrics.jsonl"
    if job.resumes_from > job.total_steps:
        raise InputError(
            f"is of step {job.resumes_from}, and the last step is {job.total_steps}: "
            "delete it, or choose another folder with --out",
            file=checkpoints / f"global_step_{job.resumes_from}",
        )
    if job.resumes_from:
        logs = [attempt / job.verl_log.name for attempt in attempts_in(folder)]
        recover_steps(metrics, logs, job.resumes_from)
        restore_step(metrics, checkpoints / f"global_step_{job.resumes_from}" / METRICS)
    if job.resumes_from < job.total_steps:
        if stage != "sft":
            _await_hosts(state, attempt)
        try:
            _run_trainer(state, stage, job, attempt)
        except StageFailed as error:
            if jobs.sealed_step(checkpoints) != job.total_steps:
                raise
            state.console.line(f"{stage}: {error}, after its last checkpoint was sealed")
        restore_step(metrics, checkpoints / f"global_step_{job.total_steps}" / METRICS)
    step = jobs.sealed_step(checkpoints)
    if step != job.total_steps:
        raise StageFailed(
            "ended with status 0 before its last step "
            f"(newest sealed checkpoint: step {step} of {job.total_steps})",
            attempt / "log.txt",
        )
    return checkpoints / f"global_step_{step}"


def _run_trainer(state: _Run, stage: str, job: jobs.Job, attempt: Path) -> None:
    follower = Follower(job.verl_log, state.folder.stage(stage) / "metrics.jsonl")
    if job.resumes_from:
        state.console.line(f"{stage}: resuming from step {job.resumes_from}")
    state.console.line(f"{stage}: starting, log {attempt / 'log.txt'}")

    address = state.recipe.cluster.ray_address
    on_cluster = address != "local"
    lost = LossWatch(attempt / "log.txt") if on_cluster else None
    deaths = DeathWatch(attempt / "log.txt")
    elsewhere = ["-m", "cluster.launch.ask_stacks", address, str((attempt / "stacks").resolve())]
    supervise = state.recipe.supervise
    hours = supervise.deadline_hours
    limits = Limits(
        deadline_s=None if hours is None else 3600 * hours,
        heartbeat_s=supervise.heartbeat_s,
        startup_s=supervise.startup_s,
    )

    def watch() -> None:
        for line in follower.poll():
            limits.beat()
            state.console.step(stage, line, job.total_steps)
        if deaths.poll():
            limits.death()
        if lost is not None:
            lost.poll()

    state.host.run(
        job.arguments,
        attempt / "log.txt",
        environment=job.environment,
        watch=watch,
        stall_timeout_s=state.recipe.cluster.stall_timeout_s,
        limits=limits,
        elsewhere=elsewhere if on_cluster and stage != "sft" else (),
    )


def base_model(recipe: Recipe) -> Path:
    """The folder of the recipe's base policy, whole. Raises InputError."""
    from rcot_rl.inference.model_folder import check_model, find_model

    path = find_model(recipe.models.policy)
    check_model(path)
    return path


def model_of(folder: RunFolder, recipe: Recipe, stage: str) -> Path:
    """The model that a training stage left; `base`: the recipe's. Raises InputError."""
    if stage == "base":
        return base_model(recipe)
    path = jobs.stage_model(folder.stage(stage))
    check_handoff(base_model(recipe), path, recipe)
    return path


def _predict(state: _Run) -> dict[str, Any]:
    recipe, folder = state.recipe, state.folder
    attempt = folder.new_attempt("predict")
    heldout = {}
    if recipe.eval.heldout_prompts:
        for task in ("aks", "ktg"):
            shards = folder.root / "shards" / recipe.grpo(f"grpo-{task}").shard_set
            heldout[task] = [str(p) for p in jobs.split_files(shards, "val")]
    plan = {
        "recipe": str(attempt / "recipe.yaml"),
        "out": str(folder.root),
        "checkpoints": [[c, str(model_of(folder, recipe, c))] for c in recipe.eval.checkpoints],
        "benchmarks": [
            {
                "dataset": b.dataset,
                "root": str(benchmark_root(folder, recipe, b)),
                "split": b.split,
                "limit": b.limit,
            }
            for b in recipe.eval.benchmarks
        ],
        "heldout": heldout,
    }
    from rcot_rl.recipe.loader import dump_recipe

    (attempt / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    write_json(attempt / "plan.json", plan)
    log = attempt / "log.txt"
    state.console.line(f"predict: starting, log {log}")
    events = EventReader(log, state.console)
    state.host.run(
        ["-m", "rcot_rl.inference.stage", str(attempt / "plan.json")],
        log,
        watch=events.poll,
        stall_timeout_s=recipe.cluster.stall_timeout_s,
    )
    return {"checkpoints": [c for c, _ in plan["checkpoints"]]}


def benchmark_root(folder: RunFolder, recipe: Recipe, benchmark: Benchmark) -> Path:
    """Where a benchmark's corpus lies."""
    return data_stage.corpus_root(folder, recipe, benchmark.dataset, benchmark.root)


def _eval(state: _Run) -> dict[str, Any]:
    from data_pipelines.corpora import open_corpus
    from rcot_rl.evaluation.benchmarks import BASELINES, evaluate, evaluate_masks
    from rcot_rl.inference.stage import FIRST_FRAME
    from rcot_rl.monitoring.summary import fault_lines

    recipe, folder = state.recipe, state.folder
    scores = {}
    for benchmark in recipe.eval.benchmarks:
        root, split, limit = (
            benchmark_root(folder, recipe, benchmark),
            benchmark.split,
            benchmark.limit,
        )
        state.console.line(f"eval: {benchmark.dataset} {split}")
        last = folder.root / "predictions" / benchmark.dataset
        if not open_corpus(benchmark.dataset, root, split).has_masks:
            state.console.line(
                f"eval: {benchmark.dataset} {split} has no masks here and is not scored; "
                f"its server takes {last}"
            )
            continue
        result = evaluate(benchmark.dataset, root, split, last, limit=limit)
        for line in fault_lines(result):
            state.console.line(f"eval: {benchmark.dataset}: {line}")
        others = {}
        for name in recipe.eval.checkpoints[:-1]:
            place = folder.root / "predict" / name / benchmark.dataset
            others[name] = evaluate(benchmark.dataset, root, split, place, limit=limit)
        others[recipe.eval.checkpoints[-1]] = result
        baselines = {}
        if recipe.eval.baselines:
            place = folder.root / "predict" / FIRST_FRAME / benchmark.dataset
            baselines[FIRST_FRAME] = evaluate(benchmark.dataset, root, split, place, limit=limit)
            for name, masks in BASELINES.items():
                baselines[name] = evaluate_masks(benchmark.dataset, root, split, masks, limit=limit)
        whole = dict(result) | {"checkpoints": others, "baselines": baselines}
        write_json(folder.root / "eval" / f"{benchmark.dataset}.json", whole)
        scores[benchmark.dataset] = {name: r["J&F"] for name, r in others.items()}
    return {"J&F": scores}


def _report(state: _Run) -> dict[str, Any]:
    from rcot_rl.monitoring.report import write_report

    return {"page": str(write_report(state.folder.root))}


_STAGES: dict[str, Callable[[_Run], dict[str, Any]]] = {
    "data": lambda state: data_stage.run(state.recipe, state.folder, state.host, state.console),
    "sft": _sft,
    "grpo-aks": _grpo("grpo-aks"),
    "grpo-ktg": _grpo("grpo-ktg", after="grpo-aks"),
    "predict": _predict,
    "eval": _eval,
    "report": _report,
}


def _minutes(folder: RunFolder, stage: str) -> str:
    return f"{folder.done(stage).get('minutes', 0):.1f} min"
