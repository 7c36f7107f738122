"""Compare the seconds of our GRPO step with those of plain verl, at the laptop recipe's sizes.

    python benchmarks/bench_step.py [--steps 10] [--rounds 1] [--only NAME …] [--json FILE]
                                    [--against CHECKOUT]

Runs of one stage from one SFT model, one after the other on the real stack:

    verl             verl's trainer, agent loop and `naive` reward manager; no dump, no callback
    caching off      ours without the cached agent loop; polls as rarely as verl (2 s); no switch
    no switches      ours with packing, final_outputs and rollout_threads off
    packing          one switch on, the others off; likewise the next two
    final_outputs
    rollout_threads
    recipe           the recipe unchanged
    checkout         the recipe of `--against`, by its own code: another version of this repository

Seconds per step are wall-clock time from the end of the second step to the end of the last but one.
They include metrics, the dump of rollouts and the reading of host memory, but neither warm-up nor
the last checkpoint. CPU seconds are those of all processes of the run between the same two steps.
They depend little on other work on the machine; wall-clock time does, so compare it only between
rounds of an idle machine. Ratios are to the first run.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from statistics import mean

import psutil

BARE_REWARD = Path(__file__).resolve().parent / "bare" / "verl_reward.py"
HERE = Path(__file__).resolve().parents[1]
AGENT = "actor_rollout_ref.rollout.agent"

VERL_LOOP = {
    f"{AGENT}.agent_loop_manager_class": "verl.trainer.ppo.v1.agent_loop_tq.AgentLoopManagerTQ",
    f"{AGENT}.default_agent_loop": "single_turn_agent",
}
_PLAIN: dict[str, dict] = {
    "verl": VERL_LOOP
    | {
        "trainer.v1.trainer_mode": "sync",
        "trainer.rollout_data_dir": None,
        "trainer.checkpoint_callback_class": None,
        "reward.reward_manager.source": "register",
        "reward.reward_manager.name": "naive",
        "reward.custom_reward_function.path": str(BARE_REWARD),
    },
    "caching off": VERL_LOOP | {"trainer.rcot.poll_interval_s": 2.0},
}
_OFF = {"packing": "false", "final_outputs": "false", "rollout_threads": "null"}
_ON = {"packing": "true", "final_outputs": "true", "rollout_threads": "1"}


def _switches(*on: str) -> list[str]:
    return [f"grpo.{name}={(_ON if name in on else _OFF)[name]}" for name in _OFF]


def _stage(verl: dict) -> str:
    return f"train.grpo-aks.verl={json.dumps(verl)}"


RUNS: dict[str, list[str]] = {
    **{name: [*_switches(), _stage(verl)] for name, verl in _PLAIN.items()},
    "no switches": _switches(),
    **{name: _switches(name) for name in _OFF},
    "recipe": [],
}
"""Overrides of the laptop recipe by the name of the run."""
CHECKOUT = "checkout"


def settings(steps: int) -> list[str]:
    """Return overrides of the laptop recipe: one short stage, few rows, one checkpoint."""
    return [
        "toy.corpora=[{layout: mevis, split: train, videos: 100}]",
        "data.corpora=[{dataset: mevis}]",
        "data.describe=template",
        "data.sets={sft-384: {ktg: 64, aks: 128, val: 8}, grpo-aks-480: {aks: 192, val: 8}, "
        "grpo-ktg-960: {ktg: 32, val: 8}}",
        "train.sft.epochs=2",
        f"train.grpo-aks.steps={steps}",
        "grpo.save_every=1000",
        "eval.benchmarks=[]",
        "supervise.max_attempts=1",
    ]


def main() -> None:
    """Run the variants and print their seconds per step."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=RUNS)
    parser.add_argument("--against", type=Path, metavar="CHECKOUT")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    names = [name for name in RUNS if name in (arguments.only or RUNS)]
    if arguments.against is not None:
        names.insert(0, CHECKOUT)
    results: dict[str, list[dict[str, float]]] = defaultdict(list)
    with tempfile.TemporaryDirectory(prefix="rcot-step-") as folder:
        base = Path(folder) / "base"
        common = settings(arguments.steps)
        _run(HERE, [*common, "stages=[data, sft]", "--out", str(base)]).wait()
        for number in range(arguments.rounds):
            for name in names:
                checkout = arguments.against if name == CHECKOUT else HERE
                out = Path(folder) / f"{name.replace(' ', '-')}-{number}"
                results[name].append(_measure(checkout, base, out, common, RUNS.get(name, [])))
                print(name, json.dumps(results[name][-1]), flush=True)
    first = names[0]
    for name in names:
        columns = []
        for key in results[first][0]:
            value, of_first = (mean(r[key] for r in results[n]) for n in (name, first))
            columns.append(f"{value:8.3g} {key}  {value / of_first:.2f} x")
        print(f"{name:<16}" + "   ".join(columns))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def _measure(
    checkout: Path, base: Path, out: Path, common: list[str], overrides: list[str]
) -> dict[str, float]:
    """Run one stage from the SFT model in `base` and return its seconds per step."""
    overrides = [*common, *overrides, "stages=[grpo-aks]"]
    claim = (
        "import sys; from pathlib import Path; from rcot_rl.recipe.loader import load_recipe; "
        "from rcot_rl.runfolder import RunFolder; "
        "RunFolder.claim(Path(sys.argv[1]), load_recipe('laptop', sys.argv[2:]))"
    )
    environment = os.environ | {"PYTHONPATH": str(checkout)}
    command = [sys.executable, "-c", claim, str(out), *overrides]
    subprocess.run(command, cwd=checkout, env=environment, check=True)
    for part in ("shards", "sft", "data", "corpora"):
        shutil.copytree(base / part, out / part, symlinks=True)
    metrics, process = (
        out / "grpo-aks" / "metrics.jsonl",
        _run(checkout, [*overrides, "--out", str(out)]),
    )
    cpu: list[dict[int, float]] = []
    while process.poll() is None:
        steps = len(metrics.read_text(encoding="utf-8").splitlines()) if metrics.exists() else 0
        if steps > len(cpu):
            cpu += [_cpu_seconds(process.pid)] * (steps - len(cpu))
        time.sleep(0.1)
    if process.returncode:
        sys.exit(f"{out.name}: {(out.parent / (out.name + '.log')).read_text()[-3000:]}")
    rows = [json.loads(row) for row in metrics.read_text(encoding="utf-8").splitlines()]
    times = [row["time"] for row in rows][1:-1]  # the last step saves
    steps = len(times) - 1
    used = sum(cpu[-2][pid] - cpu[1].get(pid, 0.0) for pid in cpu[-2])
    return {
        "wall s/step": (times[-1] - times[0]) / steps,
        "CPU s/step": used / steps,
        **{f"{part} s": mean(r[f"timing_s/{part}"] for r in rows[2:-1]) for part in _PARTS},
    }


_PARTS = ("gen", "ref", "update_actor")


def _cpu_seconds(pid: int) -> dict[int, float]:
    """Return the CPU seconds of each process of a tree so far."""
    used = {}
    for process in (root := psutil.Process(pid), *root.children(recursive=True)):
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        used[process.pid] = times.user + times.system
    return used


def _run(checkout: Path, arguments: list[str]) -> subprocess.Popen:
    """Start `rcot run laptop` with the code of `checkout`; its output goes beside its folder."""
    out = Path(arguments[-1])
    with out.with_name(f"{out.name}.log").open("w") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "rcot_rl.cli", "run", "laptop", *arguments],
            cwd=checkout,
            env=os.environ | {"PYTHONPATH": str(checkout)},
            stdout=log,
            stderr=subprocess.STDOUT,
        )


if __name__ == "__main__":
    main()
