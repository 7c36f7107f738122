"""Host memory of a run's actors at every step: leaks show before a node's kernel kills something.

The actors are those that Ray lists for this job, each with the processes that it started (vLLM's
engine on a GPU, a user's reward). Memory is read here on the driver's node, and by a small actor on
every other node. Figures are proportional set sizes (PSS): shared pages are counted once.
"""

from __future__ import annotations

import logging
import math
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, TypedDict

from rcot_rl.system import machine

logger = logging.getLogger(__name__)

GIB = 2**30


class NodeMemory(TypedDict):
    """Memory of one node, in bytes."""

    pids: dict[int, int]
    """By process id: its PSS and its descendants'."""
    used: int
    total: int


def node_memory() -> tuple[int, int]:
    """Return the bytes used and the total on this node, within this process's control groups."""
    memory = machine.memory()
    return memory.total - memory.available, memory.total


def read(pids: list[int]) -> NodeMemory:
    """Read this node's memory, and that of processes with their descendants, each counted once."""
    used, total = node_memory()
    children = _children()
    sizes = {pid: sum(map(machine.pss_bytes, _tree(pid, children, set(pids)))) for pid in pids}
    return {"pids": sizes, "used": used, "total": total}


def _children() -> dict[int, list[int]]:
    """Return the ids of every process's children."""
    import psutil

    children: dict[int, list[int]] = defaultdict(list)
    for process in psutil.process_iter(["pid", "ppid"]):
        children[process.info["ppid"]].append(process.info["pid"])
    return children


def _tree(pid: int, children: dict[int, list[int]], excluded: set[int]) -> Iterator[int]:
    yield pid
    for child in children.get(pid, []):
        if child not in excluded:
            yield from _tree(child, children, excluded)


class HostMemory:
    """Memory of this job's actors, on all nodes.

    Reading a proportional set size takes the kernel 30 ms per process, so steps within `every_s`
    seconds of the last reading repeat it.
    """

    def __init__(self, every_s: float = 30.0) -> None:
        import ray

        self._every_s, self._read_at = every_s, -math.inf
        self._latest: dict[str, float] = {}

        context = ray.get_runtime_context()
        self._node, self._job = context.get_node_id(), context.get_job_id()
        self._readers: dict[str, Any] = {}
        logger.info("host memory is read every %g s, from node %s", every_s, self._node)

    def metrics(self) -> dict[str, float]:
        """Return `memory_gib/<actor class>/{sum,max}`, and `used_max`, `free_min` over nodes."""
        if time.monotonic() - self._read_at >= self._every_s:
            self._latest, self._read_at = self._measure(), time.monotonic()
        return dict(self._latest)

    def _measure(self) -> dict[str, float]:
        classes, pids = self._actors()
        nodes = self._read(pids)
        sizes: dict[str, list[int]] = defaultdict(list)
        for node, memory in nodes.items():
            for pid, size in memory["pids"].items():
                sizes[classes[node, pid]].append(size)
        metrics = {}
        for name, values in sizes.items():
            metrics[f"memory_gib/{name}/sum"] = sum(values) / GIB
            metrics[f"memory_gib/{name}/max"] = max(values) / GIB
        metrics["memory_gib/node/used_max"] = max(m["used"] for m in nodes.values()) / GIB
        free = min(m["total"] - m["used"] for m in nodes.values())
        metrics["memory_gib/node/free_min"] = free / GIB
        return metrics

    def _actors(self) -> tuple[dict[tuple[str, int], str], dict[str, list[int]]]:
        """Return the class of each (node, process id), and the process ids of each node."""
        from ray._private.state import actors  # the public state API needs the dashboard

        classes: dict[tuple[str, int], str] = {}
        pids: dict[str, list[int]] = {self._node: []}
        for actor in actors(actor_state_name="ALIVE").values():
            node, pid = actor["Address"]["NodeID"], actor.get("Pid")
            if actor["JobID"] == self._job and pid:
                classes[node, pid] = str(actor["ActorClassName"]).rsplit(".", 1)[-1]
                pids.setdefault(node, []).append(pid)
        return classes, pids

    def _read(self, pids: dict[str, list[int]]) -> dict[str, NodeMemory]:
        """Read every node's memory: the other nodes' while this one is read."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        pending = {}
        for node, node_pids in pids.items():
            if node == self._node:
                continue
            if node not in self._readers:
                affinity = NodeAffinitySchedulingStrategy(node_id=node, soft=False)
                actor: Any = ray.remote(num_cpus=0)(_Reader)
                self._readers[node] = actor.options(scheduling_strategy=affinity).remote()
            pending[node] = self._readers[node].read.remote(node_pids)
        nodes = {self._node: read(pids[self._node])}
        return nodes | {node: ray.get(reply, timeout=30) for node, reply in pending.items()}


class _Reader:
    """Ray actor that reads its node's memory."""

    def read(self, pids: list[int]) -> NodeMemory:
        return read(pids)
