"""Check on every node whether a Ray cluster is fit for a run.

    python -m cluster.launch.health --nodes N --shared DIR     exit 2 with one line per fault

The check waits for the nodes, pins a small actor to each, and asks it: do verl and our plug-in load
in this node's workers, in the head's versions; how many GPUs are there, and are they free; is DIR
the head's DIR (a token written there is read on each node, and each node's on the head); how much
disk is free; how far is the clock off the head's; can the node reach every other one.

It does not measure bandwidth, and does not find GPU faults that only show under load.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from cluster.launch import rendezvous
from rcot_rl.system.doctor import installed_version

VERSIONED_PACKAGES = ("verl", "ray", "torch", "transformers", "numpy", "rcot-rl")
"""Packages whose versions must be the same on all nodes."""

_ANSWER_S = 300.0
"""Seconds that a node may take to import verl and answer: a cold network file system is slow."""

_BUSY_GPU_MIB = 2048


@dataclass(frozen=True)
class NodeRequirements:
    """What the nodes must have."""

    shared: Path
    """A folder on the file system that all nodes share."""
    gpus: int = 0
    """GPUs of a node that trains."""
    gpu_nodes: int = 0
    """How many nodes must have `gpus` GPUs."""
    min_free_gib: float = 0.0
    min_tmp_gib: float = 0.0
    max_skew_s: float = 5.0
    driver_gpus: int = 0
    """GPUs that the driver's node must have, for stages that run next to the driver."""


@dataclass
class NodeFacts:
    """What is known of one node."""

    host: str
    ip: str
    gpus: int
    skew_s: float = 0.0
    """Its clock minus the head's, in seconds."""
    uncertain_s: float = 0.0
    """Half of the round trip, the uncertainty of `skew_s`."""
    fault: str | None = None
    """Why `probed` is empty."""
    probed: dict[str, Any] = field(default_factory=dict)
    """What `NodeProber.facts` returned, and `echo`: what the head read of the node's file."""

    def __str__(self) -> str:
        return f"{self.host} ({self.ip})"


def faults(
    required: NodeRequirements, token: str, head: dict[str, Any], nodes: list[NodeFacts]
) -> list[str]:
    """Compare the nodes with what they must have.

    Args:
        token: What the head wrote into the shared folder.
        head: `versions`, `python` and `ip` of the head.
    """
    lines = [
        f"{node}: {fault}" for node in nodes for fault in _node_faults(required, token, head, node)
    ]
    suitable = sum(n.gpus >= required.gpus for n in nodes)
    if required.gpus and suitable < required.gpu_nodes:
        counts = ", ".join(f"{n.host} {n.gpus}" for n in nodes)
        lines.append(
            f"{required.gpu_nodes} nodes with {required.gpus} GPUs are needed, {suitable} are "
            f"there ({counts})"
        )
    lines += [
        f"{node}: the driver is here, with {node.gpus} GPUs; CoT-SFT and predictions run beside it "
        f"and need {required.driver_gpus}; place it with launch.ray.entrypoint_resources"
        for node in nodes
        if node.ip == head.get("ip") and node.gpus < required.driver_gpus
    ]
    return lines


def _node_faults(
    required: NodeRequirements, token: str, head: dict[str, Any], node: NodeFacts
) -> Iterator[str]:
    if node.fault:
        yield node.fault
        return
    probed = node.probed
    if probed["plugin"]:
        yield f"the plug-in is not loaded there: {probed['plugin']}"
    for name, version in head["versions"].items():
        installed = probed["versions"].get(name)
        if installed != version:
            yield f"{name} {installed or 'is missing'}, the head has {version}"
    if probed["python"] != head["python"]:
        yield f"Python {probed['python']}, the head has {head['python']}"
    if probed["token"] != token:
        reason = probed["token_fault"] or "another token"
        yield f"{required.shared} is not the head's folder ({reason})"
    elif probed["echo"] != probed["written"]:
        yield f"what this node writes to {required.shared} is not seen on the head"
    for free, least, folder in (
        (probed["free_gib"], required.min_free_gib, required.shared),
        (probed["tmp_gib"], required.min_tmp_gib, probed["tmp"]),
    ):
        if free is not None and free < least:
            yield f"{free:.1f} GiB free in {folder}, {least:.0f} needed"
    if abs(node.skew_s) - node.uncertain_s > required.max_skew_s:
        yield f"its clock is {node.skew_s:+.1f} s off the head's; {required.max_skew_s:g} s allowed"
    for gpu in probed["busy_gpus"]:
        yield f"GPU {gpu} is in use by another process"
    for other in probed["unreached"]:
        yield f"cannot reach {other}"


