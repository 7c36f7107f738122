"""Wait until a running Ray has the hosts that a stage needs: before each start on a cluster.

    python -m cluster.launch.await_hosts ADDRESS --nodes N --gpus G --wait SECONDS

A host that was lost comes back when its manager says so, minutes later, and Ray counts it as alive
for a while after it went; the attempt before may still hold its GPUs. verl, started then, fails at
once, and two such failures look like a deterministic one. So: N nodes have G GPUs each that nobody
holds, and a worker on each of them answers. Exit status 0, or 1 with the reason on the last line.

Left out: whether the hosts are equal and share a disk, which `health` asks before a run.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping
from typing import Any, NoReturn

from cluster.launch import rendezvous

_ANSWER_S = 60.0
_POLL_S = 1.0
_SAY_S = 30.0
_NODE = "node:"


def ready(free: Mapping[str, Mapping[str, float]], gpus: int) -> list[str]:
    """Addresses of nodes with at least `gpus` free. free: node -> resource -> free amount. Pure."""
    out = []
    for resources in free.values():
        names = [n for n in resources if n.startswith(_NODE) and not n.endswith("__")]
        if names and resources.get("GPU", 0.0) >= gpus:
            out.append(names[0].removeprefix(_NODE))
    return sorted(out)


def wait(nodes: int, gpus: int, seconds: float) -> str | None:
    """Wait for the cluster that this process is connected to. Returns what is missing, or None."""
    import ray

    started = said = time.monotonic()
    while True:
        found = ready(ray._private.state.available_resources_per_node(), gpus)
        alive = {n["NodeManagerAddress"] for n in ray.nodes() if n["Alive"]}
        found = [address for address in found if address in alive]
        if len(found) >= nodes and _answer(found):
            return None
        now = time.monotonic()
        missing = f"{len(found)} of {nodes} hosts with {gpus} free GPUs ({', '.join(found)})"
        if now - started > seconds:
            return f"{missing} after {seconds:.0f} s"
        if now - said > _SAY_S:
            print(f"rcot: waiting: {missing}", flush=True)
            said = now
        time.sleep(_POLL_S)


def _answer(addresses: list[str]) -> bool:
    """Whether a worker on each of these nodes says so within a minute."""
    import ray

    @ray.remote(num_cpus=0, max_retries=0)
    def here() -> bool:
        return True

    asked = [here.options(resources={_NODE + a: 0.001}).remote() for a in addresses]
    try:
        return all(ray.get(asked, timeout=_ANSWER_S))
    except (ray.exceptions.RayError, ray.exceptions.GetTimeoutError):
        for reference in asked:
            ray.cancel(reference, force=True)
        return False


def _answers(ip: str, port: int, seconds: float) -> bool:
    """Whether somebody listens there in time; ray.init itself tries for many minutes."""
    deadline = time.monotonic() + seconds
    while not rendezvous.answers(ip, port):
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_S)
    return True


def main(words: list[str] | None = None) -> NoReturn:
    """The command of the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("address")
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--gpus", type=int, required=True)
    parser.add_argument("--wait", type=float, required=True, help="seconds")
    args = parser.parse_args(words)
    sys.exit(_main(args))


def _main(args: argparse.Namespace) -> int:
    import ray

    options: dict[str, Any] = {"logging_level": "warning", "log_to_driver": False}
    host, _, port = args.address.removeprefix("ray://").rpartition(":")
    if port.isdigit() and not _answers(host.strip("[]"), int(port), args.wait):
        print(f"rcot: no Ray answers at {args.address} after {args.wait:.0f} s")
        return 1
    try:
        ray.init(address=args.address, **options)
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
