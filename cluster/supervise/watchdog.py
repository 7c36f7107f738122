"""Run a training process under the limits of a recipe: deadline, heartbeat, lost hosts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from cluster.supervise.lost_hosts import DeathWatch, LossWatch
from cluster.supervise.processes import Limits
from rcot_rl.recipe.schema import Recipe


def run_watched(
    run: Callable[..., object],
    arguments: Sequence[str],
    log: Path,
    recipe: Recipe,
    *,
    new_steps: Callable[[], int],
    environment: Mapping[str, str] | None = None,
    on_ray: bool,
) -> None:
    """Run one training process to its end; end it early if it hangs or loses a host.

    Raises StageFailed.

    Args:
        run: `Host.run`, or a function that calls it with the same arguments.
        recipe: Its `supervise` and `cluster` sections set the limits.
        new_steps: Reports progress: returns the number of steps done since the last call. Called
            about four times a second.
        on_ray: True if workers are Ray's, so that some may run on other hosts.
    """
    supervise, address = recipe.supervise, recipe.cluster.ray_address
    hours = supervise.deadline_hours
    limits = Limits(
        deadline_s=None if hours is None else 3600 * hours,
        heartbeat_s=supervise.heartbeat_s,
        startup_s=supervise.startup_s,
    )
    losses = LossWatch(log) if address != "local" else None
    deaths = DeathWatch(log)

    def watch() -> None:
        for _ in range(new_steps()):
            limits.beat()
        if deaths.poll():
            limits.death()
        if losses is not None:
            losses.poll()

    stacks = str((log.parent / "stacks").resolve())
    asker = ["-m", "cluster.supervise.ask_stacks", address, stacks]
    run(
        arguments,
        log,
        environment=environment,
        watch=watch,
        stall_timeout_s=recipe.cluster.stall_timeout_s,
        limits=limits,
        elsewhere=asker if on_ray and address != "local" else (),
    )
