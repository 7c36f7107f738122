"""How a command that found faults ends: one line each on standard error, status 2."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import typer


def exit_with(faults: Sequence[str]) -> NoReturn:
    """Print every fault on standard error. Raises typer.Exit.

    faults: at least one, each naming its file, row or key.
    """
    for fault in faults:
        typer.echo(f"rcot: {fault}", err=True)
    raise typer.Exit(2)
