"""Submit a run to Slurm: an sbatch script that allocates the nodes, starts Ray on them, and runs.

The script (`templates/slurm.sh`) has two steps: `cluster.launch.node`, once on every node, and
`cluster.launch.head` on the first node, which waits for the others, checks them, and becomes
`rcot run`. If one step ends, the script ends the other, by the ids of the steps that it started.

Before the time limit, Slurm sends the script TERM: the run stops and can be resumed. With
`launch.slurm.requeue` it sends USR1 instead, so that a cancelled job does not return by itself.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.launch import render
from rcot_rl.errors import InputError
from rcot_rl.recipe.schema import Recipe
from rcot_rl.system.files import write_text

_TEMPLATE = Path(__file__).with_name("templates") / "slurm.sh"
_RESERVED_OPTIONS = frozenset(
    {
        *("--nodes", "--ntasks", "--signal", "--output", "--error", "--requeue", "--no-requeue"),
        *("--array", "--wrap", "--export", "--open-mode", "--parsable"),
    }
)
"""Options of sbatch that a recipe must not set."""

_CLIENT_SETTINGS = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT")
"""Variables that tell Slurm's commands where its controller is."""


@dataclass(frozen=True)
class SbatchScript:
    """An sbatch script, and the folder that must exist when it starts."""

    text: str
    folder: Path


def script(
    recipe: Recipe,
    recipe_name: str,
    overrides: Sequence[str] = (),
    *,
    command: Sequence[str] | None = None,
) -> SbatchScript:
    """Render the sbatch script of a run. Raises InputError.

    Args:
        recipe_name: As given on the command line; a file by its absolute path.
        command: Words to run in the cluster instead of `rcot run`.
    """
    slurm = recipe.launch.slurm
    workdir = render.workdir_of(recipe)
    python = slurm.python or sys.executable
    run = render.run_folder(recipe, workdir)
    folder = run.with_name(f"{run.name}.launch")  # next to RUN, which must be empty at first
    if any(mark in str(folder) for mark in ("%", "\\", '"', "'", " ")):
        raise InputError(
            f"'{folder}' has a blank, a quote or a % in it, which sbatch does not take literally",
            key="launch.run_dir",
        )
    words = list(command or render.run_command(python, recipe_name, overrides, run))
    settings = _settings(recipe, folder, workdir, python, words)
    body = _TEMPLATE.read_text(encoding="utf-8").replace("@SETTINGS@", settings, 1)
    return SbatchScript("#!/usr/bin/env bash\n" + _directives(recipe, folder) + "\n" + body, folder)


def submit(job: SbatchScript) -> str:
    """Write the script into its folder and submit it. Raises InputError."""
    path = job.folder / "job.sh"
    write_text(path, job.text)
    # sizes of an interactive allocation, such as SLURM_MEM_PER_NODE, conflict with the job's own
    environment = {
        name: value
        for name, value in os.environ.items()
        if name in _CLIENT_SETTINGS or not name.startswith("SLURM_")
    }
    missing = "launch from a login node, or write the script with --dry-run"
    command = ["sbatch", "--parsable", str(path)]
    refused = f"{path}: sbatch refused the script"
    return render.run_client(command, missing, refused, env=environment).partition(";")[0]


def _directives(recipe: Recipe, folder: Path) -> str:
    slurm, cluster = recipe.launch.slurm, recipe.cluster
    gres = slurm.gres or (f"gpu:{cluster.gpus_per_node}" if recipe.device == "cuda" else None)
    options: list[str | None] = [
        f"--job-name=rcot-{recipe.name}",
        f"--nodes={cluster.nodes}",
        "--ntasks-per-node=1",
        f"--cpus-per-task={_cpus(recipe)}",
        f"--mem={slurm.memory}",
        f"--time={slurm.time}",
        f"--gres={gres}" if gres else None,
        "--exclusive" if slurm.exclusive else None,
        *(
            f"--{name}={value}" if (value := getattr(slurm, name)) else None
            for name in ("partition", "account", "qos", "reservation", "constraint")
        ),
        f"--output={folder}/slurm-%j.log",
        "--open-mode=append",
        f"--signal=B:{'USR1' if slurm.requeue else 'TERM'}@{slurm.signal_s}",
        "--requeue" if slurm.requeue else "--no-requeue",
        "--export=ALL",
    ]
    for index, option in enumerate(slurm.sbatch):
        if option.partition("=")[0] in _RESERVED_OPTIONS:
            raise InputError(
                f"{option} is set by the launcher itself", key=f"launch.slurm.sbatch.{index}"
            )
        options.append(option)
    return "".join(f"#SBATCH {option}\n" for option in options if option)


def _settings(recipe: Recipe, folder: Path, workdir: Path, python: str, words: list[str]) -> str:
    """Render everything that differs between two scripts: variables, quoted for bash."""
    slurm, launch, nodes = recipe.launch.slurm, recipe.launch, recipe.cluster.nodes
    node = [
        f"--gpus={recipe.cluster.gpus_per_node}",
        f"--cpus={_cpus(recipe)}",
        f"--deadline={launch.health.wait_s}",
        f"--tmp={slurm.tmp}",
    ]
    if slurm.interface:
        node.append(f"--interface={slurm.interface}")
    if recipe.cluster.object_store_bytes is not None:
        node.append(f"--object-store={recipe.cluster.object_store_bytes}")
    if recipe.cluster.metrics_port is not None:
        node.append(f"--metrics-port={recipe.cluster.metrics_port}")
    health = render.health_options(recipe, folder, nodes, nodes)
    singles = {
        "nodes": nodes,
        "cpus": _cpus(recipe),
        "patience": max(10, slurm.signal_s - 60),
        "may_requeue": "yes" if slurm.requeue else "",
        "max_requeues": slurm.max_requeues,
        "folder": folder,
        "workdir": workdir,
        "code": slurm.code or render.CHECKOUT,
        "python": python,
        "setup": slurm.setup_script or "",
    }
    lists = {
        "srun_options": slurm.srun,
        "needed": launch.secrets,
        "node_options": node,
        "health_options": health,
        "command": words,
    }
    lines = [f"{name}={shlex.quote(str(value))}" for name, value in singles.items()]
    lines += [f"{name}=({shlex.join(values)})" for name, values in lists.items()]
    lines += [f"export {k}={shlex.quote(v)}" for k, v in launch.environment.items()]
    return "\n".join(lines)


def _cpus(recipe: Recipe) -> int:
    cpus = recipe.launch.slurm.cpus_per_node
    if cpus is None:
        return render.cpus_of_node(recipe)
    render.check_cpus(recipe, cpus, 0, "launch.slurm.cpus_per_node")
    return cpus
