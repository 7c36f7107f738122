"""Writing a file whole or not at all: to a temporary name in the same folder, then renamed; and
what is done where a file system has no links."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rcot_rl.disk import explained
from rcot_rl.errors import InputError


def write_text(path: Path, text: str) -> None:
    """`text` as UTF-8; readers see the old file or the new one. Makes the folder if need be."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, data: bytes) -> None:
    """As `write_text`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def link_or_copy(source: str | Path, target: str | Path) -> None:
    """Make `target` a second name of the file `source`, or a copy where that is not possible."""
    try:
        os.link(source, target)
    except FileExistsError:
        raise
    except OSError:  # no hard links, another file system, too many of them
        shutil.copy2(source, target)


def replace_folder(new: Path, target: Path) -> None:
    """Rename the folder `new` to `target`, which may be a folder, a link or a file."""
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.is_dir() and not target.is_symlink():
        target.rename(old)
    else:
        target.unlink(missing_ok=True)
    new.rename(target)
    shutil.rmtree(old, ignore_errors=True)


_NO_ROOM = frozenset(
    {
        errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR,
        errno.EEXIST,
    }
)  # fmt: skip


@contextmanager
def writing(place: Path, errnos: frozenset[int] = _NO_ROOM) -> Iterator[None]:
    """Raises InputError, naming the file or else `place`, where there is no room, or no right, to
    write; errors other than `errnos` pass."""
    try:
        yield
    except OSError as error:
        if error.errno not in errnos:
            raise
        where = error.filename or place
        raise InputError(f"cannot be written: {explained(error, where)}", file=where) from error
