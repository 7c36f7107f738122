"""`rcot study`: run the recipes of a study with several seeds, and write its page."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from rcot_rl.cli.default_command import group_with_default
from rcot_rl.errors import InputError
from rcot_rl.system.lines import wrapped

_RUN = "run"


study_app = typer.Typer(
    cls=group_with_default(_RUN),
    no_args_is_help=True,
    help="Run the recipes of a study with several seeds (FOLDER [--out OUT]), and write its page.",
    subcommand_metavar="FOLDER | COMMAND [ARGS]...",
)


@study_app.command(_RUN)
def run_study_command(
    recipes: Annotated[Path, typer.Argument(help="Folder of recipes, such as recipes/study.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Overrides of all recipes."),
    ] = None,
    seeds: Annotated[str, typer.Option(help="Seeds, separated by commas.")] = "1,2,3",
    out: Annotated[Path, typer.Option("--out", help="The study's folder.")] = Path("runs/study"),
    only: Annotated[
        list[str] | None, typer.Option(help="Run only this recipe of the folder; repeatable.")
    ] = None,
) -> None:
    """Run every recipe with every seed; the same command resumes. Then write the study's page.

    Finished runs are skipped. If a run fails, the others still run and the exit status is 1.
    """
    from rcot_rl.study_runs import run_study, study_tasks

    numbers = _numbers(seeds)
    tasks = study_tasks(recipes, numbers, out, only or (), overrides or ())
    every = study_tasks(recipes, _known_seeds(out, numbers), out, (), overrides or ())
    try:
        outcome = run_study(tasks, every, out, lambda text: typer.echo(text, err=True))
    except KeyboardInterrupt:
        typer.echo("rcot: interrupted; rerun the same command to resume", err=True)
        raise typer.Exit(130) from None
    if outcome.page is not None:
        typer.echo(str(outcome.page))
    for label, failure in outcome.failures.items():
        typer.echo(wrapped(f"rcot: {label} failed: {failure}", sys.stderr), err=True)
    if outcome.failures:
        raise typer.Exit(1)


@study_app.command("page")
def study_page_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder with results.json.")],
) -> None:
    """Write a study's page again, from its results.json alone."""
    from rcot_rl.monitoring.study.study_page import write_page

    typer.echo(str(write_page(folder)))


def _numbers(seeds: str) -> list[int]:
    """Return the seeds of `1,2,3`. Raises InputError."""
    parts = [part.strip() for part in seeds.split(",")]
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise InputError(f"must be numbers separated by commas, not {seeds!r}", key="--seeds")
    numbers = [int(part) for part in parts]
    if len(set(numbers)) < len(numbers):
        raise InputError(f"names a seed twice: {seeds}", key="--seeds")
    return numbers


def _known_seeds(out: Path, given: list[int]) -> list[int]:
    """Return the given seeds and those that have a folder in OUT, sorted."""
    names = [path.name.removeprefix("seed-") for path in out.glob("seed-*")]
    return sorted({*given, *(int(name) for name in names if name.isascii() and name.isdigit())})
