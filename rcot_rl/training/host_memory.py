"""Host memory of a run's actors at every step: what grows until a node's kernel kills something.

The actors are those that Ray knows of this job, each with the processes that it started (vLLM's
engine on a GPU, a user's reward). On the driver's node their memory is read here; on every other
node, by a small actor of our own. Figures are proportional set sizes: what processes share is
counted once.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rcot_rl import machine

GIB = 2**30


def pss_bytes(pid: int) -> int:
    """Proportional set size of a process; 0 when it is gone or not ours to read."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii")
    except OSError:
        return 0
    for row in text.splitlines():
        if row.startswith("Pss:"):
            return int(row.split()[1]) * 1024
    return 0


def node_memory() -> tuple[int, int]:
    """Bytes in use and in all on this node: of what this process' control groups may have."""
    memory = machine.memory()
    return memory.total - memory.available, memory.total


def read(pids: list[int]) -> dict[str, Any]:
    """This node's figures: bytes by pid, its descendants' with them, and the node's own. A process
    that is asked for itself is not counted with the one that started it."""
    used, total = node_memory()
    children = _children()
    sizes = {pid: sum(map(pss_bytes, _tree(pid, children, set(pids)))) for pid in pids}
    return {"pids": sizes, "used": used, "total": total}


def _children() -> dict[int, list[int]]:
    """Every process' children, as they are now."""
    import psutil

    found: dict[int, list[int]] = defaultdict(list)
    for process in psutil.process_iter(["pid", "ppid"]):
        found[process.info["ppid"]].append(process.info["pid"])
    return found


def _tree(pid: int, children: dict[int, list[int]], others: set[int]) -> Iterator[int]:
    yield pid
    for child in children.get(pid, []):
        if child not in others:
            yield from _tree(child, children, others)


class HostMemory:
    """Reads the memory of this job's actors, on all nodes, at most every `every_s` seconds: a
    proportional set size takes the kernel 30 ms a process. Steps in between repeat the last."""

    def __init__(self, every_s: float = 30.0) -> None:
        import ray

        self._every_s, self._read_at = every_s, -math.inf
        self._latest: dict[str, float] = {}

        context = ray.get_runtime_context()
        self._here, self._job = context.get_node_id(), context.get_job_id()
        self._readers: dict[str, Any] = {}

    def metrics(self) -> dict[str, float]:
        """`memory_gib/<actor class>/{sum,max}`, and `memory_gib/node/{used,free}_*` over nodes."""
        if time.monotonic() - self._read_at < self._every_s:
            return dict(self._latest)
        self._latest, self._read_at = self._measure(), time.monotonic()
        return dict(self._latest)

    def _measure(self) -> dict[str, float]:
        classes, by_node = self._actors()
        found = self._read(by_node)
        sizes: dict[str, list[int]] = defaultdict(list)
        for node, of_node in found.items():
            for pid, size in of_node["pids"].items():
                sizes[classes[node, pid]].append(size)
        metrics = {}
        for name, values in sizes.items():
            metrics[f"memory_gib/{name}/sum"] = sum(values) / GIB
            metrics[f"memory_gib/{name}/max"] = max(values) / GIB
        metrics["memory_gib/node/used_max"] = max(f["used"] for f in found.values()) / GIB
        least = min(f["total"] - f["used"] for f in found.values())
        metrics["memory_gib/node/free_min"] = least / GIB
        return metrics

    def _actors(self) -> tuple[dict[tuple[str, int], str], dict[str, list[int]]]:
        from ray._private.state import actors  # the public state API needs the dashboard

        classes: dict[tuple[str, int], str] = {}
        by_node: dict[str, list[int]] = {self._here: []}
        for actor in actors(actor_state_name="ALIVE").values():
            node, pid = actor["Address"]["NodeID"], actor.get("Pid")
            if actor["JobID"] == self._job and pid:
                classes[node, pid] = str(actor["ActorClassName"]).rsplit(".", 1)[-1]
                by_node.setdefault(node, []).append(pid)
        return classes, by_node

    def _read(self, by_node: dict[str, list[int]]) -> dict[str, Any]:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        asked = {}
        for node, pids in by_node.items():
            if node == self._here:
                continue
            if node not in self._readers:
                place = NodeAffinitySchedulingStrategy(node_id=node, soft=False)
                actor = ray.remote(num_cpus=0)(_Reader)
                self._readers[node] = actor.options(scheduling_strategy=place).remote()
            asked[node] = self._readers[node].read.remote(pids)
        found = {self._here: read(by_node[self._here])}
        return found | {node: ray.get(answer, timeout=30) for node, answer in asked.items()}


class _Reader:
    def read(self, pids: list[int]) -> dict[str, Any]:
        return read(pids)
