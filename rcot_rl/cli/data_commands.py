"""`rcot data …`: build shards from corpora, check, show and publish them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from rcot_rl.cli.faults import exit_with
from rcot_rl.errors import InputError

if TYPE_CHECKING:
    from rcot_rl.annotation.annotation_process import Annotation

data_app = typer.Typer(
    no_args_is_help=True, help="Build, check, show and publish shards; write toy corpora."
)

RecipeArgument = Annotated[
    str, typer.Argument(help="A recipe's YAML file, or the name of a shipped recipe.")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides; values in YAML.")
]


@data_app.command("toy")
def data_toy(
    root: Annotated[Path, typer.Argument(help="Output folder.")],
    layout: Annotated[
        str | None,
        typer.Option(help="Write one layout into ROOT (default: all, into ROOT/<layout>)."),
    ] = None,
    videos: Annotated[int, typer.Option(min=1, help="Training clips.")] = 20,
    eval_videos: Annotated[
        int | None, typer.Option(min=1, help="Evaluation clips (default: a fifth of --videos).")
    ] = None,
    seed: Annotated[int, typer.Option(min=0)] = 1,
    preset: Annotated[str, typer.Option(help="Difficulty: lattice, fleeting or rich.")] = "rich",
    absent: Annotated[
        float,
        typer.Option(
            min=0.0, max=1.0, help="Share of expressions without a target (MeViS, ReVOS)."
        ),
    ] = 0.0,
    valid_labels: Annotated[
        Literal["meta", "obj_id", "folders"],
        typer.Option(help="Layout of the masks of Ref-YouTube-VOS valid."),
    ] = "meta",
    workers: Annotated[int, typer.Option(min=1)] = 1,
) -> None:
    """Write procedurally generated corpora in the public layouts, with exact masks."""
    from data_pipelines.toy.layouts import write_all, write_layout
    from rcot_rl.system.paths import check_path

    check_path(root)
    options: dict[str, Any] = {
        "n_eval": eval_videos,
        "absent_share": absent,
        "workers": workers,
        "valid_labels": valid_labels,
    }
    if layout is None:
        written = write_all(root, seed, preset, videos, **options)
    else:
        written = {layout: write_layout(root, layout, seed, preset, videos, **options)}
    for name, splits in written.items():
        for split, counts in splits.items():
            typer.echo(f"{name} {split}: " + ", ".join(f"{n} {kind}" for kind, n in counts.items()))


@data_app.command("build")
def data_build(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Output folder (default: shards).")
    ] = None,
) -> None:
    """Build the recipe's shard sets from its corpora: OUT/<shard-set>/…"""
    from rcot_rl.recipe.loader import load_recipe
    from rcot_rl.stages.data_stage import build_shards

    loaded = load_recipe(recipe, overrides or [], stages=())
    for key, texts in (("describe", "descriptions.jsonl"), ("trace", "traces.jsonl")):
        if getattr(loaded.data, key) == "model":
            raise InputError(
                f"only `rcot run` generates texts by a model; run `rcot data {key}` first and set "
                f"data.{key}=texts/{texts}, or data.{key}=template for a toy corpus",
                key=f"data.{key}",
            )
    typer.echo(build_shards(loaded, out or Path("shards")))


@data_app.command("describe")
def data_describe(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option("--out", help="Output folder.")] = Path("texts"),
) -> None:
    """Generate a description of every video with a model: OUT/descriptions.jsonl."""
    _annotate("describe", recipe, overrides, out)


@data_app.command("trace")
def data_trace(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option("--out", help="Output folder.")] = Path("texts"),
) -> None:
    """Generate the reasoning of every SFT row with a model: OUT/traces.jsonl."""
    _annotate("trace", recipe, overrides, out)


def _annotate(work: Annotation, recipe: str, overrides: list[str] | None, out: Path) -> None:
    from rcot_rl.recipe.loader import load_recipe
    from rcot_rl.stages.data_stage import annotate

    loaded = load_recipe(recipe, overrides or [], stages=())
    try:
        typer.echo(str(annotate(loaded, work, out)))
    except KeyboardInterrupt:
        typer.echo("rcot: interrupted; rerun the same command to resume", err=True)
        raise typer.Exit(130) from None


@data_app.command("check")
def data_check(
    folder: Annotated[Path, typer.Argument(help="A shard set, or a folder of sets.")],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
    model: Annotated[
        str | None,
        typer.Option(help="A policy; its processor must not resize the rows' images."),
    ] = None,
) -> None:
    """Verify shards: checksums, schema, media, ratios, disjoint splits, lengths, pixels."""
    from data_pipelines.verify.check_sets import check
    from rcot_rl.inference.model_folder import check_model, find_model

    path = None if model is None else find_model(model)
    if path is not None:
        check_model(path)
    result = check(folder, path)
    if as_json:
        typer.echo(json.dumps(result.as_dict()))
    else:
        for fault in result.faults:
            typer.echo(str(fault), err=True)
        typer.echo("no faults" if result.ok else _counted(len(result.faults)))
    if not result.ok:
        # without --json every fault is on standard error already
        if as_json:
            exit_with([str(fault) for fault in result.faults])
        raise typer.Exit(2)


def _counted(faults: int) -> str:
    return f"{faults} fault{'' if faults == 1 else 's'}"


@data_app.command("show")
def data_show(
    shard: Annotated[Path, typer.Argument(help="A parquet shard, or the folder of a set.")],
    row: Annotated[list[int] | None, typer.Option("--row", help="Row to show; repeatable.")] = None,
    rows: Annotated[int, typer.Option(min=1, help="Number of rows, of all kinds.")] = 12,
    out: Annotated[Path, typer.Option("--out", help="A .png or .html file.")] = Path("rows.png"),
) -> None:
    """Draw rows with boxes, points and options: a contact sheet (.png) or a page (.html)."""
    from data_pipelines.verify.show import contact_sheet, page, read_shown
    from rcot_rl.system.files import visible, write_bytes

    if out.suffix not in (".png", ".html"):
        raise InputError("must end in .png or .html", file=out, key="--out")
    if out.is_dir():
        raise InputError("is a folder; name a file", file=out, key="--out")
    if shard.is_dir():
        shards = visible(shard.glob("*.parquet"))
        if not shards:
            raise InputError("has no Parquet shard", file=shard)
        shard = shards[0]
    shown = read_shown(shard, row or None, limit=rows, varied=True)
    if out.suffix == ".png":
        write_bytes(out, contact_sheet(shown))
    else:
        write_bytes(out, page(shown, shard.name).encode("utf-8"))
    typer.echo(f"{len(shown)} rows of {shard}: {out}")


@data_app.command("push")
def data_push(
    folder: Annotated[Path, typer.Argument(help="A shard set.")],
    repo: Annotated[str, typer.Argument(help="Dataset on the hub, as owner/name.")],
    private: Annotated[bool, typer.Option(help="Create a private dataset.")] = True,
) -> None:
    """Check a shard set and push it to the hub with `datasets`."""
    from data_pipelines.verify.check_sets import check
    from rcot_rl.system.paths import check_path

    check_path(folder, handed_on=True)
    result = check(folder)
    if not result.ok:
        first = f"{_counted(len(result.faults))}; the first: {result.faults[0]}"
        raise InputError(first, file=folder)
    from datasets import load_dataset

    rows = load_dataset(str(folder))
    rows.push_to_hub(repo, private=private)
    typer.echo(f"{ {split: len(r) for split, r in rows.items()} } at {repo}")
