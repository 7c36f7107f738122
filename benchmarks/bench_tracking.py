"""Measure what a follower costs the training beside it, pairwise against no tracker.

    python benchmarks/bench_tracking.py [--run RUN] [--steps 16] [--step-s 4] [--pairs 2]

A finished GRPO stage is played again: one step after the other, with its metrics and rollouts,
while all CPUs do a fixed amount of work for each step. Of each pair of plays, one has the follower
of the recipe's trackers (default: W&B offline) and one has none; the order alternates. Printed are

- the ratio of the seconds of all steps, with and without the follower: the first step includes its
  start;
- the CPU seconds of the follower and its children per step, and their share of all CPUs at the
  stage's own seconds per step. This does not depend on other work on the machine.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.pool import Pool
from pathlib import Path

import psutil

from cluster.supervise import keeper
from cluster.supervise.processes import Host
from cluster.supervise.run_tracking import RunTracking
from rcot_rl.monitoring.run_files.run_reader import RunReader
from rcot_rl.monitoring.terminal.console import Console
from rcot_rl.system import machine

BLOCK = bytes(1 << 20)


def work(blocks: int) -> None:
    """Keep one CPU busy."""
    for _ in range(blocks):
        hashlib.sha256(BLOCK)


def blocks_per_second() -> float:
    """Return how many blocks a CPU hashes per second; the best of five."""
    rates = []
    for _ in range(5):
        began = time.perf_counter()
        work(100)
        rates.append(100 / (time.perf_counter() - began))
    return max(rates)


def prepare(source: Path, stage: str, folder: Path) -> None:
    """Make a run folder with the source's recipe and shards, and a stage without steps."""
    folder.mkdir()
    shutil.copy(source / "recipe.yaml", folder)
    (folder / "shards").symlink_to((source / "shards").resolve())
    (folder / stage / "rollouts").mkdir(parents=True)
    (folder / stage / "attempt-1").mkdir()


def cpu_seconds(pids: Sequence[int]) -> dict[int, float]:
    """Return the CPU seconds that live processes have used."""
    used = {}
    for pid in pids:
        try:
            times = psutil.Process(pid).cpu_times()
        except psutil.Error:
            continue
        used[pid] = times.user + times.system
    return used


def play(
    source: Path, stage: str, lines: list[dict], blocks: int, pool: Pool, track: bool
) -> tuple[list[float], float, float]:
    """Play the steps; return their seconds, the follower's CPU seconds, and those at its end."""
    reader = RunReader(source)
    assert reader.recipe is not None
    seconds: list[float] = []
    used: dict[int, float] = {}
    with tempfile.TemporaryDirectory(prefix="bench-tracking-") as place:
        run = Path(place) / "run"
        prepare(source, stage, run)
        settings = {} if track else {"mode": "disabled"}
        recipe = reader.recipe.model_copy(
            update={"wandb": reader.recipe.wandb.model_copy(update=settings)}
        )
        host = Host({})
        with host:
            with RunTracking(recipe, run, host, Console()) as tracking:
                followers = [followed.process.pid for followed in tracking._followed]
                for line in lines:
                    began = time.perf_counter()
                    pool.map(work, [blocks] * machine.cpus(), chunksize=1)
                    rollouts = source / stage / "rollouts" / f"{line['step']}.jsonl"
                    shutil.copy(rollouts, run / stage / "rollouts")
                    with (run / stage / "metrics.jsonl").open("a") as file:
                        file.write(json.dumps(line) + "\n")
                    tracking.poll()
                    seconds.append(time.perf_counter() - began)
                    used |= cpu_seconds([p for f in followers for p in keeper.descendants(f)])
                during = sum(used.values())
                (run / stage / "done.json").write_text("{}")
                ended = time.perf_counter()
            drain = time.perf_counter() - ended
    return seconds, during, drain


def main() -> int:
    """Run the benchmark. Returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--run", type=Path, default=Path("runs/laptop"))
    parser.add_argument("--stage", default="grpo-ktg")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--step-s", type=float, default=4.0)
    parser.add_argument("--pairs", type=int, default=2)
    arguments = parser.parse_args()
    lines = RunReader(arguments.run).metrics(arguments.stage)[: arguments.steps]
    if not lines:
        print(f"{arguments.run}: has no steps of {arguments.stage}; `make run` makes such a run")
        return 0
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    own = statistics.median(line["timing_s/step"] for line in lines)
    blocks = round(arguments.step_s * blocks_per_second())
    ratios, shares = [], []
    with Pool(machine.cpus()) as pool:  # older than any Host, which ends its children
        for pair in range(arguments.pairs):
            totals = {}
            for track in (True, False) if pair % 2 else (False, True):
                seconds, used, drain = play(
                    arguments.run, arguments.stage, lines, blocks, pool, track
                )
                totals[track] = sum(seconds)
                if track:
                    per_step = used / len(lines)
                    shares.append(per_step / (own * machine.cpus()))
                    print(
                        f"pair {pair + 1}: follower {used:.2f} CPU s in {len(lines)} steps "
                        f"({per_step:.3f} a step), drained in {drain:.1f} s"
                    )
            ratios.append(totals[True] / totals[False])
            print(f"pair {pair + 1}: seconds with / without the follower {ratios[-1]:.4f}")
    ratio, share = statistics.median(ratios), 100 * statistics.median(shares)
    print(f"median ratio {ratio:.4f} at {arguments.step_s:g} s of work a step")
    print(f"CPU share {share:.2f} % of {machine.cpus()} CPUs at the stage's {own:.1f} s a step")
    return 0


if __name__ == "__main__":
    sys.exit(main())
