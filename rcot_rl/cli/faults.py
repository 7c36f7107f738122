"""Exit of a command that found faults: one line each on standard error, status 2."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import typer


def exit_with(faults: Sequence[str]) -> NoReturn:
    """Print each fault on standard error and exit with status 2.

    Args:
        faults: One line for each fault, which names its file, row or key; not empty.

    Raises:
        typer.Exit: Always.
    """
    for fault in faults:
        typer.echo(f"rcot: {fault}", err=True)
    raise typer.Exit(2)