def probe(
    nodes: int, wait_s: float, required: NodeRequirements
) -> tuple[list[str], list[NodeFacts]]:
    """Probe every node of the Ray cluster that this process is connected to.

    Returns:
        One line per fault, and what is known of each node.
    """
    alive = _await_nodes(nodes, wait_s)
    facts = [
        NodeFacts(
            n["NodeManagerHostname"], n["NodeManagerAddress"], int(n["Resources"].get("GPU", 0))
        )
        for n in alive
    ]
    missing = []
    if len(alive) < nodes:
        hosts = ", ".join(f.host for f in facts) or "none"
        missing.append(f"{len(alive)} of {nodes} nodes are there after {wait_s:.0f} s ({hosts})")
    required.shared.mkdir(parents=True, exist_ok=True)
    name, token = f".health-{secrets.token_hex(6)}", secrets.token_hex(16)
    path = required.shared / name
    try:
        path.write_text(token, encoding="ascii")
        _probe_all(alive, facts, path)
        for node in facts:
            if node.probed:
                node_file = path.with_name(f"{name}-{node.probed['written']}")
                node.probed["echo"] = _read(node_file)[0]
    finally:
        for leftover in required.shared.glob(f"{name}*"):
            leftover.unlink(missing_ok=True)
    head = {"versions": versions(), "python": _python(), "ip": _address_here(alive)}
    return missing + faults(required, token, head, facts), facts


def _address_here(alive: list[dict[str, Any]]) -> str | None:
    """Return the address of the node on which this process and, later, the driver runs."""
    import ray

    node_id = ray.get_runtime_context().get_node_id()
    return next((n["NodeManagerAddress"] for n in alive if n["NodeID"] == node_id), None)


def _await_nodes(nodes: int, wait_s: float) -> list[dict[str, Any]]:
    """Wait until so many nodes are alive, or the time is over. Returns those that are alive."""
    import ray

    deadline = time.monotonic() + wait_s
    while True:
        alive = [n for n in ray.nodes() if n["Alive"]]
        if len(alive) >= nodes or time.monotonic() > deadline:
            return alive
        time.sleep(1)


def _probe_all(alive: list[dict[str, Any]], facts: list[NodeFacts], path: Path) -> None:
    """Pin an actor to each node, and fill in what it finds. path: the file with the token."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    def pinned(node: dict[str, Any]) -> Any:
        strategy = NodeAffinitySchedulingStrategy(node_id=node["NodeID"], soft=False)
        return ray.remote(NodeProber).options(
            num_cpus=0,
            scheduling_strategy=strategy,
            runtime_env={"env_vars": {"RCOT_RL_PLUGIN": "required"}},
        )

    probers = [pinned(node).remote() for node in alive]
    pairs = zip(probers, alive, strict=True)
    listeners = _gather([p.listen.remote(n["NodeManagerAddress"]) for p, n in pairs], facts)
    for prober, node in zip(probers, facts, strict=True):
        if not node.fault:
            _measure_skew(prober, node)
    peers = [
        f"{n.host} {listener[0]} {listener[1]}"
        for n, listener in zip(facts, listeners, strict=True)
        if listener
    ]
    answers = _gather([p.facts.remote(str(path), peers) for p in probers], facts)
    for node, answer in zip(facts, answers, strict=True):
        if answer is not None:
            node.probed = answer
    for prober in probers:
        ray.kill(prober)


def _measure_skew(prober: Any, node: NodeFacts) -> None:
    """Compare a node's clock with this one's; the shortest of three round trips counts."""
    import ray

    shortest = float("inf")
    for _ in range(3):
        before, start = time.time(), time.monotonic()
        try:
            remote = ray.get(prober.clock.remote(), timeout=60)
        except ray.exceptions.RayError as error:
            node.fault = f"its worker ended: {type(error).__name__}"
            return
        round_trip = time.monotonic() - start
        if round_trip < shortest:
            shortest = round_trip
            node.skew_s = remote - (before + round_trip / 2)
            node.uncertain_s = round_trip / 2


def _gather(references: list[Any], facts: list[NodeFacts]) -> list[Any]:
    """Return each node's answer; None, and a fault in its facts, if a node does not answer."""
    import ray

    deadline, answers = time.monotonic() + _ANSWER_S, []
    for reference, node in zip(references, facts, strict=True):
        try:
            answers.append(ray.get(reference, timeout=max(1.0, deadline - time.monotonic())))
        except ray.exceptions.GetTimeoutError:
            answers.append(None)
            node.fault = node.fault or f"did not answer in {_ANSWER_S:.0f} s"
        except ray.exceptions.RayError as error:
            answers.append(None)
            last = str(error).strip().splitlines()[-1][:300]
            node.fault = node.fault or f"its worker ended; the plug-in or verl fails there: {last}"
    return answers


class NodeProber:
    """An actor on one node, in a worker that was started with RCOT_RL_PLUGIN=required."""

    def listen(self, ip: str) -> tuple[str, int]:
        """Listen for the other nodes. Returns address and port."""
        family = socket.AF_INET6 if ":" in ip else socket.AF_INET
        self._listener = socket.socket(family, socket.SOCK_STREAM)
        self._listener.bind((ip, 0))
        self._listener.listen(512)
        return ip, self._listener.getsockname()[1]

    def clock(self) -> float:
        """Return the node's time in seconds since the epoch."""
        return time.time()

    def facts(self, path: str, peers: list[str]) -> dict[str, Any]:
        """Probe the node.

        Args:
            path: The file with the head's token.
            peers: `HOST IP PORT` of every node.
        """
        token_path = Path(path)
        token, fault = _read(token_path)
        written = secrets.token_hex(8)
        try:
            token_path.with_name(f"{token_path.name}-{written}").write_text(written)
        except OSError as error:
            fault = fault or str(error.strerror)
        tmp = tempfile.gettempdir()
        return {
            "plugin": plugin_fault(),
            "versions": versions(),
            "python": _python(),
            "token": token,
            "token_fault": fault,
            "written": written,
            "free_gib": _free_gib(token_path.parent),
            "tmp_gib": _free_gib(Path(tmp)),
            "tmp": tmp,
            "busy_gpus": busy_gpus(),
            "unreached": [peer.split()[0] for peer in peers if not _reaches(peer)],
        }


