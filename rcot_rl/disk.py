"""What keeps a folder from being written: space, inodes, a quota, or a read-only file system.

`shutil.disk_usage` sees the first alone. A quota is seen only by writing.
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
"""Bytes that are allocated and freed again to see whether a quota is used up."""

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
    """Why a folder cannot be written now."""

    kind: Kind
    place: Path
    text: str
    """One sentence, with what to do."""

    @property
    def passes(self) -> bool:
        """True if it can end without a remount, so that waiting makes sense."""
        return self.kind != "read-only"


def shortage(place: Path, needed: int = LEAST_FREE, probe: int = PROBE) -> Shortage | None:
    """What keeps `place` from being written, or None.

    Args:
        place: A folder, or where one will be: its nearest existing parent is looked at.
        needed: Bytes that must be free.
        probe: Bytes to allocate for a moment, since only that shows a quota.
    """
    place = next(p for p in (place, *place.absolute().parents) if p.is_dir())
    facts = os.statvfs(place)
    if facts.f_flag & os.ST_RDONLY:
        return _shortage("read-only", place)
    free = facts.f_bavail * facts.f_frsize
    if free < needed:
        text = f"{free / 2**20:.0f} MiB are free on its disk, and {needed / 2**20:.0f} are needed."
        return Shortage("space", place, text)
    if facts.f_files and facts.f_favail < LEAST_INODES:  # some file systems count none
        return _shortage("inodes", place)
    fault = _write_fault(place, min(needed, probe))
    return _shortage(KINDS[fault], place) if fault in KINDS else None


def named_shortage(error: str) -> tuple[Kind, list[Path]] | None:
    """The kind of shortage that an error's text names, and the absolute paths that it quotes."""
    for pattern, kind in _NAMED:
        if pattern.search(error):
            return kind, [Path(path) for path in _QUOTED_PATH.findall(error)]
    return None


def explained(error: OSError, place: str | os.PathLike[str]) -> str:
    """`error` in words; for a shortage, which one it is and what to do."""
    kind = KINDS.get(error.errno or 0)
    if kind is None:
        return str(error.strerror)
    if kind == "space":
        found = None
        with contextlib.suppress(OSError):
            found = shortage(Path(place), needed=0, probe=0)
        if found is None or found.kind != "inodes":  # what failed may have been removed since
            return f"{error.strerror} (space or inodes: see `df -h` and `df -i`)"
        return f"{error.strerror}. {found.text}"
    return f"{error.strerror}. {_TEXTS[kind]}"


_TEXTS: dict[Kind, str] = {
    "inodes": "Its file system has no inodes left (see `df -i`): delete some files.",
    "quota": "The quota there is used up (see `quota -s`): delete some files, or ask for more.",
    "read-only": "It is mounted read-only: remount it, and look in `dmesg` for what made it so.",
}


def _shortage(kind: Kind, place: Path) -> Shortage:
    return Shortage(kind, place, _TEXTS.get(kind, "Its disk has no space left: delete some files."))


def _write_fault(place: Path, size: int) -> int | None:
    """errno of writing `size` bytes in a file of its own, which is removed again."""
    try:
        with tempfile.TemporaryFile(dir=place, prefix=".probe-") as file:
            if size:
                os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        return error.errno
    return None
