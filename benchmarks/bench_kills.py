"""Kill matrix: one GRPO stage on the real stack, with one fault after the other.

    python benchmarks/bench_kills.py [--only 'NAME; NAME'] [--json FILE] [--out DIR]

Every fault is injected once, each at a later step. The stage must finish unattended, with every
optimizer step done once; else the exit status is 1. Prints for each fault the seconds until the
supervisor noticed it and until a step ended that began after it, and at the end the ratio of the
stage's time to that of the same number of steps without faults (their median times their number).
"""

from __future__ import annotations

import argparse
import errno
import functools
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

FAULTS_CODE = Path(__file__).resolve().parent / "faults"
RCOT = Path(sys.executable).parent / "rcot"

PROCESSES = {
    "trainer rank": "ray::WorkerDict",
    "vLLM engine": "ray::vLLMHttpServer",
    "agent-loop worker": "ray::CachedAgentLoopWorkerTQ",
    "reward worker": "ray::RewardLoopWorker",
    "task runner": "ray::TaskRunnerV1",
    "raylet": "raylet/raylet",
    "driver": "rcot_rl.stages.grpo_stage",
}
"""Process of the stage -> part of its title or command line."""

RECIPE = [
    "toy.corpora=[{layout: mevis, split: train, videos: 60}]",
    "data.corpora=[{dataset: mevis}]",
    "data.describe=template",
    "data.sets={sft-384: {ktg: 64, aks: 64, val: 8}, grpo-aks-480: {aks: 64, val: 8}, "
    "grpo-ktg-960: {ktg: 32, val: 8}}",
    "stages=[data, sft, grpo-aks]",
    "train.sft.batch_size=16",
    "train.sft.micro_batch_size=16",
    "grpo.prompts_per_step=4",
    "grpo.micro_batch_size=32",
    "grpo.max_response_length=64",
    "grpo.save_every=1",
    f"train.grpo-aks.reward={FAULTS_CODE / 'hanging_reward.py'}:reward",
    "train.grpo-aks.reward_deadline_s=5",
    "train.grpo-aks.verl={actor_rollout_ref.rollout.engine_kwargs.vllm.worker_extension_cls: "
    "failing_weights.FailingWeights}",
    "supervise.max_attempts=99",
    "supervise.backoff_s=1",
    "supervise.heartbeat_s=60",
    "supervise.startup_s=200",
    "eval.benchmarks=[]",
]


@dataclass
class StageUnderFaults:
    """A running stage, observed from outside."""

    process: subprocess.Popen
    run: Path
    faults: Path
    struck: float = 0.0
    """Time of the last fault, in seconds since the epoch."""

    @property
    def folder(self) -> Path:
        """Folder of the stage."""
        return self.run / "grpo-aks"

    def steps(self) -> list[int]:
        """Return the steps in the complete lines of metrics.jsonl."""
        return [row["step"] for row in _rows(self.folder / "metrics.jsonl")]

    def has_step(self, step: int) -> bool:
        """Return True if `step` is in metrics.jsonl."""
        return step in self.steps()

    def verdicts(self) -> list[dict]:
        """Return the supervisor's decisions so far."""
        return _rows(self.folder / "attempts.jsonl")

    def wait(
        self, condition: Callable[[], object], within_s: float = 600, pause_s: float = 0.05
    ) -> None:
        """Poll until `condition` is true.

        Raises:
            AssertionError: The run ended, or `within_s` seconds passed.
        """
        deadline = time.monotonic() + within_s
        while not condition():
            assert self.process.poll() is None, "the run ended"
            assert time.monotonic() < deadline, "waited too long"
            time.sleep(pause_s)

    def find(self, part: str) -> psutil.Process | None:
        """Return a process of the run whose title or command line contains `part`."""
        for child in psutil.Process(self.process.pid).children(recursive=True):
            try:
                if part in " ".join([child.name(), *child.cmdline()]):
                    return child
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return None

    def strike(self, part: str, number: int = signal.SIGKILL) -> None:
        """Send a signal to the process that `find` returns."""
        self.wait(lambda: self._send(part, number))

    def _send(self, part: str, number: int) -> bool:
        victim = self.find(part)
        if victim is None:
            return False
        self.struck = time.time()
        try:
            os.kill(victim.pid, number)
        except ProcessLookupError:  # the attempt is just ending
            return False
        return True


Strike = Callable[[StageUnderFaults], int]
"""Inject a fault and return the first step that must begin after it.

The current step may still finish, and may be reported after the next start.
"""


def mid_step(part: str) -> Strike:
    """Kill a process one second after a step's end, while the next step samples or trains."""

    def strike(stage: StageUnderFaults) -> int:
        step = stage.steps()[-1]
        time.sleep(1.0)
        stage.strike(part)
        return step + 2

    return strike


def mid_save(part: str) -> Strike:
    """Kill a process while a checkpoint exists but is not sealed."""

    def strike(stage: StageUnderFaults) -> int:
        step = stage.steps()[-1] + 1
        target = stage.folder / "checkpoints" / f"global_step_{step}"
        stage.wait(lambda: (target / "actor").is_dir(), pause_s=0.001)
        sealed = (target / "checkpoint.json").exists()
        stage.strike(part)
        if sealed:
            print("(the checkpoint was sealed before the kill)", file=sys.stderr)
        return step + 1

    return strike


def stopped(part: str) -> Strike:
    """Stop a process with SIGSTOP."""

    def strike(stage: StageUnderFaults) -> int:
        step = stage.steps()[-1]
        stage.strike(part, signal.SIGSTOP)
        return step + 2

    return strike


