"""`rcot watch`: a run in the terminal, in progress or finished; also another user's."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def watch_command(
    run_dir: Annotated[Path, typer.Argument(help="A run's folder.")],
    once: Annotated[bool, typer.Option("--once", help="Show the state once and exit.")] = False,
    every: Annotated[
        float, typer.Option(help="Seconds between two looks at the folder.", min=0.2)
    ] = 2.0,
) -> None:
    """Watch a run: stages, rewards, alerts, and when it will end. q or Ctrl-C quits.

    Reads the folder only. A finished run is shown once, and so is any run if the output is not a
    terminal.
    """
    from rcot_rl.monitoring.terminal.watch import watch

    watch(run_dir, once=once, every=every)
