"""Whether a Ray cluster can carry a run: asked of every node before the run starts.

    python -m cluster.launch.health --nodes N --shared DIR     exit 2 with one line per fault

It waits until the nodes are there, pins a small actor to each, and asks it: do verl and our plug-in
load in this node's workers, in the head's versions; how many GPUs, and are they free; is DIR the
head's DIR (a token written there is read back on each node, and each node's on the head); free
disk; the clock against the head's, halving the round trip; can each node reach each other one.

Left out: bandwidth, and faults of a GPU that only show under load.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import secrets
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

PACKAGES = ("verl", "ray", "torch", "transformers", "numpy", "rcot-rl")
_ANSWER_S = 300.0
"""For one node to import verl and answer: a cold network file system takes minutes."""


@dataclass(frozen=True)
class Wanted:
    """What every node must have."""

    shared: Path
    gpus: int = 0
    gpu_nodes: int = 0
    """How many nodes must have `gpus` GPUs."""

    min_free_gib: float = 0.0
    min_tmp_gib: float = 0.0
    max_skew_s: float = 5.0
    driver_gpus: int = 0
    """GPUs that the driver's own node must have, for stages that run beside it."""


@dataclass
class Facts:
    """What one node said. Fields as `Prober.facts` fills them."""

    host: str
    ip: str
    gpus: int
    skew_s: float = 0.0
    uncertain_s: float = 0.0
    """Half of the round trip: the clock is known no better."""

    fault: str | None = None
    """Why it said nothing more."""

    said: dict[str, Any] = field(default_factory=dict)


def faults(wanted: Wanted, token: str, head: dict[str, Any], nodes: list[Facts]) -> list[str]:
    """What is wrong, one line each. head: the head process' own facts. Pure."""
    out: list[str] = []
    for node in nodes:
        out += [f"{node.host} ({node.ip}): {text}" for text in _node(wanted, token, head, node)]
    rich = [n for n in nodes if n.gpus >= wanted.gpus]
    if wanted.gpus and len(rich) < wanted.gpu_nodes:
        have = ", ".join(f"{n.host} {n.gpus}" for n in nodes)
        out.append(
            f"{wanted.gpu_nodes} nodes with {wanted.gpus} GPUs are needed, {len(rich)} are there "
            f"({have})"
        )
    for node in nodes:
        if node.ip == head.get("ip") and node.gpus < wanted.driver_gpus:
            out.append(
                f"{node.host} ({node.ip}): the driver is here, with {node.gpus} GPUs; CoT-SFT and "
                f"predictions run beside it and need {wanted.driver_gpus}; place it with "
                "launch.ray.entrypoint_resources"
            )
    return out


def _node(wanted: Wanted, token: str, head: dict[str, Any], node: Facts) -> Iterator[str]:
    if node.fault:
        yield node.fault
        return
    said = node.said
    if said["plugin"]:
        yield f"the plug-in is not loaded there: {said['plugin']}"
    for name, version in head["versions"].items():
        there = said["versions"].get(name)
        if there != version:
            yield f"{name} {there or 'is missing'}, the head has {version}"
    if said["python"] != head["python"]:
        yield f"Python {said['python']}, the head has {head['python']}"
    if said["token"] != token:
        yield f"{wanted.shared} is not the head's folder ({said['token_fault'] or 'another token'})"
    elif said["echo"] != said["written"]:
        yield f"what this node writes to {wanted.shared} is not seen on the head"
    for what, least in (("free_gib", wanted.min_free_gib), ("tmp_gib", wanted.min_tmp_gib)):
        if said[what] is not None and said[what] < least:
            place = wanted.shared if what == "free_gib" else said["tmp"]
            yield f"{said[what]:.1f} GiB free in {place}, {least:.0f} wanted"
    if abs(node.skew_s) - node.uncertain_s > wanted.max_skew_s:
        yield f"its clock is {node.skew_s:+.1f} s off the head's; {wanted.max_skew_s:g} s allowed"
    for busy in said["busy_gpus"]:
        yield f"GPU {busy} is in use by someone else"
    for other in said["unreached"]:
        yield f"cannot reach {other}"


