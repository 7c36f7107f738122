"""Why a folder cannot be written: space, inodes, a quota, or a read-only file system.

`shutil.disk_usage` shows only the first. Only a write shows a quota.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Kind = Literal["space", "inodes", "quota", "read-only"]

LEAST_FREE = 256 * 2**20
"""Bytes of free space below which a disk counts as full."""

LEAST_INODES = 64
"""Free inodes below which a disk counts as full: a checkpoint has a few dozen files."""

PROBE = 2**20
"""Bytes to allocate and free again, to see whether a quota is used up."""

KINDS: dict[int, Kind] = {
    errno.ENOSPC: "space",
    errno.EDQUOT: "quota",
    errno.EROFS: "read-only",
}

_NAMED: tuple[tuple[re.Pattern[str], Kind], ...] = (
    (re.compile(r"no room for a checkpoint|No space left on device|\bErrno 28\b"), "space"),
    (re.compile(r"Disk quota exceeded|\bErrno 122\b"), "quota"),
    (re.compile(r"Read-only file system|\bErrno 30\b"), "read-only"),
)
_QUOTED_PATH = re.compile(r"""['"](/[^'"\n]{1,4000})['"]""")


@dataclass(frozen=True)
class Shortage:
    """Why a folder cannot be written at the moment."""

    kind: Kind
    place: Path
    text: str
    """One sentence: the cause and what to do."""

    @property
    def passes(self) -> bool:
        """True if the shortage can end without a remount, so that waiting makes sense."""
        return self.kind != "read-only"


def shortage(place: Path, needed: int = LEAST_FREE, probe: int = PROBE) -> Shortage | None:
    """Return what keeps `place` from being written, or None.

    Args:
        place: A folder; if it does not exist, its nearest existing parent is checked.
        needed: Bytes that must be free.
        probe: Bytes to allocate for a moment, to detect a quota.
    """
    place = next(p for p in (place, *place.absolute().parents) if p.is_dir())
    facts = os.statvfs(place)
    if facts.f_flag & os.ST_RDONLY:
        return _shortage("read-only", place)
    free = facts.f_bavail * facts.f_frsize
    if free < needed:
        text = f"{free / 2**20:.0f} MiB are free on its disk, and {needed / 2**20:.0f} are needed."
        return Shortage("space", place, text)
    if facts.f_files and facts.f_favail < LEAST_INODES:  # f_files is 0 if inodes are not counted
        return _shortage("inodes", place)
    kind = KINDS.get(_write_fault(place, min(needed, probe)) or 0)
    return _shortage(kind, place) if kind else None


def named_shortage(error: str) -> tuple[Kind, list[Path]] | None:
    """Return the kind of shortage that an error text names and the absolute paths it quotes."""
    for pattern, kind in _NAMED:
        if pattern.search(error):
            return kind, [Path(path) for path in _QUOTED_PATH.findall(error)]
    return None


def explained(error: OSError, place: str | os.PathLike[str]) -> str:
    """Return the message of `error`; for a shortage, with its cause and what to do."""
    kind = KINDS.get(error.errno or 0)
    if kind is None:
        return str(error.strerror)
    if kind == "space":
        lack = None
        with contextlib.suppress(OSError):
            lack = shortage(Path(place), needed=0, probe=0)
        if lack is None or lack.kind != "inodes":  # the file that failed may be gone by now
            return f"{error.strerror} (space or inodes: see `df -h` and `df -i`)"
        return f"{error.strerror}. {lack.text}"
    return f"{error.strerror}. {_TEXTS[kind]}"


_TEXTS: dict[Kind, str] = {
    "inodes": "Its file system has no inodes left (see `df -i`): delete some files.",
    "quota": "The quota there is used up (see `quota -s`): delete some files, or ask for more.",
    "read-only": "It is mounted read-only: remount it; `dmesg` shows the cause.",
}


def _shortage(kind: Kind, place: Path) -> Shortage:
    return Shortage(kind, place, _TEXTS.get(kind, "Its disk has no space left: delete some files."))


def _write_fault(place: Path, size: int) -> int | None:
    """Return the errno of allocating `size` bytes in a temporary file, or None."""
    try:
        with tempfile.TemporaryFile(dir=place, prefix=".probe-") as file:
            if size:
                os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        return error.errno
    return None
