"""Where was it when it hung? Python stacks of a run's processes, on request.

`arm` is called in every process of a run (by the verl plug-in, and by the zygote's forks): on
SIGUSR2 the process writes the stacks of all its threads to RCOT_STACKS/<host>-<pid>.stack (the
folder is the run's own, which several hosts may share). The standard library only; the interpreter
does it in C, so that a process which waits for ever still answers.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import socket
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
    """Where process `pid` of this host writes."""
    return folder / f"{socket.gethostname()}-{pid}.stack"


def ask(folder: Path) -> int:
    """Ask every process of this host that writes into `folder`; returns how many were asked.

    The signal would end a process that is not armed: its environment must name the folder.
    """
    asked = 0
    for file in sorted(folder.glob(f"{socket.gethostname()}-*.stack")):
        pid = int(file.stem.rpartition("-")[2])
        with contextlib.suppress(OSError):
            environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            if f"{FOLDER}={folder}".encode() in environment:
                os.kill(pid, SIGNAL)
                asked += 1
    return asked
