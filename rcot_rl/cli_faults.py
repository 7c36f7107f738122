"""How a command that found several faults at once ends: one line on standard error, status 2.

The whole list is the command's output; this line is for whoever reads standard error alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import typer


def exit_with(faults: Sequence[str]) -> NoReturn:
    """Name the first fault and say how many more there are. Raises typer.Exit.

    faults: at least one, each naming its file, row or key.
    """
    more = f"; and {len(faults) - 1} more" if len(faults) > 1 else ""
    typer.echo(f"rcot: {faults[0]}{more}", err=True)
    raise typer.Exit(2)
