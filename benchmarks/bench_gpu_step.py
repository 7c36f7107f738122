"""GRPO steps of Qwen2.5-VL-3B's exact shapes, random weights, on one GPU: the whole real stack.

    python benchmarks/bench_gpu_step.py [--steps 4] [--json FILE] [--shape 3b] [KEY=VALUE …]

The stage is `rcot_seg_3b_1gpu`'s GRPO-AKS: 16 prompts of 900 vision tokens, 8 responses each, all
of 300 tokens (the end of a text is ignored), bf16; Ray, verl's trainer, FSDP2, vLLM and our agent
loop, reward and metrics. Nothing is saved. Prints seconds of each part, tokens a second, the share
of the device's peak that the update reaches (verl's count of operations), and the ratio of a step
to its rollout. KEY=VALUE overrides the recipe; `--shape tiny device=cpu` rehearses it on a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from gpu.random_model import SHAPES, write_model

from data_pipelines.build import build
from data_pipelines.toy.layouts import write_corpus
from rcot_rl.recipe.loader import load_recipe
from rcot_rl.recipe.schema import Recipe
from rcot_rl.runfolder import git_commit
from rcot_rl.training import jobs

RESPONSE_TOKENS = 300
PACKAGES = ("verl", "ray", "torch", "transformers", "vllm", "tensordict", "numpy")
TIMINGS = ("gen", "reward", "old_log_prob", "ref", "adv", "update_actor", "update_weights", "step")
GAUGES = (
    "perf/mfu/actor", "actor/perf/max_memory_allocated_gb", "actor/perf/max_memory_reserved_gb",
    "training/rollout_probs_diff_mean", "training/rollout_probs_diff_max",
    "training/rollout_actor_probs_pearson_corr", "response_length/mean", "prompt_length/mean",
    "actor/grad_norm", "actor/kl_loss", "memory_gib/node/used_max",
)  # fmt: skip


def recipe_for(folder: Path, steps: int, settings: list[str]) -> Recipe:
    """The 3B recipe on one GPU, on toy clips, its responses of one length."""
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
            f"grpo_aks.steps={steps}",
            f"grpo.max_response_length={RESPONSE_TOKENS}",
            "grpo.max_prompt_length=1300",
            f"grpo_aks.verl={json.dumps(verl)}",
            "wandb.mode=disabled",
            *settings,
        ],
    )


def run(folder: Path, recipe: Recipe, shape: str) -> list[dict[str, Any]]:
    """Make model and rows, run the stage to its end; verl's metrics of every step."""
    device = "cuda" if recipe.device == "cuda" else "cpu"
    _timed("corpus", lambda: write_corpus(folder / "mevis", "mevis", "train", 24, 1, "rich"))
    name = recipe.grpo_aks.shard_set
    data = recipe.data.model_copy(update={"sets": {name: recipe.data.sets[name]}})
    _timed("rows", lambda: build(data, folder / "shards", recipe.prompts, seed=recipe.seed))
    model = _timed("model", lambda: write_model(folder / "model", shape, device))
    out, attempt = folder / "grpo-aks", folder / "grpo-aks" / "attempt-1"
    job = jobs.grpo_job(recipe, "grpo-aks", model, folder / "shards" / name, out, attempt)
    log = attempt / "log.txt"
    with log.open("wb") as file:
        done = subprocess.run(
            [sys.executable, *job.arguments],
            env=os.environ | job.environment,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    if done.returncode:
        sys.exit(log.read_text(errors="replace")[-6000:] + "\nthe stage ended badly")
    return [json.loads(row) for row in job.verl_log.read_text().splitlines()]


def _timed(what: str, call: Any) -> Any:
    started = time.monotonic()
    result = call()
    print(f"{what}: {time.monotonic() - started:.1f} s", flush=True)
    return result


def figures(rows: list[dict[str, Any]], recipe: Recipe) -> dict[str, Any]:
    """Medians over the steps after the first, in which kernels are compiled."""
    data = [row["data"] for row in rows][1:]
    found = {
        f"seconds/{t}": statistics.median(d[f"timing_s/{t}"] for d in data)
        for t in TIMINGS
        if all(f"timing_s/{t}" in d for d in data)
    }
    found |= {k: statistics.median(d[k] for d in data) for k in GAUGES if all(k in d for d in data)}
    section = recipe.grpo_aks
    responses = section.prompts_per_step * section.n
    length = found["prompt_length/mean"] + found["response_length/mean"]
    found["tokens/rollout_per_s"] = responses * found["response_length/mean"] / found["seconds/gen"]
    found["tokens/update_per_s"] = responses * length / found["seconds/update_actor"]
    found["tokens/step_per_s"] = responses * length / found["seconds/step"]
    found["ratio/step_to_gen"] = found["seconds/step"] / found["seconds/gen"]
    return found


def host() -> dict[str, Any]:
    """Hardware, versions, commit."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        gpu = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        gpu = "none"
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "absent"
    return {
        "gpu": gpu,
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "versions": versions,
        "commit": git_commit() or os.environ.get("RCOT_COMMIT"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--shape", default="3b", choices=SHAPES)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--out", type=Path, help="where model and run lie; default: temporary")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="rcot-gpu-") as temporary:
        folder = (options.out or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        recipe = recipe_for(folder, options.steps, options.settings)
        if recipe.device == "cuda" and host()["gpu"] == "none":
            print("no GPU on this host: nothing measured")
            return
        rows = run(folder, recipe, options.shape)
    found = figures(rows, recipe)
    for key, value in found.items():
        print(f"{key:<46}{value:14.5g}")
    if options.json:
        whole = {"host": host(), "settings": options.settings, "shape": options.shape}
        whole |= {"figures": found, "steps": [row["data"] for row in rows]}
        options.json.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
