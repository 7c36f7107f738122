"""Rules that all launchers share: the run's command, the health check's options, folders, CPUs.

Commands are lists of words until the last moment; what a shell reads has passed `shlex.quote`.
"""

from __future__ import annotations

import math
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rcot_rl.errors import InputError
from rcot_rl.recipe.schema import Recipe
from rcot_rl.system.paths import path_fault

CHECKOUT = Path(__file__).resolve().parents[2]


def run_command(python: str, recipe: str, overrides: Sequence[str], run: Path) -> list[str]:
    """Return the `rcot run` command inside a cluster that a launcher started.

    Ray's address is `auto`, not the cluster's own, so that each attempt's recipe hash is the same.

    Args:
        recipe: A name, or a path there.
        run: RUN, absolute.
    """
    words = [python, "-m", "rcot_rl.cli", "run", "--out", str(run), recipe, *overrides]
    return [*words, "cluster.ray_address=auto"]


def recipe_reference(name_or_path: str) -> str:
    """Return what names a recipe in any folder: an absolute path, or a shipped recipe's name."""
    return str(Path(name_or_path).resolve()) if Path(name_or_path).is_file() else name_or_path


def health_options(recipe: Recipe, shared: Path, nodes: int, gpu_nodes: int) -> list[str]:
    """Return the options of `cluster.launch.health`.

    Args:
        shared: A folder on the file system that all nodes share.
        gpu_nodes: How many of them train.
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
    """Return the CPUs that verl holds during a GRPO stage: on each training node, and in total.

    These are 3 per GPU for its pools, and one for each storage unit and their controller. Agent and
    reward workers need a CPU only to start.
    """
    cluster = recipe.cluster
    pools = 3 * cluster.gpus_per_node
    return pools, pools * cluster.nodes + cluster.queue_storage_units + 1


def cpus_of_node(recipe: Recipe) -> int:
    """Return the CPUs to request per node: 3 per GPU, one per worker, 4 for Ray and the driver."""
    cluster = recipe.cluster
    workers = cluster.agent_workers + cluster.reward_workers + cluster.queue_storage_units
    return 3 * cluster.gpus_per_node + math.ceil(workers / cluster.nodes) + 4


def check_cpus(recipe: Recipe, gpu_node: float, others: float, key: str) -> None:
    """Check that verl's placement fits. Raises InputError.

    Args:
        gpu_node: CPUs of a training node.
        others: CPUs of all other nodes together.
        key: The recipe key that sets them.
    """
    pools, total = held_cpus(recipe)
    nodes = recipe.cluster.nodes
    if gpu_node < pools or gpu_node * nodes + others < total:
        raise InputError(
            f"gives a training node {gpu_node:g} CPUs; verl needs {pools} on each and {total} in "
            "total, and would wait for them forever with the GPUs allocated",
            key=key,
        )


def driver_needs_gpus(recipe: Recipe) -> bool:
    """Return True if a stage needs GPUs on the driver's node: it does not run in Ray's workers."""
    on_driver = {*recipe.sft_stages, "predict"}
    return recipe.device == "cuda" and not on_driver.isdisjoint(recipe.stages)


def check_environment(recipe: Recipe) -> None:
    """Raise InputError unless every secret is set here, from where the job takes it."""
    for index, name in enumerate(recipe.launch.secrets):
        if not os.environ.get(name):
            raise InputError(
                f"{name} is not set in this environment", key=f"launch.secrets.{index}"
            )


def run_folder(recipe: Recipe, workdir: Path) -> Path:
    """Return RUN of a job that starts in `workdir`. Raises InputError."""
    run = Path(os.path.normpath(workdir / (recipe.launch.run_dir or f"runs/{recipe.name}")))
    for form in (recipe.launch.run_dir or "", run):
        fault = path_fault(form, handed_on=True)
        if fault is not None:
            raise InputError(fault, file=form, key="launch.run_dir")
    return run


def workdir_of(recipe: Recipe) -> Path:
    """Return the folder in which the job starts: `launch.workdir`, or the current one."""
    return Path(recipe.launch.workdir or Path.cwd())


def run_client(command: Sequence[str], missing: str, action: str, **options: Any) -> str:
    """Run a batch system's client and return its output. Raises InputError.

    Args:
        missing: The error if the client is not installed.
        action: Names the call if it fails.
        options: Further arguments of `subprocess.run`.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, **options)
    except FileNotFoundError as error:
        raise InputError(f"{command[0]} is not on this host; {missing}") from error
    except subprocess.CalledProcessError as error:
        raise InputError(f"{action}: {error.stderr.strip()}") from error
    return str(done.stdout).strip()
