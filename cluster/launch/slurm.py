"""`rcot launch slurm`: an sbatch script that holds the nodes, starts Ray on them, and runs.

The script (`templates/slurm.sh`) has two steps: `cluster.launch.node` once on every node, and
`cluster.launch.head` on the first, which waits for the others, checks them, and becomes `rcot run`.
Whatever ends one of them ends the other, by the ids of the steps that the script started.

Before the time limit Slurm signals the script: TERM, and the run stops and can be resumed; with
`launch.slurm.requeue` USR1 instead, so that a cancelled job does not come back by itself.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.launch import render
from rcot_rl.errors import InputError
from rcot_rl.files import write_text
from rcot_rl.recipe.schema import Recipe

_TEMPLATE = Path(__file__).with_name("templates") / "slurm.sh"
_OWN = ("--nodes", "--ntasks", "--signal", "--output", "--error", "--requeue", "--no-requeue",
        "--array", "--wrap", "--export", "--open-mode", "--parsable")  # fmt: skip
_CLIENT_SETTINGS = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT")
"""Variables of Slurm that say where its controller is."""


@dataclass(frozen=True)
class Script:
    """An sbatch script, and the folder that must be there when it starts."""

    text: str
    folder: Path


def script(
    recipe: Recipe,
    recipe_name: str,
    overrides: Sequence[str] = (),
    *,
    command: Sequence[str] | None = None,
) -> Script:
    """The sbatch script of a run. Raises InputError naming the key at fault.

    recipe_name, overrides: as given on the command line. command: what to run in the cluster
    instead of `rcot run`, as words.
    """
    slurm = recipe.launch.slurm
    workdir = render.workdir_of(recipe)
    python = slurm.python or sys.executable
    run = render.run_folder(recipe, workdir)
    folder = run.with_name(f"{run.name}.launch")  # beside it: RUN must be empty at first
    if any(mark in str(folder) for mark in ("%", "\\", '"', "'", " ")):
        raise InputError(
            f"'{folder}' has a blank, a quote or a % in it, which sbatch would not take literally",
            key="launch.run_dir",
        )
    words = list(command or render.run_command(python, recipe_name, overrides, run))
    settings = _settings(recipe, folder, workdir, python, words)
    body = _TEMPLATE.read_text(encoding="utf-8").replace("@SETTINGS@", settings, 1)
    return Script("#!/usr/bin/env bash\n" + _directives(recipe, folder) + "\n" + body, folder)


def submit(made: Script) -> str:
    """Write the script into its folder and give it to sbatch; returns the job's id."""
    path = made.folder / "job.sh"
    write_text(path, made.text)
    # an interactive allocation's sizes, SLURM_MEM_PER_NODE say, contradict the job's own in srun
    environment = {
        name: value
        for name, value in os.environ.items()
        if name in _CLIENT_SETTINGS or not name.startswith("SLURM_")
    }
    try:
        done = subprocess.run(
            ["sbatch", "--parsable", str(path)], capture_output=True, text=True, check=True,
            env=environment,
        )  # fmt: skip
    except FileNotFoundError as error:
        raise InputError(
            "sbatch is not on this host; launch from a login node, or write the script with "
            "--dry-run"
        ) from error
    except subprocess.CalledProcessError as error:
        raise InputError(f"sbatch refused it: {error.stderr.strip()}", file=path) from error
    return done.stdout.strip().partition(";")[0]


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
        if option.partition("=")[0] in _OWN:
            raise InputError(
                f"{option} is set by the launcher itself", key=f"launch.slurm.sbatch.{index}"
            )
        options.append(option)
    return "".join(f"#SBATCH {option}\n" for option in options if option)


def _settings(recipe: Recipe, folder: Path, workdir: Path, python: str, words: list[str]) -> str:
    """The script's variables: everything that differs between two scripts, quoted for bash."""
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
    asked = recipe.launch.slurm.cpus_per_node
    if asked is None:
        return render.cpus_of_node(recipe)
    render.check_cpus(recipe, asked, 0, "launch.slurm.cpus_per_node")
    return asked
