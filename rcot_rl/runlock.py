"""The lock of a run's folder: held until the last process of a command has ended.

RUN/.lock is held with flock, by the command and, through the inherited descriptor, by the keepers
of its children (`keeper.py`), so that a killed command's lock outlives it as long as its
processes do. Where command and keepers were killed together, what is left is found by the files
below RUN that it holds open for writing: logs, stacks, checkpoints.
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
from rcot_rl.disk import explained
from rcot_rl.errors import InputError

LOCK = ".lock"
ENDING_S = 10.0
"""How long the processes of a killed command may take to end before the next one refuses."""


@contextlib.contextmanager
def hold(root: Path) -> Iterator[int]:
    """Hold the run's folder `root`; yields the lock's descriptor, for children to inherit.

    Raises InputError when a command works in it, or processes of an earlier one still live.
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
        command = shlex.join(Path(a).name if i == 0 else a for i, a in enumerate(sys.argv))[:200]
        json.dump({"pid": os.getpid(), "host": socket.gethostname(), "command": command}, file)
        file.flush()
        yield file.fileno()


@dataclass(frozen=True)
class _Obstacle:
    text: str
    passes: bool = False
    """Processes of a killed command end within seconds."""


def _obstacle(file: TextIO, root: Path) -> _Obstacle | None:
    """Why the run cannot be had now; None: it is ours."""
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
    """record: of the command that took the lock; holders: who has it open on this host."""
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
        passes=here,  # it may have ended since; or it is another user's, whose files are not shown
    )


def _left(pids: list[int]) -> _Obstacle:
    named = ", ".join(f"{pid} ({_command(pid)})" for pid in pids[:3])
    more = f" and {len(pids) - 3} more" if len(pids) > 3 else ""
    return _Obstacle(
        f"processes of another command still work on this run: {named}{more}; "
        f"end them with `kill -9 {' '.join(map(str, pids))}`",
        passes=True,
    )


def _record(file: TextIO) -> dict[str, Any]:
    """What the command that holds the lock wrote; empty: nothing readable."""
    file.seek(0)
    try:
        record = json.loads(file.read(4096))
        return record if {"pid", "host", "command"} <= record.keys() else {}
    except (ValueError, AttributeError):
        return {}


def _holders(path: Path) -> list[int]:
    """Other processes of this host that have the lock open."""
    wanted = os.stat(path)
    return sorted({pid for pid, file in _open_files() if _is(file, wanted)})


def _writers(root: Path) -> list[int]:
    """Other processes of this host that write below RUN's folders; this one's ancestors, which may
    keep its log, aside."""
    below = str(root.resolve()) + os.sep
    ours = {process.pid for process in psutil.Process().parents()}
    found = []
    for pid, file in _open_files():
        if pid in ours or pid in found:
            continue
        with contextlib.suppress(OSError):
            target = os.readlink(file)
            if os.sep in target.removeprefix(below) and target.startswith(below) and _writes(file):
                found.append(pid)
    return found


def _open_files() -> Iterator[tuple[int, str]]:
    """(pid, /proc/pid/fd/number) of all other processes that may be looked into."""
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            for number in os.listdir(f"/proc/{name}/fd"):
                yield int(name), f"/proc/{name}/fd/{number}"


def _is(file: str, wanted: os.stat_result) -> bool:
    try:
        return os.path.samestat(os.stat(file), wanted)
    except OSError:
        return False


def _writes(file: str) -> bool:
    process, _, number = file.rpartition("/fd/")
    for row in Path(f"{process}/fdinfo/{number}").read_text(encoding="ascii").splitlines():
        if row.startswith("flags:"):
            return int(row.split()[1], 8) & os.O_ACCMODE != os.O_RDONLY
    return False


def _command(pid: int) -> str:
    try:
        words = psutil.Process(pid).cmdline()
    except psutil.NoSuchProcess:
        return "gone"
    except psutil.Error:
        return "?"
    return " ".join(words).strip()[:60] or "?"
