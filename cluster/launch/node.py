"""One node of a job's Ray cluster: `python -m cluster.launch.node`, started once on every node.

The nodes meet (`rendezvous`), the head starts Ray on the address that all of them reach, the others
join it. Ray's processes are children of this one and end with it, whatever ends it; nothing else on
the host is touched. It runs until Ray ends or TERM comes.

Gloo and NCCL are told the same interface, before Ray starts: left alone they take the one that the
host's name resolves to, which is often the loopback.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import NoReturn

from cluster.launch import rendezvous
from cluster.launch.rendezvous import Place
from cluster.supervise.processes import Host, StageFailed
from rcot_rl import variables
from rcot_rl.errors import InputError

_UP = b"This command will now block forever"
"""What `ray start --block` says once it has registered."""

_ENDS = (signal.SIGTERM, signal.SIGHUP)
_FOREVER_S = 10.0 * 365 * 86400


def ray_arguments(
    place: Place,
    ports: list[int],
    *,
    head: str | None,
    gpus: int,
    cpus: int | None,
    object_store: int | None,
    temporary: Path,
) -> list[str]:
    """Arguments of `ray start`. head: the head's address; None: this node is it.

    ports: eight of this node's; the first is the head's own.
    """
    names = (
        "node-manager-port",
        "object-manager-port",
        "dashboard-agent-listen-port",
        "dashboard-agent-grpc-port",
        "runtime-env-agent-port",
        "metrics-export-port",
    )
    arguments = ["start", "--block", "--disable-usage-stats", "--log-color=false"]
    if head is None:
        arguments += ["--head", f"--port={ports[0]}", f"--ray-client-server-port={ports[1]}"]
        arguments += ["--include-dashboard=false"]
    else:
        arguments += [f"--address={head}"]
    arguments += [f"--node-ip-address={place.ip}", f"--temp-dir={temporary}"]
    arguments += [f"--{name}={port}" for name, port in zip(names, ports[2:], strict=True)]
    arguments += [f"--num-gpus={gpus}"]
    if cpus is not None:
        arguments += [f"--num-cpus={cpus}"]
    if object_store is not None:
        arguments += [f"--object-store-memory={object_store}"]
    return arguments


def interfaces(place: Place, nodes: int) -> dict[str, str]:
    """What torch, NCCL and vLLM are told of this node's network; a user's own settings stay."""
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES")
    visible = {"RCOT_HEALTH_GPUS": gpus} if gpus else {}  # Ray overwrites it in workers
    if nodes == 1 or not place.interface:
        return visible
    told = visible | {
        "GLOO_SOCKET_IFNAME": place.interface,
        "NCCL_SOCKET_IFNAME": place.interface,
        "VLLM_HOST_IP": place.ip,
    }
    return {name: value for name, value in told.items() if not os.environ.get(name)}


def serve(args: argparse.Namespace) -> int:
    """Meet, start Ray, wait for its end. Returns the exit status; raises InputError."""
    folder: Path = args.rendezvous
    deadline = time.monotonic() + args.deadline
    is_head = args.name == args.head
    if is_head:
        places = rendezvous.host(folder, args.nodes, deadline, args.index, args.interface)
        place, head = places[0], None
    else:
        rendezvous.join(folder, args.index, deadline)
        found = rendezvous.address(folder, deadline)
        place = next(Place(**p) for p in found["places"] if p["index"] == args.index)
        head = found["address"]
        _await_port(found["ip"], found["port"], deadline)
    ports = rendezvous.free_ports(place.ip, args.job, args.index, 8)
    environment = {"RCOT_RL_PLUGIN": "required", "RAY_USAGE_STATS_ENABLED": "0"}
    tempfile.tempdir = str(args.tmp)  # Host's folder: on this node's own disk
    with Host(environment | interfaces(place, args.nodes)) as host:
        host.memory.stop()  # the driver watches memory; here nobody reads it
        arguments = ray_arguments(
            place,
            ports,
            head=head,
            gpus=args.gpus,
            cpus=args.cpus,
            object_store=args.object_store,
            temporary=Path(host.environment["RAY_TMPDIR"]),
        )
        if is_head:
            rendezvous.publish(folder, places, ports[0])
        told = "head" if is_head else f"joining {head}"
        print(f"rcot: node {args.index} is {args.name}, {place.ip} on {place.interface}: {told}")
        sys.stdout.flush()
        return _run_ray(host, arguments, folder / f"node-{args.index}.log", args.index, deadline)


def _run_ray(host: Host, arguments: list[str], log: Path, index: int, deadline: float) -> int:
    """Ray to its end. One that never came up is started again: Ray gives a node 30 s, and the first
    imports from a cold network file system or on a busy host take longer."""
    while True:
        size = log.stat().st_size if log.exists() else 0
        try:
            host.run(["-m", "ray.scripts.scripts", *arguments], log, stall_timeout_s=_FOREVER_S)
        except StageFailed as error:
            came_up = _UP in log.read_bytes()[size:]
            print(f"rcot: node {index}: Ray {error}; see {log}", file=sys.stderr, flush=True)
            if came_up or time.monotonic() > deadline:
                return 1
            print(f"rcot: node {index}: it had not come up: once more", file=sys.stderr, flush=True)
            time.sleep(2)
        else:
            return 0


def _await_port(ip: str, port: int, deadline: float) -> None:
    while not rendezvous.answers(ip, port):
        if time.monotonic() > deadline:
            raise InputError(f"Ray's head does not answer at {rendezvous.joined(ip, port)}")
        time.sleep(0.5)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="One node of a job's Ray cluster.")
    parser.add_argument("--rendezvous", type=Path, required=True, help="a folder of the job's own")
    parser.add_argument("--nodes", type=int, required=True)
    index, name = os.environ.get("SLURM_NODEID"), os.environ.get("SLURMD_NODENAME")
    parser.add_argument(
        "--index", type=int, default=index, required=index is None, help="this node's, from 0"
    )
    parser.add_argument(
        "--name", default=name, required=name is None, help="this node's, to the scheduler"
    )
    parser.add_argument("--head", required=True, help="the head's name")
    parser.add_argument("--job", type=int, required=True, help="a number: chooses the ports")
    parser.add_argument("--deadline", type=float, default=600.0, help="seconds to meet in")
    parser.add_argument("--interface", help="the head's network interface")
    parser.add_argument("--gpus", type=int, required=True)
    parser.add_argument("--cpus", type=int)
    parser.add_argument("--object-store", type=int)
    parser.add_argument("--tmp", type=Path, default=Path("/tmp"))
    return parser.parse_args()


def main() -> NoReturn:
    """Exit status: Ray's; 2 when the nodes could not meet; 143 after TERM."""
    variables.settle()
    for number in _ENDS:
        signal.signal(number, _terminated)
    try:
        sys.exit(serve(_parse()))
    except InputError as error:
        print(f"rcot: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(143)


def _terminated(number: int, frame: object) -> None:
    for end in _ENDS:
        signal.signal(end, signal.SIG_IGN)  # the way out is not interrupted again
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