def probe(nodes: int, wait_s: float, wanted: Wanted) -> tuple[list[str], list[Facts]]:
    """Ask every node of the cluster that this process is connected to. Returns faults and facts."""
    alive = _await_nodes(nodes, wait_s)
    found = [
        Facts(n["NodeManagerHostname"], n["NodeManagerAddress"], int(n["Resources"].get("GPU", 0)))
        for n in alive
    ]
    late = []
    if len(alive) < nodes:
        there = ", ".join(f.host for f in found) or "none"
        late.append(f"{len(alive)} of {nodes} nodes are there after {wait_s:.0f} s ({there})")
    wanted.shared.mkdir(parents=True, exist_ok=True)
    name, token = f".health-{secrets.token_hex(6)}", secrets.token_hex(16)
    path = wanted.shared / name
    try:
        path.write_text(token, encoding="ascii")
        _ask(alive, found, path)
        for fact in found:
            if fact.said:
                fact.said["echo"] = _read(path.with_name(f"{name}-{fact.said['written']}"))[0]
    finally:
        for leftover in wanted.shared.glob(f"{name}*"):
            leftover.unlink(missing_ok=True)
    head = {"versions": versions(), "python": _python(), "ip": _own_address(alive)}
    return late + faults(wanted, token, head, found), found


def _own_address(alive: list[dict[str, Any]]) -> str | None:
    """Of the node that this process, and then the driver, runs on."""
    import ray

    here = ray.get_runtime_context().get_node_id()
    return next((n["NodeManagerAddress"] for n in alive if n["NodeID"] == here), None)


def _await_nodes(nodes: int, wait_s: float) -> list[dict[str, Any]]:
    import ray

    deadline = time.monotonic() + wait_s
    while True:
        alive = [n for n in ray.nodes() if n["Alive"]]
        if len(alive) >= nodes or time.monotonic() > deadline:
            return alive
        time.sleep(1)


def _ask(alive: list[dict[str, Any]], found: list[Facts], path: Path) -> None:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    def pinned(node: dict[str, Any]) -> Any:
        where = NodeAffinitySchedulingStrategy(node_id=node["NodeID"], soft=False)
        return ray.remote(Prober).options(
            num_cpus=0,
            scheduling_strategy=where,
            runtime_env={"env_vars": {"RCOT_RL_PLUGIN": "required"}},
        )

    probers = [pinned(node).remote() for node in alive]
    pairs = zip(probers, alive, strict=True)
    doors = _gather([p.listen.remote(n["NodeManagerAddress"]) for p, n in pairs], found)
    for prober, fact in zip(probers, found, strict=True):
        if not fact.fault:
            _clock(prober, fact)
    told = [f"{f.host} {door[0]} {door[1]}" for f, door in zip(found, doors, strict=True) if door]
    answers = _gather([p.facts.remote(str(path), told) for p in probers], found)
    for fact, said in zip(found, answers, strict=True):
        if said is not None:
            fact.said = said
    for prober in probers:
        ray.kill(prober)


def _clock(prober: Any, fact: Facts) -> None:
    import ray

    best = float("inf")
    for _ in range(3):
        before, start = time.time(), time.monotonic()
        try:
            there = ray.get(prober.clock.remote(), timeout=60)
        except ray.exceptions.RayError as error:
            fact.fault = f"its worker ended: {type(error).__name__}"
            return
        took = time.monotonic() - start
        if took < best:
            best = took
            fact.skew_s, fact.uncertain_s = there - (before + took / 2), took / 2


def _gather(references: list[Any], found: list[Facts]) -> list[Any]:
    """Each answer, or None with the node's fault noted; one silent node does not hide the rest."""
    import ray

    deadline, out = time.monotonic() + _ANSWER_S, []
    for reference, fact in zip(references, found, strict=True):
        try:
            out.append(ray.get(reference, timeout=max(1.0, deadline - time.monotonic())))
        except ray.exceptions.GetTimeoutError:
            out.append(None)
            fact.fault = fact.fault or f"did not answer in {_ANSWER_S:.0f} s"
        except ray.exceptions.RayError as error:
            out.append(None)
            last = str(error).strip().splitlines()[-1][:300]
            fact.fault = fact.fault or f"its worker ended; the plug-in or verl fails there: {last}"
    return out


class Prober:
    """An actor on one node. Its worker was started with RCOT_RL_PLUGIN=required."""

    def listen(self, ip: str) -> tuple[str, int]:
        """Open a door for the other nodes."""
        import socket

        family = socket.AF_INET6 if ":" in ip else socket.AF_INET
        self._listener = socket.socket(family, socket.SOCK_STREAM)
        self._listener.bind((ip, 0))
        self._listener.listen(512)
        return ip, self._listener.getsockname()[1]

    def clock(self) -> float:
        """Seconds since the epoch."""
        return time.time()

    def facts(self, path: str, doors: list[str]) -> dict[str, Any]:
        """Everything else. path: the head's token; doors: `HOST IP PORT` of every node."""
        import tempfile

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
            "free_gib": _free(token_path.parent),
            "tmp_gib": _free(Path(tmp)),
            "tmp": tmp,
            "busy_gpus": busy_gpus(),
            "unreached": [d.split()[0] for d in doors if not _reaches(d)],
        }


