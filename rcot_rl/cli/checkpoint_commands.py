"""`rcot checkpoints …`: list, verify, prune and export the checkpoints of a run."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path
from typing import Annotated

import typer

checkpoints_app = typer.Typer(
    no_args_is_help=True, help="List, verify, prune and export a run's checkpoints."
)


def _stores(run: Path) -> list[Path]:
    """Return the checkpoint folders of a run or a stage, or the folder itself.

    Raises:
        InputError: The folder has no checkpoints.
    """
    from rcot_rl.errors import InputError
    from rcot_rl.recipe.recorded import stages_with

    stores = [run / stage / "checkpoints" for stage in stages_with(run, "checkpoints")]
    if (run / "checkpoints").is_dir():
        stores.append(run / "checkpoints")
    if not stores and any(run.glob("global_step_*")):
        stores = [run]
    if not stores:
        raise InputError(
            "has no checkpoints; name a run, a stage or a folder of checkpoints", file=run
        )
    return stores


def _is_checkpoint(path: Path) -> bool:
    return path.name == "latest" or path.name.startswith("global_step_")


@checkpoints_app.command("list")
def list_checkpoints(
    run: Annotated[Path, typer.Argument(help="A run's folder, or a stage's.")],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
) -> None:
    """List checkpoints with step, time, size, ranks and completeness."""
    from rcot_rl.errors import InputError
    from rcot_rl.training.checkpoint_store import LATEST, all_of, find_checkpoint

    rows = [(store, c) for store in _stores(run) for c in all_of(store)]
    if as_json:
        listed = [
            {
                "path": str(c.path),
                "step": c.step,
                "bytes": c.size,
                "world_size": c.world_size,
                "time": c.time,
                "sealed": c.sealed,
                "whole": c.whole,
                "faults": list(c.faults),
            }
            for _, c in rows
        ]
        typer.echo(json.dumps(listed))
        return
    newest = set()
    for store in {store for store, _ in rows}:
        with contextlib.suppress(InputError):
            newest.add(find_checkpoint(store / LATEST))
    for store, c in rows:
        mark = " latest" if c.path.resolve() in newest else ""
        state = ("sealed" if c.sealed else "whole") if c.whole else c.faults[0]
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(c.time))
        typer.echo(
            f"{store.parent.name:<10}{c.step:>8}  {when}  {c.size / 2**20:10.1f} MiB  "
            f"{c.world_size or '?'} ranks  {state}{mark}"
        )


@checkpoints_app.command("verify")
def verify(
    path: Annotated[Path, typer.Argument(help="A run, a stage, or one checkpoint.")],
) -> None:
    """Check the size and checksum of every file. Status 2 if a file is missing or changed."""
    from rcot_rl.training.checkpoint_store import all_of, find_checkpoint, inspect

    path = find_checkpoint(path) if _is_checkpoint(path) else path
    if path.name.startswith("global_step_"):
        checkpoints = [inspect(path, deep=True)]
    else:
        checkpoints = [c for store in _stores(path) for c in all_of(store, deep=True)]
    for c in checkpoints:
        for fault in c.faults:
            typer.echo(f"{c.path}: {fault}", err=True)
        if c.whole:
            typer.echo(f"{c.path}: {'intact' if c.sealed else 'complete, never sealed'}")
    if any(not c.whole for c in checkpoints):
        raise typer.Exit(2)


@checkpoints_app.command("prune")
def prune_checkpoints(
    run: Annotated[Path, typer.Argument(help="A run's folder, or a stage's.")],
    keep: Annotated[int, typer.Option(min=1, help="Complete checkpoints to keep per stage.")],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List what would be deleted; delete nothing.")
    ] = False,
) -> None:
    """Delete old checkpoints, and incomplete ones older than the newest complete one."""
    from rcot_rl.training.checkpoint_store import prune

    for store in _stores(run):
        for path in prune(store, keep, dry_run):
            typer.echo(f"{'would delete' if dry_run else 'deleted'} {path}")


@checkpoints_app.command("export")
def export(
    checkpoint: Annotated[Path, typer.Argument(help="A GRPO stage's global_step_N (or `latest`).")],
    out: Annotated[Path, typer.Argument(help="Output folder; it must not exist.")],
) -> None:
    """Copy a checkpoint's model into a folder that transformers and vLLM load."""
    import shutil

    from rcot_rl.errors import InputError
    from rcot_rl.inference.model_folder import check_model
    from rcot_rl.training.checkpoint_store import find_checkpoint, inspect

    checkpoint = find_checkpoint(checkpoint)
    state = inspect(checkpoint, deep=True)
    if not state.whole:
        raise InputError(state.faults[0], file=checkpoint)
    model = checkpoint / "actor" / "huggingface"
    if not any(model.glob("*.safetensors")):
        raise InputError(
            "contains only an adapter; the merged model is RUN/<stage>/model",
            file=checkpoint,
        )
    if out.exists():
        raise InputError("exists already; choose another folder", file=out)
    check_model(model)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(model, partial)
    partial.rename(out)
    typer.echo(str(out))
