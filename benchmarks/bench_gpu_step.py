"""GRPO steps of Qwen2.5-VL-3B's shapes with random weights on one GPU, on the whole real stack.

    python benchmarks/bench_gpu_step.py [--steps 4] [--json FILE] [--shape 3b] [KEY=VALUE …]

The stage is GRPO-AKS of `rcot_seg_3b_1gpu`: 16 prompts of 900 vision tokens with 8 responses each,
all of 300 tokens (EOS is ignored), in bf16, with Ray, verl's trainer, FSDP2, vLLM and our agent
loop, reward (a user's function) and metrics. No checkpoint is saved. Each step is printed as a JSON
line and written to `--json` as soon as verl logs it, so that an interrupted run keeps its steps;
`--seconds` limits the run. A model and rows in `--out` are reused. Prints at the end medians over
the steps after the first, tokens per second, the update's share of the device's peak (MFU), and the
ratio of a step to its rollout. KEY=VALUE overrides the recipe; for a trial on a CPU use
`--shape small device=cpu` with a few prompts.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from gpu.flops import PEAK_FLOPS, passes
from gpu.random_model import SHAPES, write_model
from gpu.record import BenchRecord, GpuMemory, host

from data_pipelines.build import build
from data_pipelines.toy.layouts import write_corpus
from rcot_rl.recipe.loader import load_recipe
from rcot_rl.recipe.schema import Recipe
from rcot_rl.training import jobs

RESPONSE_TOKENS = 300
IMAGE_PATCHES = 60 * 60
TIMINGS = ("gen", "reward", "old_log_prob", "ref", "adv", "update_actor", "update_weights", "step")
GAUGES = (
    "perf/mfu/actor",
    "actor/perf/max_memory_allocated_gb",
    "actor/perf/max_memory_reserved_gb",
    "training/rollout_probs_diff_mean",
    "training/rollout_probs_diff_max",
    "training/rollout_actor_probs_pearson_corr",
    "actor/rollout_probs_diff_mean",
    "response_length/mean",
    "prompt_length/mean",
    "actor/grad_norm",
    "actor/kl_loss",
    "memory_gib/node/used_max",
)


def recipe_for(folder: Path, steps: int, settings: list[str]) -> Recipe:
    """Return the 3B recipe for one GPU, on toy clips, with responses of equal length."""
    verl = {"actor_rollout_ref.rollout.ignore_eos": True, "trainer.save_freq": -1}
    return load_recipe(
        "rcot_seg_3b_1gpu",
        [
            f"models.policy={folder / 'model'}",
            f"data.corpora=[{{dataset: mevis, root: {folder / 'mevis'}, split: train}}]",
            "data.sets.grpo-aks-4k={aks: 64, val: 8}",
            "data.describe=template",
            "data.allow_smaller=true",
            "stages=[grpo-aks]",
            f"train.grpo-aks.steps={steps}",
            f"grpo.max_response_length={RESPONSE_TOKENS}",
            "grpo.max_prompt_length=1300",
            f"train.grpo-aks.verl={json.dumps(verl)}",
            f"train.grpo-aks.reward={Path(__file__).parent / 'gpu' / 'digits_reward.py'}:reward",
            "wandb.mode=disabled",
            *settings,
        ],
    )


def run(folder: Path, recipe: Recipe, shape: str, record: BenchRecord) -> str | None:
    """Make model and rows where they are missing and run the stage; every step goes to `record`.

    Returns:
        None, or why the stage failed.
    """
    device = "cuda" if recipe.device == "cuda" else "cpu"
    name = recipe.grpo("grpo-aks").shard_set
    shards = folder / "shards" / name
    if not (shards / "manifest.json").exists():
        _timed("corpus", lambda: write_corpus(folder / "mevis", "mevis", "train", 24, 1, "rich"))
        data = recipe.data.model_copy(update={"sets": {name: recipe.data.sets[name]}})
        _timed("rows", lambda: build(data, folder / "shards", recipe.prompts, seed=recipe.seed))
    model = _timed("model", lambda: write_model(folder / "model", shape, device))
    out = next(p for k in range(1, 1000) if not (p := folder / f"grpo-aks-{k}").exists())
    attempt = out / "attempt-1"
    job = jobs.grpo_job(recipe, "grpo-aks", model, shards, out, attempt)
    log = attempt / "log.txt"
    with log.open("wb") as file:
        child = subprocess.Popen(
            [sys.executable, "-m", "rcot_rl.stages.grpo_stage", str(job.config)],
            env=os.environ | job.environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))
    known = 0
    try:
        while True:
            status = child.poll()
            rows = job.verl_log.read_text().split("\n")[:-1] if job.verl_log.exists() else []
            for row in rows[known:]:
                record.add(json.loads(row)["data"])
            known = len(rows)
            if status is not None:
                break
            if record.left() < 0:
                return f"stopped at --seconds after {known} steps"
            time.sleep(0.2)
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGTERM)
            try:
                child.wait(15)
            except subprocess.TimeoutExpired:
                os.killpg(child.pid, signal.SIGKILL)
    if status:
        return log.read_text(errors="replace")[-6000:] + "\nthe stage failed"
    return None


def _timed(name: str, call: Any) -> Any:
    started = time.monotonic()
    result = call()
    print(f"{name}: {time.monotonic() - started:.1f} s", flush=True)
    return result


def figures(rows: list[dict[str, Any]], recipe: Recipe) -> dict[str, Any]:
    """Return medians over the steps after the first, which compiles kernels."""
    data = rows[1:] or rows
    values = {
        name: statistics.median(row[key] for row in data)
        for name, key in {f"seconds/{t}": f"timing_s/{t}" for t in TIMINGS}.items()
        | {key: key for key in GAUGES}.items()
        if all(isinstance(row.get(key), int | float) for row in data)
    }
    section = recipe.grpo("grpo-aks")
    responses = section.prompts_per_step * section.n
    length = values["prompt_length/mean"] + values["response_length/mean"]
    generated = responses * values["response_length/mean"]
    values["tokens/rollout_per_s"] = generated / values["seconds/gen"]
    values["tokens/update_per_s"] = responses * length / values["seconds/update_actor"]
    values["tokens/step_per_s"] = responses * length / values["seconds/step"]
    values["ratio/step_to_gen"] = values["seconds/step"] / values["seconds/gen"]
    work = passes(recipe.models.policy, responses, length, IMAGE_PATCHES)
    values["mfu/update"] = work["update"] / values["seconds/update_actor"] / PEAK_FLOPS
    values["tflop/update"] = work["update"] / 1e12
    return values


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--seconds", type=float, help="end the run after this many seconds")
    parser.add_argument("--shape", default="3b", choices=SHAPES)
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--out", type=Path, help="folder of model and run; default: a temporary one"
    )
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="rcot-gpu-") as temporary:
        folder = (options.out or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        recipe = recipe_for(folder, options.steps, options.settings)
        if recipe.device == "cuda" and host()["gpu"] == "none":
            print("no GPU on this host: nothing measured")
            return
        record = BenchRecord(
            options.json, options.seconds, settings=options.settings, shape=options.shape
        )
        with GpuMemory() as memory:
            fault = run(folder, recipe, options.shape, record)
        values: dict[str, Any] = {}
        if record.rows:
            values = figures(record.rows, recipe)
            values["memory_gib/gpu/used_max"] = memory.peak_mib / 1024
        for key, value in values.items():
            print(f"{key:<46}{value:14.5g}")
        record.write(figures=values, fault=fault)
    if fault is not None:
        sys.exit(fault)


if __name__ == "__main__":
    main()
