"""`rcot checkpoints …`: what a run has saved, whether it is whole, and a way out of it."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path
from typing import Annotated

import typer

checkpoints_app = typer.Typer(no_args_is_help=True, help="A run's checkpoints.")
STAGES = ("sft", "grpo-aks", "grpo-ktg")


def _stores(run: Path) -> list[Path]:
    """The checkpoint folders of a run, of a stage, or the folder itself."""
    from rcot_rl.errors import InputError

    places = [run / stage / "checkpoints" for stage in STAGES]
    found = [p for p in [*places, run / "checkpoints"] if p.is_dir()]
    if not found and any(run.glob("global_step_*")):
        found = [run]
    if not found:
        raise InputError("holds no checkpoints (a run, a stage or its checkpoints)", file=run)
    return found


def _is_one(path: Path) -> bool:
    return path.name == "latest" or path.name.startswith("global_step_")


@checkpoints_app.command("list")
def list_checkpoints(
    run: Annotated[Path, typer.Argument(help="A run's folder, or a stage's.")],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
) -> None:
    """Every checkpoint: step, when, size, ranks, whole or what is missing."""
    from rcot_rl.errors import InputError
    from rcot_rl.training.checkpoint_store import LATEST, all_of, find_checkpoint

    rows = [(store, c) for store in _stores(run) for c in all_of(store)]
    if as_json:
        listed = [
            {
                "path": str(c.path), "step": c.step, "bytes": c.size, "world_size": c.world_size,
                "time": c.time, "sealed": c.sealed, "whole": c.whole, "faults": list(c.faults),
            }
            for _, c in rows
        ]  # fmt: skip
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
    """Check every file's size and checksum; status 2 when one is not as it was saved."""
    from rcot_rl.training.checkpoint_store import all_of, find_checkpoint, inspect

    path = find_checkpoint(path) if _is_one(path) else path
    if path.name.startswith("global_step_"):
        found = [inspect(path, deep=True)]
    else:
        found = [c for store in _stores(path) for c in all_of(store, deep=True)]
    for c in found:
        for fault in c.faults:
            typer.echo(f"{c.path}: {fault}", err=True)
        if c.whole:
            typer.echo(f"{c.path}: {'as it was saved' if c.sealed else 'whole, never sealed'}")
    if any(not c.whole for c in found):
        raise typer.Exit(2)


@checkpoints_app.command("prune")
def prune_checkpoints(
    run: Annotated[Path, typer.Argument(help="A run's folder, or a stage's.")],
    keep: Annotated[int, typer.Option(min=1, help="Whole checkpoints to keep of each stage.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
) -> None:
    """Delete old checkpoints, and broken ones older than the newest whole one."""
    from rcot_rl.training.checkpoint_store import prune

    for store in _stores(run):
        for path in prune(store, keep, dry_run):
            typer.echo(f"{'would delete' if dry_run else 'deleted'} {path}")


@checkpoints_app.command("export")
def export(
    checkpoint: Annotated[Path, typer.Argument(help="A GRPO stage's global_step_N (or `latest`).")],
    out: Annotated[Path, typer.Argument(help="A folder to make.")],
) -> None:
    """A Hugging Face folder that transformers and vLLM load."""
    import shutil

    from rcot_rl.errors import InputError
    from rcot_rl.inference.model_folder import check_model
    from rcot_rl.training.checkpoint_store import find_checkpoint, inspect

    checkpoint = find_checkpoint(checkpoint)
    found = inspect(checkpoint, deep=True)
    if not found.whole:
        raise InputError(found.faults[0], file=checkpoint)
    model = checkpoint / "actor" / "huggingface"
    if not any(model.glob("*.safetensors")):
        raise InputError(
            "has no model of its own: an adapter's is merged into RUN/<stage>/model",
            file=checkpoint,
        )
    if out.exists():
        raise InputError("is there already", file=out)
    check_model(model)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(model, partial)
    partial.rename(out)
    typer.echo(str(out))
