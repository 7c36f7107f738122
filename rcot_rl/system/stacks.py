"""Python stacks of a run's processes, on request, to see where a process hangs.

Every process of a run calls `arm` (through the verl plug-in and the zygote). On SIGUSR2 it writes
the stacks of all its threads to RCOT_STACKS/<host>-<pid>.stack, a folder of the run that several
hosts may share. The interpreter writes them in C, so a process that is blocked still answers.
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
    """Make this process answer `SIGNAL` if the environment names a folder for stacks."""
    folder = os.environ.get(FOLDER)
    if not folder:
        return
    with contextlib.suppress(OSError, ValueError, AttributeError):
        Path(folder).mkdir(parents=True, exist_ok=True)
        file = open(path_of(Path(folder), os.getpid()), "w", encoding="utf-8")  # noqa: SIM115
        _open.append(file)  # faulthandler needs it open after this call
        faulthandler.register(SIGNAL, file=file, all_threads=True, chain=False)


def path_of(folder: Path, pid: int) -> Path:
    """Return the file that process `pid` of this host writes."""
    return folder / f"{socket.gethostname()}-{pid}.stack"


def ask(folder: Path) -> int:
    """Signal every process of this host that writes into `folder`.

    Only processes whose environment names the folder are signalled: SIGUSR2 ends other processes.

    Returns:
        The number of processes signalled.
    """
    signalled = 0
    for file in sorted(folder.glob(f"{socket.gethostname()}-*.stack")):
        pid = int(file.stem.rpartition("-")[2])
        with contextlib.suppress(OSError):
            environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            if f"{FOLDER}={folder}".encode() in environment:
                os.kill(pid, SIGNAL)
                signalled += 1
    return signalled
