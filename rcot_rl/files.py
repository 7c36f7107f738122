"""Writing a file whole or not at all: to a temporary name in the same folder, then renamed."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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


_NO_ROOM = frozenset(
    {
        errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR,
        errno.EEXIST,
    }
)  # fmt: skip


@contextmanager
def writing(place: Path) -> Iterator[None]:
    """Raises InputError, naming the file or else `place`, where there is no room, or no right, to
    write; other errors pass."""
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        where = error.filename or place
        raise InputError(f"cannot be written: {error.strerror}", file=where) from error