def armed(name: str) -> Strike:
    """Arm a fault of the folder `faults/`."""

    def strike(stage: StageUnderFaults) -> int:
        step = stage.steps()[-1]
        stage.struck = time.time()
        (stage.faults / name).touch()
        return step + 2

    return strike


def full_disk(stage: StageUnderFaults) -> int:
    """Fill the run's disk until ten seconds after the supervisor noticed."""
    before, step = len(stage.verdicts()), stage.steps()[-1]
    ballast = stage.run / "ballast"
    stage.struck = time.time()
    try:
        with ballast.open("wb") as file:
            _fill(file.fileno())
        stage.wait(lambda: len(stage.verdicts()) > before)
        time.sleep(10)
    finally:
        ballast.unlink()
    return step + 2


def _fill(descriptor: int, block: int = 2**30) -> None:
    """Allocate blocks at the file's end and halve the block when it does not fit, down to 1 MiB.

    The stage keeps writing, so the free space is not known in advance.
    """
    size = 0
    while block >= 2**20:
        try:
            os.posix_fallocate(descriptor, size, block)
            size += block
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            block //= 2


FAULTS: dict[str, Strike] = {
    **{f"{name}, mid-step": mid_step(part) for name, part in PROCESSES.items()},
    **{f"{name}, mid-save": mid_save(part) for name, part in PROCESSES.items()},
    "reward worker stopped": stopped(PROCESSES["reward worker"]),
    "hung reward": armed("reward"),
    "engine refuses weights": armed("weights"),
    "full disk": full_disk,
}


def main() -> int:
    """Run the chosen faults and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="names of faults or parts of names, separated by semicolons")
    parser.add_argument("--json", type=Path, help="also write the table to this file")
    parser.add_argument("--out", type=Path, help="folder of the run; default: a temporary one")
    arguments = parser.parse_args()
    parts = arguments.only.split(";") if arguments.only else [""]
    chosen = {n: f for n, f in FAULTS.items() if any(part.strip() in n for part in parts)}
    with _disk(arguments.out) as (folder, mounted):
        if not mounted:
            print("cannot mount a disk (needs root): the full disk is left out", file=sys.stderr)
            chosen.pop("full disk", None)
        result = matrix(folder, chosen)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0 if result["ok"] else 1


def matrix(folder: Path, faults: dict[str, Strike]) -> dict:
    """Run the stage with the faults in order; print the table and return it."""
    steps = 3 * len(faults) + 2
    stage = _start(folder, [*RECIPE, f"train.grpo-aks.steps={steps}"])
    table, started = [], 0.0
    try:
        stage.wait(stage.steps, within_s=900)
        started = time.monotonic()
        for name, strike in faults.items():
            before = len(stage.verdicts())
            awaited = strike(stage)
            stage.wait(functools.partial(stage.has_step, awaited), within_s=900)
            verdicts = stage.verdicts()[before:]
            noticed = round(verdicts[0]["time"] - stage.struck, 1) if verdicts else None
            row = {
                "fault": name,
                "noticed_s": noticed,
                "next_step_s": round(time.time() - stage.struck, 1),
                "causes": [v["cause"] for v in verdicts],
            }
            table.append(row)
            print(_text(row), flush=True)
        status = stage.process.wait(timeout=900)
    except AssertionError:
        print((folder / "console.txt").read_text(errors="replace")[-3000:], file=sys.stderr)
        raise
    finally:
        if stage.process.poll() is None:
            stage.process.terminate()
            stage.process.wait(timeout=90)
    elapsed = time.monotonic() - started
    seconds = [r["timing_s/step"] for r in _rows(stage.folder / "metrics.jsonl")]
    undisturbed = statistics.median(seconds) * (steps - 1)
    done = stage.steps() == list(range(1, steps + 1)) and status == 0
    print(f"{len(table)} of {len(faults)} faults survived, steps {stage.steps()}")
    ratio = elapsed / undisturbed
    print(f"with / without faults = {elapsed:.0f} s / {undisturbed:.0f} s = {ratio:.1f} x")
    return {"ok": done, "steps": stage.steps(), "faults": table}


def _start(folder: Path, settings: list[str]) -> StageUnderFaults:
    faults = folder / "faults"
    faults.mkdir(parents=True, exist_ok=True)
    path = os.pathsep.join(filter(None, [str(FAULTS_CODE), os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(
        [RCOT, "run", "laptop", *settings, "--out", str(folder / "run")],
        env=os.environ | {"PYTHONPATH": path, "RCOT_FAULTS": str(faults)},
        stdout=subprocess.DEVNULL,
        stderr=(folder / "console.txt").open("wb"),
    )
    return StageUnderFaults(process, folder / "run", faults)


@contextmanager
def _disk(out: Path | None) -> Iterator[tuple[Path, bool]]:
    """Yield a folder, and True if it is a mounted disk that can be filled."""
    folder = Path(tempfile.mkdtemp(prefix="rcot-kills-")) if out is None else out
    folder.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=6g", "tmpfs", str(folder)]
    mounted = out is None and os.geteuid() == 0 and subprocess.run(mount).returncode == 0
    try:
        yield folder, mounted
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)
        if out is None:
            shutil.rmtree(folder)


def _rows(file: Path) -> list[dict]:
    if not file.is_file():
        return []
    text = file.read_text(encoding="utf-8", errors="replace")
    return [json.loads(row) for row in text[: text.rfind("\n") + 1].splitlines()]


def _text(row: dict) -> str:
    noticed = "" if row["noticed_s"] is None else f"noticed after {row['noticed_s']:6.1f} s, "
    causes = ", ".join(row["causes"]) or "no restart"
    return f"{row['fault']:<30}{noticed}next step after {row['next_step_s']:6.1f} s  ({causes})"


if __name__ == "__main__":
    sys.exit(main())
