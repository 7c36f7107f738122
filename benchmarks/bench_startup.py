"""Compare the start of a training process forked from the zygote with a new interpreter.

Measures both in turn in one run. Prints their median seconds, the ratio, and the seconds that the
zygote itself takes to start. A GRPO stage starts ten such processes.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from cluster.supervise.zygote import write_client

MODULE = "verl.trainer.ppo.v1"
ROUNDS = 3


def seconds(python: str, environment: dict[str, str], script: Path) -> float:
    """Return the wall-clock seconds of one process that imports MODULE."""
    started = time.monotonic()
    subprocess.run([python, str(script)], env=environment, check=True, capture_output=True)
    return time.monotonic() - started


def main() -> None:
    """Run the benchmark."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        script = folder / "imports.py"
        script.write_text(f"import {MODULE}\n", encoding="utf-8")
        client = write_client(folder)
        environment = os.environ | {"VERL_PLATFORM": "cpu", "RCOT_RL_PLUGIN": "required"}
        started = time.monotonic()
        zygote = subprocess.Popen(
            [sys.executable, "-m", "cluster.supervise.zygote", str(folder / "socket"), MODULE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
        )
        assert zygote.stdin is not None and zygote.stdout is not None
        while zygote.stdout.readline() != b"ready\n":
            if zygote.poll() is not None:
                raise SystemExit("the zygote ended")
        once = time.monotonic() - started
        forked, fresh = [], []
        for _ in range(ROUNDS):
            fresh.append(seconds(sys.executable, environment, script))
            forked.append(seconds(str(client), environment, script))
        zygote.stdin.close()
        zygote.wait()
    a, b = statistics.median(fresh), statistics.median(forked)
    print(f"importing {MODULE}: fresh interpreter {a:.2f} s, forked {b:.2f} s, ratio {a / b:.1f}")
    print(f"the zygote itself, once: {once:.1f} s")


if __name__ == "__main__":
    main()
