"""`rcot recipe …`: what a recipe resolves to, and what every key means."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Annotated

import typer

recipe_app = typer.Typer(no_args_is_help=True, help="A recipe's values, and every key's meaning.")


@recipe_app.command("show")
def show_recipe(
    recipe: Annotated[str, typer.Argument(help="A recipe's YAML file, or a shipped one's name.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, in YAML.")
    ] = None,
) -> None:
    """The resolved recipe as YAML, each value with its origin: file and line, override, default."""
    from rcot_rl.recipe.loader import resolve_recipe
    from rcot_rl.recipe.reference import show

    resolved, source = resolve_recipe(recipe, overrides or [])
    here = f"{Path.cwd()}/"
    typer.echo(show(resolved, source).replace(f"# {here}", "# "))


@recipe_app.command("keys")
def list_keys(
    prefix: Annotated[str, typer.Argument(help="Only keys at or below this one.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
) -> None:
    """Every key of the recipe with type, default and meaning, from the schema."""
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
    """Write the key reference of the documentation."""
    from rcot_rl.files import write_text
    from rcot_rl.recipe.reference import keys_page

    write_text(out, keys_page())
