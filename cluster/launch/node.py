"""Run one node of a job's Ray cluster: `python -m cluster.launch.node`, started once on every node.

The nodes meet (`rendezvous`), the head starts Ray on the address that all of them reach, and the
others join it. Ray's processes are children of this one and end with it, however it ends; nothing
else on the host is touched. The process runs until Ray ends or TERM arrives.

Gloo and NCCL get the same network interface, before Ray starts. Without it they use the interface
that the host's name resolves to, which is often the loopback.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import NoReturn

from cluster.launch import rendezvous
from cluster.launch.rendezvous import NodeAddress
from cluster.supervise.processes import Host, StageFailed
from rcot_rl.errors import InputError
from rcot_rl.system import variables
from rcot_rl.system.logs import configure_logging

logger = logging.getLogger(__name__)

_UP = b"This command will now block forever"
"""Printed by `ray start --block` once it has registered."""

_END_SIGNALS = (signal.SIGTERM, signal.SIGHUP)
_FOREVER_S = 10.0 * 365 * 86400


def ray_arguments(
    node: NodeAddress,
    ports: list[int],
    *,
    head: str | None,
    gpus: int,
    cpus: int | None,
    object_store: int | None,
    metrics_port: int | None,
    temporary: Path,
) -> list[str]:
    """Return the arguments of `ray start`.

    Args:
        ports: Eight free ports of this node; the head's own port is the first.
        head: `ip:port` of the head; None if this node is the head.
        cpus: CPUs of this node; None: as many as Ray finds.
        object_store: Bytes of the object store; None: Ray's default.
        metrics_port: Port of the Prometheus endpoint; None: the last of `ports`.
        temporary: Folder for Ray's logs and sockets.
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
    if metrics_port is not None:
        ports = [*ports[:-1], metrics_port]
    arguments += [f"--node-ip-address={node.ip}", f"--temp-dir={temporary}"]
    arguments += [f"--{name}={port}" for name, port in zip(names, ports[2:], strict=True)]
    arguments += [f"--num-gpus={gpus}"]
    if cpus is not None:
        arguments += [f"--num-cpus={cpus}"]
    if object_store is not None:
        arguments += [f"--object-store-memory={object_store}"]
    return arguments


def interfaces(node: NodeAddress, nodes: int) -> dict[str, str]:
    """Return environment variables with this node's network, for torch, NCCL and vLLM.

    Variables that the user set are left out.

    Args:
        nodes: Number of nodes; one node needs no network.
    """
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES")
    visible = {"RCOT_HEALTH_GPUS": gpus} if gpus else {}  # Ray overwrites it in workers
    if nodes == 1 or not node.interface:
        return visible
    network = {
        "GLOO_SOCKET_IFNAME": node.interface,
        "NCCL_SOCKET_IFNAME": node.interface,
        "VLLM_HOST_IP": node.ip,
    }
    return {name: value for name, value in (visible | network).items() if not os.environ.get(name)}


def serve(args: argparse.Namespace) -> int:
    """Meet the other nodes, start Ray, and wait for its end. Raises InputError.

    Returns:
        The exit status.
    """
    folder: Path = args.rendezvous
    deadline = time.monotonic() + args.deadline
    is_head = args.name == args.head
    if is_head:
        addresses = rendezvous.host(folder, args.nodes, deadline, args.index, args.interface)
        node, head = addresses[0], None
    else:
        rendezvous.join(folder, args.index, deadline)
        choice = rendezvous.address(folder, deadline)
        node = next(NodeAddress(**p) for p in choice["places"] if p["index"] == args.index)
        head = choice["address"]
        rendezvous.await_ray(choice, deadline)
    ports = rendezvous.free_ports(node.ip, args.job, args.index, 8)
    environment = {"RCOT_RL_PLUGIN": "required", "RAY_USAGE_STATS_ENABLED": "0"}
    tempfile.tempdir = str(args.tmp)  # Host's folder must be on this node's own disk
    with Host(environment | interfaces(node, args.nodes)) as host:
        host.memory.stop()  # only the driver reports memory
        arguments = ray_arguments(
            node,
            ports,
            head=head,
            gpus=args.gpus,
            cpus=args.cpus,
            object_store=args.object_store,
            metrics_port=args.metrics_port,
            temporary=Path(host.environment["RAY_TMPDIR"]),
        )
        if is_head:
            rendezvous.publish(folder, addresses, ports[0])
        role = "head" if is_head else f"joining {head}"
        logger.info(
            "node %d is %s, %s on %s: %s", args.index, args.name, node.ip, node.interface, role
        )
        return _run_ray(host, arguments, folder / f"node-{args.index}.log", args.index, deadline)


def _run_ray(host: Host, arguments: list[str], log: Path, index: int, deadline: float) -> int:
    """Run Ray to its end. Returns the exit status.

    Ray is restarted if it never came up: it gives a node 30 s, and the first imports from a cold
    network file system, or on a busy host, take longer.
    """
    while True:
        size = log.stat().st_size if log.exists() else 0
        try:
            host.run(["-m", "ray.scripts.scripts", *arguments], log, stall_timeout_s=_FOREVER_S)
        except StageFailed as error:
            came_up = _UP in log.read_bytes()[size:]
            logger.error("node %d: Ray %s; see %s", index, error, log)
            if came_up or time.monotonic() > deadline:
                return 1
            logger.warning("node %d: Ray had not come up: restarting it", index)
            time.sleep(2)
        else:
            return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="One node of a job's Ray cluster.")
    parser.add_argument("--rendezvous", type=Path, required=True, help="a folder for this job only")
    parser.add_argument("--nodes", type=int, required=True)
    index, name = os.environ.get("SLURM_NODEID"), os.environ.get("SLURMD_NODENAME")
    parser.add_argument(
        "--index",
        type=int,
        default=index,
        required=index is None,
        help="this node's number, from 0",
    )
    parser.add_argument(
        "--name", default=name, required=name is None, help="this node's name in the scheduler"
    )
    parser.add_argument("--head", required=True, help="the head's name in the scheduler")
    parser.add_argument(
        "--job", type=int, required=True, help="the job's number, which selects the ports"
    )
    parser.add_argument(
        "--deadline", type=float, default=600.0, help="seconds that the nodes may take to meet"
    )
    parser.add_argument("--interface", help="the head's network interface")
    parser.add_argument("--gpus", type=int, required=True)
    parser.add_argument("--cpus", type=int)
    parser.add_argument("--object-store", type=int)
    parser.add_argument("--metrics-port", type=int)
    parser.add_argument("--tmp", type=Path, default=Path("/tmp"))
    return parser.parse_args()


def main() -> NoReturn:
    """Exit with Ray's status; 2 if the nodes could not meet; 143 after TERM."""
    configure_logging(logging.INFO)
    variables.settle()
    for number in _END_SIGNALS:
        signal.signal(number, _terminated)
    try:
        sys.exit(serve(_parse()))
    except InputError as error:
        print(f"rcot: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(143)


def _terminated(number: int, frame: object) -> None:
    for end in _END_SIGNALS:
        signal.signal(end, signal.SIG_IGN)  # the clean-up is not interrupted again
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
