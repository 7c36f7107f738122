"""Memory, GPUs and object store of a run's hosts at every step: leaks and idle GPUs show early.

The actors are those that Ray lists for this job, each with the processes that it started (vLLM's
engine on a GPU, a user's reward). Memory and GPUs are read here on the driver's node, and by a
small actor on every other node. Memory figures are proportional set sizes (PSS): shared pages are
counted once.

`host0` in a metric's name is the driver's node; the others follow in the order of their addresses.
"""

from __future__ import annotations

import logging
import math
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, TypedDict

from rcot_rl.system import machine
from rcot_rl.training.gpu_sampler import GIB, GpuSampler

logger = logging.getLogger(__name__)

_PATIENCE_S = 30.0
"""Seconds to wait for a reading."""


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
    children = _children() if pids else {}
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


class NodeReader:
    """Reads one node: the driver's own, or another's in a Ray actor."""

    def __init__(self) -> None:
        self._gpus = GpuSampler()

    def has_gpus(self) -> bool:
        """Return True if the node has GPUs to sample."""
        return self._gpus.has_gpus

    def gpus(self) -> dict[str, float]:
        """Return the GPUs' figures since the last call; see `GpuSampler.take`."""
        return self._gpus.take()

    def memory(self, pids: list[int]) -> NodeMemory:
        """Return the memory of the node and of `pids`; see `read`."""
        return read(pids)


class HostMetrics:
    """Memory of this job's actors, GPUs and object store, on all nodes.

    A proportional set size takes the kernel up to 30 ms per process. Memory and object store are
    therefore read in a thread, every `every_s` seconds, and steps in between repeat the latest
    figures. GPUs are taken at every step.
    """

    def __init__(self, every_s: float = 30.0) -> None:
        import ray

        self._every_s, self._started_at = every_s, -math.inf
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="host-metrics")
        self._reading: Future[dict[str, float]] | None = None
        self._latest: dict[str, float] = {}

        context = ray.get_runtime_context()
        self._node, self._job = context.get_node_id(), context.get_job_id()
        self._own_reader = NodeReader()
        self._readers: dict[str, Any] = {}
        self._labels: dict[str, str] = {}
        self._gpu_nodes: set[str] = {self._node} if self._own_reader.has_gpus() else set()
        logger.info("memory of the hosts is read every %g s, their GPUs every step", every_s)

    def metrics(self) -> dict[str, float]:
        """Return the step's metrics; only the first call waits for a reading.

        - `memory_gib/<actor class>/{sum,max}`; `memory_gib/node/used_max`, `free_min` over nodes
        - `object_store/<host>/{used,total}_gib`
        - `gpu/<host>/{utilization_percent,memory_gib}/{mean,max}`, on hosts with GPUs
        """
        is_first = math.isinf(self._started_at)
        if self._reading is None and time.monotonic() - self._started_at >= self._every_s:
            self._started_at = time.monotonic()
            self._reading = self._thread.submit(self._measure)
        if self._reading is not None and is_first:
            wait([self._reading], timeout=_PATIENCE_S)
        if self._reading is not None and self._reading.done():
            error = self._reading.exception()
            if error is None:
                self._latest = self._reading.result()
            else:  # figures must not end a run
                logger.warning("the hosts' memory could not be read: %s", error)
            self._reading = None
        return self._latest | self._gpus()

    def _measure(self) -> dict[str, float]:
        classes, pids = self._actors()
        self._labels = host_labels(self._node, _addresses())
        self._start_readers([node for node in pids if node in self._labels])
        return memory_metrics(self._memory(pids), classes) | _object_store(self._labels)

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

    def _start_readers(self, nodes: Iterable[str]) -> None:
        """Start an actor on each other node that has none."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        for node in nodes:
            if node == self._node or node in self._readers:
                continue
            affinity = NodeAffinitySchedulingStrategy(node_id=node, soft=False)
            # two calls at a time: GPUs are not to wait for a reading of memory
            actor: Any = ray.remote(num_cpus=0)(NodeReader)
            options = {"scheduling_strategy": affinity, "max_concurrency": 2}
            self._readers[node] = actor.options(**options).remote()
            if ray.get(self._readers[node].has_gpus.remote(), timeout=_PATIENCE_S):
                self._gpu_nodes.add(node)

    def _memory(self, pids: Mapping[str, list[int]]) -> dict[str, NodeMemory]:
        """Read every node's memory: the other nodes' while this one is read."""
        import ray

        pending = {n: self._readers[n].memory.remote(pids[n]) for n in pids if n in self._readers}
        nodes = {self._node: self._own_reader.memory(pids[self._node])}
        return nodes | {node: ray.get(r, timeout=_PATIENCE_S) for node, r in pending.items()}

    def _gpus(self) -> dict[str, float]:
        """Take the GPUs' figures of all nodes that have some."""
        import ray

        others = [node for node in sorted(self._gpu_nodes) if node in self._readers]
        pending = {node: self._readers[node].gpus.remote() for node in others}
        figures = {self._node: self._own_reader.gpus()}
        for node, reply in pending.items():
            try:
                figures[node] = ray.get(reply, timeout=_PATIENCE_S)
            except ray.exceptions.RayError as error:  # the node may have been lost
                logger.warning("GPUs of node %s are not read any more: %s", node, error)
                self._gpu_nodes.discard(node)
        return {
            f"gpu/{self._labels[node]}/{name}": value
            for node, of_node in figures.items()
            for name, value in of_node.items()
            if node in self._labels
        }


def memory_metrics(
    nodes: Mapping[str, NodeMemory], classes: Mapping[tuple[str, int], str]
) -> dict[str, float]:
    """Return the metrics of nodes' memory.

    Args:
        nodes: Memory by node.
        classes: Class of the actor of each (node, process id).
    """
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


def host_labels(driver: str, addresses: Mapping[str, str]) -> dict[str, str]:
    """Return `host0` for the driver's node and `host1`, … for the others, by address.

    Args:
        driver: Id of the driver's node.
        addresses: Address of each node by its id.
    """
    order = sorted(addresses, key=lambda node: (node != driver, addresses[node]))
    return {node: f"host{number}" for number, node in enumerate(order)}


def _addresses() -> dict[str, str]:
    import ray

    nodes = ray.nodes()
    return {n["NodeID"]: str(n["NodeManagerAddress"]) for n in nodes if n["Alive"]}


def _object_store(labels: Mapping[str, str]) -> dict[str, float]:
    """Return used and total GiB of each node's object store, as Ray's scheduler counts them."""
    from ray._private.state import available_resources_per_node, total_resources_per_node

    resource, metrics = "object_store_memory", {}
    free = available_resources_per_node()
    for node, resources in total_resources_per_node().items():
        total = resources.get(resource)
        if node not in labels or total is None:
            continue
        used = total - free.get(node, {}).get(resource, 0.0)  # a full store is not listed
        metrics[f"object_store/{labels[node]}/used_gib"] = used / GIB
        metrics[f"object_store/{labels[node]}/total_gib"] = total / GIB
    return metrics
