"""`rcot launch`: renders and submits a run to this host, Ray Jobs, Slurm or KubeRay.

With `--dry-run` nothing is submitted: what would be goes to standard output, or to a file below
`--out`. Everything about where and how is in the recipe's section `launch`.
"""

from __future__ import annotations

import json
from contextlib import chdir
from pathlib import Path
from typing import Annotated

import typer

from rcot_rl.cli.faults import exit_with
from rcot_rl.errors import InputError
from rcot_rl.recipe.schema import Recipe

launch_app = typer.Typer(
    no_args_is_help=True, help="Submit a run: to this host, Ray Jobs, Slurm or KubeRay."
)

RecipeArgument = Annotated[
    str, typer.Argument(help="A recipe's YAML file, or a shipped one's name.")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, in YAML.")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Show what would be submitted; submit nothing.")
]
Out = Annotated[
    Path | None, typer.Option("--out", help="With --dry-run: write it into this folder.")
]


@launch_app.command()
def local(
    recipe: RecipeArgument, overrides: Overrides = None, dry_run: DryRun = False, out: Out = None
) -> None:
    """The preflight, and then the run, on this host."""
    from cluster.launch import local as launcher

    loaded = _load(recipe, overrides, dry_run, out)
    with launcher.surroundings(loaded):
        found = launcher.preflight(loaded)
        if not dry_run:
            typer.echo(found.text(), err=True)
            if found.ok:
                typer.echo(str(_run_here(loaded)))
    if dry_run:
        _show(found.text() + "\n", out, "plan.txt")
    if not found.ok:
        exit_with(found.errors)


def _run_here(recipe: Recipe) -> Path:
    from cluster.launch import local as launcher

    try:
        return launcher.run(recipe).root
    except KeyboardInterrupt:  # here, because typer would turn it into a bare "Aborted"
        typer.echo("rcot: stopped; the same command goes on from here", err=True)
        raise typer.Exit(130) from None


@launch_app.command()
def ray(
    recipe: RecipeArgument, overrides: Overrides = None, dry_run: DryRun = False, out: Out = None
) -> None:
    """A job of a Ray cluster that runs already; follows its log, and ends with its status."""
    from cluster.launch import ray_jobs, render

    loaded = _load(recipe, overrides, dry_run, out)
    _check(loaded, render.run_folder(loaded, render.workdir_of(loaded)))
    made = ray_jobs.request(loaded, recipe, overrides or [])
    if dry_run:
        _show(json.dumps(made.as_dict(), indent=1) + "\n", out, "ray-job.json")
        return
    try:
        status = ray_jobs.submit(loaded, made, typer.echo)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    if status:
        raise typer.Exit(status)


@launch_app.command()
def slurm(
    recipe: RecipeArgument, overrides: Overrides = None, dry_run: DryRun = False, out: Out = None
) -> None:
    """An sbatch script that starts Ray on the nodes, checks them, runs and tears down."""
    from cluster.launch import render
    from cluster.launch import slurm as launcher

    loaded = _load(recipe, overrides, dry_run, out)
    workdir = render.workdir_of(loaded)
    if workdir.is_dir():
        with chdir(workdir):  # a login node has the files of the others
            _check(loaded, render.run_folder(loaded, workdir), shared=True)
    else:
        _check(loaded, render.run_folder(loaded, workdir))
    name = str(Path(recipe).resolve()) if Path(recipe).is_file() else recipe
    made = launcher.script(loaded, name, overrides or [])
    if dry_run:
        _show(made.text, out, "job.sh")
        return
    render.check_environment(loaded)
    job = launcher.submit(made)
    typer.echo(f"job {job}; its log: {made.folder}/slurm-{job}.log")


@launch_app.command()
def kuberay(
    recipe: RecipeArgument, overrides: Overrides = None, dry_run: DryRun = False, out: Out = None
) -> None:
    """A RayJob with GPU and CPU groups, a volume claim and secrets by reference."""
    from cluster.launch import kuberay as launcher

    loaded = _load(recipe, overrides, dry_run, out)
    _check(loaded, launcher.run_folder(loaded))
    made = launcher.manifest(loaded)
    if dry_run:
        _show(launcher.text(made), out, "rayjob.yaml")
        return
    typer.echo(launcher.submit(loaded, made))


def _load(recipe: str, overrides: list[str] | None, dry_run: bool, out: Path | None) -> Recipe:
    from rcot_rl.recipe.loader import load_recipe

    if out is not None and not dry_run:
        raise InputError("goes with --dry-run; the run's own folder is launch.run_dir", key="--out")
    return load_recipe(recipe, overrides or [])


def _check(recipe: Recipe, run: Path, shared: bool = False) -> None:
    """The preflight of a run on other hosts; warnings go to standard error. Raises InputError."""
    from cluster.preflight.plan import check_launch

    check_launch(recipe, run, lambda line: typer.echo(line, err=True), shared=shared)


def _show(text: str, out: Path | None, name: str) -> None:
    from rcot_rl.files import write_text

    if out is None:
        typer.echo(text, nl=False)
        return
    try:
        write_text(out / name, text)
    except OSError as error:
        raise InputError(f"cannot be written: {error.strerror}", file=out / name) from error
    typer.echo(str(out / name))
