"""Processes that a running Ray started say what they hang in."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import sys, time, ray
from pathlib import Path
from cluster.launch.ask_stacks import ask_all
from rcot_rl.stacks import FOLDER
folder = Path(sys.argv[1])
ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)

@ray.remote(num_cpus=0, max_concurrency=2)
class Worker:
    def arm(self):
        from rcot_rl import stacks
        stacks.arm()
    def waits_for_what_never_comes(self):
        import time
        time.sleep(600)

ours = Worker.options(runtime_env={"env_vars": {FOLDER: str(folder)}}).remote()
ray.get(ours.arm.remote())
ours.waits_for_what_never_comes.remote()
time.sleep(1)
# a file of an earlier attempt, whose number another process has now
(first,) = folder.glob("*.stack")
first.with_name(first.name.rpartition("-")[0] + "-1.stack").touch()
print(list(ask_all(folder).values()))
time.sleep(1)
print("waits_for_what_never_comes" in first.read_text())
"""


@pytest.mark.drill
def test_a_hung_actor_of_a_running_ray(tmp_path):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)], capture_output=True, text=True, timeout=300,
        env=environment | {"RAY_USAGE_STATS_ENABLED": "0"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split("\n")[:2] == ["[1]", "True"]
