"""Compare the seconds of our GRPO step with those of plain verl, at the laptop recipe's sizes.

    python benchmarks/bench_step.py [--steps 10] [--json FILE]

Three runs of one stage from one SFT model, one after the other on the real stack:

    verl           verl's trainer, agent loop and `naive` reward manager; no dump, no callback
    caching off    ours without the cached agent loop; polls as rarely as verl (2 s)
    ours           the recipe unchanged

Seconds per step are wall-clock time from the end of the second step to the end of the last but one.
They include metrics, the dump of rollouts and the reading of host memory, but neither warm-up nor
the last checkpoint.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from rcot_rl.recipe.loader import load_recipe
from rcot_rl.runfolder import RunFolder

BARE_REWARD = Path(__file__).resolve().parent / "bare" / "verl_reward.py"
RCOT = Path(sys.executable).parent / "rcot"
AGENT = "actor_rollout_ref.rollout.agent"

VERL_LOOP = {
    f"{AGENT}.agent_loop_manager_class": "verl.trainer.ppo.v1.agent_loop_tq.AgentLoopManagerTQ",
    f"{AGENT}.default_agent_loop": "single_turn_agent",
}
RUNS: dict[str, dict] = {
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
    "ours": {},
}


def settings(steps: int) -> list[str]:
    """Return overrides of the laptop recipe: one short stage, few rows, one checkpoint."""
    return [
        "toy.corpora=[{layout: mevis, split: train, videos: 100}]",
        "data.corpora=[{dataset: mevis}]",
        "data.describe=template",
        "data.sets={sft-1536: {ktg: 64, aks: 128, val: 8}, grpo-aks-640: {aks: 192, val: 8}, "
        "grpo-ktg-960: {ktg: 32, val: 8}}",
        "train.sft.epochs=2",
        f"train.grpo-aks.steps={steps}",
        "grpo.save_every=1000",
        "eval.benchmarks=[]",
        "supervise.max_attempts=1",
    ]


def main() -> None:
    """Run the three variants and print their seconds per step."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="rcot-step-") as folder:
        base = Path(folder) / "base"
        common = settings(arguments.steps)
        _run([*common, "stages=[data, sft]", "--out", str(base)])
        seconds = {name: _seconds(base, common, name) for name in RUNS}
    for name, value in seconds.items():
        print(f"{name:<12}{value:6.2f} s/step   {value / seconds['verl']:.2f} x verl")
    if arguments.json:
        arguments.json.write_text(json.dumps(seconds, indent=1) + "\n", encoding="utf-8")


def _seconds(base: Path, common: list[str], name: str) -> float:
    overrides = [*common, "stages=[grpo-aks]", f"train.grpo-aks.verl={json.dumps(RUNS[name])}"]
    out = base.parent / name.replace(" ", "-")
    RunFolder.claim(out, load_recipe("laptop", overrides))
    for part in ("shards", "sft", "data", "corpora"):
        shutil.copytree(base / part, out / part, symlinks=True)
    _run([*overrides, "--out", str(out)])
    rows = (out / "grpo-aks" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    times = [json.loads(row)["time"] for row in rows][1:-1]  # the last step saves
    return (times[-1] - times[0]) / (len(times) - 1)


def _run(arguments: list[str]) -> None:
    result = subprocess.run([RCOT, "run", "laptop", *arguments], capture_output=True, text=True)
    if result.returncode:
        sys.exit(result.stderr[-3000:])


if __name__ == "__main__":
    main()
