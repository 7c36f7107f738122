"""`rcot launch local`: the preflight, and then `rcot run` on this host."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import chdir, contextmanager
from pathlib import Path

from cluster.preflight.plan import Report, examine
from rcot_rl.errors import InputError
from rcot_rl.recipe.schema import Recipe
from rcot_rl.runfolder import RunFolder


def run_folder(recipe: Recipe) -> Path:
    """RUN: launch.run_dir, or runs/<name> here."""
    return Path(recipe.launch.run_dir or f"runs/{recipe.name}")


@contextmanager
def surroundings(recipe: Recipe) -> Iterator[None]:
    """This process with launch.environment, in launch.workdir; relative paths count from there.
    Raises InputError when that is no folder."""
    workdir = Path(recipe.launch.workdir or ".")
    if not workdir.is_dir():
        raise InputError(f"{workdir} is no folder on this host", key="launch.workdir")
    before = {name: os.environ.get(name) for name in recipe.launch.environment}
    os.environ.update(recipe.launch.environment)
    try:
        with chdir(workdir):
            yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def preflight(recipe: Recipe) -> Report:
    """The plan and its findings. Raises InputError for a recipe of several hosts."""
    if recipe.cluster.nodes > 1:
        raise InputError(
            f"is {recipe.cluster.nodes}, and this is one host; launch with ray, slurm or kuberay",
            key="cluster.nodes",
        )
    return examine(recipe, run_folder(recipe))


def run(recipe: Recipe) -> RunFolder:
    """`rcot run` of the recipe after `preflight`; errors as `rcot_rl.chain.run`."""
    from rcot_rl.chain import run as run_chain

    return run_chain(recipe, run_folder(recipe), checked=True)