def plugin_fault() -> str | None:
    """Import verl; why its plug-in is not in force in this process. None: it is."""
    try:
        import verl  # noqa: F401 - loads the plug-ins of its entry point
    except Exception as error:
        return f"import verl: {type(error).__name__}: {error}"
    if "rcot_rl.plugin" not in sys.modules:
        return "rcot-rl is not installed (no entry point verl.plugins)"
    if "rcot_rl.training.verl_patches" not in sys.modules:
        return "it stayed out: RCOT_RL_PLUGIN is not `required` in its environment"
    return None


def versions() -> dict[str, str]:
    """Installed versions of what must be equal everywhere."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def busy_gpus() -> list[int]:
    """GPUs of this host with more than 2 GiB in use; none where there is no nvidia-smi."""
    import subprocess

    ask = ["nvidia-smi", "--query-gpu=index,memory.used", "--format=csv,noheader,nounits"]
    try:
        text = subprocess.run(ask, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [row.split(",") for row in text.splitlines() if row.count(",") == 1]
    mine = os.environ.get("RCOT_HEALTH_GPUS")  # on a shared host only the job's own count
    return [
        int(i) for i, used in rows if used.strip().isdigit() and int(used) > 2048
        and (mine is None or i.strip() in mine.split(","))
    ]  # fmt: skip


def _read(path: Path) -> tuple[str | None, str | None]:
    for _ in range(10):  # a network file system shows a new file after its cache's seconds
        try:
            list(path.parent.iterdir())
            return path.read_text(encoding="ascii"), None
        except OSError as error:
            fault = str(error.strerror)
        time.sleep(1)
    return None, fault


def _free(path: Path) -> float | None:
    import shutil

    try:
        return shutil.disk_usage(path).free / 2**30
    except OSError:
        return None


def _reaches(door: str) -> bool:
    from cluster.launch.rendezvous import answers

    _, ip, port = door.rsplit(" ", 2)
    return answers(ip, int(port), timeout=10.0)


def _python() -> str:
    return ".".join(map(str, sys.version_info[:3]))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that say what every node must have."""
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--shared", type=Path, required=True, help="the run's folder's parent")
    parser.add_argument("--wait", type=float, default=600.0, help="seconds for nodes to come")
    parser.add_argument("--gpus", type=int, default=0, help="GPUs of a node")
    parser.add_argument("--gpu-nodes", type=int, default=0, help="nodes that must have them")
    parser.add_argument("--driver-gpus", type=int, default=0, help="GPUs of the driver's own node")
    parser.add_argument("--min-free-gib", type=float, default=0.0)
    parser.add_argument("--min-tmp-gib", type=float, default=0.0)
    parser.add_argument("--max-skew", type=float, default=5.0, help="seconds")


def check(args: argparse.Namespace) -> int:
    """Connect, ask, print. Returns the exit status."""
    import ray

    wanted = Wanted(
        args.shared, args.gpus, args.gpu_nodes, args.min_free_gib, args.min_tmp_gib, args.max_skew,
        args.driver_gpus,
    )  # fmt: skip
    try:
        ray.init(address="auto", logging_level="warning", log_to_driver=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        print(f"rcot: no Ray cluster answers: {error}", file=sys.stderr)
        return 2
    try:
        wrong, found = probe(args.nodes, args.wait, wanted)
    except OSError as error:
        wrong, found = [f"{args.shared}: {error.strerror}"], []
    finally:
        ray.shutdown()
    for line in wrong:
        print(f"rcot: health: {line}", file=sys.stderr)
    if wrong:
        return 2
    shown = [{"host": f.host, "ip": f.ip, "gpus": f.gpus} | f.said["versions"] for f in found]
    print(f"rcot: health: {len(found)} nodes: {json.dumps(shown)}", flush=True)
    return 0


def main() -> NoReturn:
    """Exit status 0, or 2 with one line per fault on standard error."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    sys.exit(check(parser.parse_args()))


if __name__ == "__main__":
    from cluster.launch import health  # the actor's class must not be __main__'s on other nodes

    health.main()
