"""Exit of a command that found faults: one line each on standard error, status 2."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NoReturn

import typer

from rcot_rl.system.lines import wrapped


def exit_with(faults: Sequence[str], *, shown: bool = False) -> NoReturn:
    """Print each fault on standard error and exit with status 2.

    Args:
        faults: One line for each fault, which names its file, row or key; not empty.
        shown: The faults are on the terminal already: they are not repeated there.

    Raises:
        typer.Exit: Always.
    """
    if shown and sys.stderr.isatty():
        faults = ["nothing was started: fix the errors above"]
    for fault in faults:
        typer.echo(wrapped(f"rcot: {fault}", sys.stderr), err=True)
    raise typer.Exit(2)
