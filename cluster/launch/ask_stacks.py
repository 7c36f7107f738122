"""Ask a stage's processes on every host of a running Ray what they are doing: it hangs.

    python -m cluster.launch.ask_stacks ADDRESS FOLDER

On one host the supervisor asks its own descendants (`cluster.supervise.processes`). On a cluster
the trainer's and the engine's processes are Ray's children, here and elsewhere: a task on each host
that lives asks those which write into FOLDER, on the disk that all hosts share. A host that does
not answer in time is left out: it may be what the others wait for. Prints a line a host; exit
status 0.
"""

from __future__ import annotations

import sys
from pathlib import Path

ANSWER_S = 20.0
_NODE = "node:"


def ask_all(folder: Path) -> dict[str, int | None]:
    """Host -> processes asked there; None: no answer. This process must be connected to Ray."""
    import ray

    from rcot_rl.stacks import ask

    here = ray.remote(num_cpus=0, max_retries=0)(ask)
    asked = {
        address: here.options(resources={_NODE + address: 0.001}).remote(folder)
        for address in sorted(n["NodeManagerAddress"] for n in ray.nodes() if n["Alive"])
    }
    ready, _ = ray.wait(list(asked.values()), num_returns=len(asked), timeout=ANSWER_S)
    found: dict[str, int | None] = {}
    for address, answer in asked.items():
        found[address] = None
        if answer in ready:
            try:
                found[address] = ray.get(answer)
            except ray.exceptions.RayError as error:
                print(f"{address}: {type(error).__name__}", flush=True)
    return found


def main(address: str, folder: Path) -> None:
    """The command of the module's docstring."""
    import ray

    ray.init(address=address, log_to_driver=False, logging_level="warning")
    for host, asked in ask_all(folder).items():
        print(f"{host}: {'no answer' if asked is None else f'{asked} processes asked'}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
