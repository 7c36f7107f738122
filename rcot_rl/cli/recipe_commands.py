"""`rcot recipe …`: show a resolved recipe, and list all keys."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Annotated

import typer

recipe_app = typer.Typer(
    no_args_is_help=True, help="Show a resolved recipe, and list all recipe keys."
)


@recipe_app.command("show")
def show_recipe(
    recipe: Annotated[
        str, typer.Argument(help="A recipe's YAML file, or the name of a shipped recipe.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Overrides; values in YAML."),
    ] = None,
) -> None:
    """Print the resolved recipe as YAML, with the file and line of each value."""
    from rcot_rl.recipe.loader import resolve_recipe
    from rcot_rl.recipe.reference import show

    resolved, source = resolve_recipe(recipe, overrides or [])
    here = f"{Path.cwd()}/"
    typer.echo(show(resolved, source).replace(f"# {here}", "# "))


@recipe_app.command("keys")
def list_keys(
    prefix: Annotated[str, typer.Argument(help="List only keys at or below this one.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
) -> None:
    """List all recipe keys with type, default and meaning."""
    from rcot_rl.recipe.reference import recipe_keys

    keys = recipe_keys(prefix)
    if as_json:
        typer.echo(json.dumps([vars(doc) for doc in keys]))
        return
    for doc in keys:
        default = "required" if doc.default == "required" else f"default {doc.default}"
        typer.echo(f"{doc.key}  ({doc.type}; {default})")
        if doc.meaning:
            typer.echo(
                textwrap.fill(doc.meaning, 100, initial_indent="    ", subsequent_indent="    ")
            )


@recipe_app.command("page", hidden=True)
def write_page(out: Annotated[Path, typer.Argument(help="A Markdown file.")]) -> None:
    """Write the documentation's key reference."""
    from rcot_rl.recipe.reference import keys_page
    from rcot_rl.system.files import write_text

    write_text(out, keys_page())
