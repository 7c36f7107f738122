"""Writing a file whole or not at all: to a temporary name in the same folder, then renamed; and
what is done where a file system has no links."""

from __future__ import annotations

import errno
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
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


def visible(paths: Iterable[Path]) -> list[Path]:
    """The paths in order of their names, hidden ones left out.

    Finder, Windows shares and network file systems leave files such as `._00001.jpg`, `.DS_Store`
    and `.nfs0001`, which nobody means.
    """
    return sorted(path for path in paths if not path.name.startswith("."))


def suffix_counts(paths: Iterable[Path]) -> str:
    """How many files of each type there are: `12 .jpg and 1 .webp (00003.webp)`.

    Types with few files are shown with the name of one.
    """
    first: dict[str, str] = {}
    counts: Counter[str] = Counter()
    for path in paths:
        counts[path.suffix.lower()] += 1
        first.setdefault(path.suffix.lower(), path.name)
    parts = [f"{n} {suffix} ({first[suffix]})" for suffix, n in counts.most_common()]
    return " and ".join(parts)


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
