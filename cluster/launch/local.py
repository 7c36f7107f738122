"""`rcot launch local`: the preflight, and then `rcot run` on this host."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import chdir, contextmanager
from pathlib import Path
from typing import NoReturn

from cluster.preflight.plan import Report, examine
from rcot_rl.errors import InputError
from rcot_rl.recipe.schema import Recipe


def run_folder(recipe: Recipe) -> Path:
    """Return RUN, relative to `launch.workdir`: `launch.run_dir` or runs/<name>."""
    return Path(recipe.launch.run_dir or f"runs/{recipe.name}")


@contextmanager
def surroundings(recipe: Recipe) -> Iterator[None]:
    """Apply `launch.environment` and `launch.workdir` to this process. Raises InputError."""
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
    """Check the run on this host. Raises InputError."""
    if recipe.cluster.nodes > 1:
        raise InputError(
            f"is {recipe.cluster.nodes}, and this is one host; launch with ray, slurm or kuberay",
            key="cluster.nodes",
        )
    return examine(recipe, run_folder(recipe))


def become_run(recipe: Recipe, name_or_path: str, overrides: Sequence[str]) -> NoReturn:
    """Replace this process with `rcot run`, without a second preflight.

    Its signals, its output and its exit status are then those of the launch. Call it within
    `surroundings`.

    Args:
        name_or_path: The recipe's name or absolute path.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    # -P: a module in launch.workdir must not shadow an installed one
    words = [sys.executable, "-P", "-m", "rcot_rl.cli", "run", "--checked"]
    os.execv(words[0], [*words, f"--out={run_folder(recipe)}", name_or_path, *overrides])
