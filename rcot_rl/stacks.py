"""Where was it when it hung? Python stacks of a run's processes, on request.

`arm` is called in every process of a run (by the verl plug-in, and by the zygote's forks): on
SIGUSR2 the process writes the stacks of all its threads to RCOT_STACKS/<pid>.stack. The standard
library only; the interpreter does it in C, so that a process which waits for ever still answers.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
from pathlib import Path

FOLDER = "RCOT_STACKS"
SIGNAL = signal.SIGUSR2
_open: list[object] = []


def arm() -> None:
    """Make this process answer `SIGNAL`, if the run asked for it."""
    folder = os.environ.get(FOLDER)
    if not folder:
        return
    with contextlib.suppress(OSError, ValueError, AttributeError):
        Path(folder).mkdir(parents=True, exist_ok=True)
        file = open(path_of(Path(folder), os.getpid()), "w", encoding="utf-8")  # noqa: SIM115
        _open.append(file)  # must outlive this call
        faulthandler.register(SIGNAL, file=file, all_threads=True, chain=False)


def path_of(folder: Path, pid: int) -> Path:
    """Where process `pid` writes."""
    return folder / f"{pid}.stack"
