"""Memory of processes and of the node, against an allocation of known size."""

from __future__ import annotations

import os
import subprocess
import sys

from rcot_rl.system.machine import pss_bytes
from rcot_rl.training.gpu_sampler import GIB
from rcot_rl.training.host_metrics import (
    NodeMemory,
    host_labels,
    memory_metrics,
    node_memory,
    read,
)

ALLOCATE = (
    "import sys; held = bytearray(b'x' * (64 << 20)); print('ready', flush=True); sys.stdin.read()"
)


def test_a_process_allocation_is_counted() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", ALLOCATE], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout.readline() == b"ready\n"
        assert 64 << 20 <= pss_bytes(child.pid) < 160 << 20
        memory = read([os.getpid(), child.pid])
        assert set(memory["pids"]) == {os.getpid(), child.pid}
        child.stdin.close()
    assert pss_bytes(child.pid) == 0, "the process has ended"


PARENT = (
    "import subprocess, sys; "
    f"child = subprocess.Popen([sys.executable, '-c', {ALLOCATE!r}], stdin=sys.stdin, "
    "stdout=subprocess.PIPE); child.stdout.readline(); print(child.pid, flush=True); child.wait()"
)


def test_a_child_is_counted_with_its_parent_unless_read_itself() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as parent:
        child = int(parent.stdout.readline())
        assert read([parent.pid])["pids"][parent.pid] >= 64 << 20
        separate = read([parent.pid, child])["pids"]
        assert separate[child] >= 64 << 20 > separate[parent.pid]
        parent.stdin.close()


def test_a_node_uses_less_than_it_has() -> None:
    used, total = node_memory()
    assert 0 < used < total


def test_memory_is_summed_per_class_and_the_fullest_node_counts() -> None:
    nodes: dict[str, NodeMemory] = {
        "a": {"pids": {1: 1 * GIB, 2: 3 * GIB}, "used": 10 * GIB, "total": 64 * GIB},
        "b": {"pids": {1: 2 * GIB}, "used": 30 * GIB, "total": 32 * GIB},
    }
    classes = {("a", 1): "WorkerDict", ("b", 1): "WorkerDict", ("a", 2): "TaskRunner"}
    assert memory_metrics(nodes, classes) == {
        "memory_gib/WorkerDict/sum": 3.0,
        "memory_gib/WorkerDict/max": 2.0,
        "memory_gib/TaskRunner/sum": 3.0,
        "memory_gib/TaskRunner/max": 3.0,
        "memory_gib/node/used_max": 30.0,
        "memory_gib/node/free_min": 2.0,
    }


def test_the_drivers_node_is_the_first_host_and_others_follow_by_address() -> None:
    addresses = {"x": "10.0.0.9", "driver": "10.0.0.5", "y": "10.0.0.2"}
    assert host_labels("driver", addresses) == {"driver": "host0", "y": "host1", "x": "host2"}
