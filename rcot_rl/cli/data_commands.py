"""`rcot data …`: corpora to shards, and a look at both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from rcot_rl.cli.faults import exit_with
from rcot_rl.errors import InputError

data_app = typer.Typer(no_args_is_help=True, help="Corpora, shards, toy corpora.")

RecipeArgument = Annotated[
    str, typer.Argument(help="A recipe's YAML file, or a shipped one's name.")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, in YAML.")
]


@data_app.command("toy")
def data_toy(
    root: Annotated[Path, typer.Argument(help="Where to write.")],
    layout: Annotated[
        str | None,
        typer.Option(help="One public layout, into DIR; default: all, into DIR/<layout>."),
    ] = None,
    videos: Annotated[int, typer.Option(min=1, help="Clips to train on.")] = 20,
    eval_videos: Annotated[
        int | None, typer.Option(min=1, help="Clips to evaluate on (a fifth of --videos).")
    ] = None,
    seed: Annotated[int, typer.Option(min=0)] = 1,
    preset: Annotated[str, typer.Option(help="lattice or rich.")] = "rich",
    absent: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Share of absent targets (MeViS, ReVOS).")
    ] = 0.0,
    workers: Annotated[int, typer.Option(min=1)] = 1,
) -> None:
    """Write procedurally generated corpora in the public layouts, with exact masks."""
    from data_pipelines.toy.layouts import write_all, write_layout
    from rcot_rl.paths import check_path

    check_path(root)
    options = {"n_eval": eval_videos, "absent_share": absent, "workers": workers}
    if layout is None:
        written = write_all(root, seed, preset, videos, **options)
    else:
        written = {layout: write_layout(root, layout, seed, preset, videos, **options)}
    for name, splits in written.items():
        for split, counts in splits.items():
            typer.echo(f"{name} {split}: " + ", ".join(f"{n} {what}" for what, n in counts.items()))


@data_app.command("build")
def data_build(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option("--out", help="Where sets go (shards).")] = None,
) -> None:
    """Corpora to shards: OUT/<shard-set>/…"""
    from rcot_rl.data_stage import build_shards
    from rcot_rl.recipe.loader import load_recipe

    loaded = load_recipe(recipe, overrides or [], needs=("data",))
    for key, texts in (("describe", "descriptions.jsonl"), ("trace", "traces.jsonl")):
        if getattr(loaded.data, key) == "model":
            raise InputError(
                f"a model is asked by `rcot run` alone; here, run `rcot data {key}` first and set "
                f"data.{key}=texts/{texts}, or data.{key}=template for a toy corpus",
                key=f"data.{key}",
            )
    typer.echo(build_shards(loaded, out or Path("shards")))


@data_app.command("describe")
def data_describe(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option("--out", help="Where answers go.")] = Path("texts"),
) -> None:
    """Describe every video of the corpora with a model: OUT/descriptions.jsonl."""
    _ask("describe", recipe, overrides, out)


@data_app.command("trace")
def data_trace(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option("--out", help="Where answers go.")] = Path("texts"),
) -> None:
    """Have a model reason towards the answer of every SFT row: OUT/traces.jsonl."""
    _ask("trace", recipe, overrides, out)


def _ask(what: str, recipe: str, overrides: list[str] | None, out: Path) -> None:
    from rcot_rl.data_stage import ask_model
    from rcot_rl.recipe.loader import load_recipe

    loaded = load_recipe(recipe, overrides or [], needs=("data",))
    try:
        typer.echo(str(ask_model(loaded, what, out)))
    except KeyboardInterrupt:
        typer.echo("rcot: stopped; the same command goes on from here", err=True)
        raise typer.Exit(130) from None


@data_app.command("check")
def data_check(
    folder: Annotated[Path, typer.Argument(help="A shard set, or a folder of sets.")],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
    model: Annotated[
        str | None,
        typer.Option(help="A policy: its own processor must take rows unchanged."),
    ] = None,
) -> None:
    """Verify shards: checksums, schema, media, ratios, disjointness, lengths, pixels."""
    from data_pipelines.verify.check_sets import check
    from rcot_rl.inference.model_folder import check_model, find_model

    path = None if model is None else find_model(model)
    if path is not None:
        check_model(path)
    found = check(folder, path)
    if as_json:
        typer.echo(json.dumps(found.as_dict()))
    else:
        for fault in found.faults:
            typer.echo(str(fault), err=True)
        typer.echo("no faults" if found.ok else _counted(len(found.faults)))
    if not found.ok:
        # without --json every fault is on standard error already
        if as_json:
            exit_with([str(fault) for fault in found.faults])
        raise typer.Exit(2)


def _counted(faults: int) -> str:
    return f"{faults} fault{'' if faults == 1 else 's'}"


@data_app.command("show")
def data_show(
    shard: Annotated[Path, typer.Argument(help="A parquet shard, or the folder of a set.")],
    row: Annotated[list[int] | None, typer.Option("--row", help="This row (repeatable).")] = None,
    rows: Annotated[int, typer.Option(min=1, help="So many rows, of all kinds.")] = 12,
    out: Annotated[Path, typer.Option("--out", help="A .png or .html file.")] = Path("rows.png"),
) -> None:
    """Draw rows with their boxes, points and options: a contact sheet, or a page with the texts."""
    from data_pipelines.verify.show import contact_sheet, page, read_shown
    from rcot_rl.files import visible, write_bytes

    if out.suffix not in (".png", ".html"):
        raise InputError("must end in .png or .html", file=out, key="--out")
    if out.is_dir():
        raise InputError("is a folder", file=out, key="--out")
    if shard.is_dir():
        found = visible(shard.glob("*.parquet"))
        if not found:
            raise InputError("holds no parquet shard", file=shard)
        shard = found[0]
    shown = read_shown(shard, row or None, limit=rows, varied=True)
    if out.suffix == ".png":
        write_bytes(out, contact_sheet(shown))
    else:
        write_bytes(out, page(shown, shard.name).encode("utf-8"))
    typer.echo(f"{len(shown)} rows of {shard}: {out}")


@data_app.command("push")
def data_push(
    folder: Annotated[Path, typer.Argument(help="A shard set.")],
    repo: Annotated[str, typer.Argument(help="The hub's dataset, as you/name.")],
    private: Annotated[bool, typer.Option(help="Visible to you alone.")] = True,
) -> None:
    """Check a shard set, then push it to the hub with `datasets`' own call."""
    from data_pipelines.verify.check_sets import check
    from rcot_rl.paths import check_path

    check_path(folder, handed_on=True)
    found = check(folder)
    if not found.ok:
        first = f"{_counted(len(found.faults))}; the first: {found.faults[0]}"
        raise InputError(first, file=folder)
    from datasets import load_dataset

    rows = load_dataset(str(folder))
    rows.push_to_hub(repo, private=private)
    typer.echo(f"{ {split: len(r) for split, r in rows.items()} } at {repo}")
