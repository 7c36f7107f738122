"""Wait until a running Ray has the hosts that a stage needs: before each start on a cluster.

    python -m cluster.launch.await_hosts ADDRESS --nodes N --gpus G --wait SECONDS

A lost host returns minutes later, when its manager restarts it. Ray counts a lost host as alive for
a while, and the previous attempt may still hold its GPUs. verl fails at once if it starts then, and
two such failures look like a deterministic one. The command therefore waits until N nodes have G
free GPUs each and a worker on each of them answers. The exit status is 0, or 1 with the reason on
the last line.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Mapping
from typing import NoReturn

from cluster.launch import rendezvous

_ANSWER_S = 60.0
_POLL_S = 1.0
_REPORT_S = 30.0
_NODE_RESOURCE = "node:"


def ready(free: Mapping[str, Mapping[str, float]], gpus: int) -> list[str]:
    """Return the addresses of the nodes that have at least `gpus` free GPUs.

    Args:
        free: Node id -> resource -> free amount.
        gpus: GPUs of a node.
    """
    addresses = []
    for resources in free.values():
        names = [n for n in resources if n.startswith(_NODE_RESOURCE) and not n.endswith("__")]
        if names and resources.get("GPU", 0.0) >= gpus:
            addresses.append(names[0].removeprefix(_NODE_RESOURCE))
    return sorted(addresses)


def wait(nodes: int, gpus: int, seconds: float) -> str | None:
    """Wait until the connected Ray has enough free hosts."""
    import ray

    started = reported = time.monotonic()
    while True:
        free = ready(ray._private.state.available_resources_per_node(), gpus)
        alive = {n["NodeManagerAddress"] for n in ray.nodes() if n["Alive"]}
        addresses = [address for address in free if address in alive]
        if len(addresses) >= nodes and _workers_answer(addresses):
            return None
        now = time.monotonic()
        missing = (
            f"{len(addresses)} of {nodes} hosts with {gpus} free GPUs ({', '.join(addresses)})"
        )
        if now - started > seconds:
            return f"{missing} after {seconds:.0f} s"
        if now - reported > _REPORT_S:
            print(f"rcot: waiting: {missing}", flush=True)
            reported = now
        time.sleep(_POLL_S)


def _workers_answer(addresses: list[str]) -> bool:
    """Return True if a worker on each of these nodes answers within _ANSWER_S."""
    import ray

    @ray.remote(num_cpus=0, max_retries=0)
    def answer() -> bool:
        return True

    references = [answer.options(resources={_NODE_RESOURCE + a: 0.001}).remote() for a in addresses]
    try:
        return all(ray.get(references, timeout=_ANSWER_S))
    except (ray.exceptions.RayError, ray.exceptions.GetTimeoutError):
        for reference in references:
            ray.cancel(reference, force=True)
        return False


def main() -> NoReturn:
    """Parse the command line, wait, and exit with the status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("address")
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--gpus", type=int, required=True)
    parser.add_argument("--wait", type=float, required=True, help="seconds")
    sys.exit(_wait_for_cluster(parser.parse_args()))


def _wait_for_cluster(args: argparse.Namespace) -> int:
    """Connect to the cluster and wait. Returns the exit status."""
    import ray

    host, _, port = args.address.removeprefix("ray://").rpartition(":")
    deadline = time.monotonic() + args.wait
    # ray.init itself would try for many minutes
    if port.isdigit() and not rendezvous.await_port(host.strip("[]"), int(port), deadline):
        print(f"rcot: no Ray answers at {args.address} after {args.wait:.0f} s")
        return 1
    try:
        ray.init(address=args.address, logging_level=logging.WARNING, log_to_driver=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        print(f"rcot: no Ray answers at {args.address}: {error}")
        return 1
    try:
        missing = wait(args.nodes, args.gpus, args.wait)
    finally:
        ray.shutdown()
    if missing is not None:
        print(f"rcot: {missing}", flush=True)
    return 0 if missing is None else 1


if __name__ == "__main__":
    main()
