"""Stacks are collected from processes that a running Ray started."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import sys, time, ray
from pathlib import Path
from cluster.supervise.ask_stacks import ask_all
from rcot_rl.system.stacks import FOLDER
folder = Path(sys.argv[1])
ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)

@ray.remote(num_cpus=0, max_concurrency=2)
class Worker:
    def arm(self):
        from rcot_rl.system import stacks
        stacks.arm()
    def waits_for_what_never_comes(self):
        import time
        time.sleep(600)

worker = Worker.options(runtime_env={"env_vars": {FOLDER: str(folder)}}).remote()
ray.get(worker.arm.remote())
worker.waits_for_what_never_comes.remote()
time.sleep(1)
# a file of an earlier attempt, whose pid another process has now
(first,) = folder.glob("*.stack")
first.with_name(first.name.rpartition("-")[0] + "-1.stack").touch()
print(list(ask_all(folder).values()))
time.sleep(1)
print("waits_for_what_never_comes" in first.read_text())
"""


@pytest.mark.drill
def test_a_hung_actor_of_a_running_ray_writes_its_stack(tmp_path):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment | {"RAY_USAGE_STATS_ENABLED": "0"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split("\n")[:2] == ["[1]", "True"]