def plugin_fault() -> str | None:
    """Import verl. Returns why its plug-in is not active in this process; None if it is."""
    try:
        import verl  # noqa: F401 - loads the plug-ins of its entry point
    except Exception as error:
        return f"import verl: {type(error).__name__}: {error}"
    if "rcot_rl.plugin" not in sys.modules:
        return "rcot-rl is not installed (no entry point verl.plugins)"
    if "rcot_rl.training.verl_patches" not in sys.modules:
        return "it is inactive: RCOT_RL_PLUGIN is not `required` in its environment"
    return None


def versions() -> dict[str, str]:
    """Return the installed versions of VERSIONED_PACKAGES."""
    versions_of = ((name, installed_version(name)) for name in VERSIONED_PACKAGES)
    return {name: version for name, version in versions_of if version is not None}


def busy_gpus() -> list[int]:
    """Return the GPUs of this host with more than 2 GiB in use; none without nvidia-smi."""
    query = ["nvidia-smi", "--query-gpu=index,memory.used", "--format=csv,noheader,nounits"]
    try:
        text = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    used = dict(row.split(",") for row in text.splitlines() if row.count(",") == 1)
    busy = [i for i, mib in used.items() if mib.strip().isdigit() and int(mib) > _BUSY_GPU_MIB]
    assigned = os.environ.get("RCOT_HEALTH_GPUS")  # other jobs may use the rest of the host
    return [int(i) for i in busy if assigned is None or i.strip() in assigned.split(",")]


def _read(path: Path) -> tuple[str | None, str | None]:
    """Return a file's text, and why it cannot be read; one of them is None."""
    for _ in range(10):  # the cache of a network file system hides new files for seconds
        try:
            list(path.parent.iterdir())
            return path.read_text(encoding="ascii"), None
        except OSError as error:
            fault = str(error.strerror)
        time.sleep(1)
    return None, fault


def _free_gib(path: Path) -> float | None:
    try:
        return shutil.disk_usage(path).free / 2**30
    except OSError:
        return None


def _reaches(peer: str) -> bool:
    _, ip, port = peer.rsplit(" ", 2)
    return rendezvous.answers(ip, int(port), timeout=10.0)


def _python() -> str:
    return ".".join(map(str, sys.version_info[:3]))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that say what the nodes must have."""
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--shared", type=Path, required=True, help="parent of the run folder")
    parser.add_argument("--wait", type=float, default=600.0, help="seconds to wait for nodes")
    parser.add_argument("--gpus", type=int, default=0, help="GPUs of a node")
    parser.add_argument("--gpu-nodes", type=int, default=0, help="nodes with that many GPUs")
    parser.add_argument("--driver-gpus", type=int, default=0, help="GPUs of the driver's node")
    parser.add_argument("--min-free-gib", type=float, default=0.0)
    parser.add_argument("--min-tmp-gib", type=float, default=0.0)
    parser.add_argument("--max-skew", type=float, default=5.0, help="seconds")


def check(args: argparse.Namespace) -> int:
    """Connect to Ray, probe its nodes, print the result. Returns the exit status."""
    import ray

    required = NodeRequirements(
        shared=args.shared,
        gpus=args.gpus,
        gpu_nodes=args.gpu_nodes,
        min_free_gib=args.min_free_gib,
        min_tmp_gib=args.min_tmp_gib,
        max_skew_s=args.max_skew,
        driver_gpus=args.driver_gpus,
    )
    try:
        ray.init(address="auto", logging_level=logging.WARNING, log_to_driver=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        print(f"rcot: no Ray cluster answers: {error}", file=sys.stderr)
        return 2
    try:
        lines, facts = probe(args.nodes, args.wait, required)
    except OSError as error:
        lines, facts = [f"{args.shared}: {error.strerror}"], []
    finally:
        ray.shutdown()
    for line in lines:
        print(f"rcot: health: {line}", file=sys.stderr)
    if lines:
        return 2
    nodes = [{"host": f.host, "ip": f.ip, "gpus": f.gpus} | f.probed["versions"] for f in facts]
    print(f"rcot: health: {len(facts)} nodes: {json.dumps(nodes)}", flush=True)
    return 0


def main() -> NoReturn:
    """Exit with 0, or with 2 and one line per fault on standard error."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    sys.exit(check(parser.parse_args()))


if __name__ == "__main__":
    from cluster.launch import health  # the actor's class must not be __main__'s on other nodes

    health.main()
