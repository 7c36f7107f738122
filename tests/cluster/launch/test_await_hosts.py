"""A stage waits until a running Ray has its hosts."""

import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.launch.await_hosts import ready

HEAD = {"node:10.0.0.1": 1.0, "node:__internal_head__": 1.0, "CPU": 4.0, "GPU": 2.0}
OTHER = {"node:10.0.0.2": 1.0, "CPU": 4.0, "GPU": 1.0}
CPU_ONLY = {"node:10.0.0.3": 1.0, "CPU": 64.0}


def test_only_nodes_whose_gpus_are_free_count():
    free = {"a": HEAD, "b": OTHER, "c": CPU_ONLY}
    assert ready(free, 1) == ["10.0.0.1", "10.0.0.2"]
    assert ready(free, 2) == ["10.0.0.1"], "one GPU of the other is in use"
    assert ready({"a": HEAD | {"GPU": 0.0}}, 1) == []
    assert ready({}, 1) == []


def test_a_node_that_is_being_removed_has_no_address():
    assert ready({"a": {"CPU": 4.0, "GPU": 2.0}}, 1) == []


@given(st.lists(st.integers(0, 8), max_size=6), st.integers(1, 8))
def test_every_node_with_enough_is_named_once(free, gpus):
    nodes = {f"n{i}": {f"node:10.0.0.{i}": 1.0, "GPU": float(g)} for i, g in enumerate(free)}
    addresses = ready(nodes, gpus)
    assert len(addresses) == len(set(addresses)) == sum(g >= gpus for g in free)


PROGRAM = """
import sys, ray
from cluster.launch.await_hosts import wait
ray.init(address="local", num_cpus=4, num_gpus=2, include_dashboard=False, log_to_driver=False)
print("first", wait(1, 2, 120.0))

@ray.remote(num_gpus=1)
class Holder:
    def here(self): return True

holder = Holder.remote()
ray.get(holder.here.remote())
print("held", wait(1, 2, 3.0))
print("half", wait(1, 1, 120.0))
ray.kill(holder)
print("freed", wait(1, 2, 120.0))
print("more", wait(2, 1, 3.0))
"""


@pytest.mark.drill
def test_a_real_ray_is_waited_for_until_its_gpus_are_free():
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment | {"RAY_USAGE_STATS_ENABLED": "0"},
    )
    answers = dict(row.split(" ", 1) for row in done.stdout.splitlines() if " " in row)
    assert done.returncode == 0, done.stderr[-2000:]
    assert answers["first"] == answers["half"] == answers["freed"] == "None"
    assert answers["held"].startswith("0 of 1 hosts with 2 free GPUs () after 3 s")
    assert answers["more"].startswith("1 of 2 hosts with 1 free GPUs (")


@pytest.mark.drill
def test_a_missing_ray_is_reported_with_status_1():
    words = ["-m", "cluster.launch.await_hosts", "127.0.0.1:1", "--nodes", "1", "--gpus", "1"]
    done = subprocess.run(
        [sys.executable, *words, "--wait", "1"], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1].startswith("rcot: no Ray answers at 127.0.0.1:1")
