"""Collect Python stacks from a hung stage's processes on every host of a running Ray cluster.

    python -m cluster.supervise.ask_stacks ADDRESS FOLDER

On one host, the supervisor signals its own descendants (`cluster.supervise.processes`). On a
cluster, the trainer and the engine are children of Ray, here and on other hosts. A task on each
live host signals the processes whose stacks go to FOLDER, which must be on a shared disk. A host
that does not answer in time is skipped: it may be the one that the others wait for. Prints one line
per host; the exit status is 0.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

ANSWER_S = 20.0
"""Seconds that a host has to answer."""

_NODE_RESOURCE = "node:"


def ask_all(folder: Path) -> dict[str, int | None]:
    """Signal the processes of every live host. This process must be connected to Ray.

    Returns:
        Host address -> number of signalled processes; None if the host did not answer.
    """
    import ray

    from rcot_rl.system.stacks import ask

    ask_on_host = ray.remote(num_cpus=0, max_retries=0)(ask)
    references = {
        address: ask_on_host.options(resources={_NODE_RESOURCE + address: 0.001}).remote(folder)
        for address in sorted(n["NodeManagerAddress"] for n in ray.nodes() if n["Alive"])
    }
    ready, _ = ray.wait(list(references.values()), num_returns=len(references), timeout=ANSWER_S)
    counts: dict[str, int | None] = dict.fromkeys(references)
    for address, reference in references.items():
        if reference in ready:
            try:
                counts[address] = ray.get(reference)
            except ray.exceptions.RayError as error:
                print(f"{address}: {type(error).__name__}", flush=True)
    return counts


def main(address: str, folder: Path) -> None:
    """Connect to the Ray at `address` and print one line per host."""
    import ray

    ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
    for host, count in ask_all(folder).items():
        print(f"{host}: {'no answer' if count is None else f'{count} processes asked'}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
