"""What all launchers share: the run's command, what the health check asks, and where things lie.

Commands are lists of words until the last moment; what a shell reads has passed `shlex.quote`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

from rcot_rl.errors import InputError
from rcot_rl.paths import path_fault
from rcot_rl.recipe.schema import Recipe

CHECKOUT = Path(__file__).resolve().parents[2]
_ON_DRIVER = frozenset({"sft", "predict"})


def run_command(python: str, recipe: str, overrides: Sequence[str], run: Path) -> list[str]:
    """`rcot run` inside a cluster that a launcher has started; overrides stay as they were given.

    python: the interpreter there; run: RUN, absolute. The address is `auto`, not the cluster's
    own, so that the recipe's hash is the same at each attempt.
    """
    words = [python, "-m", "rcot_rl.cli", "run", "--out", str(run), recipe, *overrides]
    return [*words, "cluster.ray_address=auto"]


def health_options(recipe: Recipe, shared: Path, nodes: int, gpu_nodes: int) -> list[str]:
    """Options of `cluster.launch.health` for `nodes`, of which `gpu_nodes` train.

    shared: a folder on the file system that all nodes must see.
    """
    health = recipe.launch.health
    values = {
        "nodes": nodes,
        "shared": shared,
        "wait": health.wait_s,
        "gpus": recipe.cluster.gpus_per_node,
        "gpu-nodes": gpu_nodes,
        "min-free-gib": health.min_free_gib,
        "min-tmp-gib": health.min_tmp_gib,
        "max-skew": health.max_skew_s,
    }
    if driver_needs_gpus(recipe):
        values["driver-gpus"] = recipe.cluster.gpus_per_node
    return [f"--{name}={value}" for name, value in values.items()]


def held_cpus(recipe: Recipe) -> tuple[int, int]:
    """CPUs that verl holds as long as a GRPO stage runs: (on each training node, in all). 3 a GPU
    in its pools; one each for storage units and their controller. Workers of agents and rewards
    need one only to begin."""
    cluster = recipe.cluster
    pools = 3 * cluster.gpus_per_node
    return pools, pools * cluster.nodes + cluster.queue_storage_units + 1


def cpus_of_node(recipe: Recipe) -> int:
    """CPUs that verl asks of each node: 3 a GPU, one a worker, and 4 for Ray and the driver."""
    cluster = recipe.cluster
    workers = cluster.agent_workers + cluster.reward_workers + cluster.queue_storage_units
    return 3 * cluster.gpus_per_node + math.ceil(workers / cluster.nodes) + 4


def check_cpus(recipe: Recipe, gpu_node: float, others: float, key: str) -> None:
    """That verl's placement can be had. gpu_node: CPUs of a node that trains; others: of all that
    do not. Raises InputError for `key`."""
    pools, total = held_cpus(recipe)
    nodes = recipe.cluster.nodes
    if gpu_node < pools or gpu_node * nodes + others < total:
        raise InputError(
            f"gives a training node {gpu_node:g} CPUs; verl holds {pools} on each and {total} in "
            "all, and would wait for ever for them, with the GPUs held",
            key=key,
        )


def driver_needs_gpus(recipe: Recipe) -> bool:
    """Whether a stage runs beside the driver and not in Ray's workers."""
    return recipe.device == "cuda" and bool(_ON_DRIVER.intersection(recipe.stages))


def check_environment(recipe: Recipe) -> None:
    """That every secret named is set here, where the job takes it from. Raises InputError."""
    for index, name in enumerate(recipe.launch.secrets):
        if not os.environ.get(name):
            raise InputError(
                f"{name} is not set in this environment", key=f"launch.secrets.{index}"
            )


def run_folder(recipe: Recipe, workdir: Path) -> Path:
    """RUN of a job that starts in `workdir`. Raises InputError for a name that packages would
    interpret."""
    run = Path(os.path.normpath(workdir / (recipe.launch.run_dir or f"runs/{recipe.name}")))
    for form in (recipe.launch.run_dir or "", run):
        fault = path_fault(form, handed_on=True)
        if fault is not None:
            raise InputError(fault, file=form, key="launch.run_dir")
    return run


def workdir_of(recipe: Recipe) -> Path:
    """Where the job starts: launch.workdir, or here."""
    return Path(recipe.launch.workdir or Path.cwd())
