"""`rcot launch`: render and submit a run to this host, Ray Jobs, Slurm or KubeRay.

The recipe's section `launch` has all settings. With `--dry-run`, nothing is submitted: the script,
request or manifest is printed, or written to a file below `--out`.
"""

from __future__ import annotations

import json
import sys
from contextlib import chdir
from pathlib import Path
from typing import Annotated

import typer

from rcot_rl.cli.faults import exit_with
from rcot_rl.errors import InputError
from rcot_rl.recipe.schema import Recipe
from rcot_rl.system.lines import width_of

launch_app = typer.Typer(
    no_args_is_help=True, help="Submit a run: to this host, Ray Jobs, Slurm or KubeRay."
)

RecipeArgument = Annotated[
    str, typer.Argument(help="A recipe's YAML file, or the name of a shipped recipe.")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides; values in YAML.")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Show what would be submitted; submit nothing.")
]
Out = Annotated[Path | None, typer.Option("--out", help="With --dry-run: output folder.")]


@launch_app.command()
def local(
    recipe: RecipeArgument, overrides: Overrides = None, dry_run: DryRun = False, out: Out = None
) -> None:
    """Check a run and start it on this host."""
    from cluster.launch import local as launcher
    from cluster.launch.render import recipe_reference

    loaded = _load(recipe, overrides, dry_run, out)
    reference = recipe_reference(recipe)
    with launcher.surroundings(loaded):
        result = launcher.preflight(loaded)
        if not dry_run:
            typer.echo(result.text(width=min(100, width_of(sys.stderr))), err=True)
            if result.ok:
                launcher.become_run(loaded, reference, overrides or [])
    if dry_run:
        _show(result.text() + "\n", out, "plan.txt")
    if not result.ok:
        exit_with(result.errors, shown=not dry_run)


@launch_app.command()
def ray(
    recipe: RecipeArgument, overrides: Overrides = None, dry_run: DryRun = False, out: Out = None
) -> None:
    """Submit a job to a running Ray cluster, follow its log, and exit with its status."""
    from cluster.launch import ray_jobs, render

    loaded = _load(recipe, overrides, dry_run, out)
    _check(loaded, render.run_folder(loaded, render.workdir_of(loaded)))
    request = ray_jobs.request(loaded, recipe, overrides or [])
    if dry_run:
        _show(json.dumps(request.as_dict(), indent=1) + "\n", out, "ray-job.json")
        return
    try:
        status = ray_jobs.submit(loaded, request, typer.echo)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    if status:
        raise typer.Exit(status)


@launch_app.command()
def slurm(
    recipe: RecipeArgument, overrides: Overrides = None, dry_run: DryRun = False, out: Out = None
) -> None:
    """Submit a Slurm job that starts Ray on the nodes, checks them and runs the recipe."""
    from cluster.launch import render
    from cluster.launch import slurm as launcher

    loaded = _load(recipe, overrides, dry_run, out)
    workdir = render.workdir_of(loaded)
    if workdir.is_dir():
        with chdir(workdir):  # a login node sees the files of the compute nodes
            _check(loaded, render.run_folder(loaded, workdir), shared=True)
    else:
        _check(loaded, render.run_folder(loaded, workdir))
    script = launcher.script(loaded, render.recipe_reference(recipe), overrides or [])
    if dry_run:
        _show(script.text, out, "job.sh")
        return
    render.check_environment(loaded)
    job = launcher.submit(script)
    typer.echo(f"job {job}; its log: {script.folder}/slurm-{job}.log")


@launch_app.command()
def kuberay(
    recipe: RecipeArgument, overrides: Overrides = None, dry_run: DryRun = False, out: Out = None
) -> None:
    """Create a RayJob with GPU and CPU groups, a volume claim and references to secrets."""
    from cluster.launch import kuberay as launcher

    loaded = _load(recipe, overrides, dry_run, out)
    _check(loaded, launcher.run_folder(loaded))
    manifest = launcher.manifest(loaded)
    if dry_run:
        _show(launcher.text(manifest), out, "rayjob.yaml")
        return
    typer.echo(launcher.submit(loaded, manifest))


def _load(recipe: str, overrides: list[str] | None, dry_run: bool, out: Path | None) -> Recipe:
    from rcot_rl.recipe.loader import load_recipe

    if out is not None and not dry_run:
        raise InputError("needs --dry-run; the run's folder is launch.run_dir", key="--out")
    return load_recipe(recipe, overrides or [])


def _check(recipe: Recipe, run: Path, shared: bool = False) -> None:
    """Run the preflight for other hosts and print warnings to standard error.

    Raises:
        InputError: The preflight found errors.
    """
    from cluster.preflight.plan import check_launch

    check_launch(recipe, run, lambda line: typer.echo(line, err=True), shared=shared)


def _show(text: str, out: Path | None, name: str) -> None:
    from rcot_rl.system.files import write_text

    if out is None:
        typer.echo(text, nl=False)
        return
    try:
        write_text(out / name, text)
    except OSError as error:
        raise InputError(f"cannot be written: {error.strerror}", file=out / name) from error
    typer.echo(str(out / name))
