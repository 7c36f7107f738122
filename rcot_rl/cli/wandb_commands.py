"""`rcot wandb`: what needs a W&B server, after or beside a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rcot_rl.errors import InputError

wandb_app = typer.Typer(no_args_is_help=True, help="Weights & Biases: send runs, workspaces.")


@wandb_app.command("sync")
def sync_command(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.")],
) -> None:
    """Send a run folder to W&B, also one that was offline or never tracked.

    What the server already has is not sent again. Needs `wandb login` or WANDB_API_KEY.
    """
    from cluster.supervise.sync_run import sync_run

    text, complete = sync_run(run_dir)
    typer.echo(text)
    if not complete:
        raise typer.Exit(1)


@wandb_app.command("workspace")
def workspace_command(
    run_dir: Annotated[
        Path | None, typer.Argument(metavar="[RUN]", help="A run's folder: show only its runs.")
    ] = None,
    project: Annotated[
        str | None, typer.Option(help="Show all runs of this W&B project instead.")
    ] = None,
    entity: Annotated[
        str | None, typer.Option(help="W&B user or team (default: the run's, or the account's).")
    ] = None,
) -> None:
    """Save a W&B workspace with sections by question, and print its URL.

    Each call saves a new view. Needs `wandb login` or WANDB_API_KEY.
    """
    from rcot_rl.monitoring.trackers.wandb_workspace import save_workspace

    if (run_dir is None) == (project is None):
        raise InputError("give either a run's folder or --project", key="RUN")
    typer.echo(save_workspace(run_dir, project, entity))
