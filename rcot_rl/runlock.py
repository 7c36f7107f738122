"""The lock of a run folder, held until the last process of a command has ended.

RUN/.lock is held with flock by the command and, through the inherited descriptor, by the keepers of
its children (`keeper.py`). The lock of a killed command is therefore held as long as its processes
live. If command and keepers were killed together, processes that are left are found by the files
below RUN that they have open for writing: logs, stacks, checkpoints.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shlex
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import psutil

from cluster.supervise.keeper import descendants
from rcot_rl.errors import InputError
from rcot_rl.recipe.tracking_section import TRACKING
from rcot_rl.system.disk import explained

LOCK = ".lock"
ENDING_S = 10.0
"""Seconds that processes of a killed command may take to end before the next command fails."""


@contextlib.contextmanager
def hold(root: Path) -> Iterator[int]:
    """Hold the lock of the run folder `root`; yields its descriptor, for children to inherit.

    Raises:
        InputError: Another command works in the folder, or processes of an earlier one still live.
    """
    path = root / LOCK
    try:
        file = path.open("a+", encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot be opened: {explained(error, root)}", file=path) from error
    with file:
        deadline = time.monotonic() + ENDING_S
        while (obstacle := _obstacle(file, root)) is not None:
            if not obstacle.passes or time.monotonic() > deadline:
                raise InputError(obstacle.text, file=root)
            time.sleep(0.1)
        file.truncate(0)
        command = shlex.join([_program(), *sys.argv[1:]])[:200]
        json.dump({"pid": os.getpid(), "host": socket.gethostname(), "command": command}, file)
        file.flush()
        yield file.fileno()


def _program() -> str:
    """Return the name of this command; `python -m rcot_rl.cli` is `rcot` too."""
    path = Path(sys.argv[0])
    return "rcot" if path.name == "__main__.py" else path.name


@dataclass(frozen=True)
class _Obstacle:
    """Why the lock cannot be taken."""

    text: str
    passes: bool = False
    """True if it may end within seconds, like the processes of a killed command."""


def _obstacle(file: TextIO, root: Path) -> _Obstacle | None:
    """Try to take the lock. Returns what prevents it; None if this process holds the lock."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return _held(_record(file), _holders(root / LOCK))
    except OSError as error:
        return _Obstacle(f"cannot be locked: {error.strerror}; choose another file system's folder")
    if writers := _writers(root):
        fcntl.flock(file, fcntl.LOCK_UN)
        return _left(writers)
    return None


def _held(record: dict[str, Any], holders: list[int]) -> _Obstacle:
    """Describe who holds the lock.

    Args:
        record: Written by the command that took the lock.
        holders: Processes of this host that have it open.
    """
    here = record.get("host") == socket.gethostname()
    if here and (pid := record["pid"]) in holders:
        return _Obstacle(
            f"another command is working on this run: process {pid} ({record['command']}); "
            f"wait for its end, or stop it with `kill {pid}`"
        )
    if holders:
        return _left(sorted({*holders, *(pid for h in holders for pid in descendants(h))}))
    where = f": process {record['pid']} on host {record['host']}" if record else ""
    return _Obstacle(
        f"another command is working on this run{where}; wait for its end, or stop it there",
        passes=here,  # it may have ended, or belong to another user, whose files are not visible
    )


def _left(pids: list[int]) -> _Obstacle:
    """Describe processes that a command left behind."""
    named = ", ".join(f"{pid} ({_command(pid)})" for pid in pids[:3])
    more = f" and {len(pids) - 3} more" if len(pids) > 3 else ""
    return _Obstacle(
        f"processes of another command still work on this run: {named}{more}; "
        f"end them with `kill -9 {' '.join(map(str, pids))}`",
        passes=True,
    )


def _record(file: TextIO) -> dict[str, Any]:
    """Return the record of the command that took the lock; empty if it is unreadable."""
    file.seek(0)
    try:
        record = json.loads(file.read(4096))
        return record if {"pid", "host", "command"} <= record.keys() else {}
    except (ValueError, AttributeError):
        return {}


def _holders(path: Path) -> list[int]:
    """Return the other processes of this host that have the lock open."""
    lock = os.stat(path)
    return sorted({pid for pid, file in _open_files() if _is(file, lock)})


def _writers(root: Path) -> list[int]:
    """Return the other processes of this host that write into folders below RUN.

    Ancestors of this process are left out: they may write its log there. RUN/tracking has locks of
    its own, and nothing there concerns a stage.
    """
    below = str(root.resolve()) + os.sep
    apart = below + TRACKING + os.sep
    ancestors = {process.pid for process in psutil.Process().parents()}
    writers: list[int] = []
    for pid, file in _open_files():
        if pid in ancestors or pid in writers:
            continue
        with contextlib.suppress(OSError):
            target = os.readlink(file)
            inside = target.startswith(below) and os.sep in target.removeprefix(below)
            if inside and not target.startswith(apart) and _writes(file):
                writers.append(pid)
    return writers


def _open_files() -> Iterator[tuple[int, str]]:
    """Yield (pid, /proc/pid/fd/number) of the other processes that this user may inspect."""
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            for number in os.listdir(f"/proc/{name}/fd"):
                yield int(name), f"/proc/{name}/fd/{number}"


def _is(file: str, other: os.stat_result) -> bool:
    try:
        return os.path.samestat(os.stat(file), other)
    except OSError:
        return False


def _writes(file: str) -> bool:
    """Return True if the descriptor /proc/pid/fd/number is open for writing."""
    process, _, number = file.rpartition("/fd/")
    for row in Path(f"{process}/fdinfo/{number}").read_text(encoding="ascii").splitlines():
        if row.startswith("flags:"):
            return int(row.split()[1], 8) & os.O_ACCMODE != os.O_RDONLY
    return False


def _command(pid: int) -> str:
    """Return the start of a process' command line."""
    try:
        words = psutil.Process(pid).cmdline()
    except psutil.NoSuchProcess:
        return "gone"
    except psutil.Error:
        return "?"
    return " ".join(words).strip()[:60] or "?"
